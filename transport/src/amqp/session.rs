//! What lives as long as the connections to the broker do (shell).

use std::sync::Arc;

use lapin::Channel;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::calls::{self, REPLIES, Request};
use super::consumer::{Leftover, tidy};
use super::convert::{self, arguments, short};
use super::failure::{Attempt, Subject, names_exchange};
use super::link::Link;
use super::publisher::{CHANNELS, Parcel, Pool};
use super::settings::{AmqpSettings, Timing};
use crate::topology::{Binding, Exchange, ExchangeKind, Queue, QueueKind};
use crate::{BusError, Message, Published, Topology};

/// Requests that wait to be sent.
const REQUESTS: usize = 64;

/// Two connections and what runs on them. When one of them ends, so does the session.
pub(super) struct Session {
    pub(super) identity: String,
    pub(super) epoch: u64,
    pub(super) timing: Timing,
    pub(super) consuming: Arc<Link>,
    publishing: Arc<Link>,
    pool: Pool,
    requests: mpsc::Sender<Request>,
    pub(super) leftovers: mpsc::UnboundedSender<Leftover>,
    /// The channel for declarations; none after an error, which closes it.
    admin: Mutex<Option<Channel>>,
    /// Set when somebody notices that it has ended.
    over: watch::Sender<bool>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("identity", &self.identity)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Connects. Its tasks run in the set; the first of them to end says why the session has ended.
    pub(super) async fn open(
        settings: &AmqpSettings,
        epoch: u64,
        over: watch::Sender<bool>,
    ) -> Result<(Arc<Self>, JoinSet<String>), String> {
        let opened = tokio::try_join!(Link::open(settings, "consume"), Link::open(settings, "publish"));
        let ((consuming, consuming_vitals), (publishing, publishing_vitals)) = opened?;
        let (consuming, publishing) = (Arc::new(consuming), Arc::new(publishing));
        let (identity, timing) = (settings.identity().to_owned(), settings.timing);
        let (requests, called) = mpsc::channel(REQUESTS);
        // Bounded by the number of channels: each consumer leaves once.
        let (leftovers, left) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let link = Arc::clone(&consuming);
        tasks.spawn(consuming_vitals.watch(move || link.alive()));
        let link = Arc::clone(&publishing);
        tasks.spawn(publishing_vitals.watch(move || link.alive()));
        tasks.spawn(calls::serve(Arc::clone(&publishing), identity.clone(), timing.operation, called));
        tasks.spawn(tidy(left, timing.operation));
        let pool = Pool::new(Arc::clone(&publishing), CHANNELS, timing.confirm);
        let admin = Mutex::new(None);
        let session =
            Self { identity, epoch, timing, consuming, publishing, pool, requests, leftovers, admin, over };
        Ok((Arc::new(session), tasks))
    }

    /// Looks whether it still lives. Who has just met an error learns it here before the watchers do.
    pub(super) fn look(&self) {
        if !self.consuming.alive() || !self.publishing.alive() {
            self.over.send_replace(true);
        }
    }

    /// Passes an error on.
    pub(super) fn failed(&self, error: BusError) -> BusError {
        self.look();
        error
    }

    pub(super) async fn close(&self) {
        tokio::join!(self.consuming.close(), self.publishing.close());
    }

    pub(super) async fn publish(
        &self,
        exchange: &str,
        key: &str,
        message: &Message,
        mandatory: bool,
    ) -> Result<Published, BusError> {
        let parcel = self.parcel(exchange, key, message, mandatory)?;
        self.pool.publish(&self.identity, parcel).await.map_err(|error| self.failed(error))
    }

    fn parcel(
        &self,
        exchange: &str,
        key: &str,
        message: &Message,
        mandatory: bool,
    ) -> Result<Parcel, BusError> {
        Ok(Parcel {
            exchange: short("exchange name", exchange)?,
            key: short("routing key", key)?,
            properties: convert::properties(message, &self.identity)?,
            body: message.body.clone(),
            mandatory,
        })
    }

    /// Publishes a request and waits for its reply, without a limit.
    pub(super) async fn call(
        &self,
        exchange: &str,
        key: &str,
        request: Message,
    ) -> Result<Message, BusError> {
        let id = request.message_id;
        let (correlation_id, reply_to) = (Some(id), Some(REPLIES.to_owned()));
        let request = Message { correlation_id, reply_to, ..request };
        let parcel = self.parcel(exchange, key, &request, true)?;
        let limit = self.timing.confirm;
        if !self.publishing.unblocked(limit).await {
            return Err(BusError::Blocked { identity: self.identity.clone(), limit });
        }
        let (answer, answered) = oneshot::channel();
        let down = || self.failed(BusError::Down { identity: self.identity.clone() });
        self.requests.send(Request { id, parcel, answer }).await.map_err(|_| down())?;
        answered.await.unwrap_or_else(|_| Err(down()))
    }

    pub(super) async fn declare(&self, topology: &Topology) -> Result<(), BusError> {
        for exchange in &topology.exchanges {
            self.declare_exchange(exchange).await?;
        }
        for queue in &topology.queues {
            self.declare_queue(queue).await?;
        }
        for binding in &topology.bindings {
            self.bind(binding).await?;
        }
        Ok(())
    }

    async fn declare_exchange(&self, exchange: &Exchange) -> Result<(), BusError> {
        let name = short("exchange name", &exchange.name)?;
        let kind = match exchange.kind {
            ExchangeKind::Topic => lapin::ExchangeKind::Topic,
            ExchangeKind::Direct => lapin::ExchangeKind::Direct,
        };
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let ask = async |channel: &Channel| {
            channel.exchange_declare(name, kind, options, FieldTable::default()).await
        };
        let subject = self.subject("declare", "exchange", &exchange.name);
        self.ask("declare", ask).await.map_err(|failed| self.failed(subject.error(&failed)))
    }

    async fn declare_queue(&self, queue: &Queue) -> Result<(), BusError> {
        let name = short("queue name", &queue.name)?;
        let exclusive = queue.kind == QueueKind::Exclusive;
        let options = QueueDeclareOptions {
            durable: !exclusive,
            exclusive,
            auto_delete: exclusive,
            ..QueueDeclareOptions::default()
        };
        let ask = async |channel: &Channel| channel.queue_declare(name, options, arguments(queue)).await;
        let subject = self.subject("declare", "queue", &queue.name);
        let declared = self.ask("declare", ask).await;
        declared.map(drop).map_err(|failed| self.failed(subject.error(&failed)))
    }

    async fn bind(&self, binding: &Binding) -> Result<(), BusError> {
        let queue = short("queue name", &binding.queue)?;
        let exchange = short("exchange name", &binding.exchange)?;
        let key = short("routing key", &binding.key)?;
        let ask = async |channel: &Channel| {
            channel.queue_bind(queue, exchange, key, QueueBindOptions::default(), FieldTable::default()).await
        };
        self.ask("bind", ask).await.map_err(|failed| {
            let exchange = matches!(&failed, Attempt::Failed(error) if names_exchange(error));
            let (what, name) =
                if exchange { ("exchange", &binding.exchange) } else { ("queue", &binding.queue) };
            self.failed(self.subject("bind", what, name).error(&failed))
        })
    }

    pub(super) async fn delete_queue(&self, queue: &str) -> Result<(), BusError> {
        let name = short("queue name", queue)?;
        let ask = async |channel: &Channel| channel.queue_delete(name, QueueDeleteOptions::default()).await;
        let subject = self.subject("delete", "queue", queue);
        match self.ask("delete", ask).await.map_err(|failed| self.failed(subject.error(&failed))) {
            Ok(_) | Err(BusError::NoQueue { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn queue_depth(&self, queue: &str) -> Result<u64, BusError> {
        let name = short("queue name", queue)?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let ask = async |channel: &Channel| channel.queue_declare(name, options, FieldTable::default()).await;
        let subject = self.subject("look at", "queue", queue);
        let looked = self.ask("look at a queue", ask).await;
        let seen = looked.map_err(|failed| self.failed(subject.error(&failed)))?;
        Ok(u64::from(seen.message_count()))
    }

    fn subject<'a>(&'a self, action: &'static str, what: &'static str, name: &'a str) -> Subject<'a> {
        Subject { identity: &self.identity, action, what, name }
    }

    /// Asks one thing on the channel for declarations, which is one that works.
    async fn ask<T>(
        &self,
        action: &'static str,
        question: impl AsyncFnOnce(&Channel) -> Result<T, lapin::Error>,
    ) -> Result<T, Attempt> {
        let asked = async {
            let mut admin = self.admin.lock().await;
            let channel = match admin.take() {
                Some(channel) if channel.status().connected() => channel,
                _ => self.consuming.connection.create_channel().await?,
            };
            let answer = question(&channel).await?;
            *admin = Some(channel);
            Ok(answer)
        };
        Attempt::within(action, self.timing.operation, asked).await
    }
}
