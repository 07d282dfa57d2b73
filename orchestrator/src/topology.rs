//! Exchanges and queues that all parts share (pure).

use std::time::Duration;

use kiln_protocol::id::Pool;
use kiln_protocol::topology as names;
use kiln_transport::Topology;
use kiln_transport::topology::{
    Binding, Bound, DeadLetter, Exchange, ExchangeKind, Overflow, Queue, QueueKind,
};

/// A message that came back more often is put aside.
const DELIVERY_LIMIT: u32 = 20;
/// Bytes that a queue holds.
const QUEUE_BYTES: u64 = 256 * 1024 * 1024;
/// A question is worth nothing when its asker has stopped waiting.
const QUESTION_TTL: Duration = Duration::from_secs(15);

/// Everything that the orchestrator declares for these pools.
pub fn shared(pools: &[Pool]) -> Topology {
    let exchange = |name: &str, kind| Exchange { name: name.to_owned(), kind };
    let mut topology = Topology {
        exchanges: vec![
            exchange(names::COMMANDS, ExchangeKind::Topic),
            exchange(names::REPORTS, ExchangeKind::Topic),
            exchange(names::EVENTS, ExchangeKind::Topic),
            exchange(names::LOGS, ExchangeKind::Topic),
            exchange(names::RPC, ExchangeKind::Direct),
            exchange(names::DEAD, ExchangeKind::Topic),
        ],
        queues: vec![
            durable(names::REPORT_QUEUE, 1_000_000, Some(names::DEAD_REPORTS)),
            questions(),
            durable(names::DEAD_COMMANDS, 100_000, None),
            durable(names::DEAD_REPORTS, 100_000, None),
        ],
        bindings: vec![
            binding(names::REPORTS, names::REPORT_QUEUE, names::REPORT_BINDING),
            binding(names::RPC, names::LEASE, names::LEASE),
            binding(names::DEAD, names::DEAD_COMMANDS, names::DEAD_COMMANDS),
            binding(names::DEAD, names::DEAD_REPORTS, names::DEAD_REPORTS),
        ],
    };
    for pool in pools {
        let name = names::requests(pool);
        topology.queues.push(durable(&name, 100_000, Some(names::DEAD_COMMANDS)));
        topology.bindings.push(binding(names::COMMANDS, &name, &name));
    }
    topology
}

fn durable(name: &str, messages: u32, dead: Option<&str>) -> Queue {
    Queue {
        name: name.to_owned(),
        kind: QueueKind::Quorum { delivery_limit: DELIVERY_LIMIT },
        bound: Bound { messages, bytes: QUEUE_BYTES },
        overflow: Overflow::RejectPublish,
        message_ttl: None,
        dead_letter: dead.map(|key| DeadLetter { exchange: names::DEAD.to_owned(), key: key.to_owned() }),
    }
}

fn questions() -> Queue {
    let kind = QueueKind::Classic;
    Queue { kind, message_ttl: Some(QUESTION_TTL), ..durable(names::LEASE, 10_000, None) }
}

fn binding(exchange: &str, queue: &str, key: &str) -> Binding {
    Binding { exchange: exchange.to_owned(), queue: queue.to_owned(), key: key.to_owned() }
}
