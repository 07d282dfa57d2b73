//! Why an output cannot be written, and which reason that is (pure).

use std::error::Error;
use std::io;
use std::path::PathBuf;

use kiln_protocol::{Digest, Reason};

use crate::seal::is_disk_full;

/// Why an output cannot be written. The destination is then as it was before.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A path without a last component, such as `/`.
    #[error("{path} cannot be an output; name a file or directory in it")]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// A directory, device or pipe where a file is to be written.
    #[error("{path} exists and is not a plain file; name another, or `-` for standard output")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file where a directory is to be written.
    #[error("{path} exists and is not a directory; remove it or name another")]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// A directory whose content Kiln would have to delete.
    #[error(
        "{path} holds {found}; Kiln replaces only an empty directory{replaceable}: empty it or name another"
    )]
    NotEmpty {
        /// The path.
        path: PathBuf,
        /// What is in the way.
        found: String,
        /// What else may be there.
        replaceable: &'static str,
    },
    /// A directory that something is mounted on.
    #[error("{path} is a mount point and cannot be replaced; name a file or directory inside it")]
    MountPoint {
        /// The path.
        path: PathBuf,
    },
    /// Another process works on the same destination.
    #[error("{path} is being replaced by another process; try again or name another")]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused an operation on the destination.
    #[error("cannot {action} {path}")]
    Destination {
        /// The operation.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Standard output is closed or full.
    #[error("cannot write to standard output")]
    Stdout(#[source] io::Error),
    /// A sealed blob cannot be read.
    #[error("cannot read the sealed blob {digest}")]
    Blob {
        /// Which one.
        digest: Digest,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// A blob is not what manifest or config say.
    #[error("the content of blob {digest} is {found}, expected {expected}")]
    Content {
        /// Which one.
        digest: Digest,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// The root filesystem cannot be unpacked.
    #[error("cannot unpack the target's files into {path}")]
    Unpack {
        /// The directory.
        path: PathBuf,
        /// The class of the failure.
        reason: Reason,
        /// What failed.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The caller asked for the end. It knows why; `reason` says `cancelled`.
    #[error("writing the output was stopped")]
    Stopped,
}

impl OutputError {
    /// The class of the failure.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoName { .. }
            | Self::NotAFile { .. }
            | Self::NotADirectory { .. }
            | Self::MountPoint { .. }
            | Self::Busy { .. }
            | Self::NotEmpty { .. } => Reason::BadRequest,
            Self::Destination { source, .. } | Self::Stdout(source) | Self::Blob { source, .. }
                if is_disk_full(source) =>
            {
                Reason::DiskFull
            }
            Self::Destination { source, .. } => destination_reason(source),
            Self::Stdout(_) => Reason::ClientGone,
            Self::Blob { .. } | Self::Content { .. } => Reason::StoreCorrupt,
            Self::Unpack { reason, .. } => *reason,
            Self::Stopped => Reason::Cancelled,
        }
    }
}

/// A path that the user may not write to stays so on the next try.
fn destination_reason(error: &io::Error) -> Reason {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::PermissionDenied
        | Kind::ReadOnlyFilesystem
        | Kind::NotADirectory
        | Kind::IsADirectory
        | Kind::InvalidFilename
        | Kind::InvalidInput
        | Kind::NotFound
        | Kind::FileTooLarge => Reason::BadRequest,
        _ => Reason::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons() {
        let destination = |kind: io::ErrorKind| OutputError::Destination {
            action: "write",
            path: "x".into(),
            source: kind.into(),
        };
        for (error, expected) in [
            (destination(io::ErrorKind::StorageFull), Reason::DiskFull),
            (destination(io::ErrorKind::PermissionDenied), Reason::BadRequest),
            (destination(io::ErrorKind::TimedOut), Reason::Unknown),
            (OutputError::Stdout(io::ErrorKind::BrokenPipe.into()), Reason::ClientGone),
            (OutputError::NotAFile { path: "x".into() }, Reason::BadRequest),
            (OutputError::Stopped, Reason::Cancelled),
        ] {
            assert_eq!(error.reason(), expected, "{error}");
        }
    }
}
