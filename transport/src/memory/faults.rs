//! What the in-memory broker does wrong on request (pure, with the handle for tests).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use crate::topic;

/// Something that goes wrong with one publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Confirmed and gone.
    Lose,
    /// Every queue gets it twice.
    Duplicate,
    /// Confirmed, arrives later; what was published after it arrives before it.
    Delay(Duration),
    /// Returned although a queue is bound. Without `mandatory` it is lost.
    Return,
    /// Refused as if the queue were full.
    Reject,
    /// Never arrives, and the publisher waits for its confirm in vain.
    LosePublish,
    /// Arrives, and the publisher waits for its confirm in vain.
    LoseConfirm,
    /// Arrives; the publisher's connection drops before the confirm and is back after this time.
    Disconnect(Duration),
    /// Arrives; the server cancels all consumers of the queues that it reached.
    CancelConsumers,
}

impl Fault {
    /// Its name in [`Faults::counts`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lose => "lose",
            Self::Duplicate => "duplicate",
            Self::Delay(_) => "delay",
            Self::Return => "return",
            Self::Reject => "reject",
            Self::LosePublish => "lose_publish",
            Self::LoseConfirm => "lose_confirm",
            Self::Disconnect(_) => "disconnect",
            Self::CancelConsumers => "cancel_consumers",
        }
    }
}

/// Name of [`FaultRates::lose_settlement`] in [`Faults::counts`].
const LOSE_SETTLEMENT: &str = "lose_settlement";

/// How often things go wrong by chance: each a probability from 0 to 1, by default 0. A publish meets at most
/// one fault.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FaultRates {
    /// [`Fault::Lose`].
    pub lose: f64,
    /// [`Fault::Duplicate`].
    pub duplicate: f64,
    /// [`Fault::Delay`], up to `longest_delay`.
    pub delay: f64,
    /// [`Fault::Return`].
    pub return_to_publisher: f64,
    /// [`Fault::Reject`].
    pub reject: f64,
    /// [`Fault::LosePublish`].
    pub lose_publish: f64,
    /// [`Fault::LoseConfirm`].
    pub lose_confirm: f64,
    /// [`Fault::Disconnect`], for up to `longest_outage`.
    pub disconnect: f64,
    /// [`Fault::CancelConsumers`].
    pub cancel_consumers: f64,
    /// The connection drops before an ack, requeue or reject arrives, for up to `longest_outage`: the message
    /// comes again although it was dealt with.
    pub lose_settlement: f64,
    /// Longest random delay.
    pub longest_delay: Duration,
    /// Longest random outage.
    pub longest_outage: Duration,
}

/// Makes things go wrong on a [`super::MemoryBroker`].
#[derive(Debug, Clone)]
pub struct Faults {
    shared: Arc<Shared>,
}

impl Faults {
    pub(super) fn of(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// From here on faults happen by chance.
    pub fn set_rates(&self, rates: FaultRates) {
        self.shared.with(|broker, _| broker.faults.rates = rates);
    }

    /// The next publish whose routing key matches the topic pattern meets this fault. Plans for one key are met
    /// in the order in which they were made. Replies match [`Faults::REPLIES`].
    pub fn plan(&self, pattern: impl Into<String>, fault: Fault) {
        let pattern = pattern.into();
        self.shared.with(|broker, _| broker.faults.planned.push_back((pattern, fault)));
    }

    /// Pattern of the routing keys of replies to calls.
    pub const REPLIES: &'static str = "amq.rabbitmq.reply-to.#";

    /// How many planned faults were not met yet.
    pub fn planned(&self) -> usize {
        self.shared.with(|broker, _| broker.faults.planned.len())
    }

    /// How often each fault happened, by [`Fault::name`] (`lose_settlement` for lost settlements).
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.shared.with(|broker, _| broker.faults.counts.clone())
    }

    /// Drops every connection of an identity. They are back after the outage.
    pub fn disconnect(&self, identity: &str, outage: Duration) {
        self.shared.with(|broker, now| broker.disconnect_identity(identity, outage, now));
    }

    /// Drops every connection, as a broker does that restarts; new ones are down as long. Durable queues keep
    /// their messages.
    pub fn restart_broker(&self, outage: Duration) {
        self.shared.with(|broker, now| broker.restart(outage, now));
    }

    /// The server cancels every consumer of the queue.
    pub fn cancel_consumers(&self, queue: &str) {
        self.shared.with(|broker, now| broker.cancel_consumers(queue, now));
    }
}

/// Which faults happen next.
#[derive(Debug)]
pub(super) struct Faulty {
    pub(super) random: fastrand::Rng,
    pub(super) rates: FaultRates,
    /// Planned by pattern of the routing key.
    pub(super) planned: VecDeque<(String, Fault)>,
    pub(super) counts: BTreeMap<&'static str, u64>,
}

impl Faulty {
    pub(super) fn new(seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        Self { random, rates: FaultRates::default(), planned: VecDeque::new(), counts: BTreeMap::new() }
    }

    /// What goes wrong with a publish for this key.
    pub(super) fn decide(&mut self, key: &str) -> Option<Fault> {
        let planned = self.planned.iter().position(|(pattern, _)| topic::matches(pattern, key));
        let planned = planned.and_then(|at| self.planned.remove(at)).map(|(_, fault)| fault);
        let fault = planned.or_else(|| self.chance())?;
        self.count(fault.name());
        Some(fault)
    }

    /// One throw for each publish, whatever the rates are.
    fn chance(&mut self) -> Option<Fault> {
        let mut throw = self.random.f64();
        let rates = self.rates;
        for (rate, fault) in [
            (rates.lose, Fault::Lose),
            (rates.duplicate, Fault::Duplicate),
            (rates.delay, Fault::Delay(rates.longest_delay)),
            (rates.return_to_publisher, Fault::Return),
            (rates.reject, Fault::Reject),
            (rates.lose_publish, Fault::LosePublish),
            (rates.lose_confirm, Fault::LoseConfirm),
            (rates.disconnect, Fault::Disconnect(rates.longest_outage)),
            (rates.cancel_consumers, Fault::CancelConsumers),
        ] {
            if throw < rate {
                return Some(self.shorten(fault));
            }
            throw -= rate;
        }
        None
    }

    fn shorten(&mut self, fault: Fault) -> Fault {
        match fault {
            Fault::Delay(longest) => Fault::Delay(longest.mul_f64(self.random.f64())),
            Fault::Disconnect(longest) => Fault::Disconnect(longest.mul_f64(self.random.f64())),
            other => other,
        }
    }

    /// Whether the connection drops before a settlement arrives, and for how long.
    pub(super) fn lose_settlement(&mut self) -> Option<Duration> {
        if self.random.f64() >= self.rates.lose_settlement {
            return None;
        }
        self.count(LOSE_SETTLEMENT);
        Some(self.rates.longest_outage.mul_f64(self.random.f64()))
    }

    fn count(&mut self, name: &'static str) {
        *self.counts.entry(name).or_default() += 1;
    }
}
