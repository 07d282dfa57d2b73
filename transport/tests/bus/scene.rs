//! A broker under test with names of its own, and how to wait on it.

use std::future::Future;
use std::num::NonZeroU16;
use std::time::Duration;

use kiln_transport::topology::{
    Binding, Bound, DeadLetter, Exchange, ExchangeKind, Overflow, Queue, QueueKind,
};
use kiln_transport::{Bus, Consumer, Delivery, MemoryBroker, Message, Published, Topology};
use uuid::Uuid;

/// Longer than any broker on a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing has to come before we believe that nothing comes. Too short hides a defect, it does not
/// fail a good broker.
const SILENCE: Duration = Duration::from_millis(150);

/// A kind of broker. Two identities exist on it: [`ALPHA`] and [`BETA`].
pub(crate) trait World {
    async fn connect(&self, identity: &str) -> Bus;
}

/// The broker inside the process.
pub(crate) struct InMemory(MemoryBroker);

impl InMemory {
    pub(crate) fn new() -> Self {
        Self(MemoryBroker::new(0))
    }

    pub(crate) fn of(broker: MemoryBroker) -> Self {
        Self(broker)
    }

    pub(crate) fn broker(&self) -> &MemoryBroker {
        &self.0
    }
}

impl World for InMemory {
    async fn connect(&self, identity: &str) -> Bus {
        self.0.connect(identity)
    }
}

/// A world with names that no other test uses.
pub(crate) struct Scene<W> {
    world: W,
    test: Uuid,
}

impl<W: World> Scene<W> {
    pub(crate) fn new(world: W) -> Self {
        Self { world, test: Uuid::now_v7() }
    }

    /// A connection of the first identity.
    pub(crate) async fn alpha(&self) -> Bus {
        self.world.connect(ALPHA).await
    }

    /// A connection of the second identity.
    pub(crate) async fn beta(&self) -> Bus {
        self.world.connect(BETA).await
    }

    /// A name of this test.
    pub(crate) fn name(&self, what: &str) -> String {
        format!("test.{}.{what}", self.test)
    }

    /// A topic exchange, and queues bound with their own names as keys.
    pub(crate) fn topology<const N: usize>(&self, queues: [Queue; N]) -> Topology {
        let exchange = Exchange { name: self.name("x"), kind: ExchangeKind::Topic };
        let bindings = queues.iter().map(|queue| self.binding(&queue.name, &queue.name)).collect();
        Topology { exchanges: vec![exchange], queues: queues.into(), bindings }
    }

    pub(crate) fn binding(&self, queue: &str, key: &str) -> Binding {
        Binding { exchange: self.name("x"), queue: queue.to_owned(), key: key.to_owned() }
    }

    /// A classic queue.
    pub(crate) fn queue(&self, what: &str) -> Queue {
        Queue {
            name: self.name(what),
            kind: QueueKind::Classic,
            bound: Bound { messages: 1000, bytes: 1 << 20 },
            overflow: Overflow::RejectPublish,
            message_ttl: None,
            dead_letter: None,
        }
    }

    /// A queue that sends what dies in it to the queue `morgue`.
    pub(crate) fn mortal(&self, what: &str) -> Queue {
        let dead_letter = DeadLetter { exchange: self.name("x"), key: self.name("morgue") };
        Queue { dead_letter: Some(dead_letter), ..self.queue(what) }
    }

    /// A connection of the first identity on which one queue and its morgue exist; the queue's name.
    pub(crate) async fn with_queue(&self, queue: Queue) -> (Bus, String) {
        let bus = self.alpha().await;
        let name = queue.name.clone();
        bus.declare(&self.topology([queue, self.queue("morgue")])).await.unwrap();
        (bus, name)
    }

    /// Publishes a number to a queue of this test, which has to take it.
    pub(crate) async fn send(&self, bus: &Bus, queue: &str, number: u64) {
        assert_eq!(self.offer(bus, queue, number).await, Published::Confirmed, "message {number}");
    }

    /// Publishes a number to a queue of this test.
    pub(crate) async fn offer(&self, bus: &Bus, queue: &str, number: u64) -> Published {
        within(bus.publish(&self.name("x"), queue, numbered(number), true)).await.unwrap()
    }
}

pub(crate) const ALPHA: &str = "alpha";
pub(crate) const BETA: &str = "beta";

/// A message whose body is a number.
pub(crate) fn numbered(number: u64) -> Message {
    Message::new(Uuid::now_v7(), "number.v1", number.to_string())
}

/// The number in a body.
pub(crate) fn number(delivery: &Delivery) -> u64 {
    std::str::from_utf8(&delivery.message.body).unwrap().parse().unwrap()
}

pub(crate) const fn prefetch(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).unwrap()
}

/// What should happen soon.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it did not happen in time")
}

/// The next delivery, which has to come.
pub(crate) async fn next(consumer: &mut Consumer) -> Delivery {
    within(consumer.next()).await.expect("the subscription ended")
}

/// Nothing comes.
pub(crate) async fn silent(consumer: &mut Consumer) {
    if let Ok(came) = tokio::time::timeout(SILENCE, consumer.next()).await {
        panic!("nothing should come, but this did: {came:?}");
    }
}

/// Waits until as many messages are ready.
pub(crate) async fn depth_becomes(bus: &Bus, queue: &str, expected: u64) {
    let reached = async {
        loop {
            let depth = bus.queue_depth(queue).await.unwrap();
            if depth == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(reached).await;
}
