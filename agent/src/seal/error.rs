//! Why an export cannot be sealed, and which reason that is (pure).

use std::io;

use kiln_protocol::{Digest, Reason};

use super::manifest::FormatError;

/// Why an export cannot be sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// A file of the export is missing, or something else than a plain file lies in its place.
    #[error("exported file {name} cannot be opened as a plain file inside the export")]
    Open {
        /// File name in the export.
        name: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A directory, device, socket or pipe where a file is expected.
    #[error("exported {name} is not a plain file")]
    NotAFile {
        /// File name in the export.
        name: String,
    },
    /// Reading failed.
    #[error("exported file {name} cannot be read")]
    Read {
        /// File name in the export.
        name: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A limit of the seal.
    #[error("{what} has {found} bytes, the limit is {limit}; {key} raises it")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size, or the size at which reading stopped.
        found: u64,
        /// The limit in bytes.
        limit: u64,
        /// The field of the limits.
        key: &'static str,
    },
    /// More layers than any image that runs.
    #[error("image has {found} layers, the limit is {limit}")]
    TooManyLayers {
        /// Layers of the manifest.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Manifest or config are not acceptable.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A file is not as long as its descriptor says.
    #[error("{what} has {found} bytes, its descriptor says {expected}")]
    Size {
        /// `config` or `layer N`.
        what: String,
        /// Bytes in the file.
        found: u64,
        /// Bytes in the descriptor.
        expected: u64,
    },
    /// A file or its content is not what its digest says.
    #[error("{what} is {found}, expected {expected}")]
    DigestMismatch {
        /// `config`, `layer N` or `content of layer N`.
        what: String,
        /// Digest of the bytes.
        found: Digest,
        /// Digest in manifest or config.
        expected: Digest,
    },
    /// Compressed bytes that do not decompress, or are followed by others.
    #[error("layer {layer} does not decompress")]
    Decompress {
        /// Counted from 0.
        layer: usize,
        /// What the decoder says.
        #[source]
        source: io::Error,
    },
    /// The agent's own store failed.
    #[error("cannot keep the sealed {what}")]
    Store {
        /// `manifest`, `config` or `layer N`.
        what: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The caller asked for the end. It knows why; `reason` says `cancelled`.
    #[error("sealing was stopped")]
    Stopped,
}

impl SealError {
    /// The class of the failure. Whatever the export did wrong is `candidate_corrupt`.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Store { source, .. } if is_disk_full(source) => Reason::DiskFull,
            Self::Store { .. } => Reason::StoreCorrupt,
            Self::Stopped => Reason::Cancelled,
            _ => Reason::CandidateCorrupt,
        }
    }
}

/// Whether an I/O error means that there is no room.
pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_store_is_disk_full() {
        let store = |source| SealError::Store { what: "layer 0".into(), source };
        let full = || io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        assert_eq!(store(full()).reason(), Reason::DiskFull);
        let quota = io::Error::from_raw_os_error(rustix::io::Errno::DQUOT.raw_os_error());
        assert_eq!(store(quota).reason(), Reason::DiskFull);
        assert_eq!(store(io::ErrorKind::Other.into()).reason(), Reason::StoreCorrupt);
        let read = SealError::Read { name: "manifest.json".into(), source: full() };
        assert_eq!(read.reason(), Reason::CandidateCorrupt);
    }
}
