//! What the in-memory broker does wrong on request, under a paused clock.

use std::cell::RefCell;
use std::time::Duration;

use kiln_transport::topology::{Queue, QueueKind};
use kiln_transport::{
    Bus, BusError, ConnectionState, Fault, FaultRates, Faults, MemoryBroker, Message, Published,
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::scene::{ALPHA, BETA, InMemory, Scene, depth_becomes, next, number, numbered, prefetch, silent};

const OUTAGE: Duration = Duration::from_secs(3);

/// A scene with one queue `q` and the faults of its broker.
async fn faulty(queue: impl FnOnce(&Scene<InMemory>) -> Queue) -> (Scene<InMemory>, Bus, String, Faults) {
    let world = InMemory::new();
    let faults = world.broker().faults();
    let scene = Scene::new(world);
    let queue = queue(&scene);
    let (bus, name) = scene.with_queue(queue).await;
    (scene, bus, name, faults)
}

/// As `faulty`, with a plain queue and one planned fault.
async fn planned(fault: Fault) -> (Scene<InMemory>, Bus, String, Faults) {
    let (scene, bus, queue, faults) = faulty(|scene| scene.queue("q")).await;
    faults.plan("test.*.q", fault);
    (scene, bus, queue, faults)
}

#[tokio::test(start_paused = true)]
async fn a_lost_message_was_confirmed() {
    let (scene, bus, queue, faults) = planned(Fault::Lose).await;
    scene.send(&bus, &queue, 1).await;
    depth_becomes(&bus, &queue, 0).await;
    assert_eq!(faults.planned(), 0);
    assert_eq!(faults.counts().get("lose"), Some(&1));
    scene.send(&bus, &queue, 2).await;
    depth_becomes(&bus, &queue, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_plan_waits_for_its_key() {
    let (scene, bus, queue, faults) = faulty(|scene| scene.queue("q")).await;
    faults.plan("somewhere.else", Fault::Lose);
    scene.send(&bus, &queue, 1).await;
    depth_becomes(&bus, &queue, 1).await;
    assert_eq!(faults.planned(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_comes_twice_as_if_it_were_new() {
    let (scene, bus, queue, _) = planned(Fault::Duplicate).await;
    scene.send(&bus, &queue, 1).await;
    let mut consumer = bus.consume(&queue, prefetch(5)).await.unwrap();
    let (first, second) = (next(&mut consumer).await, next(&mut consumer).await);
    assert_eq!(first.message, second.message);
    assert!(!second.redelivered);
    silent(&mut consumer).await;
}

#[tokio::test(start_paused = true)]
async fn a_delayed_message_is_overtaken() {
    let (scene, bus, queue, _) = planned(Fault::Delay(OUTAGE)).await;
    let start = Instant::now();
    scene.send(&bus, &queue, 1).await;
    scene.send(&bus, &queue, 2).await;
    let mut consumer = bus.consume(&queue, prefetch(5)).await.unwrap();
    let _overtaker = {
        let first = next(&mut consumer).await;
        assert_eq!(number(&first), 2);
        first
    };
    assert_eq!(number(&next(&mut consumer).await), 1);
    assert_eq!(start.elapsed(), OUTAGE);
}

#[tokio::test(start_paused = true)]
async fn a_publish_is_returned_or_rejected_on_request() {
    for (fault, expected) in [(Fault::Return, Published::Returned), (Fault::Reject, Published::Rejected)] {
        let (scene, bus, queue, _) = planned(fault).await;
        assert_eq!(scene.offer(&bus, &queue, 1).await, expected);
        depth_becomes(&bus, &queue, 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_publisher_cannot_tell_a_lost_publish_from_a_lost_confirm() {
    for (fault, stored) in [(Fault::LosePublish, 0), (Fault::LoseConfirm, 1)] {
        let (scene, bus, queue, _) = planned(fault).await;
        let start = Instant::now();
        let error = bus.publish(&scene.name("x"), &queue, numbered(1), true).await.unwrap_err();
        let BusError::Timeout { action: "publish", limit } = error else { panic!("{error}") };
        assert_eq!(start.elapsed(), limit);
        depth_becomes(&bus, &queue, stored).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_drops_after_the_publish_and_comes_back() {
    let (scene, bus, queue, _) = planned(Fault::Disconnect(OUTAGE)).await;
    let start = Instant::now();
    let mut watch = bus.watch();
    let down = BusError::Down { identity: ALPHA.into() };
    let exchange = scene.name("x");
    let publish = || bus.publish(&exchange, &queue, numbered(1), true);
    assert_eq!(publish().await.unwrap_err(), down);
    assert_eq!(publish().await.unwrap_err(), down, "it stays down");
    assert_eq!(watch.changed().await, ConnectionState::Down);
    assert_eq!(watch.changed().await, ConnectionState::Connected { epoch: 2 });
    assert_eq!(start.elapsed(), OUTAGE);
    depth_becomes(&bus, &queue, 1).await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_returns_deliveries_and_ends_exclusive_queues() {
    let kind = QueueKind::Quorum { delivery_limit: 5 };
    let (scene, bus, queue, faults) = faulty(|scene| Queue { kind, ..scene.queue("q") }).await;
    let own = Queue { kind: QueueKind::Exclusive, ..scene.queue("own") };
    bus.declare(&scene.topology([own.clone()])).await.unwrap();
    scene.send(&bus, &queue, 1).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    let held = next(&mut consumer).await;

    faults.disconnect(ALPHA, OUTAGE);
    assert!(consumer.next().await.is_none());
    assert!(matches!(held.ack().await, Err(BusError::Stale { .. })));
    let other = scene.beta().await;
    assert!(matches!(other.queue_depth(&own.name).await, Err(BusError::NoQueue { .. })));
    let again = next(&mut other.consume(&queue, prefetch(1)).await.unwrap()).await;
    assert_eq!((again.redelivered, again.delivery_count), (true, 1));

    assert_eq!(bus.watch().connected().await, Ok(2));
    bus.declare(&scene.topology([own])).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_restarted_broker_keeps_durable_queues() {
    let (scene, bus, queue, faults) = faulty(|scene| scene.queue("q")).await;
    let other = scene.beta().await;
    scene.send(&bus, &queue, 1).await;
    faults.restart_broker(OUTAGE);
    let late = scene.beta().await;
    assert_eq!([&bus, &other, &late].map(|bus| bus.watch().current()), [ConnectionState::Down; 3]);
    for bus in [&bus, &other, &late] {
        bus.watch().connected().await.unwrap();
        assert_eq!(bus.queue_depth(&queue).await, Ok(1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_cancels_consumers_but_not_their_deliveries() {
    let (scene, bus, queue, faults) = faulty(|scene| scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    scene.send(&bus, &queue, 1).await;
    let held = next(&mut consumer).await;
    faults.cancel_consumers(&queue);
    assert!(consumer.next().await.is_none());
    scene.send(&bus, &queue, 2).await;
    held.ack().await.unwrap();
    depth_becomes(&bus, &queue, 1).await;

    let mut consumer = bus.consume(&queue, prefetch(2)).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
    faults.plan("#", Fault::CancelConsumers);
    scene.send(&bus, &queue, 3).await;
    assert!(consumer.next().await.is_none());
    depth_becomes(&bus, &queue, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_settlement_brings_the_message_again() {
    let (scene, bus, queue, faults) = faulty(|scene| scene.queue("q")).await;
    scene.send(&bus, &queue, 1).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    let held = next(&mut consumer).await;
    faults.set_rates(FaultRates { lose_settlement: 1.0, longest_outage: OUTAGE, ..FaultRates::default() });
    assert_eq!(held.ack().await.unwrap_err(), BusError::Stale { queue: queue.clone() });
    faults.set_rates(FaultRates::default());
    bus.watch().connected().await.unwrap();
    let again = next(&mut bus.consume(&queue, prefetch(1)).await.unwrap()).await;
    assert!(again.redelivered);
    assert_eq!(faults.counts().get("lose_settlement"), Some(&1));
}

/// A server that answers one request.
async fn answer_one(scene: &Scene<InMemory>, server: &Bus) {
    let mut consumer = server.consume(&scene.name("q"), prefetch(1)).await.unwrap();
    let request = next(&mut consumer).await;
    server.reply(&request, Message::new(Uuid::now_v7(), "reply.v1", "pong")).await.unwrap();
    request.ack().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_whatever_becomes_of_its_reply() {
    const LIMIT: Duration = Duration::from_secs(5);
    let timeout = Err(BusError::Timeout { action: "call", limit: LIMIT });
    for (fault, expected) in [
        (Fault::Lose, timeout.clone()),
        (Fault::Delay(LIMIT * 2), timeout),
        (Fault::Delay(LIMIT / 2), Ok("pong")),
        (Fault::Duplicate, Ok("pong")),
    ] {
        let (scene, caller, queue, faults) = faulty(|scene| scene.queue("q")).await;
        faults.plan(Faults::REPLIES, fault);
        let server = scene.beta().await;
        let exchange = scene.name("x");
        let call = caller.call(&exchange, &queue, numbered(1), LIMIT);
        let (got, ()) = tokio::join!(call, answer_one(&scene, &server));
        let expected = expected.map(|text: &str| text.as_bytes().to_vec());
        assert_eq!(got.map(|reply| reply.body.to_vec()), expected, "{fault:?}");
        assert_eq!(faults.planned(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_fails_when_its_connection_drops_and_a_lost_confirm_does_not_matter() {
    const LIMIT: Duration = Duration::from_mins(1);
    let (scene, caller, queue, faults) = faulty(|scene| scene.queue("q")).await;
    let exchange = scene.name("x");
    let cut = async {
        tokio::time::sleep(OUTAGE).await;
        faults.disconnect(ALPHA, OUTAGE);
    };
    let request = numbered(1);
    let (got, ()) = tokio::join!(caller.call(&exchange, &queue, request.clone(), LIMIT), cut);
    assert_eq!(got.unwrap_err(), BusError::Down { identity: ALPHA.into() });

    caller.watch().connected().await.unwrap();
    faults.plan("test.*.q", Fault::LoseConfirm);
    let server = scene.beta().await;
    let mut consumer = server.consume(&queue, prefetch(2)).await.unwrap();
    let serve = async {
        // Longer than the caller waits for its confirm.
        tokio::time::sleep(LIMIT / 2).await;
        for text in ["to the caller before the outage", "to the caller after it"] {
            let request = next(&mut consumer).await;
            server.reply(&request, Message::new(Uuid::now_v7(), "reply.v1", text)).await.unwrap();
            request.ack().await.unwrap();
        }
    };
    let (got, ()) = tokio::join!(caller.call(&exchange, &queue, request, LIMIT), serve);
    assert_eq!(got.unwrap().body.as_ref(), b"to the caller after it");
}

/// What happens on a broker where everything goes wrong, as text.
async fn trace(seed: u64) -> Vec<String> {
    const ROUNDS: u64 = 400;
    let broker = MemoryBroker::new(seed);
    let (alpha, beta) = (broker.connect(ALPHA), broker.connect(BETA));
    let scene = Scene::new(InMemory::of(broker.clone()));
    let kind = QueueKind::Quorum { delivery_limit: 3 };
    let queue = Queue { kind, ..scene.mortal("q") };
    alpha.declare(&scene.topology([queue, scene.queue("morgue")])).await.unwrap();
    broker.faults().set_rates(chaos());
    let start = Instant::now();
    let log = RefCell::new(Vec::new());
    let note = |line: String| log.borrow_mut().push(format!("{:?} {line}", start.elapsed()));
    let (exchange, queue) = (scene.name("x"), scene.name("q"));
    let publish = async {
        for index in 0..ROUNDS {
            let outcome = alpha.publish(&exchange, &queue, numbered(index), true).await;
            note(format!("published {index} {outcome:?}"));
            alpha.watch().connected().await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let receive = async {
        loop {
            beta.watch().connected().await.unwrap();
            let Ok(mut consumer) = beta.consume(&queue, prefetch(3)).await else { continue };
            while let Some(delivery) = consumer.next().await {
                note(format!("received {} {}", number(&delivery), delivery.delivery_count));
                let held = delivery.ack().await.is_ok();
                note(format!("held {held}"));
            }
        }
    };
    tokio::select! {
        biased;
        () = publish => {}
        () = receive => {}
    }
    note(format!("{:?}", broker.faults().counts()));
    log.take()
}

fn chaos() -> FaultRates {
    FaultRates {
        lose: 0.05,
        duplicate: 0.05,
        delay: 0.05,
        return_to_publisher: 0.02,
        reject: 0.02,
        lose_publish: 0.02,
        lose_confirm: 0.02,
        disconnect: 0.02,
        cancel_consumers: 0.02,
        lose_settlement: 0.05,
        longest_delay: Duration::from_secs(1),
        longest_outage: Duration::from_secs(1),
    }
}

#[test]
fn one_seed_gives_one_trace_with_every_fault_in_it() {
    let run = |seed| {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().start_paused(true).build().unwrap().block_on(trace(seed))
    };
    let first = run(7);
    assert_eq!(first, run(7));
    assert_ne!(first, run(8));
    let counts = first.last().unwrap();
    for fault in [
        "lose\"",
        "duplicate",
        "delay",
        "return",
        "reject",
        "lose_publish",
        "lose_confirm",
        "disconnect",
        "cancel_consumers",
        "lose_settlement",
    ] {
        assert!(counts.contains(fault), "no {fault} in {counts}");
    }
}
