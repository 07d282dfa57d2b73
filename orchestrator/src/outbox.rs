//! From the record to the bus (shell).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use kiln_protocol::envelope::{Message as _, encode};
use kiln_protocol::id::{MessageId, Pool};
use kiln_protocol::message::Hint;
use kiln_protocol::{BuildId, topology};
use kiln_transport::crash::{self, CrashPoint};
use kiln_transport::{Bus, Message, Published};

use crate::build::Micros;
use crate::core::{CoreError, Orchestrator, WINDOW};
use crate::decide::SECOND;
use crate::schedule::{self, Wait};
use crate::store::{Pending, Which};

/// Messages of one round.
const BATCH: i64 = 100;
/// Nobody else sends a message that somebody took for this long; longer than a round may take.
const LOCK: Micros = 30 * SECOND;
/// Longest pause before a message is tried again.
const LONGEST_PAUSE: Micros = 60 * SECOND;
/// Hints beyond the free slots: an agent that becomes free finds one at once.
const AHEAD: usize = 1;
/// A pause after which whoever waits for something due looks anyway.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Orchestrator {
    /// Sends what committed changes cause. Gives the number of messages that the bus took.
    pub async fn relay(&self, bus: &Bus) -> Result<usize, CoreError> {
        let mut tx = self.store.write().await?;
        let (until, now) = (tx.now().saturating_add(LOCK), tx.now());
        let taken = tx.take_outgoing(until, BATCH).await?;
        tx.commit().await?;
        if taken.is_empty() {
            return Ok(0);
        }
        let mut sent = Vec::new();
        let mut failed = Vec::new();
        let mut broken = None;
        // No transaction is open across the network.
        for message in taken {
            let published = match &broken {
                None => publish(bus, &message).await,
                Some(error) => Err(Unsent::Broken(String::clone(error))),
            };
            let again_at = now.saturating_add(pause(message.tries));
            match published {
                Ok(()) => sent.push(message.id),
                Err(Unsent::Full) => failed.push((message.id, again_at, FULL.to_owned())),
                Err(Unsent::Broken(error)) => {
                    failed.push((message.id, again_at, error.clone()));
                    // Each would wait for its own timeout.
                    broken = Some(error);
                }
            }
        }
        crash::reach(CrashPoint::OutboxSent);
        let mut tx = self.store.write().await?;
        for id in &sent {
            tx.sent(*id).await?;
        }
        for (id, again_at, error) in &failed {
            tracing::warn!(id, error, "a message was not taken by the bus");
            tx.not_sent(*id, *again_at, error).await?;
        }
        tx.commit().await?;
        Ok(sent.len())
    }

    /// Tops up the hints of every pool: as many as there are builds that an agent could take now.
    pub async fn hint(&self, bus: &Bus) -> Result<usize, CoreError> {
        let mut tx = self.store.read().await?;
        let situation = self.situation(&mut tx, None, Which::Due, WINDOW).await?;
        drop(tx);
        let limits = self.settings.limits;
        let order =
            schedule::order(&situation.waiting, &situation.running, &situation.agents, limits, situation.now);
        let mut hinted = 0;
        let pool_of: BTreeMap<BuildId, &Pool> = situation.waiting.iter().map(|w| (w.id, &w.pool)).collect();
        for pool in pool_of.values().copied().collect::<BTreeSet<_>>() {
            let due = order.iter().filter(|(id, wait)| {
                matches!(wait, Wait::Next | Wait::Busy { .. }) && pool_of.get(id) == Some(&pool)
            });
            let free: usize =
                situation.agents.iter().filter(|a| a.pools.contains(pool)).map(|a| a.free as usize).sum();
            let queue = topology::requests(pool);
            let Ok(ready) = bus.queue_depth(&queue).await else { continue };
            let ready = usize::try_from(ready).unwrap_or(usize::MAX);
            let wanted = (free + AHEAD).saturating_sub(ready);
            for (id, _) in due.skip(ready).take(wanted) {
                let body = encode(&Hint { build: *id })?;
                let message = Message::new(MessageId::generate().as_uuid(), Hint::TYPE, Bytes::from(body));
                // A hint that is lost costs time only: there is another round.
                if let Ok(Published::Confirmed) = bus.publish(topology::COMMANDS, &queue, message, true).await
                {
                    hinted += 1;
                    crash::reach(CrashPoint::HintSent);
                }
            }
        }
        Ok(hinted)
    }
}

/// What a message waits for that a queue refused.
const FULL: &str = "a queue is full";

/// Why the bus did not take a message.
enum Unsent {
    /// A queue refused it; others may have room.
    Full,
    /// The bus does not answer.
    Broken(String),
}

async fn publish(bus: &Bus, pending: &Pending) -> Result<(), Unsent> {
    let message = Message::new(pending.message.as_uuid(), pending.kind.clone(), pending.body.clone());
    // Events and cancels may have no listener; both are hints.
    match bus.publish(&pending.exchange, &pending.key, message, false).await {
        Ok(Published::Confirmed | Published::Returned) => Ok(()),
        Ok(Published::Rejected) => Err(Unsent::Full),
        Err(error) => Err(Unsent::Broken(crate::error::chain(&error))),
    }
}

fn pause(tries: u32) -> Micros {
    SECOND.saturating_mul(1 << tries.min(6)).min(LONGEST_PAUSE)
}
