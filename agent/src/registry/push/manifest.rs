//! Manifests by digest and by tag (shell).

use kiln_protocol::Digest;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Method, Response, StatusCode};
use serde::{Deserialize, Serialize};

use super::{Candidate, Failed, Push, PushError};
use crate::blobs::digest_of;
use crate::registry::error::Cause;
use crate::registry::manifest::{ACCEPT, MANIFEST_LIMIT};
use crate::registry::remote::{Call, Payload};
use crate::registry::resolve::DIGEST_HEADER;

/// How the PUT of a tag ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub enum TagOutcome {
    /// The tag points to the manifest.
    Moved,
    /// The registry refuses, today and tomorrow.
    Refused(PushError),
}

/// What the registry says that it stored.
pub(super) fn answered(response: &Response) -> Option<Digest> {
    response.headers().get(DIGEST_HEADER)?.to_str().ok()?.parse().ok()
}

impl Push {
    /// Sends one PUT; only authentication may repeat it. The error is one that may pass, and after it the
    /// tag may have moved or not. The caller decides when it is sent again.
    pub async fn put_tag(
        &self,
        tag: &str,
        manifest: &[u8],
        media_type: &str,
    ) -> Result<TagOutcome, PushError> {
        match self.within(self.put(tag, manifest, media_type, &digest_of(manifest))).await {
            Ok(()) => Ok(TagOutcome::Moved),
            Err(failed) => {
                let error = self.error(Some(tag), failed);
                if error.kind.is_refusal() { Ok(TagOutcome::Refused(error)) } else { Err(error) }
            }
        }
    }

    /// What a tag points to; `None` if it does not exist.
    pub async fn head_tag(&self, tag: &str) -> Result<Option<Digest>, PushError> {
        let asked = self.within(self.patiently_named(tag)).await;
        asked.map_err(|failed| self.error(Some(tag), failed))
    }

    /// What of the candidate the repository lacks, by digest; the manifest is last.
    pub async fn verify_candidate(&self, candidate: &Candidate) -> Result<Vec<Digest>, PushError> {
        self.within(self.missing(candidate)).await.map_err(|failed| self.error(None, failed))
    }

    async fn missing(&self, candidate: &Candidate) -> Result<Vec<Digest>, Failed> {
        let mut missing = Vec::new();
        for blob in &candidate.blobs {
            if !self.patiently_has(&blob.digest).await? {
                missing.push(blob.digest.clone());
            }
        }
        match self.patiently_named(candidate.digest.as_str()).await? {
            Some(named) if named != candidate.digest => {
                return Err(Failed::OtherDigest { expected: candidate.digest.clone(), answered: named });
            }
            Some(_) => {}
            None => missing.push(candidate.digest.clone()),
        }
        Ok(missing)
    }

    async fn patiently_has(&self, digest: &Digest) -> Result<bool, Failed> {
        let mut patience = self.patience();
        loop {
            match self.has_blob(digest).await {
                Ok(has) => return Ok(has),
                Err(failed) => patience.wait(failed).await?,
            }
        }
    }

    async fn patiently_named(&self, name: &str) -> Result<Option<Digest>, Failed> {
        let mut patience = self.patience();
        loop {
            match self.named(name).await {
                Ok(named) => return Ok(named),
                Err(failed) => patience.wait(failed).await?,
            }
        }
    }

    pub(super) async fn put_by_digest(&self, candidate: &Candidate) -> Result<(), Failed> {
        let Candidate { digest, media_type, manifest, .. } = candidate;
        let mut patience = self.patience();
        loop {
            match self.put(digest.as_str(), manifest.as_bytes(), media_type, digest).await {
                Ok(()) => return Ok(()),
                Err(failed) => patience.wait(failed).await?,
            }
        }
    }

    async fn put(&self, name: &str, bytes: &[u8], media_type: &str, expected: &Digest) -> Result<(), Failed> {
        let url = self.remote.url(&format!("manifests/{name}")).await?;
        let call = Call::new(Method::PUT, url).header(CONTENT_TYPE, media_type)?;
        let call = call.body(Payload::Bytes(bytes.to_vec()));
        let response = self.remote.expect(&call, &[StatusCode::CREATED, StatusCode::OK]).await?;
        let answered = match answered(&response) {
            Some(answered) => Some(answered),
            // The header is optional.
            None => self.named(name).await?,
        };
        match answered {
            Some(answered) if answered == *expected => Ok(()),
            Some(answered) => Err(Failed::OtherDigest { expected: expected.clone(), answered }),
            None => Err(Cause::NotFound { said: crate::registry::Said::default() }.into()),
        }
    }

    /// What a name points to. Registries that do not say it in a header are asked for the bytes.
    pub(super) async fn named(&self, name: &str) -> Result<Option<Digest>, Failed> {
        let path = format!("manifests/{name}");
        match self.remote.send(Method::HEAD, &path, ACCEPT).await {
            Ok(response) => {
                if let Some(digest) = answered(&response) {
                    return Ok(Some(digest));
                }
            }
            Err(Cause::NotFound { .. }) => return Ok(None),
            Err(Cause::Refused { status: 405, .. }) => {}
            Err(cause) => return Err(cause.into()),
        }
        match self.remote.send(Method::GET, &path, ACCEPT).await {
            Ok(mut response) => {
                let bytes = self.remote.body(&mut response, MANIFEST_LIMIT, "the manifest").await?;
                Ok(Some(digest_of(&bytes)))
            }
            Err(Cause::NotFound { .. }) => Ok(None),
            Err(cause) => Err(cause.into()),
        }
    }
}
