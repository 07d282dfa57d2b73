//! State of the in-memory broker: declares, routes, dead-letters (pure: time is an argument).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::channel::Channel;
use super::connection::{ConnectionEntry, REPLIES};
use super::faults::{Fault, Faulty};
use super::queue::{QueueState, Stored};
use super::{ChannelId, ConnectionId};
use crate::message::{FIRST_DEATH_QUEUE, FIRST_DEATH_REASON};
use crate::topology::{Binding, Exchange, ExchangeKind, Queue, QueueKind, Topology};
use crate::{BusError, Message, Published, topic};

/// The exchange that reaches every queue by its name.
const DEFAULT_EXCHANGE: &str = "";
/// Most messages that a fault delays at once. What is above is not delayed.
const MAX_IN_FLIGHT: usize = 10_000;

#[derive(Debug)]
pub(super) struct Broker {
    exchanges: BTreeMap<String, ExchangeState>,
    pub(super) queues: BTreeMap<String, QueueState>,
    pub(super) connections: BTreeMap<ConnectionId, ConnectionEntry>,
    pub(super) channels: BTreeMap<ChannelId, Channel>,
    /// Delayed by a fault, by the time of arrival.
    in_flight: BTreeMap<(Instant, u64), (Target, Stored)>,
    pub(super) faults: Faulty,
    /// When the last outage of the whole broker ends.
    pub(super) out_until: Option<Instant>,
    /// Told when something is due earlier than those who wait know.
    pub(super) sooner: Arc<Notify>,
    last_number: u64,
}

#[derive(Debug)]
struct ExchangeState {
    kind: ExchangeKind,
    /// Keys and queues.
    bindings: BTreeSet<(String, String)>,
}

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    Queue(String),
    /// A call waiting on a connection since it was last established.
    Caller {
        connection: ConnectionId,
        epoch: u64,
    },
}

/// Why a message was dead-lettered, as its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    Rejected,
    Expired,
    MaxLength,
    DeliveryLimit,
}

impl Death {
    const fn label(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Expired => "expired",
            Self::MaxLength => "maxlen",
            Self::DeliveryLimit => "delivery_limit",
        }
    }
}

/// What a publisher sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Published(Published),
    /// Nothing, until it gives up.
    Silence,
    /// The end of its connection.
    Disconnected,
}

impl Broker {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            exchanges: BTreeMap::new(),
            queues: BTreeMap::new(),
            connections: BTreeMap::new(),
            channels: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            faults: Faulty::new(seed),
            out_until: None,
            sooner: Arc::default(),
            last_number: 0,
        }
    }

    /// A number that is greater than all before it: an id, or a position in a queue.
    pub(super) fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    pub(super) fn declare(&mut self, from: ConnectionId, topology: &Topology) -> Result<(), BusError> {
        self.up(from)?;
        topology.exchanges.iter().try_for_each(|exchange| self.declare_exchange(exchange))?;
        topology.queues.iter().try_for_each(|queue| self.declare_queue(from, queue))?;
        topology.bindings.iter().try_for_each(|binding| self.bind(from, binding))
    }

    fn declare_exchange(&mut self, exchange: &Exchange) -> Result<(), BusError> {
        let fresh = || ExchangeState { kind: exchange.kind, bindings: BTreeSet::new() };
        let state = self.exchanges.entry(exchange.name.clone()).or_insert_with(fresh);
        if state.kind == exchange.kind {
            return Ok(());
        }
        Err(BusError::Conflict { what: "exchange", name: exchange.name.clone() })
    }

    fn declare_queue(&mut self, from: ConnectionId, queue: &Queue) -> Result<(), BusError> {
        if !self.queues.contains_key(&queue.name) {
            let owner = (queue.kind == QueueKind::Exclusive).then_some(from);
            self.queues.insert(queue.name.clone(), QueueState::new(queue.clone(), owner));
            return Ok(());
        }
        if self.queue(from, &queue.name)?.settings == *queue {
            return Ok(());
        }
        Err(BusError::Conflict { what: "queue", name: queue.name.clone() })
    }

    fn bind(&mut self, from: ConnectionId, binding: &Binding) -> Result<(), BusError> {
        self.queue(from, &binding.queue)?;
        let exchange = self.exchanges.get_mut(&binding.exchange);
        let exchange = exchange.ok_or_else(|| BusError::NoExchange { name: binding.exchange.clone() })?;
        exchange.bindings.insert((binding.key.clone(), binding.queue.clone()));
        Ok(())
    }

    /// A queue that the connection may use.
    pub(super) fn queue(&mut self, from: ConnectionId, name: &str) -> Result<&mut QueueState, BusError> {
        self.up(from)?;
        match self.queues.get_mut(name) {
            None => Err(BusError::NoQueue { name: name.to_owned() }),
            Some(queue) if queue.owner.is_some_and(|owner| owner != from) => {
                Err(BusError::Locked { name: name.to_owned() })
            }
            Some(queue) => Ok(queue),
        }
    }

    pub(super) fn publish(
        &mut self,
        from: ConnectionId,
        letter: Letter<'_>,
        now: Instant,
    ) -> Result<Answer, BusError> {
        let user_id = self.up(from)?.identity.clone();
        let targets = self.route(letter.exchange, letter.key)?;
        let unroutable = if letter.mandatory { Published::Returned } else { Published::Confirmed };
        if targets.is_empty() {
            return Ok(Answer::Published(unroutable));
        }
        Ok(match self.faults.decide(letter.key) {
            Some(Fault::Lose) => Answer::Published(Published::Confirmed),
            Some(Fault::Return) => Answer::Published(unroutable),
            Some(Fault::Reject) => Answer::Published(Published::Rejected),
            Some(Fault::LosePublish) => Answer::Silence,
            fault => {
                let published = self.store(&targets, &letter.stored(user_id), fault, now);
                self.answer(from, &targets, fault, published, now)
            }
        })
    }

    fn answer(
        &mut self,
        from: ConnectionId,
        targets: &BTreeSet<Target>,
        fault: Option<Fault>,
        published: Published,
        now: Instant,
    ) -> Answer {
        match fault {
            Some(Fault::LoseConfirm) => return Answer::Silence,
            Some(Fault::Disconnect(outage)) => {
                self.disconnect(from, outage, now);
                return Answer::Disconnected;
            }
            Some(Fault::CancelConsumers) => {
                for target in targets {
                    if let Target::Queue(name) = target {
                        self.cancel_consumers(name, now);
                    }
                }
            }
            _ => {}
        }
        Answer::Published(published)
    }

    fn store(
        &mut self,
        targets: &BTreeSet<Target>,
        stored: &Stored,
        fault: Option<Fault>,
        now: Instant,
    ) -> Published {
        let copies = if fault == Some(Fault::Duplicate) { 2 } else { 1 };
        let mut published = Published::Confirmed;
        for target in targets.iter().flat_map(|target| std::iter::repeat_n(target, copies)) {
            match fault {
                Some(Fault::Delay(delay)) if self.in_flight.len() < MAX_IN_FLIGHT => {
                    let number = self.number();
                    self.in_flight.insert((now + delay, number), (target.clone(), stored.clone()));
                }
                _ if self.arrive(target, stored.clone(), now) => {}
                _ => published = Published::Rejected,
            }
        }
        published
    }

    /// The queues that a message reaches, each once.
    fn route(&self, exchange: &str, key: &str) -> Result<BTreeSet<Target>, BusError> {
        if exchange == DEFAULT_EXCHANGE {
            return Ok(self.by_name(key).into_iter().collect());
        }
        let state = self.exchanges.get(exchange);
        let state = state.ok_or_else(|| BusError::NoExchange { name: exchange.to_owned() })?;
        let reached = |pattern: &str| match state.kind {
            ExchangeKind::Topic => topic::matches(pattern, key),
            ExchangeKind::Direct => pattern == key,
        };
        let hits = state.bindings.iter().filter(|(pattern, _)| reached(pattern));
        Ok(hits.map(|(_, queue)| Target::Queue(queue.clone())).collect())
    }

    fn by_name(&self, key: &str) -> Option<Target> {
        if let Some(address) = key.strip_prefix(REPLIES) {
            let (connection, epoch) = address.split_once('.')?;
            let connection = ConnectionId(connection.parse().ok()?);
            return Some(Target::Caller { connection, epoch: epoch.parse().ok()? });
        }
        self.queues.contains_key(key).then(|| Target::Queue(key.to_owned()))
    }

    /// Whether the target took it.
    fn arrive(&mut self, target: &Target, stored: Stored, now: Instant) -> bool {
        match target {
            Target::Queue(name) => {
                let Ok(dropped) = self.push(name, stored, now) else { return false };
                self.bury(name, dropped, Death::MaxLength, now);
            }
            Target::Caller { connection, epoch } => self.hand_over(*connection, *epoch, stored.message),
        }
        true
    }

    fn push(&mut self, name: &str, stored: Stored, now: Instant) -> Result<Vec<Stored>, super::queue::Full> {
        let position = self.number();
        // A queue that went while the message was under way takes the message with it.
        let Some(queue) = self.queues.get_mut(name) else { return Ok(Vec::new()) };
        let dropped = queue.push(position, stored, now)?;
        self.pump(name);
        Ok(dropped)
    }

    /// Sends dead messages where their queue says. A target that is full loses them, as dead-lettering at most
    /// once does.
    pub(super) fn bury(&mut self, queue: &str, dead: Vec<Stored>, death: Death, now: Instant) {
        let mut work: VecDeque<_> = dead.into_iter().map(|dead| (queue.to_owned(), dead, death)).collect();
        while let Some((queue, dead, death)) = work.pop_front() {
            let Some(letter) = self.dead_letter(&queue, dead, death) else { continue };
            for target in self.route(&letter.exchange, &letter.key).unwrap_or_default() {
                let Target::Queue(name) = target else { continue };
                let dropped = self.push(&name, letter.clone(), now).unwrap_or_default();
                work.extend(dropped.into_iter().map(|dropped| (name.clone(), dropped, Death::MaxLength)));
            }
        }
    }

    /// What goes to the dead-letter exchange; nothing if there is none, or if the message runs in a circle.
    fn dead_letter(&self, queue: &str, mut dead: Stored, death: Death) -> Option<Stored> {
        let settings = &self.queues.get(queue)?.settings;
        let address = settings.dead_letter.as_ref()?;
        if death != Death::Rejected {
            if dead.buried_by.iter().any(|earlier| earlier == queue) {
                return None;
            }
            dead.buried_by.push(queue.to_owned());
        }
        let headers = &mut dead.message.headers;
        headers.entry(FIRST_DEATH_REASON.to_owned()).or_insert_with(|| death.label().to_owned());
        headers.entry(FIRST_DEATH_QUEUE.to_owned()).or_insert_with(|| queue.to_owned());
        dead.exchange.clone_from(&address.exchange);
        dead.key.clone_from(&address.key);
        Some(Stored { redelivered: false, delivery_count: 0, expires_at: None, ..dead })
    }

    pub(super) fn delete_queue(&mut self, name: &str) {
        for id in self.queues.remove(name).into_iter().flat_map(|queue| queue.consumers) {
            self.stop(id);
        }
        for exchange in self.exchanges.values_mut() {
            exchange.bindings.retain(|(_, queue)| queue != name);
        }
        // Nothing that was in it comes back, also not into a later queue of that name.
        for channel in self.channels.values_mut().filter(|channel| channel.queue == name) {
            channel.unsettled.clear();
        }
    }

    /// Does what is due.
    pub(super) fn advance(&mut self, now: Instant) {
        while self.next_due().is_some_and(|due| due <= now) {
            self.reconnect(now);
            self.land(now);
            self.expire(now);
        }
    }

    fn land(&mut self, now: Instant) {
        while let Some(entry) = self.in_flight.first_entry()
            && entry.key().0 <= now
        {
            let (target, stored) = entry.remove();
            // Its publisher has its confirm: a queue that is full now loses it.
            self.arrive(&target, stored, now);
        }
    }

    fn expire(&mut self, now: Instant) {
        let due = |queue: &QueueState| queue.expires_at().is_some_and(|at| at <= now);
        let names: Vec<_> =
            self.queues.iter().filter(|(_, queue)| due(queue)).map(|(name, _)| name.clone()).collect();
        for name in names {
            let expired = self.queues.get_mut(&name).map(|queue| queue.take_expired(now));
            self.bury(&name, expired.unwrap_or_default(), Death::Expired, now);
        }
    }

    /// When something happens by itself next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let landing = self.in_flight.first_key_value().map(|((at, _), _)| *at);
        let expiry = self.queues.values().filter_map(QueueState::expires_at).min();
        let reconnect = self.connections.values().filter_map(ConnectionEntry::returns_at).min();
        [landing, expiry, reconnect].into_iter().flatten().min()
    }
}

/// A message with its address.
#[derive(Debug)]
pub(super) struct Letter<'a> {
    pub(super) exchange: &'a str,
    pub(super) key: &'a str,
    pub(super) message: Message,
    pub(super) mandatory: bool,
}

impl Letter<'_> {
    fn stored(self, user_id: String) -> Stored {
        Stored {
            message: self.message,
            exchange: self.exchange.to_owned(),
            key: self.key.to_owned(),
            user_id,
            redelivered: false,
            delivery_count: 0,
            buried_by: Vec::new(),
            expires_at: None,
        }
    }
}
