//! Messages and what becomes of them (pure).

use std::collections::BTreeMap;

use bytes::Bytes;
use uuid::Uuid;

use crate::BusError;

/// Longest body in bytes. Contexts, logs and large specs travel by URL and digest.
pub const MAX_BODY: usize = 256 * 1024;
/// All headers together, names and values, in bytes: they describe a message, they are not a second body.
pub const MAX_HEADERS: usize = 8 * 1024;

/// Header of a dead-lettered message: why it died first (`rejected`, `expired`, `maxlen`, `delivery_limit`).
pub const FIRST_DEATH_REASON: &str = "x-first-death-reason";
/// Header of a dead-lettered message: the queue in which it died first.
pub const FIRST_DEATH_QUEUE: &str = "x-first-death-queue";

/// A message as its publisher wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// The publisher's id for it. A repeated publish keeps it. Nil on a received message whose publisher gave
    /// none or one that is not a UUID.
    pub message_id: Uuid,
    /// What it belongs to; in a reply the id of the request.
    pub correlation_id: Option<Uuid>,
    /// Where a reply goes: a queue, by the default exchange. [`crate::Bus::call`] sets it.
    pub reply_to: Option<String>,
    /// Name and version of what the body holds (AMQP `type`).
    pub kind: String,
    /// A few short values beside the body.
    pub headers: BTreeMap<String, String>,
    /// The payload.
    pub body: Bytes,
}

impl Message {
    /// A message without headers.
    pub fn new(message_id: Uuid, kind: impl Into<String>, body: impl Into<Bytes>) -> Self {
        Self { message_id, kind: kind.into(), body: body.into(), ..Self::default() }
    }

    /// Refuses a message that is too large for any bus. Every bus calls it before it publishes.
    pub fn check(&self) -> Result<(), BusError> {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        check_size("message body", self.body.len(), MAX_BODY)?;
        check_size("message headers", headers, MAX_HEADERS)?;
        check_size("message type", self.kind.len(), crate::topology::MAX_NAME)
    }
}

fn check_size(what: &'static str, size: usize, limit: usize) -> Result<(), BusError> {
    if size > limit { Err(BusError::TooLarge { what, size, limit }) } else { Ok(()) }
}

/// What the broker answered to a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Published {
    /// Every queue that the key reaches has it. Without `mandatory` these may be none.
    Confirmed,
    /// No queue is bound for the key, nothing was stored. Only with `mandatory`.
    Returned,
    /// A queue refused it, mostly because it is full. Other queues may have it.
    Rejected,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_limited_to_the_byte() {
        let mut message = Message::new(Uuid::nil(), "t", vec![0; MAX_BODY]);
        message.headers.insert("h".into(), "v".repeat(MAX_HEADERS - 1));
        assert!(message.check().is_ok());
        let mut fat = message.clone();
        fat.body = vec![0; MAX_BODY + 1].into();
        assert!(matches!(fat.check(), Err(BusError::TooLarge { what: "message body", .. })));
        message.headers.insert("i".into(), String::new());
        assert!(matches!(message.check(), Err(BusError::TooLarge { what: "message headers", .. })));
    }
}
