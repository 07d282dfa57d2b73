//! What exists on a broker: exchanges, queues and their bindings (pure).

use std::time::Duration;

use crate::BusError;

/// Longest name of an exchange or queue and longest routing key, in bytes: AMQP sends them as short strings.
pub const MAX_NAME: usize = 255;
/// Names that start with this belong to the broker.
const RESERVED: &str = "amq.";

/// Exchanges, queues and bindings, declared in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// Always durable.
    pub exchanges: Vec<Exchange>,
    /// Durable, or exclusive to the connection that declares them.
    pub queues: Vec<Queue>,
    /// Which keys of an exchange reach a queue.
    pub bindings: Vec<Binding>,
}

/// A durable exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// How it compares routing keys.
    pub kind: ExchangeKind,
}

/// How an exchange compares routing keys with those of its bindings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    /// By patterns of words with `*` and `#`.
    Topic,
    /// By equality.
    Direct,
}

/// A route from an exchange to a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The exchange.
    pub exchange: String,
    /// The queue.
    pub queue: String,
    /// The routing key, for a topic exchange a pattern.
    pub key: String,
}

/// A queue. Every queue is bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// How long it lives and who may use it.
    pub kind: QueueKind,
    /// How much it holds ready; what is delivered and not settled is bounded by the consumers' prefetch.
    pub bound: Bound,
    /// What happens to a message that does not fit.
    pub overflow: Overflow,
    /// How long a message waits ready before it expires; for ever if not given.
    pub message_ttl: Option<Duration>,
    /// Where rejected, expired and dropped messages go; nowhere if not given.
    pub dead_letter: Option<DeadLetter>,
}

/// How long a queue lives and who may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueKind {
    /// Replicated and durable; counts how often a message came back.
    Quorum {
        /// A message that came back more often is dead-lettered.
        delivery_limit: u32,
    },
    /// Durable on one node, without a count.
    Classic,
    /// Of the connection that declared it. Goes with that connection or with its last consumer.
    Exclusive,
}

/// How much a queue holds ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Number of messages.
    pub messages: u32,
    /// Sum of their bodies in bytes.
    pub bytes: u64,
}

/// What happens when a message does not fit into a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// The publisher sees [`crate::Published::Rejected`].
    RejectPublish,
    /// The oldest messages make room and are dead-lettered.
    DropHead,
}

/// Where dead-lettered messages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// The exchange.
    pub exchange: String,
    /// The routing key they get there.
    pub key: String,
}

impl Topology {
    /// Refuses names and keys that no broker takes. Every bus calls it before it declares anything.
    pub fn check(&self) -> Result<(), BusError> {
        self.exchanges.iter().try_for_each(|exchange| check_name("exchange", &exchange.name))?;
        for queue in &self.queues {
            check_name("queue", &queue.name)?;
            queue.dead_letter.iter().try_for_each(|dead| check_key(&dead.key))?;
        }
        self.bindings.iter().try_for_each(|binding| check_key(&binding.key))
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), BusError> {
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with(RESERVED) {
        return Err(BusError::Name { what, name: name.to_owned() });
    }
    Ok(())
}

/// Refuses a routing key that AMQP cannot carry.
pub(crate) fn check_key(key: &str) -> Result<(), BusError> {
    if key.len() > MAX_NAME {
        return Err(BusError::TooLarge { what: "routing key", size: key.len(), limit: MAX_NAME });
    }
    Ok(())
}
