//! What an agent needs of a build beyond its record (edge: whoever runs the agent provides it).

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use kiln_protocol::BuildId;
use kiln_protocol::message::{BuildGrant, Outcome};
use kiln_protocol::result::{Failure, PhaseDuration};
use kiln_protocol::spec::SecretSource;
use tokio::sync::mpsc;

use crate::executor::{BuildInputs, Event, Finished};
use crate::registry::Credentials;

/// Context, secrets and credentials of builds, and the places that only their client reaches.
pub trait Supplies: std::fmt::Debug + Send + Sync {
    /// The context, the secrets and the credentials for pulling.
    fn inputs<'a>(&'a self, grant: &'a BuildGrant) -> BoxFuture<'a, Result<BuildInputs, Failure>>;

    /// Credentials for pushing to these, `host/repository`, asked for whenever something is about to be pushed.
    fn push_credentials<'a>(
        &'a self,
        build: BuildId,
        source: &'a SecretSource,
        repositories: Vec<String>,
    ) -> BoxFuture<'a, Result<Credentials, Failure>>;

    /// Who watches a build.
    fn watcher(&self, build: BuildId) -> mpsc::Sender<Event>;

    /// Writes the outputs of a committed build that are no tags.
    fn deliver<'a>(
        &'a self,
        grant: &'a BuildGrant,
        finished: &'a Finished,
    ) -> BoxFuture<'a, BTreeMap<String, Outcome>>;

    /// An attempt is over. The sealed bytes live until this returns.
    fn ended<'a>(&'a self, build: BuildId, ended: Ended<'a>) -> BoxFuture<'a, ()>;
}

/// The end of an attempt, for whoever waits for it.
#[derive(Debug)]
pub struct Ended<'a> {
    /// What was built; none if the attempt did not come so far.
    pub finished: Option<&'a Finished>,
    /// Why the attempt failed, if it did.
    pub failure: Option<&'a Failure>,
    /// Every phase of the attempt.
    pub phases: &'a [PhaseDuration],
}
