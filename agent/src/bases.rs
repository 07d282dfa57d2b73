//! Base images: fetched once per node into immutable stores, found by builds under their names (shell).
//!
//! A store holds one image by manifest digest and has no names. What `FROM name` means is decided per
//! build, by a small index of names that is mounted beside the stores: a tag that moves between two builds,
//! or while both run, gives each the image that its own credentials resolved.

mod layout;
mod slot_files;

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::time::Duration;

use kiln_protocol::{BuildId, Digest};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::agent::bare_slot;
use crate::config::Config;
use crate::plan;
use crate::registry::ResolvedImage;
use crate::seal::BaseLayer;
use crate::slot::wire::{Command, Exit, SlotSpec, Step, StepEnd};
use crate::slot::{Identity, Slot, SlotFiles, SlotLost};
use crate::state::{Job, State, StateError, boot_id, open_lock, try_lock};
use crate::stop::StopSignal;
use layout::Layout;
pub use slot_files::{container_files, names_index};

/// Another process imports the same image: look again this often.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// Registries take configs up to this size.
const MAX_CONFIG_BYTES: u64 = 4 * 1024 * 1024;
/// An image record without its layers is below this; buildah writes one per image.
const MAX_IMAGE_RECORD_BYTES: u64 = 1024 * 1024;

/// Prints the record that buildah keeps of the image, and which of the two usual certificate bundles
/// (Debian's and Red Hat's families) the image has.
const DESCRIBE_STORE: &str = "cat /job/root/overlay-images/images.json && echo && \
    ls -d /job/root/overlay/*/diff/etc/ssl/certs/ca-certificates.crt \
          /job/root/overlay/*/diff/etc/pki/tls/certs/ca-bundle.crt 2>/dev/null; true";

/// What is known of a base store. Its presence on disk is what makes the store published.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BaseRecord {
    /// Digest of the platform's manifest.
    pub manifest: Digest,
    /// Digest of the config.
    pub config: Digest,
    /// The layers, lowest first.
    pub layers: Vec<BaseLayer>,
    /// ONBUILD triggers of the image.
    pub triggers: Vec<String>,
    /// Certificate bundles that the image has, as absolute paths inside it.
    pub ca_files: Vec<String>,
    /// The image has a HEALTHCHECK.
    pub healthcheck: bool,
    /// The boot of the machine in which the store was made. Stores are not synced, so after a crash of the machine
    /// nobody could trust them.
    boot: String,
    /// buildah's own record of the image, without names.
    image: Value,
}

/// A base store that cannot be deleted while this exists.
#[derive(Debug)]
pub struct Base {
    /// What is known of it.
    pub record: BaseRecord,
    _lock: File,
}

/// A base image could not be made available.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The data directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The slot that imports.
    #[error(transparent)]
    Slot(#[from] SlotLost),
    /// A blob is missing or damaged.
    #[error("read a blob of the base image")]
    Blob(#[from] crate::blobs::BlobError),
    /// Manifest and config do not fit together.
    #[error("the base image {digest} is malformed: {reason}")]
    Malformed {
        /// Digest of its manifest.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// buildah refused the image.
    #[error("buildah cannot import the base image {digest}: {}", end.stderr.trim())]
    Import {
        /// Digest of its manifest.
        digest: Digest,
        /// How the step ended.
        end: Box<StepEnd>,
    },
    /// The store could not be put in its place.
    #[error("publish the store of base image {digest}: {cause}")]
    Publish {
        /// Digest of its manifest.
        digest: Digest,
        /// What the slot answered.
        cause: String,
    },
    /// The build was stopped.
    #[error("stopped")]
    Stopped,
}

/// Makes base stores.
#[derive(Debug)]
pub struct Bases<'a> {
    /// The data directory.
    pub state: &'a State,
    /// Limits of the importing slot.
    pub config: &'a Config,
    /// Ids of slots.
    pub identity: Identity,
}

impl Bases<'_> {
    /// The store of an image whose blobs were fetched. Imports it, unless somebody already did.
    pub async fn ensure(&self, image: &ResolvedImage, stop: &mut StopSignal) -> Result<Base, BaseError> {
        loop {
            if stop.current().is_some() {
                return Err(BaseError::Stopped);
            }
            if let Some(base) = self.published(&image.manifest_digest)? {
                return Ok(base);
            }
            let lock = open_lock(&self.lock_path(&image.manifest_digest))?;
            if try_lock(&lock).map_err(|e| self.lock_error(e))?.is_none() {
                tokio::time::sleep(LOCK_POLL).await;
                continue;
            }
            // Between our look and our lock somebody may have finished.
            if self.record_of(&image.manifest_digest).is_none() {
                self.import(image, stop).await?;
            }
        }
    }

    /// The store, if it is there; it stays as long as the result lives.
    pub fn published(&self, manifest: &Digest) -> Result<Option<Base>, BaseError> {
        let lock = open_lock(&self.lock_path(manifest))?;
        match lock.try_lock_shared() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
            Err(std::fs::TryLockError::Error(error)) => return Err(self.lock_error(error)),
        }
        let Some(record) = self.record_of(manifest) else { return Ok(None) };
        let path = self.record_path(manifest);
        // The time of last use orders deletion. Failing to note it only makes the order worse.
        let _ =
            File::open(&path).and_then(|file| file.set_modified(std::time::UNIX_EPOCH + crate::time::now()));
        Ok(Some(Base { record, _lock: lock }))
    }

    /// What makes a store published: a record that can be read, of this boot. Everything else is imported again.
    fn record_of(&self, manifest: &Digest) -> Option<BaseRecord> {
        let bytes = std::fs::read(self.record_path(manifest)).ok()?;
        let record: BaseRecord = serde_json::from_slice(&bytes).ok()?;
        (record.boot == boot_id()).then_some(record)
    }

    fn lock_error(&self, source: std::io::Error) -> BaseError {
        StateError::io("lock", &self.state.path("bases"), source).into()
    }

    pub(crate) fn record_path(&self, manifest: &Digest) -> PathBuf {
        self.state.path(&format!("bases/{}.json", manifest.hex()))
    }

    pub(crate) fn lock_path(&self, manifest: &Digest) -> PathBuf {
        self.state.path(&format!("bases/{}.lock", manifest.hex()))
    }

    async fn import(&self, image: &ResolvedImage, stop: &mut StopSignal) -> Result<(), BaseError> {
        let digest = &image.manifest_digest;
        let name = BuildId::generate().to_string();
        let job = self.state.create_job(&name)?;
        let layout = Layout::create(self.state, image, &name)?;
        let (log, writer) = log_pipe(&job)?;
        let spec = self.spec(&job, &layout);
        let files = SlotFiles {
            store: self.state.store()?,
            lock: job.lock().map_err(|e| StateError::io("lock", job.dir(), e))?,
            archive: None,
            log: writer,
        };
        let mut slot = Slot::start(&spec, files).await?;
        let record = self.fill(&mut slot, image, log, stop).await;
        let published = match &record {
            Ok(_) => self.publish(&mut slot, digest).await,
            Err(_) => Ok(()),
        };
        slot.finish().await?;
        published?;
        self.write_record(digest, &record?)
    }

    fn spec(&self, job: &Job, layout: &Layout) -> SlotSpec {
        SlotSpec {
            input: Some(layout.relative.clone()),
            files: container_files(),
            ..bare_slot(job.name(), self.identity, self.config)
        }
    }

    async fn fill(
        &self,
        slot: &mut Slot,
        image: &ResolvedImage,
        log: std::io::PipeReader,
        stop: &mut StopSignal,
    ) -> Result<BaseRecord, BaseError> {
        let digest = &image.manifest_digest;
        let pull = slot.run(exec(plan::import()), stop).await?;
        if pull.exit != Exit::Code(0) {
            return Err(if pull.terminated {
                BaseError::Stopped
            } else {
                BaseError::Import { digest: digest.clone(), end: Box::new(pull) }
            });
        }
        // Read by a step: the files belong to another uid and are nobody else's to read.
        let describe = ["/bin/sh", "-c", DESCRIBE_STORE].map(str::to_owned).to_vec();
        let end = slot.run(exec(describe), stop).await?;
        if end.exit != Exit::Code(0) {
            return Err(BaseError::Import { digest: digest.clone(), end: Box::new(end) });
        }
        let said =
            String::from_utf8_lossy(&drain(log).map_err(|e| StateError::io("read", &PathBuf::new(), e))?)
                .into_owned();
        self.record(image, &said)
    }

    fn record(&self, image: &ResolvedImage, said: &str) -> Result<BaseRecord, BaseError> {
        let digest = image.manifest_digest.clone();
        let (record, ca_files) = described_store(said, image)?;
        let config = image.config.digest.clone();
        let malformed = |reason: String| BaseError::Malformed { digest: digest.clone(), reason };
        let text = self.state.blobs().read_verified(&config, MAX_CONFIG_BYTES)?;
        let text = text.ok_or_else(|| malformed(format!("its config {config} is missing or too large")))?;
        let parsed: ImageConfig = serde_json::from_slice(&text).map_err(|e| malformed(e.to_string()))?;
        if parsed.rootfs.diff_ids.len() != image.layers.len() {
            let reason =
                format!("{} diff ids for {} layers", parsed.rootfs.diff_ids.len(), image.layers.len());
            return Err(malformed(reason));
        }
        let layers = parsed.rootfs.diff_ids.into_iter().zip(&image.layers);
        let layers = layers
            .map(|(diff_id, layer)| BaseLayer {
                diff_id,
                digest: layer.digest.clone(),
                size: layer.size,
                media_type: layer.media_type.clone(),
            })
            .collect();
        let triggers = parsed.config.on_build.unwrap_or_default();
        let healthcheck = parsed.config.healthcheck.is_some();
        Ok(BaseRecord {
            manifest: digest,
            config,
            layers,
            triggers,
            ca_files,
            healthcheck,
            boot: boot_id(),
            image: record,
        })
    }

    async fn publish(&self, slot: &mut Slot, digest: &Digest) -> Result<(), BaseError> {
        let failed = |cause| BaseError::Publish { digest: digest.clone(), cause };
        let to = store_name(digest);
        // A predecessor may have died between its rename and its record.
        slot.change_store(Command::Remove(vec![to.clone()])).await?.map_err(failed)?;
        let failed = |cause| BaseError::Publish { digest: digest.clone(), cause };
        slot.change_store(Command::Promote { from: "job/root".to_owned(), to }).await?.map_err(failed)
    }

    fn write_record(&self, digest: &Digest, record: &BaseRecord) -> Result<(), BaseError> {
        let path = self.record_path(digest);
        let failed = |e: std::io::Error| StateError::io("write", &path, e);
        let mut file = tempfile::NamedTempFile::new_in(self.state.path("bases")).map_err(failed)?;
        serde_json::to_writer(&mut file, record).map_err(|e| failed(e.into()))?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}

#[derive(Deserialize)]
struct ImageConfig {
    rootfs: RootFs,
    #[serde(default)]
    config: RunConfig,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
struct RunConfig {
    #[serde(rename = "OnBuild")]
    on_build: Option<Vec<String>>,
    #[serde(rename = "Healthcheck")]
    healthcheck: Option<Value>,
}

/// Where a base store lies below the store directory.
pub fn store_name(manifest: &Digest) -> String {
    format!("base/{}", manifest.hex())
}

fn exec(argv: Vec<String>) -> Step {
    Step::Exec { argv, env: plan::environment(&[]), network: false }
}

/// A pipe that a slot's user may open again by `/proc/self/fd/1`.
pub(crate) fn log_pipe(job: &Job) -> Result<(std::io::PipeReader, std::os::fd::OwnedFd), StateError> {
    let failed = |e| StateError::io("make a pipe for", job.dir(), e);
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    let writer = std::os::fd::OwnedFd::from(writer);
    rustix::fs::fchmod(&writer, rustix::fs::Mode::from_raw_mode(0o622)).map_err(|e| failed(e.into()))?;
    Ok((reader, writer))
}

/// What [`DESCRIBE_STORE`] printed: buildah's record of the one image in the store, then bundle files.
fn described_store(said: &str, image: &ResolvedImage) -> Result<(Value, Vec<String>), BaseError> {
    let malformed = |reason: String| BaseError::Malformed { digest: image.manifest_digest.clone(), reason };
    let json = said.lines().find(|line| line.starts_with('[')).unwrap_or_default();
    let records: Vec<Value> =
        serde_json::from_str(json).map_err(|e| malformed(format!("image record: {e}")))?;
    let Some(record) = records.into_iter().next() else {
        return Err(malformed("no image record".to_owned()));
    };
    let files = said.lines().filter_map(|line| line.strip_prefix("/job/root/overlay/")?.split_once("/diff"));
    let files = files.map(|(_, path)| path.to_owned()).collect();
    let record = json!({
        "id": record["id"], "digest": record["digest"], "layer": record["layer"], "created": record["created"],
    });
    Ok((record, files))
}

/// Everything that is in a pipe now. Its writer is still open, so this must not wait for the end.
fn drain(pipe: std::io::PipeReader) -> std::io::Result<Vec<u8>> {
    let flags = rustix::fs::fcntl_getfl(&pipe)? | rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&pipe, flags)?;
    let mut bytes = Vec::new();
    match pipe.take(MAX_IMAGE_RECORD_BYTES).read_to_end(&mut bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(bytes),
    }
}
