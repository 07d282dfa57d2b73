//! Consumers of the in-memory broker and what they hold (pure).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::broker::{Broker, Death};
use super::queue::Stored;
use super::{ChannelId, ConnectionId};
use crate::BusError;
use crate::topology::QueueKind;

/// Most channels of one connection, as is RabbitMQ's own default.
const MAX_CHANNELS: usize = 2047;

/// One consumer with its deliveries; it outlives the consumer until they are settled.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) connection: ConnectionId,
    pub(super) queue: String,
    prefetch: usize,
    consuming: bool,
    /// Sent and not yet taken, oldest first; all of them are unsettled.
    buffer: VecDeque<u64>,
    /// By position in the queue.
    pub(super) unsettled: BTreeMap<u64, Stored>,
    pub(super) wake: Arc<Notify>,
}

/// A delivery that is handed to its consumer.
#[derive(Debug)]
pub(super) struct Taking {
    pub(super) tag: u64,
    pub(super) queue: String,
    pub(super) stored: Stored,
}

/// How a delivery is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settlement {
    Ack,
    Requeue,
    Reject,
}

impl Broker {
    pub(super) fn consume(
        &mut self,
        from: ConnectionId,
        queue: &str,
        prefetch: u16,
    ) -> Result<(ChannelId, Arc<Notify>), BusError> {
        self.queue(from, queue)?;
        if self.channels.values().filter(|channel| channel.connection == from).count() >= MAX_CHANNELS {
            return Err(BusError::TooMany { what: "consumers", limit: MAX_CHANNELS });
        }
        let id = ChannelId(self.number());
        let wake = Arc::new(Notify::new());
        let channel = Channel {
            connection: from,
            queue: queue.to_owned(),
            prefetch: usize::from(prefetch),
            consuming: true,
            buffer: VecDeque::new(),
            unsettled: BTreeMap::new(),
            wake: Arc::clone(&wake),
        };
        self.channels.insert(id, channel);
        self.queue(from, queue)?.consumers.push_back(id);
        self.pump(queue);
        Ok((id, wake))
    }

    /// Gives ready messages to consumers that have room, in turn.
    pub(super) fn pump(&mut self, name: &str) {
        while let Some(queue) = self.queues.get_mut(name)
            && queue.depth() > 0
            && let Some(turn) = queue.consumers.iter().position(|id| has_room(&self.channels, *id))
        {
            queue.consumers.rotate_left(turn + 1);
            let chosen = queue.consumers.back().and_then(|id| self.channels.get_mut(id));
            let (Some(channel), Some((position, stored))) = (chosen, queue.pop()) else { return };
            channel.unsettled.insert(position, stored);
            channel.buffer.push_back(position);
            channel.wake.notify_waiters();
        }
    }

    /// What a consumer sees next; nothing more if it has ended.
    pub(super) fn take(&mut self, id: ChannelId) -> Poll<Option<Taking>> {
        let Some(channel) = self.channels.get_mut(&id) else { return Poll::Ready(None) };
        while let Some(tag) = channel.buffer.pop_front() {
            if let Some(stored) = channel.unsettled.get(&tag) {
                return Poll::Ready(Some(Taking {
                    tag,
                    queue: channel.queue.clone(),
                    stored: stored.clone(),
                }));
            }
        }
        if channel.consuming { Poll::Pending } else { Poll::Ready(None) }
    }

    /// Whether the delivery was still held. If not, it comes again.
    pub(super) fn settle(&mut self, id: ChannelId, tag: u64, settlement: Settlement, now: Instant) -> bool {
        let Some(connection) = self.channels.get(&id).map(|channel| channel.connection) else { return false };
        if let Some(outage) = self.faults.lose_settlement() {
            self.disconnect(connection, outage, now);
        }
        let Some(channel) = self.channels.get_mut(&id) else { return false };
        let Some(stored) = channel.unsettled.remove(&tag) else { return false };
        let queue = channel.queue.clone();
        match settlement {
            Settlement::Ack => {}
            Settlement::Requeue => self.put_back(&queue, tag, stored, now),
            Settlement::Reject => self.bury(&queue, vec![stored], Death::Rejected, now),
        }
        self.pump(&queue);
        true
    }

    fn put_back(&mut self, name: &str, position: u64, mut stored: Stored, now: Instant) {
        let Some(queue) = self.queues.get_mut(name) else { return };
        if queue.count_return(&mut stored) {
            self.bury(name, vec![stored], Death::DeliveryLimit, now);
        } else {
            queue.put_back(position, stored);
        }
    }

    /// Ends a consumer. What it was sent and did not take goes back; what it took stays with it.
    pub(super) fn cancel(&mut self, id: ChannelId, now: Instant) {
        let Some(queue) = self.stop(id) else { return };
        self.return_untaken(id, &queue, now);
        let unused = |queue: &super::queue::QueueState| {
            queue.settings.kind == QueueKind::Exclusive && queue.consumers.is_empty()
        };
        if self.queues.get(&queue).is_some_and(unused) {
            self.delete_queue(&queue);
        }
        self.pump(&queue);
    }

    pub(super) fn stop(&mut self, id: ChannelId) -> Option<String> {
        let channel = self.channels.get_mut(&id)?;
        channel.consuming = false;
        channel.wake.notify_waiters();
        let name = channel.queue.clone();
        if let Some(queue) = self.queues.get_mut(&name) {
            queue.consumers.retain(|consumer| *consumer != id);
        }
        Some(name)
    }

    fn return_untaken(&mut self, id: ChannelId, queue: &str, now: Instant) {
        let Some(channel) = self.channels.get_mut(&id) else { return };
        let tags = std::mem::take(&mut channel.buffer);
        let untaken: Vec<_> =
            tags.into_iter().filter_map(|tag| Some((tag, channel.unsettled.remove(&tag)?))).collect();
        for (position, stored) in untaken {
            self.put_back(queue, position, stored, now);
        }
    }

    /// The server cancels every consumer of a queue, as when its leader moves.
    pub(super) fn cancel_consumers(&mut self, name: &str, now: Instant) {
        let Some(queue) = self.queues.get(name) else { return };
        let consumers: Vec<_> = queue.consumers.iter().copied().collect();
        for id in &consumers {
            self.stop(*id);
        }
        for id in consumers {
            self.return_untaken(id, name, now);
        }
    }

    /// Ends channels: everything that they hold goes back.
    pub(super) fn close_channels(&mut self, ids: &[ChannelId], now: Instant) {
        let queues: BTreeSet<_> = ids.iter().filter_map(|id| self.stop(*id)).collect();
        for channel in ids.iter().filter_map(|id| self.channels.remove(id)).collect::<Vec<_>>() {
            for (position, stored) in channel.unsettled {
                self.put_back(&channel.queue, position, stored, now);
            }
        }
        for queue in &queues {
            self.pump(queue);
        }
    }
}

fn has_room(channels: &BTreeMap<ChannelId, Channel>, id: ChannelId) -> bool {
    channels.get(&id).is_some_and(|channel| channel.unsettled.len() < channel.prefetch)
}
