//! Why a context cannot be packed (pure).

use std::io;
use std::path::PathBuf;

use super::quoted;

/// A problem of the context or of the archive's destination.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    /// There is nothing at the path of the context.
    #[error("the context {} does not exist; give the directory that holds the files of the build", quoted(.path))]
    NoContext {
        /// The context as given.
        path: PathBuf,
    },
    /// The context is a file or something else.
    #[error("the context {} is not a directory; give the directory that holds the files of the build", quoted(.path))]
    NotADirectory {
        /// The context as given.
        path: PathBuf,
    },
    /// The user may not read a path that belongs to the context.
    #[error("may not read {} in the context; allow it with `chmod u+rX` or add it to .dockerignore", quoted(.path))]
    Denied {
        /// Relative to the context; `.` is the context itself.
        path: PathBuf,
    },
    /// A path of the context cannot be read for another reason.
    #[error("cannot read {} in the context; if the build does not need it, add it to .dockerignore", quoted(.path))]
    Read {
        /// Relative to the context; `.` is the context itself.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// Something changes the context while it is read.
    #[error("{} {what} while the context was read; stop what writes to it or add it to .dockerignore", quoted(.path))]
    Changed {
        /// Relative to the context.
        path: PathBuf,
        /// What happened to it.
        what: &'static str,
    },
    /// The names that wait to be visited would take too much memory.
    #[error("the directory {} brings the context above {limit} waiting entries; add what the build does not need to .dockerignore", quoted(.path))]
    TooManyEntries {
        /// Relative to the context.
        path: PathBuf,
        /// The most that may wait.
        limit: usize,
    },
    /// Stands for the problems of a scan that were only counted.
    #[error("{count} more paths of the context cannot be packed")]
    More {
        /// How many.
        count: u64,
    },
    /// The archive's destination refused data.
    #[error("cannot write the context archive")]
    Write {
        /// What the system answered.
        #[source]
        source: io::Error,
    },
}
