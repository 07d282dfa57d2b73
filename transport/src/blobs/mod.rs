//! Content-addressed blobs that the parts of Kiln share: uploaded contexts (shell).

mod directory;

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use kiln_protocol::Digest;

pub use self::directory::Directory;

/// A store of blobs. A blob exists whole and with the bytes of its digest, or not at all.
#[derive(Debug, Clone)]
pub enum Blobs {
    /// In a folder, for one machine. Any number of processes may share it.
    Directory(Directory),
}

/// A blob in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// When it was put or touched last.
    pub stored_at: SystemTime,
}

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
    /// It is longer than its uploader may send.
    #[error("blob {expected} has more than {limit} bytes, which is the limit for uploads")]
    TooLarge {
        /// Its name.
        expected: Digest,
        /// The most that is taken.
        limit: u64,
    },
    /// Its bytes are not those of its name.
    #[error("blob was announced as {expected}, but its bytes have digest {actual}; send it again")]
    Mismatch {
        /// Its name.
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

impl Blobs {
    /// Opens a store in a folder and makes it if it is missing.
    pub async fn directory(root: &Path) -> Result<Self, BlobError> {
        Directory::open(root).await.map(Self::Directory)
    }

    /// Starts to store a blob of at most `limit` bytes.
    pub async fn put(&self, expected: Digest, limit: u64) -> Result<BlobWriter, BlobError> {
        match self {
            Self::Directory(directory) => {
                directory.put(expected, limit).await.map(WriterKind::Directory).map(BlobWriter)
            }
        }
    }

    /// Reads a blob; `None` if there is none.
    pub async fn open(&self, digest: &Digest) -> Result<Option<BlobReader>, BlobError> {
        match self {
            Self::Directory(directory) => {
                let reader = directory.read(digest).await?;
                Ok(reader
                    .map(|reader| BlobReader { size: reader.size(), kind: ReaderKind::Directory(reader) }))
            }
        }
    }

    /// Length of a blob in bytes; `None` if there is none.
    pub async fn size(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        match self {
            Self::Directory(directory) => directory.size(digest).await,
        }
    }

    /// Makes a blob as young as if it had been put at `now`; whether there is one.
    pub async fn touch(&self, digest: &Digest, now: SystemTime) -> Result<bool, BlobError> {
        match self {
            Self::Directory(directory) => directory.touch(digest, now).await,
        }
    }

    /// Deletes a blob that was neither put nor touched since `before`; whether it did.
    pub async fn delete_older(&self, digest: &Digest, before: SystemTime) -> Result<bool, BlobError> {
        match self {
            Self::Directory(directory) => directory.delete_older(digest, before).await,
        }
    }

    /// Deletes a blob; whether there was one. Who reads it meanwhile reads it to its end.
    pub async fn delete(&self, digest: &Digest) -> Result<bool, BlobError> {
        match self {
            Self::Directory(directory) => directory.delete(digest).await,
        }
    }

    /// All blobs, by digest.
    pub async fn list(&self) -> Result<Vec<BlobInfo>, BlobError> {
        match self {
            Self::Directory(directory) => directory.list().await,
        }
    }

    /// Removes what uploads left behind that ended without a finish more than an hour before `now`, as those of
    /// a process that was killed; returns how many.
    pub async fn sweep(&self, now: SystemTime) -> Result<usize, BlobError> {
        match self {
            Self::Directory(directory) => directory.sweep(now).await,
        }
    }
}

/// A blob that is being stored. Dropping it removes what was written.
#[derive(Debug)]
pub struct BlobWriter(WriterKind);

#[derive(Debug)]
enum WriterKind {
    Directory(directory::Writer),
}

impl BlobWriter {
    /// Appends bytes. After an error only dropping it makes sense.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        match &mut self.0 {
            WriterKind::Directory(writer) => writer.write(bytes).await,
        }
    }

    /// Checks the digest and makes the blob appear, safe from a crash of the machine; its size in bytes. A blob
    /// that is there already is replaced, which makes it younger and heals it if it was damaged.
    pub async fn finish(self) -> Result<u64, BlobError> {
        match self.0 {
            WriterKind::Directory(writer) => writer.finish().await,
        }
    }
}

/// A blob that is being read. Its bytes were those of its digest when it was stored; who cannot bear that a disk
/// changed them since hashes them again.
#[derive(Debug)]
pub struct BlobReader {
    size: u64,
    kind: ReaderKind,
}

#[derive(Debug)]
enum ReaderKind {
    Directory(directory::Reader),
}

impl BlobReader {
    /// Length in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes, at most 64 KiB; `None` at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
        match &mut self.kind {
            ReaderKind::Directory(reader) => reader.chunk().await,
        }
    }
}
