//! The bus: one participant's connection to a broker (shell).

use std::num::NonZeroU16;
use std::time::Duration;

use crate::delivery::{Consumer, ConsumerKind, Delivery};
use crate::topology::check_key;
use crate::{BusError, Message, Published, Topology, amqp, memory};

/// The exchange that reaches every queue by its name, where replies go.
const DEFAULT_EXCHANGE: &str = "";

/// A connection to a broker. Clones share it; it closes with the last one.
///
/// It comes back by itself after an outage. Consumers, exclusive queues and unsettled deliveries do not outlive
/// one: after an end of [`Consumer::next`] or [`BusError::Down`], wait with [`ConnectionWatch::connected`], declare
/// the own queues and consume again. Every operation ends within a time limit, except waiting for a delivery.
///
/// Messages that one connection publishes with one key arrive in each queue in that order and are delivered in
/// it; what comes back to a queue takes its old place.
#[derive(Debug, Clone)]
pub enum Bus {
    /// To a broker inside this process.
    Memory(memory::Connection),
    /// To a broker over the network.
    Amqp(amqp::Connection),
}

/// Whether a connection can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionState {
    /// It can.
    Connected {
        /// How often it was established. Another number means that what depended on it is gone.
        epoch: u64,
    },
    /// Not now; it comes back by itself.
    Down,
    /// It was closed by its owner.
    Closed,
}

impl Bus {
    /// Who publishes here, as receivers see it in [`Delivery::user_id`].
    pub fn identity(&self) -> &str {
        match self {
            Self::Memory(connection) => connection.identity(),
            Self::Amqp(connection) => connection.identity(),
        }
    }

    /// Makes what does not exist yet. What exists with the same settings stays as it is.
    pub async fn declare(&self, topology: &Topology) -> Result<(), BusError> {
        topology.check()?;
        match self {
            Self::Memory(connection) => connection.declare(topology).await,
            Self::Amqp(connection) => Box::pin(connection.declare(topology)).await,
        }
    }

    /// Deletes a queue with what is in it; its consumers end. Deleting a queue that is not there is no error.
    pub async fn delete_queue(&self, queue: &str) -> Result<(), BusError> {
        match self {
            Self::Memory(connection) => connection.delete_queue(queue).await,
            Self::Amqp(connection) => Box::pin(connection.delete_queue(queue)).await,
        }
    }

    /// Number of messages in a queue that wait for a consumer.
    pub async fn queue_depth(&self, queue: &str) -> Result<u64, BusError> {
        match self {
            Self::Memory(connection) => connection.queue_depth(queue).await,
            Self::Amqp(connection) => Box::pin(connection.queue_depth(queue)).await,
        }
    }

    /// Publishes a persistent message and waits for the broker's confirm. `mandatory` asks to hear of it when no
    /// queue takes the message. After an error the message may be stored, or be stored later: who publishes it
    /// again keeps its id.
    pub async fn publish(
        &self,
        exchange: &str,
        key: &str,
        message: Message,
        mandatory: bool,
    ) -> Result<Published, BusError> {
        message.check()?;
        check_key(key)?;
        match self {
            Self::Memory(connection) => connection.publish(exchange, key, message, mandatory).await,
            Self::Amqp(connection) => Box::pin(connection.publish(exchange, key, message, mandatory)).await,
        }
    }

    /// Subscribes to a queue. At most `prefetch` of its deliveries are unsettled at a time.
    pub async fn consume(&self, queue: &str, prefetch: NonZeroU16) -> Result<Consumer, BusError> {
        match self {
            Self::Memory(connection) => {
                let consumer = connection.consume(queue, prefetch.get()).await?;
                Ok(Consumer(ConsumerKind::Memory(consumer)))
            }
            Self::Amqp(connection) => {
                let consumer = Box::pin(connection.consume(queue, prefetch.get())).await?;
                Ok(Consumer(ConsumerKind::Amqp(Box::new(consumer))))
            }
        }
    }

    /// Publishes a request and waits for its reply, altogether at most `limit`. The request's message id is its
    /// correlation id; a repeated call with the same id takes whichever reply comes first. The reply is the body
    /// of the one that could read the request: trust in it is trust in who may consume the queue.
    pub async fn call(
        &self,
        exchange: &str,
        key: &str,
        request: Message,
        limit: Duration,
    ) -> Result<Message, BusError> {
        let answer = tokio::time::timeout(limit, self.call_unbounded(exchange, key, request)).await;
        answer.unwrap_or(Err(BusError::Timeout { action: "call", limit }))
    }

    async fn call_unbounded(&self, exchange: &str, key: &str, request: Message) -> Result<Message, BusError> {
        match self {
            Self::Memory(connection) => {
                let call = connection.open_call(request.message_id).await?;
                let request = addressed(request, &call.address);
                // Who waits for the reply needs no confirm: the reply may be there before it.
                let publish = async {
                    check_request(exchange, key, self.publish(exchange, key, request, true).await)?;
                    std::future::pending().await
                };
                tokio::select! {
                    biased;
                    reply = call.reply() => reply,
                    failed = publish => failed,
                }
            }
            Self::Amqp(connection) => {
                request.check()?;
                check_key(key)?;
                Box::pin(connection.call(exchange, key, request)).await
            }
        }
    }

    /// Answers a call. A caller that is gone or no longer waits is no error.
    pub async fn reply(&self, request: &Delivery, mut reply: Message) -> Result<(), BusError> {
        let address = request.message.reply_to.as_deref().ok_or(BusError::NoReplyTo)?;
        reply.correlation_id = request.message.correlation_id;
        self.publish(DEFAULT_EXCHANGE, address, reply, false).await.map(drop)
    }

    /// Watches whether the connection can be used.
    pub fn watch(&self) -> ConnectionWatch {
        match self {
            Self::Memory(connection) => {
                let watched = connection.watch();
                ConnectionWatch { seen: watched.state(), watched: Watched::Memory(watched) }
            }
            Self::Amqp(connection) => {
                let watched = connection.watch();
                ConnectionWatch { seen: watched.state(), watched: Watched::Amqp(watched) }
            }
        }
    }

    /// Why the connection is down, in words for an operator. None while it can be used, and before the first
    /// attempt to connect has ended.
    pub fn trouble(&self) -> Option<String> {
        match self {
            Self::Memory(_) => None,
            Self::Amqp(connection) => connection.trouble(),
        }
    }

    /// Closes the connection for all its clones. What it held unsettled goes back, its exclusive queues go.
    pub async fn close(&self) {
        match self {
            Self::Memory(connection) => connection.close().await,
            Self::Amqp(connection) => connection.close().await,
        }
    }
}

fn addressed(request: Message, address: &str) -> Message {
    let correlation_id = Some(request.message_id);
    Message { correlation_id, reply_to: Some(address.to_owned()), ..request }
}

/// A request whose confirm was lost may still be answered.
fn check_request(exchange: &str, key: &str, sent: Result<Published, BusError>) -> Result<(), BusError> {
    let (exchange, key) = (exchange.to_owned(), key.to_owned());
    match sent {
        Ok(Published::Confirmed) | Err(BusError::Timeout { .. }) => Ok(()),
        Ok(Published::Returned) => Err(BusError::Unserved { exchange, key }),
        Ok(Published::Rejected) => Err(BusError::Busy { exchange, key }),
        Err(error) => Err(error),
    }
}

/// Sees a connection go and come back. It does not keep the connection open.
#[derive(Debug)]
pub struct ConnectionWatch {
    seen: ConnectionState,
    watched: Watched,
}

#[derive(Debug)]
enum Watched {
    Memory(memory::Watch),
    Amqp(amqp::Watch),
}

impl ConnectionWatch {
    /// The state now.
    pub fn current(&self) -> ConnectionState {
        match &self.watched {
            Watched::Memory(watch) => watch.state(),
            Watched::Amqp(watch) => watch.state(),
        }
    }

    /// Waits for another state than the one last seen here. States between two looks may be missed; the epoch
    /// tells. A closed connection stays closed: then it answers at once.
    pub async fn changed(&mut self) -> ConnectionState {
        self.seen = match &self.watched {
            Watched::Memory(watch) => watch.state_after(self.seen).await,
            Watched::Amqp(watch) => watch.state_after(self.seen).await,
        };
        self.seen
    }

    /// Waits until the connection can be used and answers its epoch; an error if it was closed for good.
    pub async fn connected(&mut self) -> Result<u64, BusError> {
        self.seen = self.current();
        loop {
            match self.seen {
                ConnectionState::Connected { epoch } => return Ok(epoch),
                ConnectionState::Closed => return Err(BusError::Closed { identity: self.identity() }),
                ConnectionState::Down => self.changed().await,
            };
        }
    }

    fn identity(&self) -> String {
        match &self.watched {
            Watched::Memory(watch) => watch.identity().to_owned(),
            Watched::Amqp(watch) => watch.identity().to_owned(),
        }
    }
}
