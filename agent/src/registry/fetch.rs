//! Brings an image into the blob store (shell).

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use reqwest::Method;

use super::config::Endpoint;
use super::error::{Cause, RegistryError};
use super::manifest::Descriptor;
use super::remote::Remote;
use super::resolve::ResolvedImage;
use super::retry::Backoff;
use super::said::Said;
use super::{Registry, Search};
use crate::blobs::{BlobError, BlobStore, BlobWriter, digest_of};

/// As many as other tools use; more do not make one registry faster.
const PARALLEL_BLOBS: usize = 3;
/// Bytes that are gathered before a thread hashes and writes them; also the step of the progress.
const BATCH: usize = 1024 * 1024;
const ACCEPT_ANY: &str = "*/*";

/// Is told about a blob and how many of its bytes are there. The count starts again if a transfer is
/// repeated, and equals the size at the end, also of a blob that was there before.
pub type Progress<'a> = &'a (dyn Fn(&Descriptor, u64) + Send + Sync);

impl Registry {
    /// Brings config, layers, manifest and index into the store; what is there stays. When the future is
    /// dropped, nothing half-written remains.
    pub async fn fetch(
        &self,
        image: &ResolvedImage,
        store: &BlobStore,
        progress: Progress<'_>,
    ) -> Result<(), RegistryError> {
        let mut search = Search::new(&image.reference);
        let endpoints = self.endpoints(&image.reference, &mut search)?;
        let order = Order { registry: self, endpoints: &endpoints, image, store, progress };
        let limit = self.limits.fetch;
        let ended = tokio::time::timeout(limit, order.run()).await;
        ended.unwrap_or_else(|_| Err(search.expired("fetching the image", limit)))
    }
}

/// One image to bring.
struct Order<'a> {
    registry: &'a Registry,
    endpoints: &'a [Endpoint],
    image: &'a ResolvedImage,
    store: &'a BlobStore,
    progress: Progress<'a>,
}

impl Order<'_> {
    async fn run(&self) -> Result<(), RegistryError> {
        let mut seen = BTreeSet::new();
        let mut fetches = Vec::new();
        for blob in [&self.image.config].into_iter().chain(&self.image.layers) {
            // Some images have the same layer twice.
            if seen.insert(&blob.digest) {
                fetches.push(self.blob(blob));
            }
        }
        stream::iter(fetches).buffer_unordered(PARALLEL_BLOBS).try_collect::<()>().await?;
        // Last, so that a manifest in the store means that its blobs were there.
        let documents = [Some(&self.image.manifest), self.image.index.as_ref()];
        for bytes in documents.into_iter().flatten() {
            self.document(bytes)?;
        }
        Ok(())
    }

    fn document(&self, bytes: &[u8]) -> Result<(), RegistryError> {
        if self.store.has(&digest_of(bytes)) {
            return Ok(());
        }
        let stored = self.store.put(bytes).map(|_| ());
        let host = self.image.reference.registry().to_owned();
        stored.map_err(|error| Search::new(&self.image.reference).error(host, error.into()))
    }

    async fn blob(&self, blob: &Descriptor) -> Result<(), RegistryError> {
        let mut search = Search::new(&self.image.reference);
        // The endpoint that knew the manifest comes first, those that did not know it are left out.
        let endpoints = self.endpoints.get(self.image.source..).unwrap_or_default();
        for (position, endpoint) in endpoints.iter().enumerate() {
            let last = position + 1 == endpoints.len();
            match self.blob_from(endpoint, blob, last).await {
                Ok(()) => return Ok(()),
                Err(cause) => search.failed(endpoint, cause, last)?,
            }
        }
        let host = self.image.reference.registry().to_owned();
        Err(search.error(host, Cause::NotFound { said: Said::default() }))
    }

    async fn blob_from(&self, endpoint: &Endpoint, blob: &Descriptor, patient: bool) -> Result<(), Cause> {
        if self.store.size(&blob.digest)? == Some(blob.size) {
            (self.progress)(blob, blob.size);
            return Ok(());
        }
        let remote = self.registry.remote(endpoint)?;
        let mut backoff = Backoff::new(&remote.limits, patient);
        loop {
            match self.transfer(&remote, blob).await {
                Ok(()) => return Ok(()),
                Err(cause) => backoff.wait(cause).await?,
            }
        }
    }

    async fn transfer(&self, remote: &Remote, blob: &Descriptor) -> Result<(), Cause> {
        let path = format!("blobs/{}", blob.digest);
        let mut response = remote.send(Method::GET, &path, ACCEPT_ANY).await?;
        let mut writer = self.store.writer()?;
        let (mut batch, mut received) = (Vec::new(), 0);
        while let Some(chunk) = remote.chunk(&mut response).await? {
            batch.extend_from_slice(chunk.as_ref());
            received += chunk.as_ref().len() as u64;
            if received > blob.size {
                return Err(Cause::Length { expected: blob.size, actual: received });
            }
            if batch.len() >= BATCH {
                writer = append(writer, std::mem::take(&mut batch)).await?;
                (self.progress)(blob, received);
            }
        }
        let writer = append(writer, batch).await?;
        let Descriptor { digest, size, .. } = blob.clone();
        blocking(move || writer.commit(Some(&digest), Some(size))).await?;
        (self.progress)(blob, blob.size);
        Ok(())
    }
}

/// The writer travels with the bytes, so that a dropped transfer drops it as soon as they are written.
async fn append(mut writer: BlobWriter, bytes: Vec<u8>) -> Result<BlobWriter, Cause> {
    blocking(move || writer.append(&bytes).map(|()| writer)).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, Cause> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Cause::Interrupted),
    }
}
