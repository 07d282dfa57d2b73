//! Exports for tests: made by hand, or by the real buildah (shell).

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_protocol::Digest;
use kiln_protocol::request::ImageFormat;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::manifest::{Compression, Descriptor, config_type, manifest_type};
use super::{BaseLayer, SealError, SealLimits, SealOptions, Sealed, seal};
use crate::blobs::BlobStore;

pub(crate) fn options(format: ImageFormat) -> SealOptions<'static> {
    let limits = SealLimits {
        document_bytes: 128 << 10,
        layer_bytes: 8 << 20,
        total_bytes: 16 << 20,
        unpacked_bytes: 32 << 20,
    };
    SealOptions { format, gzip_level: 6, limits, should_stop: &|| false }
}

pub(crate) fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// A tar archive with one file.
pub(crate) fn tar_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

/// A directory for a test, removed with everything below it that its owner may not write to.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What this cannot open, TempDir cannot remove; a second panic would hide the first.
        let _ = Command::new("chmod").args(["-R", "u+rwX"]).arg(self.0.path()).output();
    }
}

/// A blob store in a directory of its own.
pub(crate) struct Store {
    pub(crate) blobs: BlobStore,
    directory: TempDir,
}

impl Store {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().unwrap();
        Self { blobs: BlobStore::open(directory.path()).unwrap(), directory }
    }

    pub(crate) fn put(&self, bytes: &[u8]) -> Digest {
        self.blobs.put(bytes).unwrap().digest
    }

    pub(crate) fn read(&self, digest: &Digest) -> Vec<u8> {
        fs::read(self.blobs.path(digest)).unwrap()
    }

    /// Blobs in the store, finished or not.
    pub(crate) fn files(&self) -> usize {
        count_files(self.directory.path())
    }
}

pub(crate) fn count_files(directory: &Path) -> usize {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries.map(|e| if e.file_type().unwrap().is_dir() { count_files(&e.path()) } else { 1 }).sum()
}

/// A `dir:` export.
pub(crate) struct Export {
    pub(crate) directory: TempDir,
    pub(crate) format: ImageFormat,
    handle: fs::File,
}

impl Export {
    fn empty(format: ImageFormat) -> Self {
        let directory = TempDir::new().unwrap();
        let handle = fs::File::open(directory.path()).unwrap();
        Self { directory, format, handle }
    }

    /// An image whose layers have this content and this compression.
    pub(crate) fn by_hand(format: ImageFormat, compression: Compression, contents: &[Vec<u8>]) -> Self {
        let export = Self::empty(format);
        let files = contents.iter().map(|content| match compression {
            Compression::None => content.clone(),
            Compression::Gzip => gzip(content),
            Compression::Zstd => zstd(content),
        });
        let media_type = compression.media_type(format).unwrap();
        let layers: Vec<_> = files.map(|file| export.put(media_type, &file)).collect();
        let diff_ids: Vec<_> = contents.iter().map(|content| digest(content)).collect();
        export.write(&layers, &diff_ids);
        export
    }

    pub(crate) fn put(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let digest = digest(bytes);
        fs::write(self.path(digest.hex()), bytes).unwrap();
        Descriptor { media_type: media_type.to_owned(), size: bytes.len() as u64, digest }
    }

    /// Writes config and manifest for these layers.
    pub(crate) fn write(&self, layers: &[Descriptor], diff_ids: &[Digest]) {
        let config = json!({"architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z",
            "config": {"User": "65532"}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = self.put(config_type(self.format), config.to_string().as_bytes());
        self.edit(|_| {
            json!({"schemaVersion": 2, "mediaType": manifest_type(self.format), "config": config, "layers": layers})
        });
    }

    /// Writes config and manifest for the same layer many times.
    pub(crate) fn write_many(&self, layer: &Descriptor, diff_id: &Digest, count: usize) {
        self.write(&vec![layer.clone(); count], &vec![diff_id.clone(); count]);
    }

    /// Replaces the manifest.
    pub(crate) fn edit(&self, change: impl FnOnce(Value) -> Value) {
        let old = fs::read(self.path("manifest.json")).unwrap_or_else(|_| b"null".to_vec());
        let new = change(serde_json::from_slice(&old).unwrap());
        fs::write(self.path("manifest.json"), new.to_string()).unwrap();
    }

    pub(crate) fn manifest(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("manifest.json")).unwrap()).unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Path of the file of a layer.
    pub(crate) fn layer(&self, index: usize) -> PathBuf {
        let manifest = self.manifest();
        let digest: Digest = serde_json::from_value(manifest["layers"][index]["digest"].clone()).unwrap();
        self.path(digest.hex())
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    pub(crate) fn seal(&self, bases: &[BaseLayer], store: &Store) -> Result<Sealed, SealError> {
        seal(self.fd(), bases, &store.blobs, &options(self.format))
    }

    /// What the real buildah builds from a small Dockerfile and pushes with these flags.
    pub(crate) fn by_buildah(format: ImageFormat, push_flags: &[&str]) -> (Self, Digest) {
        let work = Scratch::new();
        let context = work.path().join("context");
        fs::create_dir(&context).unwrap();
        fs::write(context.join("one"), "first\n").unwrap();
        fs::write(context.join("two"), vec![b'x'; 300_000]).unwrap();
        fs::write(context.join("Dockerfile"), DOCKERFILE).unwrap();
        let export = Self::empty(format);
        let name = if format == ImageFormat::Docker { "docker" } else { "oci" };
        let iidfile = work.path().join("iid");
        let mut build = buildah(work.path());
        build.args(["bud", "--isolation", "chroot", "--layers", "--format", name, "-t", "example"]);
        run(build.arg("--iidfile").arg(&iidfile).arg(&context));
        let destination = format!("dir:{}", export.directory.path().display());
        run(buildah(work.path()).arg("push").args(push_flags).args(["example", &destination]));
        (export, fs::read_to_string(iidfile).unwrap().parse().unwrap())
    }
}

const DOCKERFILE: &str = "FROM scratch\nCOPY one /one\nCOPY two /two\nENV KEY=value\nUSER 65532\n";

fn buildah(work: &Path) -> Command {
    let mut command = Command::new("buildah");
    command.arg("--root").arg(work.join("root")).arg("--runroot").arg(work.join("run"));
    // overlay cannot stack on every file system that tests run on
    command.args(["--storage-driver", "vfs"]).env("TMPDIR", work);
    command
}

/// Runs a tool and gives its standard output.
pub(crate) fn run(command: &mut Command) -> Vec<u8> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().unwrap_or_else(|error| {
        panic!("{program}: {error}; this test needs it: apt-get install buildah skopeo")
    });
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

pub(crate) fn skopeo(arguments: &[&str]) -> Vec<u8> {
    run(Command::new("skopeo").args(["--insecure-policy"]).args(arguments))
}
