//! What dies and where it goes.

use std::time::Duration;

use kiln_transport::topology::{Bound, DeadLetter, Overflow, Queue, QueueKind};
use kiln_transport::{Bus, Delivery, FIRST_DEATH_QUEUE, FIRST_DEATH_REASON, Message, Published, Topology};
use uuid::Uuid;

use crate::scene::{ALPHA, Scene, World, depth_becomes, next, number, prefetch, silent};

/// The next message in the morgue, with what it must say of its death.
async fn corpse(scene: &Scene<impl World>, bus: &Bus, queue: &str, reason: &str) -> Delivery {
    let mut morgue = bus.consume(&scene.name("morgue"), prefetch(1)).await.unwrap();
    let dead = next(&mut morgue).await;
    let header = |name: &str| dead.message.headers.get(name).map(String::as_str);
    assert_eq!(header(FIRST_DEATH_REASON), Some(reason));
    assert_eq!(header(FIRST_DEATH_QUEUE), Some(queue));
    assert_eq!(dead.routing_key, scene.name("morgue"));
    assert_eq!(dead.user_id.as_deref(), Some(ALPHA), "still the publisher");
    dead
}

pub(crate) async fn rejected_messages_are_dead_lettered(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.mortal("q")).await;
    scene.send(&bus, &queue, 1).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    next(&mut consumer).await.reject().await.unwrap();
    let dead = corpse(scene, &bus, &queue, "rejected").await;
    assert_eq!((number(&dead), dead.redelivered), (1, false));
    silent(&mut consumer).await;
}

pub(crate) async fn acked_messages_are_not_dead_lettered(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.mortal("q")).await;
    scene.send(&bus, &queue, 1).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
    let mut morgue = bus.consume(&scene.name("morgue"), prefetch(1)).await.unwrap();
    silent(&mut morgue).await;
}

pub(crate) async fn the_delivery_limit_ends_a_poison_message(scene: &Scene<impl World>) {
    const LIMIT: u32 = 2;
    let kind = QueueKind::Quorum { delivery_limit: LIMIT };
    let (bus, queue) = scene.with_queue(Queue { kind, ..scene.mortal("q") }).await;
    scene.send(&bus, &queue, 1).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    for count in 0..=LIMIT {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.delivery_count, count);
        delivery.requeue().await.unwrap();
    }
    silent(&mut consumer).await;
    let dead = corpse(scene, &bus, &queue, "delivery_limit").await;
    assert_eq!(number(&dead), 1);
}

pub(crate) async fn a_full_queue_rejects(scene: &Scene<impl World>) {
    let bound = Bound { messages: 3, bytes: 1 << 20 };
    let (bus, queue) = scene.with_queue(Queue { bound, ..scene.queue("q") }).await;
    for index in 0..3 {
        scene.send(&bus, &queue, index).await;
    }
    assert_eq!(scene.offer(&bus, &queue, 3).await, Published::Rejected);
    depth_becomes(&bus, &queue, 3).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    assert_eq!(number(&next(&mut consumer).await), 0);
    scene.send(&bus, &queue, 4).await;
}

pub(crate) async fn a_full_queue_drops_its_head(scene: &Scene<impl World>) {
    let bound = Bound { messages: 2, bytes: 1 << 20 };
    let lossy = Queue { bound, overflow: Overflow::DropHead, ..scene.mortal("q") };
    let (bus, queue) = scene.with_queue(lossy).await;
    for index in 0..3 {
        scene.send(&bus, &queue, index).await;
    }
    let dead = corpse(scene, &bus, &queue, "maxlen").await;
    assert_eq!(number(&dead), 0);
    let mut consumer = bus.consume(&queue, prefetch(5)).await.unwrap();
    for expected in [1, 2] {
        let delivery = next(&mut consumer).await;
        assert_eq!(number(&delivery), expected);
        delivery.ack().await.unwrap();
    }
}

pub(crate) async fn a_byte_cap_drops_the_head(scene: &Scene<impl World>) {
    let bound = Bound { messages: 1000, bytes: 250 };
    let lossy = Queue { bound, overflow: Overflow::DropHead, ..scene.queue("q") };
    let (bus, queue) = scene.with_queue(lossy).await;
    for index in 0..4_u8 {
        let message = Message::new(Uuid::now_v7(), "t", vec![index; 100]);
        let published = bus.publish(&scene.name("x"), &queue, message, true).await.unwrap();
        assert_eq!(published, Published::Confirmed);
    }
    depth_becomes(&bus, &queue, 2).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    assert_eq!(next(&mut consumer).await.message.body[0], 2);
}

pub(crate) async fn expired_messages_are_dead_lettered(scene: &Scene<impl World>) {
    let ttl = Duration::from_millis(100);
    let (bus, queue) = scene.with_queue(Queue { message_ttl: Some(ttl), ..scene.mortal("q") }).await;
    scene.send(&bus, &queue, 1).await;
    let dead = corpse(scene, &bus, &queue, "expired").await;
    assert_eq!(number(&dead), 1);
    depth_becomes(&bus, &queue, 0).await;
}

pub(crate) async fn a_circle_of_dead_letters_ends(scene: &Scene<impl World>) {
    let own = DeadLetter { exchange: scene.name("x"), key: scene.name("q") };
    let message_ttl = Some(Duration::from_millis(50));
    let circular = Queue { message_ttl, dead_letter: Some(own), ..scene.queue("q") };
    let (bus, queue) = scene.with_queue(circular).await;
    let watched = scene.queue("watched");
    let bindings = vec![scene.binding(&watched.name, &queue)];
    bus.declare(&Topology { queues: vec![watched], bindings, ..Topology::default() }).await.unwrap();
    scene.send(&bus, &queue, 1).await;
    depth_becomes(&bus, &queue, 0).await;
    let mut watched = bus.consume(&scene.name("watched"), prefetch(5)).await.unwrap();
    let _published = next(&mut watched).await;
    let _expired = next(&mut watched).await;
    silent(&mut watched).await;
}
