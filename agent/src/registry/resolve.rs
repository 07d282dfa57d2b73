//! Finds out what a reference means for one platform (shell).

use kiln_protocol::Digest;
use oci_spec::distribution::Reference;
use reqwest::Method;

use super::config::Endpoint;
use super::error::{Cause, RegistryError};
use super::manifest::{self, ACCEPT, Content, Descriptor, Document, MANIFEST_LIMIT, ManifestError};
use super::platform::Platform;
use super::remote::Remote;
use super::retry::Backoff;
use super::said::Said;
use super::{Registry, Search};
use crate::blobs::{BlobStore, digest_of};

/// The header in which registries name what a tag points to.
pub(super) const DIGEST_HEADER: &str = "docker-content-digest";

/// A reference with everything that follows from it.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// What was asked for.
    pub reference: Reference,
    /// Digest of the index that lists the platforms, if the reference leads to one.
    pub index_digest: Option<Digest>,
    /// Digest of the manifest for the platform.
    pub manifest_digest: Digest,
    /// The manifest as the registry sent it.
    pub manifest: Vec<u8>,
    /// Media type of the manifest.
    pub media_type: String,
    /// The image config.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// The index as the registry sent it.
    pub(super) index: Option<Vec<u8>>,
    /// Position of the endpoint that answered.
    pub(super) source: usize,
}

impl ResolvedImage {
    /// Bytes of the config and all layers as they are transferred.
    pub fn size(&self) -> u64 {
        let sizes = self.layers.iter().chain([&self.config]).map(|blob| blob.size);
        sizes.fold(0, u64::saturating_add)
    }
}

/// A document and its digest.
struct Fetched {
    bytes: Vec<u8>,
    digest: Digest,
    document: Document,
}

impl Fetched {
    fn new(bytes: Vec<u8>) -> Result<Self, Cause> {
        let document = manifest::parse(&bytes)?;
        Ok(Self { digest: digest_of(&bytes), bytes, document })
    }
}

impl Registry {
    /// Asks what the reference means now, with this build's credentials, whatever is in `cache`: that only
    /// saves transfers. Fails for images without the platform.
    pub async fn resolve(
        &self,
        reference: &Reference,
        platform: &Platform,
        cache: &BlobStore,
    ) -> Result<ResolvedImage, RegistryError> {
        let mut search = Search::new(reference);
        let limit = self.limits.resolve;
        let searching = self.resolve_anywhere(reference, platform, cache, &mut search);
        let ended = tokio::time::timeout(limit, searching).await;
        ended.unwrap_or_else(|_| Err(search.expired("resolving the image", limit)))
    }

    async fn resolve_anywhere(
        &self,
        reference: &Reference,
        platform: &Platform,
        cache: &BlobStore,
        search: &mut Search<'_>,
    ) -> Result<ResolvedImage, RegistryError> {
        let endpoints = self.endpoints(reference, search)?;
        for (source, endpoint) in endpoints.iter().enumerate() {
            let last = source + 1 == endpoints.len();
            let inquiry = Inquiry { reference, platform, cache, patient: last };
            match self.resolve_at(endpoint, &inquiry).await {
                Ok(image) => return Ok(ResolvedImage { source, ..image }),
                Err(cause) => search.failed(endpoint, cause, last)?,
            }
        }
        Err(search.error(reference.registry().to_owned(), Cause::NotFound { said: Said::default() }))
    }

    pub(super) fn endpoints(
        &self,
        reference: &Reference,
        search: &mut Search<'_>,
    ) -> Result<Vec<Endpoint>, RegistryError> {
        let endpoints = self.config.endpoints(reference);
        endpoints.map_err(|error| search.error(reference.registry().to_owned(), error.into()))
    }

    async fn resolve_at(&self, endpoint: &Endpoint, inquiry: &Inquiry<'_>) -> Result<ResolvedImage, Cause> {
        let remote = self.remote(endpoint)?;
        inquiry.run(&remote).await
    }
}

/// One question to one endpoint.
struct Inquiry<'a> {
    reference: &'a Reference,
    platform: &'a Platform,
    cache: &'a BlobStore,
    patient: bool,
}

impl Inquiry<'_> {
    async fn run(&self, remote: &Remote) -> Result<ResolvedImage, Cause> {
        let top = self.top(remote).await?;
        match top.document.content {
            Content::Image { config, layers } => {
                let image = self.image(top.bytes, top.digest, top.document.media_type, config, layers);
                Ok(image)
            }
            Content::Index(ref entries) => {
                let wanted = manifest::select(entries, self.platform)?;
                let child = self.child(remote, &wanted).await?;
                let Content::Image { config, layers } = child.document.content else {
                    return Err(ManifestError::NestedIndex.into());
                };
                let image = self.image(child.bytes, child.digest, child.document.media_type, config, layers);
                Ok(ResolvedImage { index_digest: Some(top.digest), index: Some(top.bytes), ..image })
            }
        }
    }

    fn image(
        &self,
        manifest: Vec<u8>,
        manifest_digest: Digest,
        media_type: String,
        config: Descriptor,
        layers: Vec<Descriptor>,
    ) -> ResolvedImage {
        let reference = self.reference.clone();
        ResolvedImage {
            reference,
            index_digest: None,
            manifest_digest,
            manifest,
            media_type,
            config,
            layers,
            index: None,
            source: 0,
        }
    }

    /// What the reference itself names. The registry is asked in any case: a cached document says nothing
    /// about who may read it, or whether the tag moved.
    async fn top(&self, remote: &Remote) -> Result<Fetched, Cause> {
        let pinned = self.reference.digest().map(manifest::parse_digest).transpose()?;
        // The digest wins over a tag beside it.
        let name = self.reference.digest().or(self.reference.tag()).unwrap_or("latest");
        let worth_asking = pinned.as_ref().is_none_or(|digest| self.cache.has(digest));
        let named = if worth_asking { self.head(remote, name).await? } else { None };
        let confirmed = named.filter(|named| pinned.as_ref().is_none_or(|pinned| pinned == named));
        match self.cached(confirmed.as_ref())? {
            Some(bytes) => Fetched::new(bytes),
            None => self.get(remote, name, pinned.as_ref()).await,
        }
    }

    /// The manifest that an index names. The index was readable, so is this.
    async fn child(&self, remote: &Remote, wanted: &Digest) -> Result<Fetched, Cause> {
        match self.cached(Some(wanted))? {
            Some(bytes) => Fetched::new(bytes),
            None => self.get(remote, wanted.as_str(), Some(wanted)).await,
        }
    }

    fn cached(&self, digest: Option<&Digest>) -> Result<Option<Vec<u8>>, Cause> {
        match digest {
            Some(digest) => Ok(self.cache.read_verified(digest, MANIFEST_LIMIT)?),
            None => Ok(None),
        }
    }

    /// The digest behind a name; `None` if the registry answers in a way that only GET explains. Docker Hub
    /// counts GET against its limits, HEAD not.
    async fn head(&self, remote: &Remote, name: &str) -> Result<Option<Digest>, Cause> {
        let mut backoff = Backoff::new(&remote.limits, self.patient);
        loop {
            match remote.send(Method::HEAD, &format!("manifests/{name}"), ACCEPT).await {
                Ok(response) => {
                    let header = response.headers().get(DIGEST_HEADER);
                    return Ok(header.and_then(|value| value.to_str().ok()?.parse().ok()));
                }
                Err(Cause::NotFound { .. } | Cause::Refused { .. }) => return Ok(None),
                Err(cause) => backoff.wait(cause).await?,
            }
        }
    }

    async fn get(&self, remote: &Remote, name: &str, expected: Option<&Digest>) -> Result<Fetched, Cause> {
        let mut backoff = Backoff::new(&remote.limits, self.patient);
        loop {
            match get_once(remote, name).await {
                Ok(bytes) => return verified(bytes, expected),
                Err(cause) => backoff.wait(cause).await?,
            }
        }
    }
}

async fn get_once(remote: &Remote, name: &str) -> Result<Vec<u8>, Cause> {
    let mut response = remote.send(Method::GET, &format!("manifests/{name}"), ACCEPT).await?;
    remote.body(&mut response, MANIFEST_LIMIT, "the manifest").await
}

fn verified(bytes: Vec<u8>, expected: Option<&Digest>) -> Result<Fetched, Cause> {
    let actual = digest_of(&bytes);
    match expected {
        Some(expected) if *expected != actual => Err(Cause::Mismatch { expected: expected.clone(), actual }),
        _ => Fetched::new(bytes),
    }
}
