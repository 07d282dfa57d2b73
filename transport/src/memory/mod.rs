//! The bus inside one process (shell around the pure broker).
//!
//! It keeps to the semantics of AMQP 0.9.1 on RabbitMQ. It has no task and no thread: what is due by itself
//! (expiry, a delayed message, the end of an outage) happens when somebody next asks or waits. With one seed, a
//! paused clock and a current-thread runtime everything that happens on it is repeatable.

mod broker;
mod channel;
mod connection;
mod faults;
mod queue;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use self::broker::{Answer, Broker, Letter};
use self::channel::Settlement;
pub use self::faults::{Fault, FaultRates, Faults};
use crate::{Bus, BusError, ConnectionState, Message, Published, Topology};

/// How long a publisher waits for its confirm: far above what a healthy broker needs.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ConnectionId(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ChannelId(u64);

/// A broker inside this process. Clones are the same broker.
#[derive(Debug, Clone)]
pub struct MemoryBroker {
    shared: Arc<Shared>,
    confirm_timeout: Duration,
}

impl MemoryBroker {
    /// An empty broker. Random faults follow from the seed; without faults it plays no part.
    pub fn new(seed: u64) -> Self {
        let shared = Arc::new(Shared { broker: Mutex::new(Broker::new(seed)) });
        Self { shared, confirm_timeout: CONFIRM_TIMEOUT }
    }

    /// Connections made from here on wait this long for a confirm.
    #[must_use]
    pub fn with_confirm_timeout(self, confirm_timeout: Duration) -> Self {
        Self { confirm_timeout, ..self }
    }

    /// A new connection. Messages published on it carry `identity` as their `user_id`.
    pub fn connect(&self, identity: impl Into<String>) -> Bus {
        let identity = identity.into();
        let id = self.shared.with(|broker, now| broker.connect(identity.clone(), now));
        let confirm_timeout = self.confirm_timeout;
        let link = Link { shared: Arc::clone(&self.shared), id, identity, confirm_timeout };
        Bus::Memory(Connection(Arc::new(link)))
    }

    /// What it does wrong.
    pub fn faults(&self) -> Faults {
        Faults::of(Arc::clone(&self.shared))
    }
}

#[derive(Debug)]
struct Shared {
    broker: Mutex<Broker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Broker> {
        // The broker is whole between any two of its operations, also after a panic in another thread.
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does one thing at the present time; wakes those who wait if something is now due earlier.
    fn with<T>(&self, operation: impl FnOnce(&mut Broker, Instant) -> T) -> T {
        let now = Instant::now();
        let mut broker = self.lock();
        broker.advance(now);
        let before = broker.next_due();
        let result = operation(&mut broker, now);
        if broker.next_due().is_some_and(|due| before.is_none_or(|before| due < before)) {
            broker.sooner.notify_waiters();
        }
        result
    }

    /// Waits until `look` finds something. `wake` is told when it is worth another look.
    async fn until<T>(&self, wake: &Notify, mut look: impl FnMut(&mut Broker) -> Poll<T>) -> T {
        let sooner = Arc::clone(&self.lock().sooner);
        loop {
            let (mut woken, mut earlier) =
                (std::pin::pin!(wake.notified()), std::pin::pin!(sooner.notified()));
            woken.as_mut().enable();
            earlier.as_mut().enable();
            let (found, due) = self.with(|broker, _| (look(broker), broker.next_due()));
            if let Poll::Ready(found) = found {
                return found;
            }
            tokio::select! {
                biased;
                () = woken => {}
                () = earlier => {}
                () = at(due) => {}
            }
        }
    }
}

/// Waits for a time, for ever if there is none.
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// A connection to a [`MemoryBroker`]. Clones share it; it closes with the last one.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Link>);

#[derive(Debug)]
struct Link {
    shared: Arc<Shared>,
    id: ConnectionId,
    identity: String,
    confirm_timeout: Duration,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.with(|broker, now| {
            broker.close(self.id, now);
            broker.connections.remove(&self.id);
        });
    }
}

impl Connection {
    pub(crate) fn identity(&self) -> &str {
        &self.0.identity
    }

    /// One operation. Yields now and then, so that a busy loop on the bus starves nobody.
    async fn ask<T>(&self, operation: impl FnOnce(&mut Broker, ConnectionId, Instant) -> T) -> T {
        tokio::task::consume_budget().await;
        self.0.shared.with(|broker, now| operation(broker, self.0.id, now))
    }

    pub(crate) async fn declare(&self, topology: &Topology) -> Result<(), BusError> {
        self.ask(|broker, id, _| broker.declare(id, topology)).await
    }

    pub(crate) async fn delete_queue(&self, queue: &str) -> Result<(), BusError> {
        self.ask(|broker, id, _| match broker.queue(id, queue) {
            Ok(_) => {
                broker.delete_queue(queue);
                Ok(())
            }
            Err(BusError::NoQueue { .. }) => Ok(()),
            Err(error) => Err(error),
        })
        .await
    }

    pub(crate) async fn queue_depth(&self, queue: &str) -> Result<u64, BusError> {
        self.ask(|broker, id, _| broker.queue(id, queue).map(|queue| queue.depth() as u64)).await
    }

    pub(crate) async fn publish(
        &self,
        exchange: &str,
        key: &str,
        message: Message,
        mandatory: bool,
    ) -> Result<Published, BusError> {
        let letter = Letter { exchange, key, message, mandatory };
        match self.ask(|broker, id, now| broker.publish(id, letter, now)).await? {
            Answer::Published(published) => Ok(published),
            Answer::Disconnected => Err(BusError::Down { identity: self.identity().to_owned() }),
            Answer::Silence => {
                let limit = self.0.confirm_timeout;
                tokio::time::sleep(limit).await;
                Err(BusError::Timeout { action: "publish", limit })
            }
        }
    }

    pub(crate) async fn consume(&self, queue: &str, prefetch: u16) -> Result<Consumer, BusError> {
        let (id, wake) = self.ask(|broker, id, _| broker.consume(id, queue, prefetch)).await?;
        let channel = Arc::new(ChannelHandle { shared: Arc::clone(&self.0.shared), id });
        Ok(Consumer { channel, wake })
    }

    pub(crate) async fn open_call(&self, id: Uuid) -> Result<PendingCall, BusError> {
        let (address, wake) = self.ask(|broker, connection, _| broker.open_call(connection, id)).await?;
        Ok(PendingCall { link: Arc::clone(&self.0), id, address, wake })
    }

    pub(crate) fn watch(&self) -> Watch {
        let Link { shared, id, identity, .. } = &*self.0;
        let changed = shared.with(|broker, _| broker.changed(*id));
        Watch { shared: Arc::clone(shared), id: *id, identity: identity.clone(), changed }
    }

    pub(crate) async fn close(&self) {
        self.ask(Broker::close).await;
    }
}

/// Looks at a connection without keeping it open.
#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    id: ConnectionId,
    identity: String,
    changed: Arc<Notify>,
}

impl Watch {
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    pub(crate) fn state(&self) -> ConnectionState {
        self.shared.with(|broker, _| broker.state(self.id))
    }

    /// Waits for another state than `seen`, or that it is closed.
    pub(crate) async fn state_after(&self, seen: ConnectionState) -> ConnectionState {
        tokio::task::consume_budget().await;
        let look = |broker: &mut Broker| match broker.state(self.id) {
            state if state == seen && state != ConnectionState::Closed => Poll::Pending,
            state => Poll::Ready(state),
        };
        self.shared.until(&self.changed, look).await
    }
}

/// A call that waits for its reply.
#[derive(Debug)]
pub(crate) struct PendingCall {
    link: Arc<Link>,
    id: Uuid,
    pub(crate) address: String,
    wake: Arc<Notify>,
}

impl PendingCall {
    pub(crate) async fn reply(&self) -> Result<Message, BusError> {
        let look = |broker: &mut Broker| broker.take_reply(self.link.id, self.id);
        self.link.shared.until(&self.wake, look).await
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        self.link.shared.with(|broker, _| broker.end_call(self.link.id, self.id));
    }
}

/// Closes its channel with the last consumer or delivery of it.
#[derive(Debug)]
struct ChannelHandle {
    shared: Arc<Shared>,
    id: ChannelId,
}

impl Drop for ChannelHandle {
    fn drop(&mut self) {
        self.shared.with(|broker, now| broker.close_channels(&[self.id], now));
    }
}

#[derive(Debug)]
pub(crate) struct Consumer {
    channel: Arc<ChannelHandle>,
    wake: Arc<Notify>,
}

impl Consumer {
    pub(crate) async fn next(&mut self) -> Option<crate::Delivery> {
        tokio::task::consume_budget().await;
        let id = self.channel.id;
        let taking = self.channel.shared.until(&self.wake, |broker| broker.take(id)).await?;
        let (stored, queue) = (taking.stored, taking.queue);
        let settle = Settle { channel: Arc::clone(&self.channel), tag: taking.tag };
        Some(crate::Delivery {
            message: stored.message,
            exchange: stored.exchange,
            routing_key: stored.key,
            queue,
            user_id: Some(stored.user_id),
            redelivered: stored.redelivered,
            delivery_count: stored.delivery_count,
            handle: crate::delivery::Handle::Memory(settle),
        })
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.channel.shared.with(|broker, now| broker.cancel(self.channel.id, now));
    }
}

/// The right to settle one delivery.
#[derive(Debug)]
pub(crate) struct Settle {
    channel: Arc<ChannelHandle>,
    tag: u64,
}

impl Settle {
    /// Whether the broker still held the delivery for us.
    pub(crate) async fn ack(self) -> bool {
        self.settle(Settlement::Ack).await
    }

    pub(crate) async fn requeue(self) -> bool {
        self.settle(Settlement::Requeue).await
    }

    pub(crate) async fn reject(self) -> bool {
        self.settle(Settlement::Reject).await
    }

    async fn settle(self, settlement: Settlement) -> bool {
        tokio::task::consume_budget().await;
        let channel = &self.channel;
        channel.shared.with(|broker, now| broker.settle(channel.id, self.tag, settlement, now))
    }
}
