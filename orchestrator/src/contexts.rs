//! Uploaded contexts that nothing needs any more (shell).

use std::time::{Duration, SystemTime};

use kiln_protocol::Digest;
use kiln_transport::Blobs;
use kiln_transport::blobs::BlobError;

use crate::core::Orchestrator;
use crate::store::{Lock, StoreError};

/// Between an upload, or a look at whether one is needed, and the submission that refers to it. A client that takes
/// longer uploads again.
pub const GRACE: Duration = Duration::from_hours(1);

/// Contexts cannot be tidied now.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The contexts.
    #[error(transparent)]
    Blobs(#[from] BlobError),
    /// The record.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Orchestrator {
    /// Deletes what is too old or too much, the least recently used first, and what broken uploads left; says how
    /// many contexts went. Never one that a build refers to which is not over for good, or that was touched within
    /// [`GRACE`].
    pub async fn prune_contexts(&self, contexts: &Blobs, now: SystemTime) -> Result<u64, ContextError> {
        contexts.sweep(now).await?;
        let mut blobs = contexts.list().await?;
        blobs.sort_by_key(|blob| blob.stored_at);
        let retention = &self.settings.retention;
        let (mut held, mut gone) = (blobs.iter().map(|blob| blob.size).sum::<u64>(), 0);
        for blob in blobs {
            // A moment in the future is the youngest.
            let age = now.duration_since(blob.stored_at).unwrap_or_default();
            let unwanted = age >= retention.contexts || held > retention.context_bytes;
            if age < GRACE || !unwanted {
                break;
            }
            if self.delete_context(contexts, &blob.digest, now).await? {
                held = held.saturating_sub(blob.size);
                gone += 1;
            }
        }
        Ok(gone)
    }

    /// Nobody submits a build of it while the transaction lasts; see [`Orchestrator::submit_uploaded`].
    async fn delete_context(
        &self,
        contexts: &Blobs,
        digest: &Digest,
        now: SystemTime,
    ) -> Result<bool, ContextError> {
        let mut tx = self.store.write().await?;
        tx.lock(Lock::Context(digest)).await?;
        if tx.needs_context(digest).await? {
            return Ok(false);
        }
        Ok(contexts.delete_older(digest, now - GRACE).await?)
    }
}
