//! Consume and settle.

use std::time::Duration;

use kiln_transport::topology::{Queue, QueueKind};
use kiln_transport::{BusError, ConnectionState, Published};

use crate::scene::{Scene, World, depth_becomes, next, number, prefetch, silent, within};

pub(crate) async fn prefetch_bounds_what_is_out(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(2)).await.unwrap();
    for index in 0..5 {
        scene.send(&bus, &queue, index).await;
    }
    let first = next(&mut consumer).await;
    let _second = next(&mut consumer).await;
    silent(&mut consumer).await;
    depth_becomes(&bus, &queue, 3).await;
    first.ack().await.unwrap();
    assert_eq!(number(&next(&mut consumer).await), 2);
    silent(&mut consumer).await;
}

pub(crate) async fn consumers_share_a_queue(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut one = bus.consume(&queue, prefetch(1)).await.unwrap();
    let beta = scene.beta().await;
    let mut two = beta.consume(&queue, prefetch(1)).await.unwrap();
    scene.send(&bus, &queue, 0).await;
    scene.send(&bus, &queue, 1).await;
    let (first, second) = tokio::join!(next(&mut one), next(&mut two));
    let mut numbers = [number(&first), number(&second)];
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1]);
    scene.send(&bus, &queue, 2).await;
    silent(&mut one).await;
    second.ack().await.unwrap();
    assert_eq!(number(&next(&mut two).await), 2, "it goes to the one that has room");
    drop(first);
}

pub(crate) async fn consumers_with_room_take_turns(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut one = bus.consume(&queue, prefetch(4)).await.unwrap();
    let mut two = bus.consume(&queue, prefetch(4)).await.unwrap();
    for index in 0..4 {
        scene.send(&bus, &queue, index).await;
    }
    for consumer in [&mut one, &mut two] {
        let _held = [next(consumer).await, next(consumer).await];
        silent(consumer).await;
    }
}

pub(crate) async fn what_is_requeued_takes_its_old_place(scene: &Scene<impl World>) {
    let kind = QueueKind::Quorum { delivery_limit: 5 };
    let (bus, queue) = scene.with_queue(Queue { kind, ..scene.queue("q") }).await;
    for index in 0..3 {
        scene.send(&bus, &queue, index).await;
    }
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    next(&mut consumer).await.requeue().await.unwrap();
    let again = next(&mut consumer).await;
    assert_eq!(number(&again), 0);
    assert!(again.redelivered);
    assert_eq!(again.delivery_count, 1);
    again.ack().await.unwrap();
    let fresh = next(&mut consumer).await;
    assert_eq!((number(&fresh), fresh.redelivered, fresh.delivery_count), (1, false, 0));
}

pub(crate) async fn what_a_consumer_leaves_comes_again(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    scene.send(&bus, &queue, 1).await;
    let mut leaving = bus.consume(&queue, prefetch(3)).await.unwrap();
    drop(next(&mut leaving).await);
    silent(&mut leaving).await;
    drop(leaving);
    let again = next(&mut bus.consume(&queue, prefetch(1)).await.unwrap()).await;
    assert!(again.redelivered);
    again.ack().await.unwrap();
}

pub(crate) async fn what_a_connection_leaves_comes_again(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    for index in 0..3 {
        scene.send(&bus, &queue, index).await;
    }
    let leaving = scene.beta().await;
    let mut consumer = leaving.consume(&queue, prefetch(3)).await.unwrap();
    let held = next(&mut consumer).await;
    next(&mut consumer).await.ack().await.unwrap();
    leaving.close().await;

    assert!(within(consumer.next()).await.is_none(), "the subscription ends with its connection");
    assert_eq!(held.ack().await.unwrap_err(), BusError::Stale { queue: queue.clone() });
    let mut consumer = bus.consume(&queue, prefetch(3)).await.unwrap();
    for expected in [0, 2] {
        let again = next(&mut consumer).await;
        assert_eq!(number(&again), expected);
        assert!(again.redelivered, "message {expected}");
        again.ack().await.unwrap();
    }
    silent(&mut consumer).await;
}

pub(crate) async fn a_taken_delivery_outlives_its_consumer(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    scene.send(&bus, &queue, 1).await;
    let held = next(&mut consumer).await;
    consumer.cancel().await.unwrap();
    scene.send(&bus, &queue, 2).await;
    depth_becomes(&bus, &queue, 1).await;
    held.ack().await.unwrap();

    let mut consumer = bus.consume(&queue, prefetch(5)).await.unwrap();
    let fresh = next(&mut consumer).await;
    assert_eq!((number(&fresh), fresh.redelivered), (2, false));
    silent(&mut consumer).await;
}

pub(crate) async fn untaken_deliveries_go_back_when_cancelled(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    for index in 0..4 {
        scene.send(&bus, &queue, index).await;
    }
    let mut consumer = bus.consume(&queue, prefetch(4)).await.unwrap();
    let held = next(&mut consumer).await;
    depth_becomes(&bus, &queue, 0).await;
    consumer.cancel().await.unwrap();
    depth_becomes(&bus, &queue, 3).await;
    held.ack().await.unwrap();
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    assert_eq!(number(&next(&mut consumer).await), 1);
}

pub(crate) async fn a_future_that_is_dropped_loses_nothing(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    for index in 0..20 {
        assert!(tokio::time::timeout(Duration::ZERO, consumer.next()).await.is_err());
        scene.send(&bus, &queue, index).await;
        let delivery = next(&mut consumer).await;
        assert_eq!(number(&delivery), index);
        delivery.ack().await.unwrap();
    }
}

pub(crate) async fn an_exclusive_queue_is_of_its_connection(scene: &Scene<impl World>) {
    let owner = scene.alpha().await;
    let own = Queue { kind: QueueKind::Exclusive, ..scene.queue("own") };
    let name = own.name.clone();
    owner.declare(&scene.topology([own.clone()])).await.unwrap();
    let mut consumer = owner.consume(&name, prefetch(1)).await.unwrap();

    let other = scene.beta().await;
    let locked = BusError::Locked { name: name.clone() };
    assert_eq!(other.consume(&name, prefetch(1)).await.unwrap_err(), locked);
    assert_eq!(other.queue_depth(&name).await.unwrap_err(), locked);
    assert_eq!(other.declare(&scene.topology([own])).await.unwrap_err(), locked);
    scene.send(&other, &name, 1).await;
    assert_eq!(number(&next(&mut consumer).await), 1);

    owner.close().await;
    assert!(within(consumer.next()).await.is_none());
    vanishes(scene, &other, &name).await;
}

pub(crate) async fn an_exclusive_queue_goes_with_its_last_consumer(scene: &Scene<impl World>) {
    let own = Queue { kind: QueueKind::Exclusive, ..scene.queue("own") };
    let (bus, name) = scene.with_queue(own).await;
    let one = bus.consume(&name, prefetch(1)).await.unwrap();
    let two = bus.consume(&name, prefetch(1)).await.unwrap();
    one.cancel().await.unwrap();
    scene.send(&bus, &name, 1).await;
    two.cancel().await.unwrap();
    vanishes(scene, &bus, &name).await;
}

async fn vanishes(scene: &Scene<impl World>, bus: &kiln_transport::Bus, queue: &str) {
    let gone = async {
        while scene.offer(bus, queue, 9).await != Published::Returned {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(gone).await;
    assert_eq!(bus.queue_depth(queue).await.unwrap_err(), BusError::NoQueue { name: queue.to_owned() });
}

pub(crate) async fn deleting_a_queue_ends_its_consumers(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    let (ended, deleted) = tokio::join!(within(consumer.next()), bus.delete_queue(&queue));
    deleted.unwrap();
    assert!(ended.is_none());
    assert_eq!(scene.offer(&bus, &queue, 1).await, Published::Returned);
}

pub(crate) async fn a_connection_closes_with_its_last_clone(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    let mut watch = bus.watch();
    drop(bus.clone());
    scene.send(&bus, &queue, 1).await;
    let _held = next(&mut consumer).await;
    drop(bus);
    assert_eq!(within(watch.changed()).await, ConnectionState::Closed);
    assert_eq!(within(watch.changed()).await, ConnectionState::Closed, "it stays closed");
    assert!(within(consumer.next()).await.is_none());
    let beta = scene.beta().await;
    assert!(next(&mut beta.consume(&queue, prefetch(1)).await.unwrap()).await.redelivered);
}

pub(crate) async fn a_closed_connection_says_so(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut watch = bus.watch();
    assert!(matches!(watch.current(), ConnectionState::Connected { .. }));
    let (seen, ()) = tokio::join!(within(watch.changed()), bus.close());
    assert_eq!(seen, ConnectionState::Closed);
    let closed = BusError::Closed { identity: bus.identity().to_owned() };
    assert_eq!(bus.queue_depth(&queue).await.unwrap_err(), closed);
    assert_eq!(bus.consume(&queue, prefetch(1)).await.unwrap_err(), closed);
    assert_eq!(within(watch.connected()).await.unwrap_err(), closed);
}
