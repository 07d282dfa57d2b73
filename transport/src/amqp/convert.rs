//! Messages as AMQP properties and back, and settings as arguments of a declaration (pure).

use std::time::Duration;

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use uuid::Uuid;

use crate::topology::{MAX_NAME, Overflow, Queue, QueueKind};
use crate::{BusError, Message};

/// Survives a restart of the broker.
const PERSISTENT: u8 = 2;
/// How often a quorum queue got a message back.
const DELIVERY_COUNT: &str = "x-delivery-count";

/// A short string of the protocol.
pub(super) fn short(what: &'static str, text: &str) -> Result<ShortString, BusError> {
    let too_large = |_| BusError::TooLarge { what, size: text.len(), limit: MAX_NAME };
    ShortString::try_new(text).map_err(too_large)
}

/// The properties of a message that `identity` publishes.
pub(super) fn properties(message: &Message, identity: &str) -> Result<BasicProperties, BusError> {
    let mut headers = FieldTable::default();
    for (name, value) in &message.headers {
        headers.insert(short("header name", name)?, AMQPValue::LongString(value.as_str().into()));
    }
    let mut properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(PERSISTENT)
        .with_message_id(message.message_id.to_string().into())
        .with_type(short("message type", &message.kind)?)
        .with_user_id(short("user name", identity)?)
        .with_headers(headers);
    if let Some(id) = message.correlation_id {
        properties = properties.with_correlation_id(id.to_string().into());
    }
    if let Some(address) = &message.reply_to {
        properties = properties.with_reply_to(short("reply address", address)?);
    }
    Ok(properties)
}

/// What arrived.
pub(super) struct Received {
    pub(super) message: Message,
    pub(super) user_id: Option<String>,
    pub(super) delivery_count: u32,
}

/// Reads what arrived. Headers that are no text are left out.
pub(super) fn received(properties: &BasicProperties, body: Vec<u8>) -> Received {
    let text = |value: &Option<ShortString>| value.as_ref().map(|text| text.as_str().to_owned());
    let id =
        |value: &Option<ShortString>| value.as_ref().and_then(|text| Uuid::parse_str(text.as_str()).ok());
    let headers = properties.headers().iter().flat_map(FieldTable::inner);
    let strings =
        headers.clone().filter_map(|(name, value)| Some((name.as_str().to_owned(), string(value)?)));
    let count =
        headers.filter(|(name, _)| name.as_str() == DELIVERY_COUNT).find_map(|(_, value)| number(value));
    Received {
        message: Message {
            message_id: id(properties.message_id()).unwrap_or_default(),
            correlation_id: id(properties.correlation_id()),
            reply_to: text(properties.reply_to()),
            kind: text(properties.kind()).unwrap_or_default(),
            headers: strings.collect(),
            body: Bytes::from(body),
        },
        user_id: text(properties.user_id()),
        delivery_count: count.unwrap_or_default(),
    }
}

fn string(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str().to_owned()),
        _ => None,
    }
}

fn number(value: &AMQPValue) -> Option<u32> {
    let wide = match value {
        AMQPValue::LongLongInt(number) => *number,
        AMQPValue::LongInt(number) => i64::from(*number),
        AMQPValue::LongUInt(number) => i64::from(*number),
        AMQPValue::ShortInt(number) => i64::from(*number),
        AMQPValue::ShortUInt(number) => i64::from(*number),
        AMQPValue::ShortShortInt(number) => i64::from(*number),
        AMQPValue::ShortShortUInt(number) => i64::from(*number),
        _ => return None,
    };
    Some(u32::try_from(wide.max(0)).unwrap_or(u32::MAX))
}

/// The arguments of a queue. All of them are known to RabbitMQ 3.10, and every limit is explicit: later versions
/// have other defaults.
pub(super) fn arguments(queue: &Queue) -> FieldTable {
    let mut table = FieldTable::default();
    let mut set = |name: &str, value: AMQPValue| {
        table.insert(name.into(), value);
    };
    set("x-max-length", integer(u64::from(queue.bound.messages)));
    set("x-max-length-bytes", integer(queue.bound.bytes));
    let overflow = match queue.overflow {
        Overflow::RejectPublish => "reject-publish",
        Overflow::DropHead => "drop-head",
    };
    set("x-overflow", word(overflow));
    if let Some(ttl) = queue.message_ttl {
        set("x-message-ttl", integer(millis(ttl)));
    }
    if let Some(dead) = &queue.dead_letter {
        set("x-dead-letter-exchange", word(&dead.exchange));
        set("x-dead-letter-routing-key", word(&dead.key));
    }
    match queue.kind {
        QueueKind::Quorum { delivery_limit } => {
            set("x-queue-type", word("quorum"));
            set("x-delivery-limit", integer(u64::from(delivery_limit)));
            // With any other overflow the broker silently falls back to at most once.
            if queue.dead_letter.is_some() && queue.overflow == Overflow::RejectPublish {
                set("x-dead-letter-strategy", word("at-least-once"));
            }
        }
        QueueKind::Classic | QueueKind::Exclusive => set("x-queue-type", word("classic")),
    }
    table
}

fn word(text: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text))
}

fn integer(number: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(number).unwrap_or(i64::MAX))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Bound, DeadLetter};

    fn queue(kind: QueueKind, overflow: Overflow) -> Queue {
        let dead_letter = Some(DeadLetter { exchange: "kiln.dead".into(), key: "dead".into() });
        let bound = Bound { messages: 5, bytes: 6 };
        let message_ttl = Some(Duration::from_secs(7));
        Queue { name: "q".into(), kind, bound, overflow, message_ttl, dead_letter }
    }

    fn shown(queue: &Queue) -> Vec<String> {
        let table = arguments(queue);
        table.inner().iter().map(|(name, value)| format!("{}={value:?}", name.as_str())).collect()
    }

    #[test]
    fn a_quorum_queue_dead_letters_at_least_once_only_if_it_rejects() {
        let kind = QueueKind::Quorum { delivery_limit: 3 };
        let safe = shown(&queue(kind, Overflow::RejectPublish)).join(" ");
        assert!(safe.contains("x-dead-letter-strategy") && safe.contains("x-delivery-limit"), "{safe}");
        let lossy = shown(&queue(kind, Overflow::DropHead)).join(" ");
        assert!(!lossy.contains("x-dead-letter-strategy"), "{lossy}");
    }

    #[test]
    fn a_classic_queue_gets_no_argument_of_a_quorum_queue() {
        for kind in [QueueKind::Classic, QueueKind::Exclusive] {
            let shown = shown(&queue(kind, Overflow::RejectPublish)).join(" ");
            assert!(!shown.contains("delivery-limit") && !shown.contains("strategy"), "{shown}");
            assert!(shown.contains("x-queue-type") && shown.contains("x-message-ttl"), "{shown}");
        }
    }

    #[test]
    fn a_message_comes_back_as_it_went() {
        let mut message = Message::new(Uuid::now_v7(), "build.request.v1", "{}");
        message.correlation_id = Some(Uuid::now_v7());
        message.reply_to = Some("somewhere".into());
        message.headers.insert("ä".into(), "ö".into());
        let sent = properties(&message, "alpha").unwrap();
        let back = received(&sent, message.body.to_vec());
        assert_eq!((back.message, back.user_id, back.delivery_count), (message, Some("alpha".into()), 0));
    }

    #[test]
    fn foreign_properties_are_read_as_far_as_they_go() {
        let mut headers = FieldTable::default();
        headers.insert(DELIVERY_COUNT.into(), AMQPValue::LongLongInt(4));
        headers.insert("flag".into(), AMQPValue::Boolean(true));
        headers.insert("no text".into(), AMQPValue::LongString(LongString::from(vec![0xff])));
        let properties = BasicProperties::default().with_message_id("17".into()).with_headers(headers);
        let back = received(&properties, Vec::new());
        assert_eq!((back.message.message_id, back.user_id, back.delivery_count), (Uuid::nil(), None, 4));
        assert!(back.message.headers.is_empty());
    }

    #[test]
    fn what_no_short_string_holds_is_refused() {
        let mut message = Message::new(Uuid::nil(), "t", "");
        message.headers.insert("n".repeat(256), String::new());
        let error = properties(&message, "alpha").unwrap_err();
        assert_eq!(error, BusError::TooLarge { what: "header name", size: 256, limit: 255 });
    }
}
