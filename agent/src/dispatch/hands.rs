//! What builds and pushes for the dispatcher (edge): this machine, or what a simulation has in its place.

use std::path::Path;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt as _};
use kiln_protocol::Digest;
use tokio::sync::mpsc;

use crate::agent::{Agent, AgentError};
use crate::executor::{self, Event, Finished, Order};
use crate::publish::{PublishError, Publisher, Target};
use crate::registry::Credentials;
use crate::registry::push::{Candidate, Mount, Probe, TagOutcome, Uploaded};
use crate::state::StateError;
use crate::stop::StopSignal;

/// Runs the steps of builds, and reaches registries.
pub trait Hands: std::fmt::Debug + Send + Sync {
    /// See [`executor::run`].
    fn build(
        &self,
        agent: Arc<Agent>,
        order: Order,
        events: mpsc::Sender<Event>,
        stop: StopSignal,
    ) -> BoxFuture<'static, Result<Finished, StateError>>;

    /// The registries, with the credentials of one build.
    fn remote(&self, agent: &Agent, credentials: Credentials) -> Result<Box<dyn Remote>, AgentError>;
}

/// Registries; every function is the one of [`Publisher`].
pub trait Remote: Send + Sync {
    /// See [`Publisher::probe`].
    fn probe<'a>(
        &'a self,
        place: Target<'a>,
        tag: Option<&'a str>,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Probe, PublishError>>;

    /// See [`Publisher::upload`].
    fn upload<'a>(
        &'a self,
        place: Target<'a>,
        candidate: &'a Candidate,
        from: (&'a Path, &'a [Mount]),
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Uploaded, PublishError>>;

    /// See [`Publisher::verify`].
    fn verify<'a>(
        &'a self,
        place: Target<'a>,
        candidate: &'a Candidate,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Vec<Digest>, PublishError>>;

    /// See [`Publisher::put_tag`].
    fn put_tag<'a>(
        &'a self,
        place: Target<'a>,
        tag: &'a str,
        candidate: &'a Candidate,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<TagOutcome, PublishError>>;

    /// See [`Publisher::head_tag`].
    fn head_tag<'a>(
        &'a self,
        place: Target<'a>,
        tag: &'a str,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Option<Digest>, PublishError>>;
}

/// Slots and registries of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Machine;

impl Hands for Machine {
    fn build(
        &self,
        agent: Arc<Agent>,
        order: Order,
        events: mpsc::Sender<Event>,
        stop: StopSignal,
    ) -> BoxFuture<'static, Result<Finished, StateError>> {
        executor::run(agent, order, events, stop).boxed()
    }

    fn remote(&self, agent: &Agent, credentials: Credentials) -> Result<Box<dyn Remote>, AgentError> {
        let (config, ca) = (&agent.config, agent.own_ca()?);
        let ca: Vec<Vec<u8>> = ca.into_iter().collect();
        let proxy = config.build.proxy.clone();
        Ok(Box::new(Publisher::new(config.registry.clone(), credentials, proxy, &ca)?))
    }
}

impl Remote for Publisher {
    fn probe<'a>(
        &'a self,
        place: Target<'a>,
        tag: Option<&'a str>,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Probe, PublishError>> {
        Publisher::probe(self, place, tag, stop).boxed()
    }

    fn upload<'a>(
        &'a self,
        place: Target<'a>,
        candidate: &'a Candidate,
        from: (&'a Path, &'a [Mount]),
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Uploaded, PublishError>> {
        Publisher::upload(self, place, candidate, from, stop, &|_, _| ()).boxed()
    }

    fn verify<'a>(
        &'a self,
        place: Target<'a>,
        candidate: &'a Candidate,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Vec<Digest>, PublishError>> {
        Publisher::verify(self, place, candidate, stop).boxed()
    }

    fn put_tag<'a>(
        &'a self,
        place: Target<'a>,
        tag: &'a str,
        candidate: &'a Candidate,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<TagOutcome, PublishError>> {
        Publisher::put_tag(self, place, tag, candidate, stop).boxed()
    }

    fn head_tag<'a>(
        &'a self,
        place: Target<'a>,
        tag: &'a str,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Option<Digest>, PublishError>> {
        Publisher::head_tag(self, place, tag, stop).boxed()
    }
}
