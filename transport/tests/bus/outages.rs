//! What a network and a server do wrong, on a real RabbitMQ. One case at a time: they share the server.

use std::sync::Arc;
use std::time::Duration;

use kiln_tests::rabbit::{Rabbit, url};
use kiln_transport::amqp::Timing;
use kiln_transport::topology::{Bound, Overflow, Queue, QueueKind};
use kiln_transport::{Bus, BusError, ConnectionState, Published};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::broker::{TIMING, connected, settings};
use crate::proxy::Proxy;
use crate::scene::{ALPHA, BETA, Scene, World, depth_becomes, next, number, numbered, prefetch, within};

/// The one server, which cases may kill.
pub(crate) type Shared = Arc<Mutex<Rabbit>>;

/// A world whose connections share one way to the broker, with limits of its own.
pub(crate) struct Way {
    address: std::net::SocketAddr,
    timing: Timing,
}

impl Way {
    async fn to(rabbit: &Shared, timing: Timing) -> Self {
        Self { address: rabbit.lock().await.address(), timing }
    }

    fn through(proxy: &Proxy, timing: Timing) -> Self {
        Self { address: proxy.address(), timing }
    }
}

impl World for Way {
    async fn connect(&self, identity: &str) -> Bus {
        connected(settings(&url(self.address, identity)).with_timing(self.timing)).await
    }
}

fn quorum(scene: &Scene<impl World>) -> Queue {
    Queue { kind: QueueKind::Quorum { delivery_limit: 100 }, ..scene.queue("q") }
}

/// Publishes numbers until told to stop, each until it is confirmed; how many were.
async fn publish_until(scene: &Scene<Way>, bus: &Bus, queue: &str, stop: &Mutex<bool>) -> u64 {
    let mut count = 0;
    while !*stop.lock().await {
        match bus.publish(&scene.name("x"), queue, numbered(count), true).await {
            Ok(Published::Confirmed) => count += 1,
            Ok(other) => panic!("message {count}: {other:?}"),
            Err(BusError::NoExchange { .. }) => panic!("the exchange is gone"),
            Err(_) => drop(within(bus.watch().connected()).await.unwrap()),
        }
    }
    count
}

/// Takes numbers until every one below `count` has come.
async fn receive_all(bus: &Bus, queue: &str, count: &Mutex<Option<u64>>) {
    let mut seen = std::collections::BTreeSet::new();
    loop {
        within(bus.watch().connected()).await.unwrap();
        let mut consumer = match bus.consume(queue, prefetch(20)).await {
            Ok(consumer) => consumer,
            Err(BusError::NoQueue { .. }) => panic!("the queue is gone"),
            Err(_) => continue,
        };
        loop {
            if count.lock().await.is_some_and(|count| (0..count).all(|number| seen.contains(&number))) {
                return;
            }
            match tokio::time::timeout(Duration::from_millis(100), consumer.next()).await {
                Ok(Some(delivery)) => {
                    seen.insert(number(&delivery));
                    // It may be too late for that.
                    drop(delivery.ack().await);
                }
                Ok(None) => break,
                Err(_) => {}
            }
        }
    }
}

pub(crate) async fn nothing_confirmed_is_lost_when_the_server_is_killed(rabbit: Shared) {
    let scene = Scene::new(Way::to(&rabbit, TIMING).await);
    let (publisher, queue) = scene.with_queue(quorum(&scene)).await;
    let consumer = scene.beta().await;
    let (stop, count) = (Mutex::new(false), Mutex::new(None));
    let before = publisher.watch().current();
    let publish = async {
        let confirmed = publish_until(&scene, &publisher, &queue, &stop).await;
        *count.lock().await = Some(confirmed);
        confirmed
    };
    let fault = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut server = rabbit.lock().await;
        // The server itself writes declarations down with delay; the messages are what this is about.
        let _ = tokio::task::block_in_place(|| server.control(&["eval", "mnesia:dump_log()."]));
        tokio::task::block_in_place(|| server.kill());
        // A goodbye that nobody hears must not hold anything up.
        let mut watch = publisher.watch();
        while watch.current() == before {
            within(watch.changed()).await;
        }
        assert!(publisher.trouble().is_some() || watch.current() != ConnectionState::Down);
        tokio::task::block_in_place(|| server.boot());
        tokio::time::timeout(BOOT, watch.connected()).await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        *stop.lock().await = true;
    };
    let received = receive_all(&consumer, &queue, &count);
    let all = Box::pin(async { tokio::join!(publish, fault, received) });
    let (confirmed, (), ()) = tokio::time::timeout(BOOT * 2, all).await.expect("messages are missing");
    assert!(confirmed > 20, "only {confirmed} messages");
}

/// A booted server's connections are back within the longest backoff.
const BOOT: Duration = Duration::from_mins(1);

pub(crate) async fn an_alarm_fails_publishes_in_time_and_ends(rabbit: Shared) {
    const LIMIT: Duration = Duration::from_secs(2);
    let scene = Scene::new(Way::to(&rabbit, Timing { confirm: LIMIT, ..TIMING }).await);
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    scene.send(&bus, &queue, 0).await;
    let server = rabbit.lock().await;
    let alarm = |mark: &str| {
        let _ = tokio::task::block_in_place(|| server.control(&["set_vm_memory_high_watermark", mark]));
    };
    let blocked = BusError::Blocked { identity: ALPHA.into(), limit: LIMIT };
    alarm("0");
    let call = bus.call(&scene.name("x"), &queue, numbered(1), LIMIT * 4).await;
    for what in ["the first, which the broker does not answer", "the second, which is not sent"] {
        let start = Instant::now();
        let error = bus.publish(&scene.name("x"), &queue, numbered(1), true).await.unwrap_err();
        assert_eq!(error, blocked, "{what}");
        assert!(start.elapsed() < LIMIT * 3, "{what}");
    }
    assert!(matches!(call, Err(BusError::Blocked { .. } | BusError::Timeout { .. })), "{call:?}");
    // Consumers go on.
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
    alarm("0.4");
    let recovered = async {
        while bus.publish(&scene.name("x"), &queue, numbered(2), true).await != Ok(Published::Confirmed) {}
    };
    within(recovered).await;
    assert!(matches!(bus.watch().current(), ConnectionState::Connected { epoch: 1 }), "it never went down");
}

pub(crate) async fn a_full_quorum_queue_rejects(rabbit: Shared) {
    let scene = Scene::new(Way::to(&rabbit, TIMING).await);
    let bound = Bound { messages: 3, bytes: 1 << 20 };
    let full = Queue { bound, overflow: Overflow::RejectPublish, ..quorum(&scene) };
    let (bus, queue) = scene.with_queue(full).await;
    // A quorum queue learns late that it is full.
    let mut taken = 0;
    while scene.offer(&bus, &queue, taken).await == Published::Confirmed {
        taken += 1;
        assert!(taken < 50, "it is never full");
    }
    assert!(taken >= 3);
    let call = within(bus.call(&scene.name("x"), &queue, numbered(1), Duration::from_secs(20))).await;
    assert_eq!(call.unwrap_err(), BusError::Busy { exchange: scene.name("x"), key: queue });
}

pub(crate) async fn a_bad_call_does_not_stop_the_others(rabbit: Shared) {
    let scene = Scene::new(Way::to(&rabbit, TIMING).await);
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let missing = scene.name("missing");
    let error = within(bus.call(&missing, "k", numbered(1), Duration::from_secs(20))).await.unwrap_err();
    assert_eq!(error, BusError::NoExchange { name: missing });
    let mut served = bus.consume(&queue, prefetch(1)).await.unwrap();
    let serve = async {
        let request = next(&mut served).await;
        bus.reply(&request, numbered(7)).await.unwrap();
        request.ack().await.unwrap();
    };
    let exchange = scene.name("x");
    let call = bus.call(&exchange, &queue, numbered(1), Duration::from_secs(20));
    let (answer, ()) = tokio::join!(within(call), serve);
    assert_eq!(answer.unwrap().body.as_ref(), b"7");
    assert_eq!(bus.watch().current(), ConnectionState::Connected { epoch: 1 });
}

pub(crate) async fn connections_that_an_operator_closes_come_back(rabbit: Shared) {
    let scene = Scene::new(Way::to(&rabbit, TIMING).await);
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    scene.send(&bus, &queue, 1).await;
    let held = next(&mut consumer).await;
    let server = rabbit.lock().await;
    let _ = tokio::task::block_in_place(|| server.control(&["close_all_connections", "maintenance"]));
    assert!(within(consumer.next()).await.is_none());
    assert_eq!(held.ack().await.unwrap_err(), BusError::Stale { queue: queue.clone() });
    let again = async {
        loop {
            bus.watch().connected().await.unwrap();
            if let Ok(consumer) = bus.consume(&queue, prefetch(1)).await {
                return consumer;
            }
        }
    };
    let mut consumer = within(again).await;
    let again = next(&mut consumer).await;
    assert!(again.redelivered);
    again.ack().await.unwrap();
}

pub(crate) async fn a_black_hole_is_noticed_by_its_silence(rabbit: Shared) {
    let timing = Timing { heartbeat: Duration::from_secs(1), connect: Duration::from_secs(2), ..TIMING };
    let proxy = Proxy::start(rabbit.lock().await.address()).await;
    let scene = Scene::new(Way::through(&proxy, timing));
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    proxy.swallow(true);
    let mut watch = bus.watch();
    assert!(within(consumer.next()).await.is_none());
    while watch.current() != ConnectionState::Down {
        within(watch.changed()).await;
    }
    // Long enough for a handshake to be given up, which must leave no thread behind.
    let silent = || bus.trouble().is_some_and(|trouble| trouble.contains("no answer"));
    within(async {
        while !silent() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    proxy.swallow(false);
    let epoch = within(watch.connected()).await.unwrap();
    assert_eq!(epoch, 2);
    scene.send(&bus, &queue, 1).await;
    within(async {
        while threads() > 2 + OTHERS {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Connections of other cases may still be saying goodbye.
const OTHERS: usize = 0;

/// Threads of the client library in this process.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("lapin")).count()
}

pub(crate) async fn a_consumer_that_is_starved_is_given_up(rabbit: Shared) {
    let timing = Timing { watchdog: Duration::from_millis(300), ..TIMING };
    let proxy = Proxy::start(rabbit.lock().await.address()).await;
    let scene = Scene::new(Way::through(&proxy, timing));
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    proxy.drop_deliveries(true);
    for index in 0..3 {
        scene.send(&bus, &queue, index).await;
    }
    assert!(within(consumer.next()).await.is_none());
    assert_eq!(bus.watch().current(), ConnectionState::Connected { epoch: 1 }, "only the consumer ended");
    drop(consumer);
    proxy.drop_deliveries(false);
    depth_becomes(&bus, &queue, 3).await;
    let mut consumer = bus.consume(&queue, prefetch(1)).await.unwrap();
    assert_eq!(number(&next(&mut consumer).await), 0);
}

pub(crate) async fn tls_is_checked_against_the_authority(rabbit: Shared) {
    let (url, ca) = {
        let rabbit = rabbit.lock().await;
        (rabbit.tls_url(ALPHA), rabbit.ca())
    };
    let bus = connected(settings(&url).with_ca_file(&ca)).await;
    let missing = BusError::NoQueue { name: "missing".to_owned() };
    assert_eq!(bus.queue_depth("missing").await.unwrap_err(), missing);
    let dir = tempfile::tempdir().unwrap();
    kiln_tests::registry::make_certificates(dir.path());
    let strangers = refused(settings(&url).with_ca_file(dir.path().join("ca.pem"))).await;
    assert!(strangers.contains("certificate"), "{strangers}");
    let empty = tempfile::NamedTempFile::new().unwrap();
    let nobody = refused(settings(&url).with_ca_file(empty.path())).await;
    assert!(nobody.contains("no certificate"), "{nobody}");
}

pub(crate) async fn a_wrong_password_is_told_and_never_shown(rabbit: Shared) {
    let address = rabbit.lock().await.address();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "canary-4711").unwrap();
    let settings = settings(&url(address, BETA)).with_password_file(file.path());
    let bus = kiln_transport::amqp::connect(settings).unwrap();
    let trouble = told(&bus).await;
    assert!(trouble.contains("ACCESS_REFUSED"), "{trouble}");
    assert!(!format!("{trouble} {bus:?}").contains("canary"), "{trouble} {bus:?}");
    std::fs::write(file.path(), BETA).unwrap();
    assert_eq!(within(bus.watch().connected()).await, Ok(1), "the file is read again");
}

async fn refused(settings: kiln_transport::AmqpSettings) -> String {
    told(&kiln_transport::amqp::connect(settings).unwrap()).await
}

/// Why it does not connect.
async fn told(bus: &Bus) -> String {
    within(async {
        loop {
            if let Some(trouble) = bus.trouble() {
                return trouble;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}
