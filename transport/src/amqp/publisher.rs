//! Confirmed publishes over a bounded pool of channels (shell).
//!
//! A channel has one publish in flight: the client library may pin a returned message on another publish of the
//! same channel. What comes back with a confirm is then certainly what was published.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::failure::{Attempt, Subject};
use super::link::Link;
use crate::{BusError, Published};

/// Publishes in flight on one connection. A quorum queue confirms after it has written to disk: one channel at a
/// time would wait for the disk between any two messages. ADR 13 has the figures.
pub(super) const CHANNELS: usize = 16;

/// A message ready to be sent.
#[derive(Debug, Clone)]
pub(super) struct Parcel {
    pub(super) exchange: ShortString,
    pub(super) key: ShortString,
    pub(super) properties: BasicProperties,
    pub(super) body: bytes::Bytes,
    pub(super) mandatory: bool,
}

impl Parcel {
    /// Sends it and waits for the confirm.
    pub(super) async fn send(self, channel: &Channel) -> Result<Confirmation, lapin::Error> {
        let options = BasicPublishOptions { mandatory: self.mandatory, ..BasicPublishOptions::default() };
        let Self { exchange, key, properties, body, .. } = self;
        channel.basic_publish(exchange, key, options, &body, properties).await?.await
    }
}

/// What a confirm says.
#[derive(Debug)]
pub(super) enum Verdict {
    /// As a user of the bus sees it.
    Published(Published),
    /// No queue took this message.
    Returned(Box<BasicReturnMessage>),
    /// The channel does not confirm. That is a defect of ours.
    Unconfirmed,
}

/// Reads a confirm.
pub(super) fn verdict(confirmation: Confirmation) -> Verdict {
    match confirmation {
        Confirmation::Ack(None) => Verdict::Published(Published::Confirmed),
        Confirmation::Ack(Some(returned)) => Verdict::Returned(Box::new(returned)),
        Confirmation::Nack(_) => Verdict::Published(Published::Rejected),
        Confirmation::NotRequested => Verdict::Unconfirmed,
    }
}

/// The error of a channel that does not confirm.
pub(super) fn unconfirmed() -> BusError {
    BusError::Unexpected { action: "publish", reason: "the channel is not in confirm mode".to_owned() }
}

/// Opens a channel that confirms.
pub(super) async fn confirming(link: &Link) -> Result<Channel, lapin::Error> {
    let channel = link.connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// Channels to publish on.
#[derive(Debug)]
pub(super) struct Pool {
    link: Arc<Link>,
    places: Semaphore,
    idle: Mutex<Vec<Channel>>,
    limit: Duration,
}

impl Pool {
    pub(super) fn new(link: Arc<Link>, channels: usize, limit: Duration) -> Self {
        Self { link, places: Semaphore::new(channels), idle: Mutex::default(), limit }
    }

    /// Publishes and waits for the confirm, altogether within the limit.
    pub(super) async fn publish(&self, identity: &str, parcel: Parcel) -> Result<Published, BusError> {
        let deadline = Instant::now() + self.limit;
        // What is written to a blocked connection only piles up in memory.
        if !self.link.unblocked(self.limit).await {
            return Err(self.blocked(identity));
        }
        let exchange = parcel.exchange.clone();
        let done = tokio::time::timeout_at(deadline, self.send(parcel)).await;
        let subject = Subject { identity, action: "publish to", what: "exchange", name: exchange.as_str() };
        match done {
            Ok(Ok(confirmation)) => match verdict(confirmation) {
                Verdict::Published(published) => Ok(published),
                Verdict::Returned(_) => Ok(Published::Returned),
                Verdict::Unconfirmed => Err(unconfirmed()),
            },
            Ok(Err(error)) => Err(subject.error(&Attempt::Failed(error))),
            Err(_) if self.link.blocked() => Err(self.blocked(identity)),
            Err(_) => Err(BusError::Timeout { action: "publish", limit: self.limit }),
        }
    }

    fn blocked(&self, identity: &str) -> BusError {
        BusError::Blocked { identity: identity.to_owned(), limit: self.limit }
    }

    /// Sends on a channel of its own. A channel on which anything is left open is not used again: it closes.
    async fn send(&self, parcel: Parcel) -> Result<Confirmation, lapin::Error> {
        // The pool never closes its semaphore.
        let _place = self.places.acquire().await;
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let channel = match idle {
            Some(channel) if channel.status().connected() => channel,
            _ => confirming(&self.link).await?,
        };
        let confirmation = parcel.send(&channel).await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(channel);
        Ok(confirmation)
    }
}
