//! The data directory: who owns what in it, and what a killed predecessor left (shell).
//!
//! ```text
//! DATA/                  0700, the agent's
//!   kiln-data            says that the directory is Kiln's
//!   blobs/sha256/        content by digest: layers, manifests and configs of base images
//!   bases/               one description and one lock per base image
//!   caches/              heads and locks of cache mounts
//!   layers/              heads and locks of layer caches
//!   jobs/ID/             lock, context archive: one directory per running build
//!   logs/ID.log          finished and running logs
//!   store/               0777 inside the 0700: everything below is written by slots, under other uids
//!     mnt/               empty mount point
//!     jobs/ID/           a slot's own directory
//!     in/                layouts for import
//!     base/HEX/          read-only image stores, published by rename
//!     cache/KEY/N/       generations of cache mounts, published by rename
//!     layers/N/          generations of layer caches, published by rename
//! ```
//! Several processes share one data directory. A lock says that something is in use; the kernel frees it
//! with the last process that holds it, so a lock that can be taken means that nobody is left.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_protocol::id::Attempt;
use kiln_protocol::{BuildId, Reason};

use crate::blobs::BlobStore;

/// The agent's own directories.
const PRIVATE: [&str; 5] = ["bases", "caches", "layers", "jobs", "logs"];
/// Directories that slots write to under subordinate uids.
const SHARED: [&str; 7] =
    ["store", "store/mnt", "store/jobs", "store/base", "store/cache", "store/layers", "store/in"];

/// Says that a directory is ours; holds the version of its layout.
const MARKER: &str = "kiln-data";
/// Locks that are waited for are held for a few file operations.
const LOCK_TIMEOUT: Duration = Duration::from_mins(1);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Something about the data directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The blob store cannot be opened.
    #[error("open the blob store")]
    Blobs(#[from] crate::blobs::BlobError),
    /// The directory belongs to somebody else.
    #[error("{} has files in it and is no data directory of Kiln; name an empty or a new one", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// Somebody held a lock for too long.
    #[error("{} was locked for more than {seconds} s by another kiln", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long we waited.
        seconds: u64,
    },
    /// There is too little space to start a build.
    #[error("{} has {free} bytes free, and a build starts only with {wanted} (data.min_free)", path.display())]
    NoSpace {
        /// The data directory.
        path: PathBuf,
        /// Bytes free.
        free: u64,
        /// Bytes wanted.
        wanted: u64,
    },
}

impl StateError {
    /// What it means for a build.
    pub fn reason(&self) -> Reason {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match self {
            Self::NoSpace { .. } => Reason::DiskFull,
            Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded) => {
                Reason::DiskFull
            }
            Self::Blobs(_) => Reason::StoreCorrupt,
            Self::Io { .. } | Self::NotOurs { .. } | Self::Locked { .. } => Reason::NodeUnfit,
        }
    }

    pub(crate) fn io(doing: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }
}

/// An open data directory.
#[derive(Debug)]
pub struct State {
    root: PathBuf,
    blobs: BlobStore,
}

impl State {
    /// Opens a data directory and makes what is missing.
    pub fn open(root: &Path) -> Result<Self, StateError> {
        std::fs::create_dir_all(root).map_err(|e| StateError::io("create", root, e))?;
        let root = root.canonicalize().map_err(|e| StateError::io("open", root, e))?;
        claim(&root)?;
        set_mode(&root, 0o700)?;
        for name in PRIVATE {
            make_dir(&root.join(name), 0o700)?;
        }
        for name in SHARED {
            make_dir(&root.join(name), 0o777)?;
        }
        let blobs = BlobStore::open(&root)?;
        Ok(Self { root, blobs })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Content by digest.
    pub fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    /// A path below the directory.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The directory that slots see parts of.
    pub fn store(&self) -> Result<File, StateError> {
        let path = self.path("store");
        File::open(&path).map_err(|e| StateError::io("open", &path, e))
    }

    /// Where the log of an attempt lies.
    pub fn log_path(&self, build: BuildId, attempt: Attempt) -> PathBuf {
        match attempt {
            Attempt::FIRST => self.path(&format!("logs/{build}.log")),
            later => self.path(&format!("logs/{build}-{later}.log")),
        }
    }

    /// Bytes that an ordinary user can still write.
    pub fn free_bytes(&self) -> Result<u64, StateError> {
        let stat =
            rustix::fs::statvfs(&self.root).map_err(|e| StateError::io("inspect", &self.root, e.into()))?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    /// Refuses to go on below a floor of free space.
    pub fn require_free(&self, wanted: u64) -> Result<(), StateError> {
        let free = self.free_bytes()?;
        if free < wanted {
            return Err(StateError::NoSpace { path: self.root.clone(), free, wanted });
        }
        Ok(())
    }

    /// Keeps blobs that no base image names yet from being deleted, as long as the result lives.
    pub async fn use_blobs(&self) -> Result<File, StateError> {
        // Held exclusively only while unreferenced blobs are deleted.
        wait_for_lock(&self.path("blobs/lock"), File::try_lock_shared).await
    }

    /// The right to delete unreferenced blobs, unless somebody is fetching.
    pub fn sweep_blobs(&self) -> Result<Option<File>, StateError> {
        let path = self.path("blobs/lock");
        let lock = open_lock(&path)?;
        let taken = try_lock(&lock).map_err(|e| StateError::io("lock", &path, e))?;
        Ok(taken.map(|()| lock))
    }

    /// Makes the private directory of a job, locked.
    pub fn create_job(&self, name: &str) -> Result<Job, StateError> {
        // Locked before it gets its name, so that nobody takes it for abandoned.
        let hidden = self.path(&format!("jobs/.{name}"));
        make_dir(&hidden, 0o700)?;
        let lock = open_lock(&hidden.join("lock"))?;
        lock.lock().map_err(|e| StateError::io("lock", &hidden, e))?;
        let dir = self.path(&format!("jobs/{name}"));
        std::fs::rename(&hidden, &dir).map_err(|e| StateError::io("create", &dir, e))?;
        Ok(Job { name: name.to_owned(), dir, lock })
    }

    /// Jobs whose processes are all dead. Each is locked for the caller.
    pub fn abandoned_jobs(&self) -> Result<Vec<Job>, StateError> {
        let jobs = self.path("jobs");
        let entries = std::fs::read_dir(&jobs).map_err(|e| StateError::io("list", &jobs, e))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| !name.starts_with('.')).filter_map(|name| self.take_over(name)).collect())
    }

    fn take_over(&self, name: String) -> Option<Job> {
        let dir = self.path(&format!("jobs/{name}"));
        let lock = OpenOptions::new().read(true).write(true).open(dir.join("lock")).ok()?;
        try_lock(&lock).ok()??;
        Some(Job { name, dir, lock })
    }
}

/// The private directory of one job. Dropping it deletes it.
#[derive(Debug)]
pub struct Job {
    name: String,
    dir: PathBuf,
    lock: File,
}

impl Job {
    /// The job's name, also below `store/jobs`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The agent's own directory of the job.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A second handle on the lock, for the slot.
    pub fn lock(&self) -> std::io::Result<File> {
        self.lock.try_clone()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // What stays is found by the next start: the lock is free then.
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(job = self.name, %error, "cannot delete the job's private directory");
        }
    }
}

/// Makes an empty directory ours. One with files in it must be ours already.
fn claim(root: &Path) -> Result<(), StateError> {
    let marker = root.join(MARKER);
    let mut entries = std::fs::read_dir(root).map_err(|e| StateError::io("list", root, e))?;
    if entries.next().is_some() && !marker.exists() {
        return Err(StateError::NotOurs { path: root.to_owned() });
    }
    std::fs::write(&marker, "1\n").map_err(|e| StateError::io("write", &marker, e))
}

/// Waits for a lock without holding up anything else.
pub(crate) async fn wait_for_lock(
    path: &Path,
    take: impl Fn(&File) -> Result<(), TryLockError>,
) -> Result<File, StateError> {
    let lock = open_lock(path)?;
    let began = std::time::Instant::now();
    while began.elapsed() < LOCK_TIMEOUT {
        match take(&lock) {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
            Err(TryLockError::Error(error)) => return Err(StateError::io("lock", path, error)),
        }
    }
    Err(StateError::Locked { path: path.to_owned(), seconds: LOCK_TIMEOUT.as_secs() })
}

/// What names this boot of the machine. Content that was not synced counts only until the next one.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Opens a lock file.
pub(crate) fn open_lock(path: &Path) -> Result<File, StateError> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    opened.map_err(|e| StateError::io("open", path, e))
}

/// Takes an exclusive lock if nobody holds one: `Some(())` if it was taken.
pub(crate) fn try_lock(file: &File) -> std::io::Result<Option<()>> {
    match file.try_lock() {
        Ok(()) => Ok(Some(())),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StateError> {
    match std::fs::create_dir(path) {
        Ok(()) => set_mode(path, mode),
        // Its creator may have died before it set the mode.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => set_mode(path, mode),
        Err(error) => Err(StateError::io("create", path, error)),
    }
}

pub(crate) fn set_mode(path: &Path, mode: u32) -> Result<(), StateError> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(|e| StateError::io("set the mode of", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_full_is_called_full() {
        let io = |kind: std::io::ErrorKind| StateError::io("create", Path::new("/x"), kind.into()).reason();
        assert_eq!(io(std::io::ErrorKind::StorageFull), Reason::DiskFull);
        assert_eq!(io(std::io::ErrorKind::QuotaExceeded), Reason::DiskFull);
        assert_eq!(io(std::io::ErrorKind::PermissionDenied), Reason::NodeUnfit);
        let space = StateError::NoSpace { path: "/x".into(), free: 1, wanted: 2 };
        assert_eq!(space.reason(), Reason::DiskFull);
        assert_eq!(StateError::Locked { path: "/x".into(), seconds: 1 }.reason(), Reason::NodeUnfit);
    }

    #[test]
    fn a_running_job_is_not_abandoned_and_a_dropped_one_is_gone() {
        let temp = tempfile::tempdir().unwrap();
        let state = State::open(temp.path()).unwrap();
        let job = state.create_job("one").unwrap();
        let slot = job.lock().unwrap();
        assert!(state.abandoned_jobs().unwrap().is_empty());
        drop(job);
        assert!(!state.path("jobs/one").exists());
        drop(slot);
    }

    #[test]
    fn a_job_is_abandoned_only_when_its_last_holder_is_gone() {
        let temp = tempfile::tempdir().unwrap();
        let state = State::open(temp.path()).unwrap();
        let mut job = state.create_job("two").unwrap();
        let slot = job.lock().unwrap();
        // As after kill -9 of the agent: no destructor ran, its descriptor is closed.
        job.lock = File::open("/dev/null").unwrap();
        std::mem::forget(job);
        assert!(state.abandoned_jobs().unwrap().is_empty());
        drop(slot);
        let found = state.abandoned_jobs().unwrap();
        assert_eq!(found.iter().map(Job::name).collect::<Vec<_>>(), ["two"]);
    }

    #[test]
    fn a_directory_of_somebody_else_is_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("precious"), "x").unwrap();
        let error = State::open(temp.path()).unwrap_err();
        assert!(matches!(error, StateError::NotOurs { .. }), "{error}");
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn too_little_space_is_refused_with_the_key() {
        let temp = tempfile::tempdir().unwrap();
        let state = State::open(temp.path()).unwrap();
        assert!(state.require_free(0).is_ok());
        let message = state.require_free(u64::MAX).unwrap_err().to_string();
        assert!(message.contains("data.min_free"), "{message}");
    }
}
