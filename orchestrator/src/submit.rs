//! Submission (shell).

use kiln_protocol::spec::InvalidSpec;
use kiln_protocol::{BuildId, BuildSpec, Digest, State};
use kiln_transport::Blobs;
use kiln_transport::blobs::BlobError;
use kiln_transport::crash::{self, CrashPoint};
use sha2::Digest as _;

use crate::build::Build;
use crate::core::{CoreError, Orchestrator};
use crate::store::{Inserted, Lock};

/// Longest idempotency key: a UUID with room for a prefix.
const MAX_KEY_BYTES: usize = 128;

/// A build that is to be recorded.
#[derive(Debug, Clone)]
pub struct Submission {
    /// What to build.
    pub spec: BuildSpec,
    /// Makes a repeated submission harmless.
    pub key: Option<String>,
    /// The build of which this is a new try by a person.
    pub retry_of: Option<BuildId>,
}

/// What became of a submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Submitted {
    /// The build.
    pub id: BuildId,
    /// The same submission was recorded before.
    pub repeated: bool,
}

/// A submission is refused.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The spec breaks a rule.
    #[error(transparent)]
    Invalid(#[from] InvalidSpec),
    /// The key is too long.
    #[error("the idempotency key has {0} bytes; the most is {MAX_KEY_BYTES}")]
    Key(usize),
    /// The key was used for something else.
    #[error("the idempotency key was used for build {0}, which is another request; use a fresh key")]
    OtherRequest(BuildId),
    /// A build that is still going on cannot be retried.
    #[error("build {id} is {state}; only a build that is over can be retried")]
    NotOver {
        /// The build.
        id: BuildId,
        /// Its state.
        state: State,
    },
    /// There is no such build.
    #[error("there is no build {0}")]
    Missing(BuildId),
    /// The context was not uploaded, or was deleted since.
    #[error("there is no context {0}; upload it first, then submit again")]
    ContextMissing(Digest),
    /// The uploaded contexts.
    #[error(transparent)]
    Contexts(#[from] BlobError),
    /// The record.
    #[error(transparent)]
    Core(#[from] CoreError),
}

impl From<crate::store::StoreError> for SubmitError {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Core(error.into())
    }
}

impl Orchestrator {
    /// Records a build whose client holds its context. It is accepted when this returns, and not before.
    pub async fn submit(&self, submission: Submission) -> Result<Submitted, SubmitError> {
        self.record(submission, None).await
    }

    /// Records a build whose context was uploaded: from then on it is kept for the build.
    pub async fn submit_uploaded(
        &self,
        submission: Submission,
        contexts: &Blobs,
    ) -> Result<Submitted, SubmitError> {
        self.record(submission, Some(contexts)).await
    }

    async fn record(
        &self,
        submission: Submission,
        contexts: Option<&Blobs>,
    ) -> Result<Submitted, SubmitError> {
        let Submission { spec, key, retry_of } = submission;
        spec.validate()?;
        if let Some(length) = key.as_ref().map(String::len).filter(|&length| length > MAX_KEY_BYTES) {
            return Err(SubmitError::Key(length));
        }
        let hash = request_hash(&spec, retry_of)?;
        let mut tx = self.store.write().await?;
        if let Some(key) = &key {
            match tx.repeated(&spec.namespace, key, &hash).await? {
                Inserted::New => {}
                Inserted::Repeated(id) => return Ok(Submitted { id, repeated: true }),
                Inserted::OtherRequest(id) => return Err(SubmitError::OtherRequest(id)),
            }
        }
        let (id, seq) = (self.entropy.build_id(), tx.next_submit_seq().await?);
        let build = Build::submitted(id, seq, &spec, retry_of, tx.now());
        tx.insert(&build, &spec, key.as_deref(), &hash).await?;
        if contexts.is_some() {
            tx.lock(Lock::Context(&spec.context.digest)).await?;
        }
        // Within the transaction: whoever deletes contexts looks for builds in one of its own.
        if let Some(contexts) = contexts
            && contexts.size(&spec.context.digest).await?.is_none()
        {
            return Err(SubmitError::ContextMissing(spec.context.digest));
        }
        let event = build.public(&spec, tx.now());
        self.publish_event(&mut tx, &event).await?;
        tx.audit(&spec.requester, "submit", Some(id), "").await?;
        tx.commit().await?;
        crash::reach(CrashPoint::SubmitRecorded);
        Ok(Submitted { id, repeated: false })
    }

    /// Submits a build that is over once more; its context is among the uploaded ones, if they are given.
    pub async fn retry(
        &self,
        of: BuildId,
        key: Option<String>,
        contexts: Option<&Blobs>,
    ) -> Result<Submitted, SubmitError> {
        let found = self.store.read().await?.load(of).await?.ok_or(SubmitError::Missing(of))?;
        if !found.build.state.is_final() {
            return Err(SubmitError::NotOver { id: of, state: found.build.state });
        }
        self.record(Submission { spec: found.spec, key, retry_of: Some(of) }, contexts).await
    }
}

fn request_hash(spec: &BuildSpec, retry_of: Option<BuildId>) -> Result<String, InvalidSpec> {
    let encoded = serde_json::to_vec(&(spec, retry_of)).map_err(|e| InvalidSpec::Encoding(e.to_string()))?;
    Ok(Digest::from_sha256(sha2::Sha256::digest(encoded).into()).to_string())
}
