//! The agent's content-addressed blobs on disk (shell).
//!
//! A blob appears under its digest by one rename, after its bytes were hashed and synced. Any number of
//! processes may read and write the same store.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_protocol::Digest;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

/// Unfinished blobs start with this; no digest does.
const TEMP_PREFIX: &str = ".tmp-";
/// Every writer that is alive has written within its idle timeout, which is far shorter.
const ABANDONED_AFTER: Duration = Duration::from_hours(1);
/// Only the agent's user enters the store; a slot sees what is bound into it.
const ROOT_MODE: u32 = 0o700;
/// Nobody changes a blob, and a slot under another uid may read one that is bound into it.
const BLOB_MODE: u32 = 0o444;

/// What can go wrong with a blob.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The file system refused.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The blob has another length than its descriptor says.
    #[error("blob has {actual} bytes, its descriptor says {expected}")]
    Size {
        /// From the descriptor.
        expected: u64,
        /// What was counted.
        actual: u64,
    },
    /// The blob has another digest than its name says.
    #[error("blob has digest {actual}, expected {expected}")]
    Digest {
        /// The name.
        expected: Digest,
        /// What was computed.
        actual: Digest,
    },
}

impl BlobError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// Whether the disk or a quota on it is full.
    pub fn is_disk_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

/// A committed blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlob {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// A folder of blobs, `blobs/sha256/<hex>` as in an OCI image layout.
#[derive(Debug, Clone)]
pub struct BlobStore {
    root: PathBuf,
    directory: PathBuf,
    lifetime: Lifetime,
}

/// How long a store outlives a crash of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lifetime {
    /// Later processes trust it: content is synced before it gets its name.
    Lasting,
    /// It ends with its build, also in a crash; syncing would only cost time.
    OfOneBuild,
}

impl BlobStore {
    /// Opens the store below `root` and makes its folders where they are missing.
    pub fn open(root: &Path) -> Result<Self, BlobError> {
        let make = |mode: u32, path: &Path| {
            let made = DirBuilder::new().recursive(true).mode(mode).create(path);
            made.map_err(|source| BlobError::io("create", path, source))
        };
        let directory = root.join("blobs").join("sha256");
        make(ROOT_MODE, root)?;
        make(0o755, &directory)?;
        Ok(Self { root: root.to_owned(), directory, lifetime: Lifetime::Lasting })
    }

    /// As [`BlobStore::open`], for blobs that end with one build.
    pub fn of_one_build(root: &Path) -> Result<Self, BlobError> {
        Ok(Self { lifetime: Lifetime::OfOneBuild, ..Self::open(root)? })
    }

    /// What [`BlobStore::open`] was given.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a blob lies, or would lie.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.hex())
    }

    /// Whether the blob is there.
    pub fn has(&self, digest: &Digest) -> bool {
        matches!(self.size(digest), Ok(Some(_)))
    }

    /// Length of a blob in bytes, `None` if it is not there.
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        let path = self.path(digest);
        match fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(BlobError::io("look at", &path, source)),
        }
    }

    /// Opens a blob for reading.
    pub fn reader(&self, digest: &Digest) -> Result<File, BlobError> {
        let path = self.path(digest);
        File::open(&path).map_err(|source| BlobError::io("open", &path, source))
    }

    /// Bytes of a small blob, hashed again; `None` if it is not there, too long or damaged.
    pub fn read_verified(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>, BlobError> {
        match self.size(digest)? {
            Some(size) if size <= limit => {}
            _ => return Ok(None),
        }
        let mut bytes = Vec::new();
        let read = self.reader(digest)?.take(limit).read_to_end(&mut bytes);
        read.map_err(|source| BlobError::io("read", &self.path(digest), source))?;
        Ok((digest_of(&bytes) == *digest).then_some(bytes))
    }

    /// Starts a blob. Dropping the writer removes what was written.
    pub fn writer(&self) -> Result<BlobWriter, BlobError> {
        let made = tempfile::Builder::new().prefix(TEMP_PREFIX).tempfile_in(&self.directory);
        let file = made.map_err(|source| BlobError::io("create a file in", &self.directory, source))?;
        let (directory, lifetime) = (self.directory.clone(), self.lifetime);
        Ok(BlobWriter { directory, lifetime, file, hasher: Sha256::new(), written: 0 })
    }

    /// Stores bytes that are in memory already.
    pub fn put(&self, bytes: &[u8]) -> Result<StoredBlob, BlobError> {
        let mut writer = self.writer()?;
        writer.append(bytes)?;
        writer.commit(None, None)
    }

    /// Deletes every blob that `keep` does not want. Returns how many bytes that freed.
    pub fn retain(&self, keep: impl Fn(&Digest) -> bool) -> Result<u64, BlobError> {
        let entries = fs::read_dir(&self.directory);
        let entries = entries.map_err(|source| BlobError::io("list", &self.directory, source))?;
        let mut freed = 0;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let digest = name.to_str().and_then(|hex| format!("sha256:{hex}").parse().ok());
            if digest.is_some_and(|digest| !keep(&digest)) {
                freed += entry.metadata().map_or(0, |metadata| metadata.len());
                let path = entry.path();
                fs::remove_file(&path).map_err(|source| BlobError::io("delete", &path, source))?;
            }
        }
        Ok(freed)
    }

    /// Removes what writers left behind that died more than an hour before `now`; returns how many.
    pub fn sweep(&self, now: SystemTime) -> Result<usize, BlobError> {
        let entries = fs::read_dir(&self.directory);
        let entries = entries.map_err(|source| BlobError::io("list", &self.directory, source))?;
        let mut removed = 0;
        for entry in entries.flatten() {
            if is_abandoned(&entry, now) && remove(&entry.path())? {
                removed += 1;
            }
        }
        Ok(removed)
    }
}

fn is_abandoned(entry: &fs::DirEntry, now: SystemTime) -> bool {
    let modified = entry.metadata().and_then(|metadata| metadata.modified());
    let age = modified.ok().and_then(|modified| now.duration_since(modified).ok());
    entry.file_name().to_string_lossy().starts_with(TEMP_PREFIX)
        && age.is_some_and(|age| age > ABANDONED_AFTER)
}

/// `false` if another process was faster.
fn remove(path: &Path) -> Result<bool, BlobError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(BlobError::io("remove", path, source)),
    }
}

/// The digest of bytes in memory.
pub fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

/// A blob that is being written and hashed.
#[derive(Debug)]
pub struct BlobWriter {
    directory: PathBuf,
    lifetime: Lifetime,
    file: NamedTempFile,
    hasher: Sha256,
    written: u64,
}

impl BlobWriter {
    /// Appends bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.write_all(bytes).map_err(|source| BlobError::io("write", self.file.path(), source))
    }

    /// How many bytes were written.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Checks size and digest and gives the blob its name. An equal blob is replaced, which heals it if it
    /// was damaged.
    pub fn commit(self, expected: Option<&Digest>, size: Option<u64>) -> Result<StoredBlob, BlobError> {
        let Self { directory, lifetime, file, hasher, written } = self;
        let digest = Digest::from_sha256(hasher.finalize().into());
        check(&digest, written, expected, size)?;
        let finish = |file: &File| {
            file.set_permissions(Permissions::from_mode(BLOB_MODE))?;
            match lifetime {
                // Later readers trust the name. The name itself may be lost in a crash, its content may not.
                Lifetime::Lasting => file.sync_data(),
                Lifetime::OfOneBuild => Ok(()),
            }
        };
        finish(file.as_file()).map_err(|source| BlobError::io("finish", file.path(), source))?;
        let path = directory.join(digest.hex());
        file.persist(&path).map_err(|error| BlobError::io("rename a blob to", &path, error.error))?;
        Ok(StoredBlob { digest, size: written })
    }
}

fn check(
    digest: &Digest,
    written: u64,
    expected: Option<&Digest>,
    size: Option<u64>,
) -> Result<(), BlobError> {
    if let Some(expected) = size.filter(|&size| size != written) {
        return Err(BlobError::Size { expected, actual: written });
    }
    match expected {
        Some(expected) if expected != digest => {
            Err(BlobError::Digest { expected: expected.clone(), actual: digest.clone() })
        }
        _ => Ok(()),
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.as_file_mut().write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_file_mut().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, BlobStore) {
        let root = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&root.path().join("store")).unwrap();
        (root, store)
    }

    fn names(store: &BlobStore) -> Vec<String> {
        let entries = fs::read_dir(&store.directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_committed_blob_has_its_digest_as_name_and_cannot_be_written() {
        let (_root, store) = store();
        let stored = store.put(b"hello").unwrap();
        assert_eq!(
            stored.digest.as_str(),
            "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        );
        assert_eq!(names(&store), [stored.digest.hex()]);
        assert_eq!(store.size(&stored.digest).unwrap(), Some(5));
        assert_eq!(store.read_verified(&stored.digest, 5).unwrap().unwrap(), b"hello");
        assert_eq!(store.read_verified(&stored.digest, 4).unwrap(), None);
        let mode = fs::metadata(store.path(&stored.digest)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, BLOB_MODE);
    }

    #[test]
    fn wrong_size_and_wrong_digest_leave_nothing() {
        let (_root, store) = store();
        let other = digest_of(b"other");
        let mut writer = store.writer().unwrap();
        writer.append(b"hello").unwrap();
        assert!(matches!(writer.commit(Some(&other), Some(5)), Err(BlobError::Digest { .. })));
        let mut writer = store.writer().unwrap();
        writer.append(b"hello").unwrap();
        let wrong = writer.commit(Some(&digest_of(b"hello")), Some(6));
        assert!(matches!(wrong, Err(BlobError::Size { expected: 6, actual: 5 })));
        let mut dropped = store.writer().unwrap();
        dropped.append(b"half").unwrap();
        assert_eq!(names(&store).len(), 1);
        drop(dropped);
        assert!(names(&store).is_empty());
    }

    #[test]
    fn a_damaged_blob_is_not_read_and_is_healed_by_the_next_commit() {
        let (_root, store) = store();
        let digest = store.put(b"hello").unwrap().digest;
        fs::remove_file(store.path(&digest)).unwrap();
        fs::write(store.path(&digest), b"jello").unwrap();
        assert_eq!(store.read_verified(&digest, 100).unwrap(), None);
        store.put(b"hello").unwrap();
        assert_eq!(store.read_verified(&digest, 100).unwrap().unwrap(), b"hello");
    }

    #[test]
    fn sweep_removes_only_old_leftovers() {
        let (_root, store) = store();
        let kept = store.put(b"blob").unwrap();
        let writer = store.writer().unwrap();
        let modified = writer.file.as_file().metadata().unwrap().modified().unwrap();
        let leftover = writer.file.keep().unwrap().1;
        assert_eq!(store.sweep(modified + ABANDONED_AFTER).unwrap(), 0);
        let later = modified + ABANDONED_AFTER + Duration::from_secs(1);
        assert_eq!(store.sweep(later).unwrap(), 1);
        assert!(!leftover.exists());
        assert!(store.has(&kept.digest));
    }

    #[test]
    fn a_link_in_the_place_of_a_blob_is_not_a_blob() {
        let (_root, store) = store();
        let digest = digest_of(b"target");
        std::os::unix::fs::symlink("/etc/hostname", store.path(&digest)).unwrap();
        assert!(!store.has(&digest));
    }
}
