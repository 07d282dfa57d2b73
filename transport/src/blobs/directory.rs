//! Blobs in a folder (shell).
//!
//! A blob appears under its digest by one rename, after its bytes were hashed and synced.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use kiln_protocol::Digest;
use sha2::{Digest as _, Sha256};
use tempfile::TempPath;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{BlobError, BlobInfo};

/// Unfinished blobs start with this; no digest does.
const TEMP_PREFIX: &str = ".tmp-";
/// An upload that is alive has written within its idle timeout, which is far shorter.
const ABANDONED_AFTER: Duration = Duration::from_hours(1);
/// Contexts are their owners' source code: only Kiln's user enters.
const ROOT_MODE: u32 = 0o700;
/// Large enough that calls cost little beside the copy, small enough that a hundred readers need little.
const CHUNK: usize = 64 * 1024;

/// A folder of blobs, `sha256/<hex>`.
#[derive(Debug, Clone)]
pub struct Directory {
    folder: PathBuf,
}

impl Directory {
    pub(super) async fn open(root: &Path) -> Result<Self, BlobError> {
        let folder = root.join("sha256");
        let this = Self { folder: folder.clone() };
        blocking("create", &folder.clone(), move || {
            DirBuilder::new().recursive(true).mode(ROOT_MODE).create(&folder)
        })
        .await?;
        Ok(this)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.hex())
    }

    pub(super) async fn put(&self, expected: Digest, limit: u64) -> Result<Writer, BlobError> {
        let folder = self.folder.clone();
        let make = move || tempfile::Builder::new().prefix(TEMP_PREFIX).tempfile_in(folder);
        let (file, temporary) = blocking("create a file in", &self.folder, make).await?.into_parts();
        let target = self.path(&expected);
        let file = File::from_std(file);
        Ok(Writer { file, temporary, target, expected, limit, hasher: Sha256::new(), written: 0 })
    }

    pub(super) async fn read(&self, digest: &Digest) -> Result<Option<Reader>, BlobError> {
        let path = self.path(digest);
        let Some(file) = found("open", &path, File::open(&path).await)? else { return Ok(None) };
        let metadata = file.metadata().await.map_err(|source| BlobError::io("look at", &path, source))?;
        Ok(Some(Reader { file, path, size: metadata.len() }))
    }

    pub(super) async fn size(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        let path = self.path(digest);
        let metadata = found("look at", &path, tokio::fs::metadata(&path).await)?;
        Ok(metadata.map(|metadata| metadata.len()))
    }

    pub(super) async fn delete(&self, digest: &Digest) -> Result<bool, BlobError> {
        let path = self.path(digest);
        Ok(found("delete", &path, tokio::fs::remove_file(&path).await)?.is_some())
    }

    pub(super) async fn touch(&self, digest: &Digest, now: SystemTime) -> Result<bool, BlobError> {
        let path = self.path(digest);
        let touch = {
            let path = path.clone();
            move || fs::File::open(&path).and_then(|file| file.set_modified(now)).map(Some).or_else(absent)
        };
        Ok(blocking("touch", &path, touch).await?.is_some())
    }

    pub(super) async fn delete_older(&self, digest: &Digest, before: SystemTime) -> Result<bool, BlobError> {
        let path = self.path(digest);
        let delete = {
            let path = path.clone();
            move || {
                if fs::metadata(&path)?.modified()? >= before {
                    return Ok(false);
                }
                fs::remove_file(&path).map(|()| true)
            }
        };
        let deleted = blocking("delete", &path, move || delete().map(Some).or_else(absent)).await?;
        Ok(deleted.unwrap_or(false))
    }

    pub(super) async fn list(&self) -> Result<Vec<BlobInfo>, BlobError> {
        let folder = self.folder.clone();
        let mut blobs = blocking("list", &self.folder, move || list(&folder)).await?;
        blobs.sort_by(|a, b| a.digest.cmp(&b.digest));
        Ok(blobs)
    }

    pub(super) async fn sweep(&self, now: SystemTime) -> Result<usize, BlobError> {
        let folder = self.folder.clone();
        blocking("sweep", &self.folder, move || sweep(&folder, now)).await
    }
}

/// Runs file system calls where they disturb no task.
async fn blocking<T: Send + 'static>(
    action: &'static str,
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, BlobError> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|source| BlobError::io(action, path, source))
}

/// `None` if the file is not there.
fn absent<T>(error: io::Error) -> io::Result<Option<T>> {
    if error.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(error) }
}

/// `None` if the file is not there.
fn found<T>(action: &'static str, path: &Path, result: io::Result<T>) -> Result<Option<T>, BlobError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(BlobError::io(action, path, source)),
    }
}

fn list(folder: &Path) -> io::Result<Vec<BlobInfo>> {
    let mut blobs = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(digest) = name.to_str().and_then(|hex| format!("sha256:{hex}").parse().ok()) else {
            continue;
        };
        match entry.metadata().and_then(|metadata| Ok((metadata.len(), metadata.modified()?))) {
            Ok((size, stored_at)) => blobs.push(BlobInfo { digest, size, stored_at }),
            // Deleted since the folder was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(blobs)
}

fn sweep(folder: &Path, now: SystemTime) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if is_abandoned(&entry, now) {
            match fs::remove_file(entry.path()) {
                Ok(()) => removed += 1,
                // Another process was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(removed)
}

fn is_abandoned(entry: &fs::DirEntry, now: SystemTime) -> bool {
    let modified = entry.metadata().and_then(|metadata| metadata.modified());
    let age = modified.ok().and_then(|modified| now.duration_since(modified).ok());
    entry.file_name().to_string_lossy().starts_with(TEMP_PREFIX)
        && age.is_some_and(|age| age > ABANDONED_AFTER)
}

#[derive(Debug)]
pub(super) struct Writer {
    file: File,
    /// Removes the file when it is dropped.
    temporary: TempPath,
    target: PathBuf,
    expected: Digest,
    limit: u64,
    hasher: Sha256,
    written: u64,
}

impl Writer {
    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.written = self.written.saturating_add(bytes.len() as u64);
        if self.written > self.limit {
            return Err(BlobError::TooLarge { expected: self.expected.clone(), limit: self.limit });
        }
        self.hasher.update(bytes);
        let written = self.file.write_all(bytes).await;
        written.map_err(|source| BlobError::io("write", &self.temporary, source))
    }

    pub(super) async fn finish(mut self) -> Result<u64, BlobError> {
        let actual = Digest::from_sha256(self.hasher.finalize().into());
        if actual != self.expected {
            return Err(BlobError::Mismatch { expected: self.expected, actual });
        }
        let flushed = self.file.flush().await;
        flushed.map_err(|source| BlobError::io("write", &self.temporary, source))?;
        let file = self.file.into_std().await;
        let (temporary, target) = (self.temporary, self.target.clone());
        blocking("store", &self.target, move || {
            file.sync_all()?;
            temporary.persist(&target)?;
            // The uploader forgets the bytes once they are accepted, so the name has to be on disk too.
            target.parent().map_or(Ok(()), |folder| fs::File::open(folder)?.sync_all())
        })
        .await?;
        Ok(self.written)
    }
}

#[derive(Debug)]
pub(super) struct Reader {
    file: File,
    path: PathBuf,
    size: u64,
}

impl Reader {
    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
        let mut bytes = BytesMut::with_capacity(CHUNK);
        let read = (&mut self.file).take(CHUNK as u64).read_buf(&mut bytes).await;
        let count = read.map_err(|source| BlobError::io("read", &self.path, source))?;
        Ok((count > 0).then(|| bytes.freeze()))
    }
}
