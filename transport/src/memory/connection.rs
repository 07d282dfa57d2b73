//! Connections of the in-memory broker and the calls that wait on them (pure).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::ConnectionId;
use super::broker::Broker;
use crate::{BusError, ConnectionState, Message};

/// Reply addresses start with this, as those of RabbitMQ's direct reply-to do.
pub(super) const REPLIES: &str = "amq.rabbitmq.reply-to.";
/// Most calls that wait on one connection: an agent has one per slot and a few more.
const MAX_CALLS: usize = 1024;

#[derive(Debug)]
pub(super) struct ConnectionEntry {
    pub(super) identity: String,
    status: Status,
    /// How often it was established.
    epoch: u64,
    calls: BTreeMap<Uuid, PendingCall>,
    /// Told when the status changes.
    pub(super) changed: Arc<Notify>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Up,
    Down { until: Instant },
    Closed,
}

#[derive(Debug)]
struct PendingCall {
    /// Its place among all calls: ids are random, and what happens here must not be.
    place: u64,
    reply: Option<Message>,
    wake: Arc<Notify>,
}

impl ConnectionEntry {
    pub(super) fn state(&self) -> ConnectionState {
        match self.status {
            Status::Up => ConnectionState::Connected { epoch: self.epoch },
            Status::Down { .. } => ConnectionState::Down,
            Status::Closed => ConnectionState::Closed,
        }
    }

    pub(super) fn returns_at(&self) -> Option<Instant> {
        if let Status::Down { until } = self.status { Some(until) } else { None }
    }

    fn set(&mut self, status: Status) {
        self.status = status;
        self.changed.notify_waiters();
        // Whoever waits for a reply sees that it cannot come any more.
        let mut calls: Vec<_> = self.calls.values().collect();
        calls.sort_by_key(|call| call.place);
        for call in calls {
            call.wake.notify_waiters();
        }
    }
}

impl Broker {
    /// A new connection. While the broker is out it is down, as one that was there before.
    pub(super) fn connect(&mut self, identity: String, now: Instant) -> ConnectionId {
        let id = ConnectionId(self.number());
        let (status, epoch) = match self.out_until.filter(|until| *until > now) {
            Some(until) => (Status::Down { until }, 0),
            None => (Status::Up, 1),
        };
        let (calls, changed) = (BTreeMap::new(), Arc::default());
        self.connections.insert(id, ConnectionEntry { identity, status, epoch, calls, changed });
        id
    }

    /// The connection, if it is up.
    pub(super) fn up(&mut self, id: ConnectionId) -> Result<&mut ConnectionEntry, BusError> {
        let gone = || BusError::Closed { identity: String::new() };
        let connection = self.connections.get_mut(&id).ok_or_else(gone)?;
        let identity = || connection.identity.clone();
        match connection.status {
            Status::Down { .. } => Err(BusError::Down { identity: identity() }),
            Status::Closed => Err(BusError::Closed { identity: identity() }),
            Status::Up => Ok(connection),
        }
    }

    /// Takes a connection down; it comes back after the outage. A longer outage wins over a shorter one.
    pub(super) fn disconnect(&mut self, id: ConnectionId, outage: Duration, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let until = connection.returns_at().unwrap_or(now).max(now + outage);
        if connection.status != Status::Closed {
            connection.set(Status::Down { until });
            self.let_go(id, now);
        }
    }

    /// Takes down the connections of one identity.
    pub(super) fn disconnect_identity(&mut self, identity: &str, outage: Duration, now: Instant) {
        let own = self.connections.iter().filter(|(_, connection)| connection.identity == identity);
        for id in own.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.disconnect(id, outage, now);
        }
    }

    /// Takes down every connection; until the outage is over no other comes up.
    pub(super) fn restart(&mut self, outage: Duration, now: Instant) {
        self.out_until = Some(now + outage);
        for id in self.connections.keys().copied().collect::<Vec<_>>() {
            self.disconnect(id, outage, now);
        }
    }

    pub(super) fn state(&self, id: ConnectionId) -> ConnectionState {
        self.connections.get(&id).map_or(ConnectionState::Closed, ConnectionEntry::state)
    }

    /// Told when the state of the connection changes.
    pub(super) fn changed(&self, id: ConnectionId) -> Arc<Notify> {
        self.connections.get(&id).map(|connection| Arc::clone(&connection.changed)).unwrap_or_default()
    }

    pub(super) fn close(&mut self, id: ConnectionId, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.set(Status::Closed);
        }
        self.let_go(id, now);
    }

    /// Gives back what a connection held: its exclusive queues go, its deliveries return.
    fn let_go(&mut self, id: ConnectionId, now: Instant) {
        let own = self.queues.iter().filter(|(_, queue)| queue.owner == Some(id));
        let own: Vec<_> = own.map(|(name, _)| name.clone()).collect();
        for name in &own {
            self.delete_queue(name);
        }
        let channels = self.channels.iter().filter(|(_, channel)| channel.connection == id);
        let channels: Vec<_> = channels.map(|(channel, _)| *channel).collect();
        self.close_channels(&channels, now);
    }

    /// Brings back connections whose outage is over.
    pub(super) fn reconnect(&mut self, now: Instant) {
        let over = |connection: &&mut ConnectionEntry| connection.returns_at().is_some_and(|at| at <= now);
        for connection in self.connections.values_mut().filter(over) {
            connection.epoch += 1;
            connection.calls.clear();
            connection.set(Status::Up);
        }
    }

    /// Starts to wait for a reply; answers its address.
    pub(super) fn open_call(
        &mut self,
        from: ConnectionId,
        id: Uuid,
    ) -> Result<(String, Arc<Notify>), BusError> {
        let place = self.number();
        let connection = self.up(from)?;
        if connection.calls.contains_key(&id) {
            return Err(BusError::CallUnderWay);
        }
        if connection.calls.len() >= MAX_CALLS {
            return Err(BusError::TooMany { what: "calls", limit: MAX_CALLS });
        }
        let wake = Arc::new(Notify::new());
        connection.calls.insert(id, PendingCall { place, reply: None, wake: Arc::clone(&wake) });
        Ok((format!("{REPLIES}{}.{}", from.0, connection.epoch), wake))
    }

    pub(super) fn end_call(&mut self, from: ConnectionId, id: Uuid) {
        if let Some(connection) = self.connections.get_mut(&from) {
            connection.calls.remove(&id);
        }
    }

    /// The reply, or an error if it cannot come any more.
    pub(super) fn take_reply(&mut self, from: ConnectionId, id: Uuid) -> Poll<Result<Message, BusError>> {
        let connection = match self.up(from) {
            Ok(connection) => connection,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let identity = connection.identity.clone();
        match connection.calls.get_mut(&id) {
            // The connection was down and is back.
            None => Poll::Ready(Err(BusError::Down { identity })),
            Some(call) => call.reply.take().map_or(Poll::Pending, |reply| Poll::Ready(Ok(reply))),
        }
    }

    /// A reply for which nobody waits is dropped.
    pub(super) fn hand_over(&mut self, to: ConnectionId, epoch: u64, reply: Message) {
        let Ok(connection) = self.up(to) else { return };
        if connection.epoch != epoch {
            return;
        }
        let call = reply.correlation_id.and_then(|id| connection.calls.get_mut(&id));
        // The first reply counts.
        if let Some(call) = call
            && call.reply.is_none()
        {
            call.reply = Some(reply);
            call.wake.notify_waiters();
        }
    }
}
