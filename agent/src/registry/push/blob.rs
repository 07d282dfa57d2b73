//! Blobs: present, mounted from a neighbour, or sent (shell).

use futures_util::stream::{self, StreamExt, TryStreamExt};
use kiln_protocol::Digest;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Method, StatusCode, Url};
use serde::{Deserialize, Serialize};

use super::body::BlobSource;
use super::manifest::answered;
use super::{Blob, Candidate, Failed, Push, PushError, Sent};
use crate::blobs::BlobStore;
use crate::registry::error::Cause;
use crate::registry::remote::{Call, Payload, location};

/// As many as other tools use; more do not make one registry faster.
const PARALLEL_BLOBS: usize = 3;
const ANY_BYTES: &str = "application/octet-stream";
/// Refusals that mean "not now", also from a host that the registry sent us to.
const PASSING: [u16; 3] = [408, 425, 429];

/// How the blobs of a candidate got there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uploaded {
    /// Blobs that the repository had.
    pub present: u32,
    /// Blobs that another repository of the registry had.
    pub mounted: u32,
    /// Blobs that were sent.
    pub sent: u32,
    /// Bytes that were sent, without what was repeated.
    pub bytes: u64,
}

enum Delivered {
    Present,
    Mounted,
    Sent,
}

enum Opened {
    Mounted,
    Session(Url),
}

impl Push {
    /// Brings the blobs there, then the manifest under its digest. No tag exists afterwards.
    pub async fn upload_candidate(
        &self,
        candidate: &Candidate,
        store: &BlobStore,
        sent: &Sent,
    ) -> Result<Uploaded, PushError> {
        self.within(self.upload(candidate, store, sent)).await.map_err(|failed| self.error(None, failed))
    }

    async fn upload(
        &self,
        candidate: &Candidate,
        store: &BlobStore,
        sent: &Sent,
    ) -> Result<Uploaded, Failed> {
        let blobs: Vec<_> = candidate.blobs.iter().map(|blob| self.blob(blob, store, sent)).collect();
        let mut delivered = stream::iter(blobs).buffer_unordered(PARALLEL_BLOBS);
        let mut uploaded = Uploaded::default();
        while let Some((size, how)) = delivered.try_next().await? {
            match how {
                Delivered::Present => uploaded.present += 1,
                Delivered::Mounted => uploaded.mounted += 1,
                Delivered::Sent => {
                    uploaded.sent += 1;
                    uploaded.bytes = uploaded.bytes.saturating_add(size);
                }
            }
        }
        self.put_by_digest(candidate).await?;
        Ok(uploaded)
    }

    async fn blob(&self, blob: &Blob, store: &BlobStore, sent: &Sent) -> Result<(u64, Delivered), Failed> {
        let path = store.path(&blob.digest);
        let source = BlobSource { path, blob: blob.clone(), sent: sent.clone() };
        let mut patience = self.patience();
        loop {
            match self.deliver(&source).await {
                Ok(how) => return Ok((blob.size, how)),
                Err(failed) => patience.wait(failed).await?,
            }
        }
    }

    async fn deliver(&self, source: &BlobSource) -> Result<Delivered, Failed> {
        if self.readable_blob(&source.blob.digest).await? {
            return Ok(Delivered::Present);
        }
        match self.open(&source.blob.digest).await? {
            Opened::Mounted => Ok(Delivered::Mounted),
            Opened::Session(url) => self.send_blob(url, source).await.map(|()| Delivered::Sent),
        }
    }

    /// Whether the blob is there, as far as this credential sees: some may push and not pull.
    async fn readable_blob(&self, digest: &Digest) -> Result<bool, Failed> {
        match self.has_blob(digest).await {
            Err(Failed::Client(Cause::Unauthorized { .. })) => Ok(false),
            other => other,
        }
    }

    pub(super) async fn has_blob(&self, digest: &Digest) -> Result<bool, Failed> {
        match self.remote.send(Method::HEAD, &format!("blobs/{digest}"), "*/*").await {
            Ok(_) => Ok(true),
            Err(Cause::NotFound { .. }) => Ok(false),
            // A redirect to storage whose signature is for GET only.
            Err(Cause::Unavailable { status, .. }) if status < 500 && !PASSING.contains(&status) => Ok(false),
            Err(cause) => Err(cause.into()),
        }
    }

    async fn open(&self, digest: &Digest) -> Result<Opened, Failed> {
        let neighbour = self.mounts.iter().find(|(_, blobs)| blobs.contains(digest));
        if let Some((from, _)) = neighbour {
            match self.post_upload(Some((digest, from))).await {
                // Who may push here may be forbidden to read there.
                Err(Cause::Unauthorized { .. } | Cause::NotFound { .. } | Cause::Refused { .. }) => {}
                other => return Ok(other?),
            }
        }
        Ok(self.post_upload(None).await?)
    }

    async fn post_upload(&self, mount: Option<(&Digest, &str)>) -> Result<Opened, Cause> {
        let mut url = self.remote.url("blobs/uploads/").await?;
        if let Some((digest, from)) = mount {
            url.query_pairs_mut().append_pair("mount", digest.as_str()).append_pair("from", from);
        }
        let call = Call::new(Method::POST, url);
        let accepted = [StatusCode::ACCEPTED, StatusCode::CREATED];
        let response = self.remote.expect(&call, &accepted).await?;
        if mount.is_some() && response.status() == StatusCode::CREATED {
            return Ok(Opened::Mounted);
        }
        location(&response, self.remote.endpoint.insecure).map(Opened::Session)
    }

    /// Opens an upload without a blob.
    pub(super) async fn open_session(&self) -> Result<Option<Url>, Failed> {
        match self.post_upload(None).await? {
            Opened::Mounted => Ok(None),
            Opened::Session(url) => Ok(Some(url)),
        }
    }

    async fn send_blob(&self, mut url: Url, source: &BlobSource) -> Result<(), Failed> {
        let expected = &source.blob.digest;
        url.query_pairs_mut().append_pair("digest", expected.as_str());
        let call = Call::new(Method::PUT, url).header(CONTENT_TYPE, ANY_BYTES)?;
        let call = call.body(Payload::Blob(source.clone()));
        let accepted = [StatusCode::CREATED, StatusCode::NO_CONTENT];
        let response = self.remote.expect(&call, &accepted).await?;
        match answered(&response) {
            Some(answered) if answered != *expected => {
                Err(Failed::OtherDigest { expected: expected.clone(), answered })
            }
            _ => Ok(()),
        }
    }
}
