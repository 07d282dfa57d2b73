//! Turns what a slot exported into bytes that the agent owns (shell).
//!
//! The export was written by untrusted code that may still change it. Each file is therefore opened once,
//! without following anything, and copied while it is hashed; every later step sees only the copy. A layer
//! that the base image already has is not read at all: the base's own blob takes its place.

mod decoder;
mod error;
mod export;
mod file;
mod layer;
pub mod manifest;
mod store;

use std::collections::{BTreeSet, HashMap};
use std::os::fd::BorrowedFd;

use kiln_protocol::Digest;
use kiln_protocol::request::ImageFormat;
use kiln_protocol::result::SealedImage;

use crate::blobs::BlobStore;
pub(crate) use decoder::decoder;
pub use error::SealError;
pub(crate) use error::is_disk_full;
pub use file::seal_file;
use manifest::{Compression, Descriptor, Manifest};
pub(crate) use store::blob_io_error;

/// Name of the manifest in a `dir:` export.
const MANIFEST_NAME: &str = "manifest.json";
/// Layers per image: several times what a container's root filesystem can stack (overlay: 128 in Docker).
const MAX_LAYERS: usize = 512;

/// Upper bounds for one export, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct SealLimits {
    /// Manifest, and config.
    pub document_bytes: u64,
    /// One exported layer file.
    pub layer_bytes: u64,
    /// All exported layer files together.
    pub total_bytes: u64,
    /// Plain content of all exported layers together.
    pub unpacked_bytes: u64,
}

impl Default for SealLimits {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        // Registries commonly refuse manifests over 4 MiB. The rest is far above images that people pull.
        Self {
            document_bytes: 4 << 20,
            layer_bytes: 64 * GIB,
            total_bytes: 128 * GIB,
            unpacked_bytes: 128 * GIB,
        }
    }
}

/// gzip level that gives nearly the size of level 6 in little more than half its time.
pub const DEFAULT_GZIP_LEVEL: u32 = 3;

/// How to seal.
#[derive(Clone, Copy)]
pub struct SealOptions<'a> {
    /// The format that the build was asked for.
    pub format: ImageFormat,
    /// gzip level (0 to 9) of layers that were exported without compression.
    pub gzip_level: u32,
    /// Upper bounds.
    pub limits: SealLimits,
    /// Asked between chunks; `true` ends the work with [`SealError::Stopped`].
    pub should_stop: &'a (dyn Fn() -> bool + Sync),
}

/// A layer of a base image, whose compressed bytes are in the blob store.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BaseLayer {
    /// sha256 of the plain tar archive.
    pub diff_id: Digest,
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Media type of the blob in the base's manifest, of either format.
    pub media_type: String,
}

impl BaseLayer {
    /// The base's own blob, if the store has it and this format has a name for its compression.
    fn sealed(&self, blobs: &BlobStore, format: ImageFormat) -> Option<SealedLayer> {
        let compression = Compression::of_media_type(&self.media_type)?;
        let media_type = compression.media_type(format)?.to_owned();
        let descriptor = Descriptor { media_type, size: self.size, digest: self.digest.clone() };
        let layer = SealedLayer { descriptor, diff_id: self.diff_id.clone(), unpacked: None };
        blobs.has(&self.digest).then_some(layer)
    }
}

/// Diff ids of the layers whose files [`seal`] will not look for in an export.
pub fn taken_from_bases(bases: &[BaseLayer], blobs: &BlobStore, format: ImageFormat) -> BTreeSet<Digest> {
    let taken = bases.iter().filter_map(|base| base.sealed(blobs, format));
    taken.map(|layer| layer.diff_id).collect()
}

/// A layer of a sealed image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedLayer {
    /// The blob in the store, with the type that the sealed manifest gives it.
    pub descriptor: Descriptor,
    /// sha256 of the plain tar archive.
    pub diff_id: Digest,
    /// Bytes of the plain tar archive; unknown for the layers of a base.
    pub unpacked: Option<u64>,
}

/// An image whose every byte is in the blob store under its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// The digests, as the rest of the system passes them on.
    pub image: SealedImage,
    /// The manifest, byte for byte.
    pub manifest: Vec<u8>,
    /// The config.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<SealedLayer>,
}

impl Sealed {
    /// The manifest as an index or a client names it.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor {
            media_type: manifest::manifest_type(self.image.format).to_owned(),
            size: self.manifest.len() as u64,
            digest: self.image.manifest_digest.clone(),
        }
    }
}

/// Copies a `dir:` export into the blob store and checks every digest in it.
pub fn seal(
    export_dir: BorrowedFd<'_>,
    bases: &[BaseLayer],
    blobs: &BlobStore,
    options: &SealOptions<'_>,
) -> Result<Sealed, SealError> {
    let manifest = read_document(export_dir, MANIFEST_NAME, options)?;
    let manifest = Manifest::parse(&manifest, options.format)?;
    let config = seal_config(export_dir, &manifest.config, blobs, options)?;
    let diff_ids = manifest::parse_config(&config)?;
    check_counts(&manifest, &diff_ids)?;
    let layers = Layers { export_dir, bases, blobs, options, sealed: HashMap::new(), copied: 0, unpacked: 0 }
        .seal_all(&manifest.layers, &diff_ids)?;
    finish(manifest, layers, blobs)
}

fn read_document(dir: BorrowedFd<'_>, name: &str, options: &SealOptions<'_>) -> Result<Vec<u8>, SealError> {
    export::open(dir, name)?.at_most(options.limits.document_bytes, "document_bytes")?.read_small()
}

/// Stores the config as it is: its digest is the image id.
fn seal_config(
    dir: BorrowedFd<'_>,
    descriptor: &Descriptor,
    blobs: &BlobStore,
    options: &SealOptions<'_>,
) -> Result<Vec<u8>, SealError> {
    let bytes = read_document(dir, descriptor.digest.hex(), options)?;
    if bytes.len() as u64 != descriptor.size {
        let found = bytes.len() as u64;
        return Err(SealError::Size { what: "config".to_owned(), found, expected: descriptor.size });
    }
    store::put("config", &bytes, Some(&descriptor.digest), blobs)?;
    Ok(bytes)
}

fn check_counts(manifest: &Manifest, diff_ids: &[Digest]) -> Result<(), SealError> {
    let layers = manifest.layers.len();
    if layers > MAX_LAYERS {
        return Err(SealError::TooManyLayers { found: layers, limit: MAX_LAYERS });
    }
    if layers != diff_ids.len() {
        return Err(manifest::FormatError::LayerCount { layers, diff_ids: diff_ids.len() }.into());
    }
    Ok(())
}

/// The layers of one image, sealed one after the other.
struct Layers<'a> {
    export_dir: BorrowedFd<'a>,
    bases: &'a [BaseLayer],
    blobs: &'a BlobStore,
    options: &'a SealOptions<'a>,
    /// Layers by exported digest and diff id: an image may stack the same one twice.
    sealed: HashMap<(Digest, Digest), SealedLayer>,
    copied: u64,
    unpacked: u64,
}

impl Layers<'_> {
    fn seal_all(
        mut self,
        exported: &[Descriptor],
        diff_ids: &[Digest],
    ) -> Result<Vec<SealedLayer>, SealError> {
        let pairs = exported.iter().zip(diff_ids).enumerate();
        pairs.map(|(index, (descriptor, diff_id))| self.seal_one(index, descriptor, diff_id)).collect()
    }

    fn seal_one(
        &mut self,
        index: usize,
        from: &Descriptor,
        diff_id: &Digest,
    ) -> Result<SealedLayer, SealError> {
        let key = (from.digest.clone(), diff_id.clone());
        if let Some(layer) = self.sealed.get(&key) {
            return Ok(layer.clone());
        }
        let layer = match self.base_layer(diff_id) {
            Some(layer) => layer,
            None => self.copy(index, from, diff_id)?,
        };
        self.sealed.insert(key, layer.clone());
        Ok(layer)
    }

    fn base_layer(&self, diff_id: &Digest) -> Option<SealedLayer> {
        let mut bases = self.bases.iter().filter(|base| base.diff_id == *diff_id);
        bases.find_map(|base| base.sealed(self.blobs, self.options.format))
    }

    fn copy(&mut self, index: usize, from: &Descriptor, diff_id: &Digest) -> Result<SealedLayer, SealError> {
        let limits = &self.options.limits;
        let file =
            export::open(self.export_dir, from.digest.hex())?.at_most(limits.layer_bytes, "layer_bytes")?;
        if file.size != from.size {
            let what = format!("layer {index}");
            return Err(SealError::Size { what, found: file.size, expected: from.size });
        }
        self.copied = self.copied.saturating_add(file.size);
        if self.copied > limits.total_bytes {
            let (what, limit) = (format!("export up to layer {index}"), limits.total_bytes);
            return Err(SealError::TooLarge { what, found: self.copied, limit, key: "total_bytes" });
        }
        let unpacked_left = limits.unpacked_bytes.saturating_sub(self.unpacked);
        let (blobs, options) = (self.blobs, self.options);
        let job = layer::Job { index, descriptor: from, diff_id, file: &file, blobs, options, unpacked_left };
        self.finish_layer(&job.run()?, diff_id)
    }

    fn finish_layer(&mut self, stored: &layer::Stored, diff_id: &Digest) -> Result<SealedLayer, SealError> {
        self.unpacked = self.unpacked.saturating_add(stored.unpacked);
        let format = self.options.format;
        let Some(media_type) = stored.compression.media_type(format) else {
            // Unreachable: the manifest was read with the types of this format only.
            let found = format!("{:?}", stored.compression);
            let (what, accepted) = ("layer".to_owned(), manifest::manifest_type(format).to_owned());
            return Err(manifest::FormatError::MediaType { what, found, accepted }.into());
        };
        let (media_type, digest) = (media_type.to_owned(), stored.digest.clone());
        let descriptor = Descriptor { media_type, size: stored.size, digest };
        Ok(SealedLayer { descriptor, diff_id: diff_id.clone(), unpacked: Some(stored.unpacked) })
    }
}

fn finish(mut manifest: Manifest, layers: Vec<SealedLayer>, blobs: &BlobStore) -> Result<Sealed, SealError> {
    manifest.layers = layers.iter().map(|layer| layer.descriptor.clone()).collect();
    let fail =
        |error: serde_json::Error| SealError::Store { what: "manifest".to_owned(), source: error.into() };
    let bytes = manifest.to_bytes().map_err(fail)?;
    let stored = store::put("manifest", &bytes, None, blobs)?;
    let layer_bytes = layers.iter().map(|layer| layer.descriptor.size).fold(0, u64::saturating_add);
    let image = SealedImage {
        manifest_digest: stored.digest,
        config_digest: manifest.config.digest.clone(),
        format: manifest.format,
        size: layer_bytes.saturating_add(stored.size).saturating_add(manifest.config.size),
    };
    Ok(Sealed { image, manifest: bytes, config: manifest.config, layers })
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
