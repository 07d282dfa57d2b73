//! Writes beside the destination and puts the result in its place by one rename (shell).
//!
//! The name of the work beside a destination is derived from the destination's name, and whoever works on it
//! holds a lock. So the next output to the same place finds and removes what a killed process left.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags, flock, renameat_with};
use sha2::{Digest as _, Sha256};

use super::OutputError;
use super::existing::{self, Existing, Kind};

/// How often a new name is tried when a cleaner takes the work before it is locked.
const ATTEMPTS: usize = 8;

/// Work beside a destination; removed when dropped without having been published.
pub(super) struct Staged {
    /// What is being written.
    path: PathBuf,
    /// Where it will be.
    target: PathBuf,
    kind: Kind,
    /// Open work, locked.
    handle: File,
}

impl Staged {
    /// Starts work on `target` after checking that it may be replaced.
    pub(super) fn new(target: &Path, kind: Kind) -> Result<Self, OutputError> {
        let target = existing::resolve(target)?;
        existing::inspect(&target, kind)?;
        let parent = parent(&target);
        fs::create_dir_all(parent).map_err(|e| destination("create", parent, e))?;
        let prefix = prefix(&target)?;
        sweep(parent, &prefix);
        for _ in 0..ATTEMPTS {
            let path = create(parent, &prefix, kind).map_err(|e| destination("write into", parent, e))?;
            match open(&path, kind) {
                Ok(handle) if lock(&handle, &path) => return Ok(Self { path, target, kind, handle }),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(destination("open", &path, error)),
            }
        }
        Err(OutputError::Busy { path: target })
    }

    /// The file or directory to fill.
    pub(super) fn handle(&self) -> &File {
        &self.handle
    }

    /// The directory to fill, for calls relative to it.
    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// Path of the work.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Wraps an error of writing, naming what the user asked for instead of the work beside it.
    pub(super) fn write_error(&self, source: io::Error) -> OutputError {
        destination("write", &self.target, source)
    }

    /// Puts the work in its place. What was there before is removed after that.
    pub(super) fn publish(self) -> Result<(), OutputError> {
        if self.kind == Kind::File {
            // File systems with late allocation or quotas on a server report a full disk only now.
            self.handle.sync_all().map_err(|e| self.write_error(e))?;
        }
        // Once more: the build took a while.
        match existing::inspect(&self.target, self.kind)? {
            Existing::Replaceable => self.exchange(),
            Existing::Nothing => fs::rename(&self.path, &self.target).map_err(|e| self.replace_error(e)),
        }
    }

    /// Swaps work and destination, and swaps back if the destination was not what was inspected.
    ///
    /// The lock on the previous content keeps another process from exchanging it as well, and from taking it
    /// for abandoned while it lies beside the destination.
    pub(super) fn exchange(&self) -> Result<(), OutputError> {
        let previous = File::open(&self.target).map_err(|e| self.replace_error(e))?;
        if !lock(&previous, &self.target) {
            return Err(OutputError::Busy { path: self.target.clone() });
        }
        self.swap()?;
        if let Err(error) = existing::inspect(&self.path, self.kind) {
            self.swap()?;
            return Err(error);
        }
        remove(&self.path);
        Ok(())
    }

    fn swap(&self) -> Result<(), OutputError> {
        let cwd = rustix::fs::CWD;
        match renameat_with(cwd, &self.path, cwd, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
                self.swap_in_steps()
            }
            Err(errno) => Err(self.replace_error(errno.into())),
        }
    }

    fn replace_error(&self, source: io::Error) -> OutputError {
        let path = self.target.clone();
        match source.kind() {
            io::ErrorKind::ResourceBusy => OutputError::MountPoint { path },
            // It was not there, or empty, a moment ago.
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => OutputError::Busy { path },
            _ => destination("replace", &path, source),
        }
    }

    /// For file systems that cannot exchange (NFS): for an instant there is no destination.
    fn swap_in_steps(&self) -> Result<(), OutputError> {
        let aside = self.path.with_extension("aside");
        let fail = |e| self.replace_error(e);
        fs::rename(&self.target, &aside).map_err(fail)?;
        if let Err(error) = fs::rename(&self.path, &self.target) {
            fs::rename(&aside, &self.target).map_err(fail)?;
            return Err(fail(error));
        }
        fs::rename(&aside, &self.path).map_err(fail)
    }
}

impl Drop for Staged {
    /// Removes unfinished work. After an output nothing is there.
    fn drop(&mut self) {
        remove(&self.path);
    }
}

pub(super) fn destination(action: &'static str, path: &Path, source: io::Error) -> OutputError {
    OutputError::Destination { action, path: path.to_owned(), source }
}

/// The directory that holds `target`.
pub(super) fn parent(target: &Path) -> &Path {
    target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Hidden, short whatever the length of the name, and the same for every output to this place.
fn prefix(target: &Path) -> Result<String, OutputError> {
    let name = target.file_name().ok_or_else(|| OutputError::NoName { path: target.to_owned() })?;
    let hash = kiln_protocol::Digest::from_sha256(Sha256::digest(name.as_encoded_bytes()).into());
    Ok(format!(".kiln-{}-", &hash.hex()[..16]))
}

/// The umask of the user decides who may read the result.
fn create(parent: &Path, prefix: &str, kind: Kind) -> io::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = tempfile::Builder::new();
    match kind {
        Kind::File => {
            let permissions = fs::Permissions::from_mode(0o644);
            Ok(builder
                .prefix(prefix)
                .permissions(permissions)
                .tempfile_in(parent)?
                .into_temp_path()
                .keep()?)
        }
        Kind::Layout | Kind::Files => {
            let permissions = fs::Permissions::from_mode(0o755);
            Ok(builder.prefix(prefix).permissions(permissions).tempdir_in(parent)?.keep())
        }
    }
}

fn open(path: &Path, kind: Kind) -> io::Result<File> {
    match kind {
        Kind::File => File::options().read(true).write(true).open(path),
        Kind::Layout | Kind::Files => File::open(path),
    }
}

/// Whether the work is ours; a cleaner may have removed it between its creation and the lock.
fn lock(handle: &File, path: &Path) -> bool {
    // Where locks do not work (some network file systems), no cleaner can take one either.
    let taken =
        matches!(flock(handle, FlockOperation::NonBlockingLockExclusive), Err(rustix::io::Errno::WOULDBLOCK));
    let same = match (handle.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    };
    !taken && same
}

/// Removes what killed processes left beside this destination. What cannot be removed is left for the next one.
fn sweep(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes())
            && let Some(_lock) = lock_abandoned(&entry.path())
        {
            remove(&entry.path());
        }
    }
}

/// The lock of work that nobody holds. It is held until the removal is over, so that a process which created
/// the same work a moment ago notices.
fn lock_abandoned(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let handle = rustix::fs::open(path, flags, Mode::empty()).map(File::from).ok()?;
    let ours = handle.metadata().is_ok_and(|m| m.uid() == rustix::process::geteuid().as_raw());
    let free = ours && flock(&handle, FlockOperation::NonBlockingLockExclusive).is_ok();
    free.then_some(handle)
}

fn remove(path: &Path) {
    let is_directory = fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
    if !is_directory {
        let _ = fs::remove_file(path);
    } else if fs::remove_dir_all(path).is_err() {
        make_removable(path);
        let _ = fs::remove_dir_all(path);
    }
}

/// An unpacked root filesystem has directories that even their owner may not write to.
fn make_removable(directory: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        let _ = fs::set_permissions(&directory, fs::Permissions::from_mode(0o700));
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        pending.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
}
