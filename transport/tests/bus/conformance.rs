//! Declare and publish.

use std::collections::BTreeMap;

use kiln_transport::topology::{Exchange, ExchangeKind, Overflow, Queue};
use kiln_transport::{BusError, MAX_BODY, Message, Published, Topology};
use uuid::Uuid;

use crate::scene::{ALPHA, Scene, World, depth_becomes, next, number, numbered, prefetch, silent, within};

pub(crate) async fn everything_that_was_published_arrives(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let message = Message {
        message_id: Uuid::now_v7(),
        correlation_id: Some(Uuid::now_v7()),
        reply_to: Some("somewhere".into()),
        kind: "build.request.v1".into(),
        headers: BTreeMap::from([("build".into(), "b-1".into()), ("ä".into(), "ö".into())]),
        body: b"\x00\xff{}".as_slice().into(),
    };
    let published = within(bus.publish(&scene.name("x"), &queue, message.clone(), true)).await;
    assert_eq!(published.unwrap(), Published::Confirmed);

    let beta = scene.beta().await;
    let delivery = next(&mut beta.consume(&queue, prefetch(1)).await.unwrap()).await;
    assert_eq!(delivery.message, message);
    assert_eq!(delivery.exchange, scene.name("x"));
    assert_eq!(delivery.routing_key, queue);
    assert_eq!(delivery.queue, queue);
    assert_eq!(delivery.user_id.as_deref(), Some(ALPHA), "the publisher's identity, not the receiver's");
    assert!(!delivery.redelivered);
    assert_eq!(delivery.delivery_count, 0);
    delivery.ack().await.unwrap();
}

pub(crate) async fn a_message_that_no_queue_takes_is_returned(scene: &Scene<impl World>) {
    let (bus, _) = scene.with_queue(scene.queue("q")).await;
    for (mandatory, expected) in [(true, Published::Returned), (false, Published::Confirmed)] {
        let published =
            within(bus.publish(&scene.name("x"), "nowhere", numbered(1), mandatory)).await.unwrap();
        assert_eq!(published, expected, "mandatory: {mandatory}");
    }
}

pub(crate) async fn concurrent_publishes_get_their_own_answers(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let exchange = scene.name("x");
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..60_u64 {
        let (bus, exchange, queue) = (bus.clone(), exchange.clone(), queue.clone());
        tasks.spawn(async move {
            let (key, expected) = if index % 3 == 0 {
                ("nowhere".to_owned(), Published::Returned)
            } else {
                (queue, Published::Confirmed)
            };
            assert_eq!(
                bus.publish(&exchange, &key, numbered(index), true).await.unwrap(),
                expected,
                "{index}"
            );
        });
    }
    while let Some(ended) = within(tasks.join_next()).await {
        ended.unwrap();
    }
    depth_becomes(&bus, &queue, 40).await;
}

pub(crate) async fn a_missing_exchange_is_named_and_nothing_else_breaks(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(5)).await.unwrap();
    scene.send(&bus, &queue, 1).await;
    let held = next(&mut consumer).await;
    let missing = scene.name("missing");
    let error = within(bus.publish(&missing, "k", numbered(1), true)).await.unwrap_err();
    assert_eq!(error, BusError::NoExchange { name: missing });
    held.ack().await.unwrap();
    scene.send(&bus, &queue, 2).await;
    assert_eq!(number(&next(&mut consumer).await), 2);
}

pub(crate) async fn topic_patterns_select(scene: &Scene<impl World>) {
    let bus = scene.alpha().await;
    let mut topology = scene.topology([scene.queue("one"), scene.queue("many"), scene.queue("exact")]);
    topology.bindings = vec![
        scene.binding(&scene.name("one"), "event.*.status"),
        scene.binding(&scene.name("many"), "event.#"),
        scene.binding(&scene.name("exact"), "event.build.status"),
    ];
    bus.declare(&topology).await.unwrap();
    for (index, key) in [
        "event.build.status",
        "event.agent.status",
        "event",
        "event.build.status.extra",
        "other.build.status",
    ]
    .into_iter()
    .enumerate()
    {
        let published =
            within(bus.publish(&scene.name("x"), key, numbered(index as u64), true)).await.unwrap();
        let expected = if index == 4 { Published::Returned } else { Published::Confirmed };
        assert_eq!(published, expected, "key {key}");
    }
    for (queue, expected) in [("one", vec![0, 1]), ("many", vec![0, 1, 2, 3]), ("exact", vec![0])] {
        let mut consumer = bus.consume(&scene.name(queue), prefetch(9)).await.unwrap();
        for expected in expected {
            let delivery = next(&mut consumer).await;
            assert_eq!(number(&delivery), expected, "queue {queue}");
            delivery.ack().await.unwrap();
        }
        silent(&mut consumer).await;
    }
}

pub(crate) async fn direct_keys_select(scene: &Scene<impl World>) {
    let bus = scene.alpha().await;
    let mut topology = scene.topology([scene.queue("q")]);
    topology.exchanges = vec![Exchange { name: scene.name("x"), kind: ExchangeKind::Direct }];
    topology.bindings = vec![scene.binding(&scene.name("q"), "rpc.*")];
    bus.declare(&topology).await.unwrap();
    for (key, expected) in [("rpc.*", Published::Confirmed), ("rpc.lease", Published::Returned)] {
        let published = within(bus.publish(&scene.name("x"), key, numbered(1), true)).await.unwrap();
        assert_eq!(published, expected, "key {key}");
    }
}

pub(crate) async fn two_bindings_bring_one_copy(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let bindings = vec![scene.binding(&queue, "test.#"), scene.binding(&queue, "#")];
    bus.declare(&Topology { bindings, ..Topology::default() }).await.unwrap();
    scene.send(&bus, &queue, 1).await;
    depth_becomes(&bus, &queue, 1).await;
}

pub(crate) async fn a_queue_belongs_to_all_bindings(scene: &Scene<impl World>) {
    let bus = scene.alpha().await;
    bus.declare(&scene.topology([scene.queue("a"), scene.queue("b")])).await.unwrap();
    let bindings = vec![scene.binding(&scene.name("a"), "both"), scene.binding(&scene.name("b"), "both")];
    bus.declare(&Topology { bindings, ..Topology::default() }).await.unwrap();
    assert_eq!(scene.offer(&bus, "both", 7).await, Published::Confirmed);
    for queue in ["a", "b"] {
        let mut consumer = bus.consume(&scene.name(queue), prefetch(1)).await.unwrap();
        assert_eq!(number(&next(&mut consumer).await), 7, "queue {queue}");
    }
}

pub(crate) async fn order_per_key_is_kept(scene: &Scene<impl World>) {
    const COUNT: u64 = 200;
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(10)).await.unwrap();
    let publish = async {
        for index in 0..COUNT {
            scene.send(&bus, &queue, index).await;
        }
    };
    let receive = async {
        for expected in 0..COUNT {
            let delivery = next(&mut consumer).await;
            assert_eq!(number(&delivery), expected);
            delivery.ack().await.unwrap();
        }
    };
    tokio::join!(publish, receive);
}

pub(crate) async fn declaring_again_changes_nothing(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.mortal("q")).await;
    scene.send(&bus, &queue, 1).await;
    scene.beta().await.declare(&scene.topology([scene.mortal("q"), scene.queue("morgue")])).await.unwrap();
    scene.send(&bus, &queue, 2).await;
    depth_becomes(&bus, &queue, 2).await;
}

pub(crate) async fn declaring_otherwise_is_a_conflict(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let other = Queue { overflow: Overflow::DropHead, ..scene.queue("q") };
    let error = bus.declare(&scene.topology([other])).await.unwrap_err();
    assert_eq!(error, BusError::Conflict { what: "queue", name: queue.clone() });
    let exchange = Exchange { name: scene.name("x"), kind: ExchangeKind::Direct };
    let error =
        bus.declare(&Topology { exchanges: vec![exchange], ..Topology::default() }).await.unwrap_err();
    assert_eq!(error, BusError::Conflict { what: "exchange", name: scene.name("x") });
    scene.send(&bus, &queue, 1).await;
}

pub(crate) async fn missing_queues_are_named(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let name = scene.name("missing");
    let missing = BusError::NoQueue { name: name.clone() };
    assert_eq!(bus.consume(&name, prefetch(1)).await.unwrap_err(), missing);
    assert_eq!(bus.queue_depth(&name).await.unwrap_err(), missing);
    let bindings = vec![scene.binding(&name, "k")];
    let error = bus.declare(&Topology { bindings, ..Topology::default() }).await.unwrap_err();
    assert_eq!(error, missing);
    bus.delete_queue(&name).await.unwrap();
    scene.send(&bus, &queue, 1).await;
}

pub(crate) async fn impossible_names_and_sizes_are_refused(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    for name in [String::new(), "amq.mine".into(), "n".repeat(256)] {
        let impossible = Queue { name, ..scene.queue("q") };
        let error = bus.declare(&scene.topology([impossible])).await.unwrap_err();
        assert!(matches!(error, BusError::Name { what: "queue", .. }), "{error}");
    }
    let fat = Message::new(Uuid::now_v7(), "t", vec![0; MAX_BODY + 1]);
    let error = bus.publish(&scene.name("x"), &queue, fat, true).await.unwrap_err();
    assert!(matches!(error, BusError::TooLarge { what: "message body", .. }), "{error}");
    let error = bus.publish(&scene.name("x"), &"k".repeat(256), numbered(1), true).await.unwrap_err();
    assert!(matches!(error, BusError::TooLarge { what: "routing key", .. }), "{error}");
    let largest = Message::new(Uuid::now_v7(), "t", vec![0; MAX_BODY]);
    assert_eq!(bus.publish(&scene.name("x"), &queue, largest, true).await.unwrap(), Published::Confirmed);
}
