//! Why an image cannot be exported (pure).

use std::io;

use kiln_protocol::Digest;

/// Why an image cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// No store has such an image.
    #[error("no store has image {image}")]
    NoImage {
        /// Its config.
        image: Digest,
    },
    /// No store has such a layer.
    #[error("no store has layer {diff_id}")]
    NoLayer {
        /// Its diff id.
        diff_id: Digest,
    },
    /// A file of the store is missing, or something else than a plain file lies in its place.
    #[error("{name} of the store cannot be read as a plain file")]
    Read {
        /// Its path below the store, or below the layer's files.
        name: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A file of the store is larger than any that buildah writes.
    #[error("{name} of the store has more than {limit} bytes")]
    TooLarge {
        /// Its path below the store.
        name: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A file of the store is not what buildah writes.
    #[error("{name} of the store is malformed: {reason}")]
    Malformed {
        /// Which file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The export cannot be written.
    #[error("write the export")]
    Write(#[source] io::Error),
}

impl ExportError {
    /// Whether what the build left is the cause, not the machine.
    pub fn is_the_stores_fault(&self) -> bool {
        !matches!(self, Self::Write(_))
    }

    pub(super) fn malformed(name: &str, reason: impl std::fmt::Display) -> Self {
        Self::Malformed { name: name.to_owned(), reason: reason.to_string() }
    }
}
