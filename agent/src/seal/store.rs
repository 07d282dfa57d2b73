//! The blob store's errors in the words of the seal (shell).

use std::io::{self, Write};

use super::SealError;
use crate::blobs::{BlobError, BlobStore, BlobWriter, StoredBlob};
use kiln_protocol::Digest;

pub(super) fn writer(blobs: &BlobStore, what: &str) -> Result<BlobWriter, SealError> {
    blobs.writer().map_err(|error| store_error(error, what))
}

/// Publishes the bytes under their digest, which has to be the expected one if there is one.
pub(super) fn commit(
    writer: BlobWriter,
    expected: Option<&Digest>,
    what: &str,
) -> Result<StoredBlob, SealError> {
    writer.commit(expected, None).map_err(|error| store_error(error, what))
}

/// Stores a small blob.
pub(super) fn put(
    what: &str,
    bytes: &[u8],
    expected: Option<&Digest>,
    blobs: &BlobStore,
) -> Result<StoredBlob, SealError> {
    let mut writer = writer(blobs, what)?;
    writer.write_all(bytes).map_err(|source| SealError::Store { what: what.to_owned(), source })?;
    commit(writer, expected, what)
}

pub(super) fn store_error(error: BlobError, what: &str) -> SealError {
    let what = what.to_owned();
    match error {
        BlobError::Digest { expected, actual } => SealError::DigestMismatch { what, found: actual, expected },
        BlobError::Size { expected, actual } => SealError::Size { what, found: actual, expected },
        error @ BlobError::Io { .. } => SealError::Store { what, source: blob_io_error(error) },
    }
}

/// The same failure as an I/O error, still known as a full disk if it was one.
pub(crate) fn blob_io_error(error: BlobError) -> io::Error {
    let kind = if error.is_disk_full() { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
    io::Error::new(kind, error)
}

#[cfg(test)]
mod tests {
    use kiln_protocol::Reason;

    use super::*;

    #[test]
    fn a_full_store_stays_a_full_store_through_the_layers() {
        for (kind, expected) in [
            (io::ErrorKind::StorageFull, Reason::DiskFull),
            (io::ErrorKind::QuotaExceeded, Reason::DiskFull),
            (io::ErrorKind::PermissionDenied, Reason::StoreCorrupt),
        ] {
            let error = BlobError::Io { action: "write", path: "x".into(), source: kind.into() };
            let error = store_error(error, "layer 0");
            assert_eq!(error.reason(), expected, "{error:?}");
        }
    }
}
