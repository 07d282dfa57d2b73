//! Consumers and deliveries of any bus (shell).

use crate::{BusError, Message, amqp, memory};

/// A subscription to a queue. Dropping it is as [`Consumer::cancel`].
#[derive(Debug)]
pub struct Consumer(pub(crate) ConsumerKind);

#[derive(Debug)]
pub(crate) enum ConsumerKind {
    Memory(memory::Consumer),
    Amqp(Box<amqp::Consumer>),
}

impl Consumer {
    /// The next delivery. `None` means that the subscription is over: the server cancelled it, the queue was
    /// deleted, or the connection went down. It never means the end of work: wait until the connection is back
    /// and consume again. Waits as long as nothing comes; a future that is dropped loses no message.
    pub async fn next(&mut self) -> Option<Delivery> {
        match &mut self.0 {
            ConsumerKind::Memory(consumer) => consumer.next().await,
            ConsumerKind::Amqp(consumer) => consumer.next().await,
        }
    }

    /// Ends the subscription: nothing more is sent to it. What was taken with [`Consumer::next`] stays with its
    /// holder and can be settled; what was sent and not taken goes back to the queue. An exclusive queue goes
    /// with its last consumer.
    pub async fn cancel(self) -> Result<(), BusError> {
        match self.0 {
            ConsumerKind::Memory(consumer) => drop(consumer),
            ConsumerKind::Amqp(consumer) => consumer.cancel().await?,
        }
        Ok(())
    }
}

/// A message that a consumer holds until it settles it. One that is dropped without being settled goes back to
/// its queue when its consumer and all other deliveries of that consumer are gone, or with the connection.
#[derive(Debug)]
#[must_use = "a delivery that is not settled takes a place of the prefetch and comes again"]
pub struct Delivery {
    /// What was published.
    pub message: Message,
    /// The exchange to which it was published; the dead-letter exchange after it was dead-lettered.
    pub exchange: String,
    /// The routing key with which it was published there.
    pub routing_key: String,
    /// The queue from which it came.
    pub queue: String,
    /// Identity of the connection that published it, validated by the broker. The only trustworthy word about
    /// who sent it. None if the publisher was no part of Kiln.
    pub user_id: Option<String>,
    /// Whether it may have been delivered before.
    pub redelivered: bool,
    /// How often it came back to its queue before. Only quorum queues count.
    pub delivery_count: u32,
    pub(crate) handle: Handle,
}

#[derive(Debug)]
pub(crate) enum Handle {
    Memory(memory::Settle),
    Amqp(amqp::Settle),
}

impl Delivery {
    /// Done: the queue forgets it. [`BusError::Stale`] means that it comes again. It may come again without that
    /// too: what is on its way when the connection ends is lost.
    pub async fn ack(self) -> Result<(), BusError> {
        let held = match self.handle {
            Handle::Memory(settle) => settle.ack().await,
            Handle::Amqp(settle) => settle.ack().await,
        };
        check_held(held, self.queue)
    }

    /// Back into its place in the queue. A quorum queue counts it against its delivery limit.
    pub async fn requeue(self) -> Result<(), BusError> {
        let held = match self.handle {
            Handle::Memory(settle) => settle.requeue().await,
            Handle::Amqp(settle) => settle.requeue().await,
        };
        check_held(held, self.queue)
    }

    /// Out of the queue and to its dead-letter exchange, if it has one.
    pub async fn reject(self) -> Result<(), BusError> {
        let held = match self.handle {
            Handle::Memory(settle) => settle.reject().await,
            Handle::Amqp(settle) => settle.reject().await,
        };
        check_held(held, self.queue)
    }
}

fn check_held(held: bool, queue: String) -> Result<(), BusError> {
    if held { Ok(()) } else { Err(BusError::Stale { queue }) }
}
