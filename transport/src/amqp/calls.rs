//! Calls by direct reply-to (shell).
//!
//! Request and reply share one channel, as the broker demands. Many calls are under way on it, so a returned
//! request is known by its message id, not by the confirm that it comes with.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::options::BasicConsumeOptions;
use lapin::types::FieldTable;
use lapin::{Channel, Confirmation};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::convert;
use super::failure::{Attempt, Subject};
use super::link::Link;
use super::publisher::{Parcel, Verdict, confirming, unconfirmed, verdict};
use crate::{BusError, Message, Published};

/// Where replies come from; the broker makes an address of its own out of it.
pub(super) const REPLIES: &str = "amq.rabbitmq.reply-to";
/// Most calls that wait on one connection: an agent has one per slot and a few more.
const MAX_CALLS: usize = 1024;
/// How often calls are forgotten whose callers wait no longer.
const SWEEP: Duration = Duration::from_secs(1);

/// A request on its way.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: Uuid,
    pub(super) parcel: Parcel,
    pub(super) answer: oneshot::Sender<Result<Message, BusError>>,
}

/// Calls under way on one channel.
struct Calls {
    identity: String,
    channel: Channel,
    waiting: HashMap<Uuid, Waiting>,
    sent: FuturesUnordered<BoxFuture<'static, Sent>>,
}

struct Waiting {
    exchange: String,
    key: String,
    answer: oneshot::Sender<Result<Message, BusError>>,
}

/// A request that the broker has answered for.
struct Sent {
    id: Uuid,
    confirmation: Result<Confirmation, lapin::Error>,
}

/// Why a channel is left.
enum Left {
    /// Nobody will call any more.
    Unused,
    /// It is closed.
    Broken(lapin::Error),
}

/// Serves calls until the connection is of no use; says why. A channel that one bad call closed is replaced.
pub(super) async fn serve(
    link: Arc<Link>,
    identity: String,
    limit: Duration,
    mut requests: mpsc::Receiver<Request>,
) -> String {
    loop {
        let opened = Attempt::within("opening a channel", limit, open(&link)).await;
        let (channel, replies) = match opened {
            Ok(opened) => opened,
            Err(Attempt::Failed(error)) => return error.to_string(),
            Err(Attempt::Silent { action, limit }) => return format!("{action} took longer than {limit:?}"),
        };
        let (waiting, sent) = (HashMap::new(), FuturesUnordered::new());
        let calls = Calls { identity: identity.clone(), channel, waiting, sent };
        match calls.run(replies, &mut requests).await {
            Left::Unused => return "nobody calls any more".to_owned(),
            Left::Broken(error) if !link.alive() => return error.to_string(),
            Left::Broken(_) => {}
        }
    }
}

async fn open(link: &Link) -> Result<(Channel, lapin::Consumer), lapin::Error> {
    let channel = confirming(link).await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let replies =
        channel.basic_consume(REPLIES.into(), "replies".into(), options, FieldTable::default()).await?;
    Ok((channel, replies))
}

impl Calls {
    async fn run(mut self, mut replies: lapin::Consumer, requests: &mut mpsc::Receiver<Request>) -> Left {
        let mut sweep = tokio::time::interval(SWEEP);
        let left = loop {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.begin(request),
                    None => break Left::Unused,
                },
                reply = replies.next() => match reply {
                    Some(Ok(reply)) => self.answer(reply),
                    Some(Err(error)) => break Left::Broken(error),
                    None => break Left::Broken(lapin::ErrorKind::FutureCompleted.into()),
                },
                Some(sent) = self.sent.next() => if let Some(error) = self.check(sent) {
                    break Left::Broken(error);
                },
                _ = sweep.tick() => self.waiting.retain(|_, waiting| !waiting.answer.is_closed()),
            }
        };
        for (_, waiting) in std::mem::take(&mut self.waiting) {
            let error = self.explain(&waiting, &left);
            // Its caller may have stopped to wait.
            drop(waiting.answer.send(Err(error)));
        }
        left
    }

    /// Why a call fails whose channel is gone. The broker says in words which exchange was wrong, but not whose
    /// request it was.
    fn explain(&self, waiting: &Waiting, left: &Left) -> BusError {
        let identity = &self.identity;
        let name = &waiting.exchange;
        match left {
            Left::Broken(error) if error.to_string().contains(&format!("'{name}'")) => {
                let subject = Subject { identity, action: "call", what: "exchange", name };
                subject.error(&Attempt::Failed(error.clone()))
            }
            Left::Broken(_) | Left::Unused => BusError::Down { identity: identity.clone() },
        }
    }

    fn begin(&mut self, request: Request) {
        if let Err(refused) = self.admit(request.id) {
            drop(request.answer.send(Err(refused)));
            return;
        }
        let (id, parcel, channel) = (request.id, request.parcel, self.channel.clone());
        let (exchange, key) = (parcel.exchange.to_string(), parcel.key.to_string());
        self.waiting.insert(id, Waiting { exchange, key, answer: request.answer });
        self.sent.push(async move { Sent { id, confirmation: parcel.send(&channel).await } }.boxed());
    }

    fn admit(&mut self, id: Uuid) -> Result<(), BusError> {
        if self.waiting.get(&id).is_some_and(|waiting| !waiting.answer.is_closed()) {
            return Err(BusError::CallUnderWay);
        }
        self.waiting.retain(|_, waiting| !waiting.answer.is_closed());
        // Also those that nobody waits for any more take their place until the broker confirms them.
        if self.waiting.len().max(self.sent.len()) >= MAX_CALLS {
            return Err(BusError::TooMany { what: "calls", limit: MAX_CALLS });
        }
        Ok(())
    }

    fn answer(&mut self, reply: lapin::message::Delivery) {
        let reply = convert::received(&reply.properties, reply.data).message;
        if let Some(id) = reply.correlation_id {
            self.finish(id, |_| Ok(reply));
        }
    }

    fn finish(&mut self, id: Uuid, answer: impl FnOnce(&Waiting) -> Result<Message, BusError>) {
        let Some(waiting) = self.waiting.remove(&id) else { return };
        let answer = answer(&waiting);
        drop(waiting.answer.send(answer));
    }

    /// Looks at what became of a request; the error if it took the channel with it.
    fn check(&mut self, sent: Sent) -> Option<lapin::Error> {
        let address = |waiting: &Waiting| (waiting.exchange.clone(), waiting.key.clone());
        let confirmation = match sent.confirmation {
            Ok(confirmation) => confirmation,
            Err(error) => return Some(error),
        };
        match verdict(confirmation) {
            Verdict::Published(Published::Confirmed | Published::Returned) => {}
            Verdict::Published(Published::Rejected) => self.finish(sent.id, |waiting| {
                let (exchange, key) = address(waiting);
                Err(BusError::Busy { exchange, key })
            }),
            Verdict::Returned(request) => {
                let id = convert::received(&request.delivery.properties, Vec::new()).message.message_id;
                self.finish(id, |waiting| {
                    let (exchange, key) = address(waiting);
                    Err(BusError::Unserved { exchange, key })
                });
            }
            Verdict::Unconfirmed => self.finish(sent.id, |_| Err(unconfirmed())),
        }
        None
    }
}
