//! Shell: compiled plugins on disk.
//!
//! Machine code that is read back runs with all that this process may do, so a file counts only if it carries our
//! authentication code over its name and content; anything else is compiled again. The folder and the key belong
//! to this user alone.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{Hash as _, Hasher as _};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use hmac::{Hmac, KeyInit as _, Mac as _};
use kiln_protocol::Digest;
use sha2::Sha256;
use wasmtime::Engine;
use wasmtime::component::Component;

/// One block of the hash: the length that every key is made to.
const KEY_BYTES: usize = 64;
const KEY_NAME: &str = "key";
const TAG_BYTES: usize = 32;
const SUFFIX: &str = "cwasm";
/// A compiled interpreter of 18 MB was 33 MB; code is at most some times its source, which has 64 MiB.
const MAX_BYTES: u64 = 1 << 30;
/// Permissions of group and others.
const OTHERS: u32 = 0o077;
/// Compiled plugins that are kept; above that the oldest go.
const MAX_ENTRIES: usize = 64;

/// The cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others may write there.
    #[error("{} must belong to this user alone (mode 700); it has mode {mode:o} and owner {owner}", path.display())]
    Exposed {
        /// The folder or the key.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner's uid.
        owner: u32,
    },
    /// The key has not the length that we write.
    #[error("{} is damaged; delete it, plugins are then compiled again", path.display())]
    Key {
        /// The file.
        path: PathBuf,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.to_owned();
    move |source| CacheError::Io { action, path, source }
}

/// The folder of compiled plugins.
#[derive(Debug)]
pub(super) struct Cache {
    directory: PathBuf,
    key: [u8; KEY_BYTES],
    compiled: AtomicUsize,
}

impl Cache {
    /// Opens the folder; makes it and its key where they are missing.
    pub(super) fn open(directory: &Path) -> Result<Self, CacheError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(io_error("create", directory))?;
        let metadata = fs::symlink_metadata(directory).map_err(io_error("look at", directory))?;
        check_private(directory, &metadata)?;
        let key = read_or_make_key(directory)?;
        Ok(Self { directory: directory.to_owned(), key, compiled: AtomicUsize::new(0) })
    }

    /// How often something was compiled because the cache did not have it.
    pub(super) fn compiled(&self) -> usize {
        self.compiled.load(Ordering::Relaxed)
    }

    /// The component, compiled now or before. The error is the compiler's.
    pub(super) fn component(
        &self,
        engine: &Engine,
        digest: &Digest,
        wasm: &[u8],
    ) -> Result<wasmtime::Result<Component>, CacheError> {
        let name = entry_name(engine, digest);
        if let Some(code) = self.read(&name) {
            // A mismatch of version or settings, which the name should exclude, is found here and compiled again.
            if let Ok(component) = deserialize(engine, &code) {
                return Ok(Ok(component));
            }
        }
        self.compiled.fetch_add(1, Ordering::Relaxed);
        let code = match engine.precompile_component(wasm) {
            Ok(code) => code,
            Err(error) => return Ok(Err(error)),
        };
        self.write(&name, &code)?;
        Ok(deserialize(engine, &code))
    }

    /// The code under a name; nothing if there is none or it is not ours.
    fn read(&self, name: &str) -> Option<Vec<u8>> {
        let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(self.directory.join(name)).ok()?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
        let (tag, code) = bytes.split_at_checked(TAG_BYTES)?;
        self.mac(name, code).verify_slice(tag).ok()?;
        bytes.drain(..TAG_BYTES);
        Some(bytes)
    }

    fn mac(&self, name: &str, code: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new(&self.key.into());
        mac.update(name.as_bytes());
        mac.update(&[0]);
        mac.update(code);
        mac
    }

    fn write(&self, name: &str, code: &[u8]) -> Result<(), CacheError> {
        self.make_room()?;
        let path = self.directory.join(name);
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)
            .map_err(io_error("create a file in", &self.directory))?;
        let tag = self.mac(name, code).finalize().into_bytes();
        file.write_all(&tag).and_then(|()| file.write_all(code)).map_err(io_error("write", file.path()))?;
        file.persist(&path).map(drop).map_err(|error| io_error("rename a file to", &path)(error.error))
    }

    fn make_room(&self) -> Result<(), CacheError> {
        let entries = fs::read_dir(&self.directory).map_err(io_error("list", &self.directory))?;
        let compiled = |path: &PathBuf| path.extension().is_some_and(|extension| extension == SUFFIX);
        let dated = |path: PathBuf| Some((fs::symlink_metadata(&path).ok()?.modified().ok()?, path));
        let mut found: Vec<_> =
            entries.flatten().map(|entry| entry.path()).filter(compiled).filter_map(dated).collect();
        found.sort();
        let surplus = (found.len() + 1).saturating_sub(MAX_ENTRIES);
        for (_, path) in found.iter().take(surplus) {
            fs::remove_file(path).map_err(io_error("delete", path))?;
        }
        Ok(())
    }
}

#[expect(unsafe_code, reason = "there is no safe way to take compiled code")]
fn deserialize(engine: &Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: the bytes come from this engine's own compiler: just now, or from a file that carries an
    // authentication code of a key that only this user can read.
    unsafe { Component::deserialize(engine, code) }
}

/// Code depends on the source and on everything that shapes the compiler's output.
fn entry_name(engine: &Engine, digest: &Digest) -> String {
    let mut hasher = std::hash::DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{}-{:016x}.{SUFFIX}", digest.hex(), hasher.finish())
}

fn check_private(path: &Path, metadata: &fs::Metadata) -> Result<(), CacheError> {
    let (mode, owner) = (metadata.permissions().mode() & 0o7777, metadata.uid());
    if owner == rustix::process::geteuid().as_raw() && mode & OTHERS == 0 {
        return Ok(());
    }
    Err(CacheError::Exposed { path: path.to_owned(), mode, owner })
}

fn read_or_make_key(directory: &Path) -> Result<[u8; KEY_BYTES], CacheError> {
    let path = directory.join(KEY_NAME);
    if !path.exists() {
        make_key(directory, &path)?;
    }
    let file = File::open(&path).map_err(io_error("open", &path))?;
    check_private(&path, &file.metadata().map_err(io_error("look at", &path))?)?;
    let mut key = Vec::new();
    file.take(KEY_BYTES as u64 + 1).read_to_end(&mut key).map_err(io_error("read", &path))?;
    key.try_into().map_err(|_| CacheError::Key { path })
}

/// Another process may be faster; then its key is used.
fn make_key(directory: &Path, path: &Path) -> Result<(), CacheError> {
    let mut key = [0; KEY_BYTES];
    let random = Path::new("/dev/urandom");
    File::open(random).and_then(|mut file| file.read_exact(&mut key)).map_err(io_error("read", random))?;
    let mut file =
        tempfile::NamedTempFile::new_in(directory).map_err(io_error("create a file in", directory))?;
    file.write_all(&key).map_err(io_error("write", file.path()))?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(io_error("rename a file to", path)(error.error)),
    }
}
