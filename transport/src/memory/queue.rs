//! One queue of the in-memory broker (pure).

use std::collections::{BTreeMap, VecDeque};

use tokio::time::Instant;

use super::{ChannelId, ConnectionId};
use crate::Message;
use crate::topology::{Overflow, Queue, QueueKind};

/// A message in the broker.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) message: Message,
    pub(super) exchange: String,
    pub(super) key: String,
    /// Identity of the connection that published it.
    pub(super) user_id: String,
    pub(super) redelivered: bool,
    pub(super) delivery_count: u32,
    /// Queues that it left without being rejected; it never comes back to one of them that way.
    pub(super) buried_by: Vec<String>,
    pub(super) expires_at: Option<Instant>,
}

impl Stored {
    fn bytes(&self) -> u64 {
        self.message.body.len() as u64
    }
}

/// The queue refuses a message because it is full.
#[derive(Debug)]
pub(super) struct Full;

#[derive(Debug)]
pub(super) struct QueueState {
    pub(super) settings: Queue,
    /// The connection that an exclusive queue belongs to.
    pub(super) owner: Option<ConnectionId>,
    /// Consumers, the one whose turn is next first.
    pub(super) consumers: VecDeque<ChannelId>,
    /// By position: what comes back takes its old place.
    ready: BTreeMap<u64, Stored>,
    bytes: u64,
}

impl QueueState {
    pub(super) fn new(settings: Queue, owner: Option<ConnectionId>) -> Self {
        Self { settings, owner, consumers: VecDeque::new(), ready: BTreeMap::new(), bytes: 0 }
    }

    pub(super) fn depth(&self) -> usize {
        self.ready.len()
    }

    /// Takes a new message; answers what had to make room for it.
    pub(super) fn push(
        &mut self,
        position: u64,
        mut stored: Stored,
        now: Instant,
    ) -> Result<Vec<Stored>, Full> {
        let bound = self.settings.bound;
        let reject = self.settings.overflow == Overflow::RejectPublish;
        let full = self.ready.len() >= bound.messages as usize || self.bytes + stored.bytes() > bound.bytes;
        if reject && full {
            return Err(Full);
        }
        stored.expires_at = self.settings.message_ttl.map(|ttl| now + ttl);
        self.put_back(position, stored);
        let mut dropped = Vec::new();
        while self.ready.len() > bound.messages as usize || self.bytes > bound.bytes {
            dropped.extend(self.pop().map(|(_, oldest)| oldest));
        }
        Ok(dropped)
    }

    /// Puts a message back into its place. It fits: how much is out is bounded by prefetch.
    pub(super) fn put_back(&mut self, position: u64, stored: Stored) {
        self.bytes += stored.bytes();
        self.ready.insert(position, stored);
    }

    pub(super) fn pop(&mut self) -> Option<(u64, Stored)> {
        let (position, stored) = self.ready.pop_first()?;
        self.bytes -= stored.bytes();
        Some((position, stored))
    }

    /// When the oldest message expires. One queue has one time to live, so the oldest is the first.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        self.ready.first_key_value().and_then(|(_, stored)| stored.expires_at)
    }

    pub(super) fn take_expired(&mut self, now: Instant) -> Vec<Stored> {
        let mut expired = Vec::new();
        while self.expires_at().is_some_and(|at| at <= now) {
            expired.extend(self.pop().map(|(_, stored)| stored));
        }
        expired
    }

    /// Counts one more return of a message; whether it came back too often.
    pub(super) fn count_return(&self, stored: &mut Stored) -> bool {
        stored.redelivered = true;
        let QueueKind::Quorum { delivery_limit } = self.settings.kind else { return false };
        stored.delivery_count = stored.delivery_count.saturating_add(1);
        stored.delivery_count > delivery_limit
    }
}
