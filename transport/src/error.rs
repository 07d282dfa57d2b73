//! Why the bus did not do what it was asked (pure).

use std::time::Duration;

/// Why the bus did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The connection is down; whether the broker has done it is unknown. It comes back by itself: see
    /// [`crate::Bus::watch`].
    #[error("the broker connection of {identity} is down")]
    Down {
        /// Whose connection.
        identity: String,
    },
    /// The connection was closed by its owner and does not come back.
    #[error("the broker connection of {identity} is closed")]
    Closed {
        /// Whose connection.
        identity: String,
    },
    /// No answer in time; whether the broker has done it, or still will, is unknown.
    #[error("{action} got no answer from the broker within {limit:?}")]
    Timeout {
        /// What was tried.
        action: &'static str,
        /// How long the answer was waited for.
        limit: Duration,
    },
    /// An alarm of the broker, memory or disk, keeps it from taking messages; whether it has this one, or still
    /// takes it, is unknown.
    #[error("the broker took no message of {identity} within {limit:?}: it is short of memory or disk")]
    Blocked {
        /// Whose connection.
        identity: String,
        /// How long the end of the alarm was waited for.
        limit: Duration,
    },
    /// The broker's user lacks a permission.
    #[error(
        "the broker does not let {identity} {action} {what} `{name}`; give this user the permission there"
    )]
    Denied {
        /// The broker's user.
        identity: String,
        /// What was tried.
        action: &'static str,
        /// Exchange or queue.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The broker said something that has no meaning here.
    #[error("{action} failed on the broker: {reason}")]
    Unexpected {
        /// What was tried.
        action: &'static str,
        /// The broker's words.
        reason: String,
    },
    /// Nobody has declared the exchange.
    #[error("exchange `{name}` does not exist on the broker; the orchestrator declares it when it starts")]
    NoExchange {
        /// The exchange.
        name: String,
    },
    /// Nobody has declared the queue, or it was deleted.
    #[error("queue `{name}` does not exist on the broker; the orchestrator declares it when it starts")]
    NoQueue {
        /// The queue.
        name: String,
    },
    /// The queue is exclusive to another connection.
    #[error("queue `{name}` is exclusive to another connection")]
    Locked {
        /// The queue.
        name: String,
    },
    /// It exists with other settings.
    #[error(
        "{what} `{name}` exists on the broker with other settings; delete it there or choose another name"
    )]
    Conflict {
        /// Exchange or queue.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// No broker takes such a name.
    #[error("`{name}` cannot name {what}; a name has 1 to 255 bytes and does not start with amq.")]
    Name {
        /// Exchange or queue.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Longer than every bus carries.
    #[error("{what} has {size} bytes, the limit is {limit}; large data travels by URL and digest")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its bytes.
        size: usize,
        /// The most that is carried.
        limit: usize,
    },
    /// As many are open as a connection may have.
    #[error("{limit} {what} are open on one connection, which is the limit")]
    TooMany {
        /// Consumers or calls.
        what: &'static str,
        /// The most that may be open.
        limit: usize,
    },
    /// A call reached no queue: nobody serves it now.
    #[error("nobody serves calls to `{key}` of exchange `{exchange}`")]
    Unserved {
        /// The exchange.
        exchange: String,
        /// The routing key.
        key: String,
    },
    /// The queue of a call is full.
    #[error("the queue for calls to `{key}` of exchange `{exchange}` is full")]
    Busy {
        /// The exchange.
        exchange: String,
        /// The routing key.
        key: String,
    },
    /// A call with this message id is under way on this connection.
    #[error("a call with this message id is under way")]
    CallUnderWay,
    /// The message is no call: nobody waits for a reply.
    #[error("the message names no queue for a reply")]
    NoReplyTo,
    /// Its connection, channel or queue is gone; the broker delivers the message again.
    #[error("the delivery from queue `{queue}` is no longer held here; it comes again")]
    Stale {
        /// The queue it came from.
        queue: String,
    },
}
