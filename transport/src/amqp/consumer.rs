//! Subscriptions and what they hold (shell).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    BasicRejectOptions,
};
use lapin::types::FieldTable;
use lapin::{Acker, Channel};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use uuid::Uuid;

use super::convert;
use super::failure::{Attempt, Subject};
use super::session::Session;
use crate::BusError;

/// A channel with one consumer. It closes with the last of its consumer and deliveries, and what is unsettled
/// goes back.
#[derive(Debug)]
struct Held {
    channel: Channel,
    /// Taken and not settled.
    unsettled: AtomicU32,
}

/// A subscription.
pub(crate) struct Consumer {
    /// None when it is over.
    stream: Option<lapin::Consumer>,
    held: Arc<Held>,
    session: Arc<Session>,
    queue: String,
    prefetch: u16,
    watchdog: Watchdog,
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consumer").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Consumer {
    pub(super) async fn open(session: Arc<Session>, queue: &str, prefetch: u16) -> Result<Self, BusError> {
        let name = convert::short("queue name", queue)?;
        let subscribe = async {
            let channel = session.consuming.connection.create_channel().await?;
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            // A fresh tag: RabbitMQ 3.10.8 mixes up a consumer that comes again under its old one.
            let tag = Uuid::now_v7().to_string().into();
            let options = BasicConsumeOptions::default();
            let stream = channel.basic_consume(name, tag, options, FieldTable::default()).await?;
            Ok((channel, stream))
        };
        let opened = Attempt::within("consume", session.timing.operation, subscribe).await;
        let subject = Subject { identity: &session.identity, action: "consume", what: "queue", name: queue };
        let (channel, stream) = opened.map_err(|failed| session.failed(subject.error(&failed)))?;
        let held = Arc::new(Held { channel, unsettled: AtomicU32::new(0) });
        let watchdog = Watchdog::new(session.timing.watchdog, Instant::now());
        Ok(Self { stream: Some(stream), held, session, queue: queue.to_owned(), prefetch, watchdog })
    }

    pub(crate) async fn next(&mut self) -> Option<crate::Delivery> {
        loop {
            let stream = self.stream.as_mut()?;
            tokio::select! {
                biased;
                item = stream.next() => match item {
                    // What is left of a closed channel was given to others.
                    Some(Ok(delivery)) if self.held.channel.status().connected() => {
                        return Some(self.take(delivery));
                    }
                    // The broker has closed the channel or cancelled the consumer. Both are the end of it.
                    Some(_) | None => self.end(),
                },
                () = tokio::time::sleep_until(self.watchdog.next_look) => self.look().await,
            }
        }
    }

    fn take(&mut self, delivery: lapin::message::Delivery) -> crate::Delivery {
        self.watchdog.delivered(Instant::now());
        self.held.unsettled.fetch_add(1, Ordering::Relaxed);
        let received = convert::received(&delivery.properties, delivery.data);
        let limit = self.session.timing.operation;
        let settle = Settle { acker: delivery.acker, held: Arc::clone(&self.held), limit };
        crate::Delivery {
            message: received.message,
            exchange: delivery.exchange.to_string(),
            routing_key: delivery.routing_key.to_string(),
            queue: self.queue.clone(),
            user_id: received.user_id,
            redelivered: delivery.redelivered,
            delivery_count: received.delivery_count,
            handle: crate::delivery::Handle::Amqp(settle),
        }
    }

    fn end(&mut self) {
        self.session.look();
        self.leave();
    }

    /// Looks whether messages wait that nobody delivers.
    async fn look(&mut self) {
        let room = self.held.unsettled.load(Ordering::Relaxed) < u32::from(self.prefetch);
        let waiting = match self.session.queue_depth(&self.queue).await {
            Ok(ready) => ready > 0,
            Err(BusError::NoQueue { .. }) => return self.end(),
            // Without the right to look there is nothing to see; other errors end the connection.
            Err(_) => false,
        };
        if self.watchdog.silent(room && waiting, Instant::now()) {
            self.leave();
        }
    }

    /// Hands the subscription over to be ended; says when that is done.
    fn leave(&mut self) -> oneshot::Receiver<Result<(), Attempt>> {
        let (done, ended) = oneshot::channel();
        if let Some(stream) = self.stream.take() {
            let left = Leftover { stream, held: Arc::clone(&self.held), done };
            // If nobody takes it, the connection has ended and everything went with it.
            drop(self.session.leftovers.send(left));
        }
        ended
    }

    pub(crate) async fn cancel(mut self) -> Result<(), BusError> {
        let identity = self.session.identity.clone();
        match self.leave().await {
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(failed)) => {
                let subject =
                    Subject { identity: &identity, action: "cancel", what: "queue", name: &self.queue };
                Err(subject.error(&failed))
            }
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        drop(self.leave());
    }
}

/// A subscription that its user has left.
#[derive(Debug)]
pub(super) struct Leftover {
    stream: lapin::Consumer,
    held: Arc<Held>,
    done: oneshot::Sender<Result<(), Attempt>>,
}

/// Ends what was left, for as long as the connection lives.
pub(super) async fn tidy(mut leftovers: mpsc::UnboundedReceiver<Leftover>, limit: Duration) -> String {
    while let Some(Leftover { stream, held, done }) = leftovers.recv().await {
        let ended = Attempt::within("cancel", limit, cancel(stream, &held.channel)).await;
        if ended.is_err() && held.channel.status().connected() {
            // Then everything it holds goes back, also what was taken.
            drop(tokio::time::timeout(limit, held.channel.close(200, "cancelled".into())).await);
        }
        // Who dropped its consumer does not wait.
        drop(done.send(ended));
    }
    "nobody consumes any more".to_owned()
}

/// Cancels, then gives back what was sent and not taken.
async fn cancel(mut stream: lapin::Consumer, channel: &Channel) -> Result<(), lapin::Error> {
    if !channel.status().connected() {
        return Ok(());
    }
    channel.basic_cancel(stream.tag(), BasicCancelOptions::default()).await?;
    let requeue = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
    while let Some(Ok(untaken)) = stream.next().await {
        untaken.acker.nack(requeue).await?;
    }
    Ok(())
}

/// The right to settle one delivery.
#[derive(Debug)]
pub(crate) struct Settle {
    acker: Acker,
    held: Arc<Held>,
    limit: Duration,
}

impl Settle {
    /// Whether the broker still held the delivery for us.
    pub(crate) async fn ack(self) -> bool {
        self.settle(self.acker.ack(BasicAckOptions::default())).await
    }

    pub(crate) async fn requeue(self) -> bool {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        self.settle(self.acker.nack(options)).await
    }

    pub(crate) async fn reject(self) -> bool {
        self.settle(self.acker.reject(BasicRejectOptions { requeue: false })).await
    }

    async fn settle(&self, sent: impl Future<Output = Result<bool, lapin::Error>>) -> bool {
        let sent = tokio::time::timeout(self.limit, sent).await;
        self.held.unsettled.fetch_sub(1, Ordering::Relaxed);
        // Written is all one can know: the broker does not answer. If that is lost, the message comes again.
        matches!(sent, Ok(Ok(true)))
    }
}

/// When to look after a consumer to which nothing comes, and when to give it up (pure).
#[derive(Debug)]
struct Watchdog {
    period: Duration,
    next_look: Instant,
    /// The last look saw messages that wait.
    suspicious: bool,
}

impl Watchdog {
    fn new(period: Duration, now: Instant) -> Self {
        Self { period, next_look: now + period, suspicious: false }
    }

    fn delivered(&mut self, now: Instant) {
        *self = Self::new(self.period, now);
    }

    /// Takes note of a look; whether the consumer is to be given up. A message may be on its way at one look, but
    /// not for a whole period.
    fn silent(&mut self, starving: bool, now: Instant) -> bool {
        let twice = self.suspicious && starving;
        *self = Self { suspicious: starving, ..Self::new(self.period, now) };
        twice
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_consumer_is_given_up_after_two_looks_in_a_row_without_a_delivery() {
        let period = Duration::from_mins(1);
        let start = Instant::now();
        let mut watchdog = Watchdog::new(period, start);
        assert_eq!(watchdog.next_look, start + period);
        assert!(!watchdog.silent(true, start + period), "one look may be a coincidence");
        assert!(!watchdog.silent(false, start + period * 2));
        assert!(!watchdog.silent(true, start + period * 3));
        watchdog.delivered(start + period * 4);
        assert_eq!(watchdog.next_look, start + period * 5);
        assert!(!watchdog.silent(true, start + period * 5));
        assert!(watchdog.silent(true, start + period * 6));
    }
}
