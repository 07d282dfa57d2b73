//! Confirmed publishes per second to a quorum queue of a real RabbitMQ: one at a time, and as many as the pool of
//! channels takes.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement prints, and fails by panicking")]

use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use kiln_tests::rabbit::Rabbit;
use kiln_transport::topology::{Binding, Bound, Exchange, ExchangeKind, Overflow, Queue, QueueKind};
use kiln_transport::{AmqpSettings, Bus, Message, Published, Topology, amqp};

const MEASURE: Duration = Duration::from_secs(5);

fn topology() -> Topology {
    let queue = Queue {
        name: "q".to_owned(),
        kind: QueueKind::Quorum { delivery_limit: 5 },
        bound: Bound { messages: 10_000_000, bytes: 1 << 40 },
        overflow: Overflow::RejectPublish,
        message_ttl: None,
        dead_letter: None,
    };
    let exchange = Exchange { name: "x".to_owned(), kind: ExchangeKind::Topic };
    let binding = Binding { exchange: "x".to_owned(), queue: "q".to_owned(), key: "k".to_owned() };
    Topology { exchanges: vec![exchange], queues: vec![queue], bindings: vec![binding] }
}

async fn rate(bus: &Bus, at_once: usize) -> f64 {
    let start = Instant::now();
    let publish = |()| async move {
        let message = Message::new(uuid::Uuid::now_v7(), "bench.v1", vec![b' '; 1024]);
        assert_eq!(bus.publish("x", "k", message, true).await.unwrap(), Published::Confirmed);
    };
    let until = |(): &()| std::future::ready(start.elapsed() < MEASURE);
    let done = stream::repeat(()).map(publish).buffer_unordered(at_once).take_while(until);
    let count = done.count().await;
    f64::from(u32::try_from(count).unwrap()) / start.elapsed().as_secs_f64()
}

#[tokio::main]
async fn main() {
    let rabbit = Rabbit::start(&["bench"]);
    let bus = amqp::connect(AmqpSettings::new(&rabbit.url("bench")).unwrap()).unwrap();
    bus.watch().connected().await.unwrap();
    bus.declare(&topology()).await.unwrap();
    for at_once in [1, 4, 16, 64] {
        println!("{at_once:3} at once: {:6.0} confirmed per second", rate(&bus, at_once).await);
    }
    bus.close().await;
}
