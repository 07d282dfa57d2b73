//! A blob of the store on its way into a request (shell).

use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::{Stream, stream};
use kiln_protocol::Digest;
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Body, RequestBuilder, Response};
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use super::{Blob, Sent};
use crate::blobs::BlobError;
use crate::registry::error::Cause;
use crate::registry::retry::Limits;

/// Bytes that are read, hashed and sent at once.
const CHUNK: u64 = 256 * 1024;

/// A blob that can be sent any number of times.
#[derive(Clone)]
pub(crate) struct BlobSource {
    pub(super) path: PathBuf,
    pub(super) blob: Blob,
    pub(super) sent: Sent,
}

impl std::fmt::Debug for BlobSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlobSource({})", self.blob.digest)
    }
}

/// What the stream tells the one who waits for the answer.
#[derive(Debug, Default)]
struct Meter {
    sent: AtomicU64,
    fault: OnceLock<BlobError>,
}

impl BlobSource {
    /// Sends the blob and waits for the answer. Bytes that do not have the blob's digest never arrive
    /// whole: the last piece is held back until the digest is known.
    pub(crate) async fn send(&self, request: RequestBuilder, limits: &Limits) -> Result<Response, Cause> {
        let opened = File::open(&self.path).await;
        let file = opened.map_err(|source| Cause::Store(self.unreadable("open", source)))?;
        let meter = Arc::new(Meter::default());
        let body = Body::wrap_stream(self.stream(file, Arc::clone(&meter)));
        let sending = request.header(CONTENT_LENGTH, self.blob.size).body(body).send();
        let answered = self.while_moving(sending, &meter, limits).await;
        match Arc::into_inner(meter).and_then(|meter| meter.fault.into_inner()) {
            Some(fault) => Err(Cause::Store(fault)),
            None => answered,
        }
    }

    /// A transfer may take long, but not stand still.
    async fn while_moving(
        &self,
        sending: impl Future<Output = reqwest::Result<Response>>,
        meter: &Meter,
        limits: &Limits,
    ) -> Result<Response, Cause> {
        let mut sending = pin!(sending);
        loop {
            let before = meter.sent.load(Ordering::Relaxed);
            let (what, limit) = self.allowance(before, limits);
            if let Ok(answered) = tokio::time::timeout(limit, &mut sending).await {
                return answered.map_err(|error| Cause::of_request(error, limits.connect));
            }
            if meter.sent.load(Ordering::Relaxed) == before {
                return Err(Cause::Timeout { what, limit });
            }
        }
    }

    fn allowance(&self, sent: u64, limits: &Limits) -> (&'static str, Duration) {
        if sent == self.blob.size {
            ("storing the blob", limits.store)
        } else {
            ("sending the next bytes", limits.idle)
        }
    }

    fn stream(
        &self,
        file: File,
        meter: Arc<Meter>,
    ) -> impl Stream<Item = io::Result<Vec<u8>>> + Send + 'static {
        let reading = Reading { file, meter, source: self.clone(), hasher: Sha256::new(), read: 0 };
        stream::try_unfold(reading, Reading::next)
    }

    fn unreadable(&self, action: &'static str, source: io::Error) -> BlobError {
        BlobError::Io { action, path: self.path.clone(), source }
    }
}

struct Reading {
    file: File,
    meter: Arc<Meter>,
    source: BlobSource,
    hasher: Sha256,
    read: u64,
}

impl Reading {
    async fn next(mut self) -> io::Result<Option<(Vec<u8>, Self)>> {
        let left = self.source.blob.size - self.read;
        if left == 0 {
            return Ok(None);
        }
        let mut chunk = Vec::new();
        let limit = left.min(CHUNK);
        let read = (&mut self.file).take(limit).read_to_end(&mut chunk).await;
        if let Err(error) = read {
            let fault = self.source.unreadable("read", error);
            return Err(self.stop(fault));
        }
        self.hasher.update(&chunk);
        self.read += chunk.len() as u64;
        if let Some(fault) = self.fault(chunk.is_empty()) {
            return Err(self.stop(fault));
        }
        self.meter.sent.store(self.read, Ordering::Relaxed);
        (self.source.sent)(&self.source.blob, self.read);
        Ok(Some((chunk, self)))
    }

    /// What is wrong with the bytes, once that is known.
    fn fault(&self, ended: bool) -> Option<BlobError> {
        let Blob { digest, size } = &self.source.blob;
        if ended {
            return Some(BlobError::Size { expected: *size, actual: self.read });
        }
        if self.read < *size {
            return None;
        }
        let actual = Digest::from_sha256(self.hasher.clone().finalize().into());
        (actual != *digest).then(|| BlobError::Digest { expected: digest.clone(), actual })
    }

    fn stop(&self, fault: BlobError) -> io::Error {
        // The request ends with it; the reason travels beside.
        let _ = self.meter.fault.set(fault);
        io::Error::other("the blob cannot be read")
    }
}
