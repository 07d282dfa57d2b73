//! Takes sealed bytes to a repository (shell).
//!
//! Never converts: what is uploaded is the manifest and the blobs under the digests that hooks saw. A tag is a
//! PUT of its own, sent once, because its caller asks before each one whether it may still be sent.

mod blob;
mod body;
mod error;
mod failed;
mod manifest;
mod patience;
mod probe;

#[cfg(test)]
mod faults;
#[cfg(test)]
mod harbor;
#[cfg(test)]
mod real;
#[cfg(test)]
mod testing;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::Digest;
use oci_spec::distribution::Reference;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::config::Endpoint;
use super::error::Cause;
use super::remote::Remote;
use super::{Credential, Registry};
use crate::seal::Sealed;
pub use blob::Uploaded;
pub(crate) use body::BlobSource;
pub use error::{Kind, PushError};
use failed::Failed;
pub use manifest::TagOutcome;
use patience::Patience;
pub use probe::{Probe, TagRule};

/// 1 GB at 10 Mbit/s, or a registry that restarts.
pub const DEFAULT_BUDGET: Duration = Duration::from_mins(15);
/// Scopes that one token is asked for; each costs the token service a look-up.
const MAX_MOUNTS: usize = 4;

/// Bytes under their digest, as a push needs them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Blob {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// A manifest, or an index, and the blobs that it names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Media type of the manifest.
    pub media_type: String,
    /// The manifest, byte for byte. Its text: both formats are JSON.
    pub manifest: String,
    /// Config and layers. Empty for an index, whose manifests are candidates of their own.
    pub blobs: Vec<Blob>,
}

impl Candidate {
    /// What a sealed image consists of; `None` if its manifest is not text.
    pub fn of(sealed: &Sealed) -> Option<Self> {
        let named = sealed.layers.iter().map(|layer| &layer.descriptor).chain([&sealed.config]);
        let blobs: BTreeSet<_> =
            named.map(|blob| Blob { digest: blob.digest.clone(), size: blob.size }).collect();
        let descriptor = sealed.descriptor();
        Some(Self {
            digest: descriptor.digest,
            media_type: descriptor.media_type,
            manifest: String::from_utf8(sealed.manifest.clone()).ok()?,
            blobs: blobs.into_iter().collect(),
        })
    }
}

/// A repository that is known to have blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where they are: a base image, or a target that came earlier.
    pub repository: Reference,
    /// What is there.
    pub blobs: BTreeSet<Digest>,
}

/// Is told about a blob and how many of its bytes were sent. The count starts again if a transfer is repeated.
pub type Sent = Arc<dyn Fn(&Blob, u64) + Send + Sync>;

/// One repository while something is pushed to it.
#[derive(Debug)]
pub struct Push {
    remote: Remote,
    /// Repositories on the same registry, by their names there.
    mounts: Vec<(String, BTreeSet<Digest>)>,
    deadline: Instant,
    budget: Duration,
}

impl Registry {
    /// Opens a repository for pushing; its tag and digest do not count. Everything that is done with it,
    /// with all repetitions, ends after `budget`. Mirrors are not used. Nothing is sent yet.
    pub fn push(
        &self,
        repository: &Reference,
        mounts: &[Mount],
        budget: Duration,
    ) -> Result<Push, PushError> {
        let refused = |cause: Cause| {
            let (host, name) = (repository.registry(), repository.repository());
            PushError::new(host, name, None, Failed::Client(cause))
        };
        let endpoint = self.config.location(repository).map_err(|error| refused(error.into()))?;
        let mounts = self.mounts(&endpoint, mounts);
        let remote = self.push_remote(&endpoint, &mounts).map_err(refused)?;
        Ok(Push { remote, mounts, deadline: Instant::now() + budget, budget })
    }

    fn mounts(&self, target: &Endpoint, mounts: &[Mount]) -> Vec<(String, BTreeSet<Digest>)> {
        let same = mounts.iter().filter_map(|mount| {
            let endpoint = self.config.location(&mount.repository).ok()?;
            let near = endpoint.host == target.host && endpoint.repository != target.repository;
            near.then(|| (endpoint.repository, mount.blobs.clone()))
        });
        same.take(MAX_MOUNTS).collect()
    }

    fn push_remote(
        &self,
        endpoint: &Endpoint,
        mounts: &[(String, BTreeSet<Digest>)],
    ) -> Result<Remote, Cause> {
        let client = self.clients.get(endpoint, &self.limits)?;
        let credential = self.credentials.lookup(&endpoint.credential_key()).cloned();
        let own = format!("repository:{}:pull,push", endpoint.repository);
        let others = mounts.iter().map(|(repository, _)| format!("repository:{repository}:pull"));
        let scopes = std::iter::once(own).chain(others).collect();
        Ok(Remote::new(client, endpoint.clone(), credential, scopes, self.limits.clone()))
    }
}

impl Push {
    fn patience(&self) -> Patience<'_> {
        Patience::new(&self.remote.limits, self.deadline)
    }

    /// Ends work that takes longer than the budget.
    async fn within<T>(&self, work: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
        let ended = tokio::time::timeout_at(self.deadline, work).await;
        let expired = Cause::Timeout { what: "pushing, with all repetitions,", limit: self.budget };
        ended.unwrap_or_else(|_| Err(expired.into()))
    }

    fn error(&self, tag: Option<&str>, failed: Failed) -> PushError {
        let endpoint = &self.remote.endpoint;
        PushError::new(&endpoint.host, &endpoint.repository, tag, failed)
    }

    fn password(&self) -> Option<(&str, &str)> {
        match &self.remote.credential {
            Some(Credential::Password { username, password }) => Some((username, password)),
            _ => None,
        }
    }
}
