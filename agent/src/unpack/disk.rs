//! Edge: makes the judged entries on a disk, through directory descriptors only.
//!
//! The tree has already refused every path through a link. The kernel is told to refuse them too, in case that
//! somebody else writes below the root at the same time.

use std::fs::File;
use std::io::{self, Write};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps};

use super::entries::{Entry, Kind};
use super::error::{Name, UnpackError};
use super::packed::BUFFER;
use super::path::{self, components};
use super::stream::Body;
use super::tree::{Directory, Step, Tree};

/// Mode of a directory while it is filled: nobody else may enter it, whatever the archive says of it.
const FILLING: u32 = 0o700;

/// What becomes of permission bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modes {
    /// All twelve bits as the archive has them, as `COPY` does in Docker: images need set-user-id programs. Only for
    /// a slot, where the owner is a subordinate id that is nobody outside and ends with the build.
    Verbatim,
    /// For a tree that a user of this machine keeps: no set-user-id, set-group-id and sticky bits, because files
    /// belong to that user, and always read and write (and search) for the owner, who must be able to remove it.
    Owned,
}

impl Modes {
    fn file(self, mode: u32) -> Mode {
        Mode::from_raw_mode(if self == Self::Verbatim { mode } else { mode & 0o777 | 0o600 })
    }

    fn directory(self, mode: u32) -> Mode {
        Mode::from_raw_mode(if self == Self::Verbatim { mode } else { mode & 0o777 | 0o700 })
    }
}

/// Writes entries below a root.
pub(super) struct Disk<'r> {
    root: BorrowedFd<'r>,
    modes: Modes,
    /// The directory used last: archives put neighbours one after the other.
    recent: Option<(Vec<u8>, OwnedFd)>,
    buffer: Box<[u8]>,
}

impl<'r> Disk<'r> {
    pub(super) fn new(root: BorrowedFd<'r>, modes: Modes) -> Self {
        Self { root, modes, recent: None, buffer: vec![0; BUFFER].into_boxed_slice() }
    }

    pub(super) fn write(
        &mut self,
        entry: &Entry,
        step: Step,
        body: &mut Body<'_, '_>,
    ) -> Result<(), UnpackError> {
        match step {
            Step::Keep => return Ok(()),
            Step::Create { known } => self.make_parents(entry, known)?,
            Step::Replace => self.remove(entry)?,
        }
        match &entry.kind {
            Kind::Directory => self.make_directory(&entry.path),
            Kind::File { .. } => self.make_file(entry, body),
            Kind::Symlink { target } => self.make_symlink(entry, target),
            Kind::HardLink { target } => self.make_hard_link(entry, target),
        }
    }

    /// Gives directories their modes and times, which later entries inside would have changed or made impossible.
    pub(super) fn finish(&mut self, tree: &Tree) -> Result<(), UnpackError> {
        self.recent = None;
        tree.directories().try_for_each(|directory| self.finish_directory(&directory))
    }

    fn finish_directory(&self, directory: &Directory) -> Result<(), UnpackError> {
        let Directory { path, mode, mtime } = directory;
        let opened = self.open(path)?;
        rustix::fs::futimens(&opened, &times(*mtime)).map_err(|e| failed("set the time of", path, e))?;
        rustix::fs::fchmod(&opened, self.modes.directory(*mode))
            .map_err(|e| failed("set the mode of", path, e))
    }

    fn make_parents(&mut self, entry: &Entry, known: usize) -> Result<(), UnpackError> {
        let (parent, _) = path::split_last(&entry.path);
        let names: Vec<&[u8]> = components(parent).collect();
        for depth in known..names.len() {
            self.make_directory(&names[..=depth].join(&b'/'))?;
        }
        Ok(())
    }

    fn make_directory(&mut self, path: &[u8]) -> Result<(), UnpackError> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(FILLING))
            .map_err(|e| failed("create the directory", path, e))
    }

    fn make_file(&mut self, entry: &Entry, body: &mut Body<'_, '_>) -> Result<(), UnpackError> {
        let path = &entry.path;
        let (parent, name) = self.parent(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| failed("create the file", path, e))?;
        let mut file = File::from(file);
        self.copy(&mut file, body, path)?;
        // After the content: writing clears the set-user-id bit and moves the time.
        rustix::fs::fchmod(&file, self.modes.file(entry.mode))
            .map_err(|e| failed("set the mode of", path, e))?;
        rustix::fs::futimens(&file, &times(entry.mtime)).map_err(|e| failed("set the time of", path, e))
    }

    fn copy(&mut self, file: &mut File, body: &mut Body<'_, '_>, path: &[u8]) -> Result<(), UnpackError> {
        loop {
            let count = body.read(&mut self.buffer)?;
            if count == 0 {
                return Ok(());
            }
            file.write_all(&self.buffer[..count]).map_err(|source| failed("write", path, source))?;
        }
    }

    fn make_symlink(&mut self, entry: &Entry, target: &[u8]) -> Result<(), UnpackError> {
        let path = &entry.path;
        let (parent, name) = self.parent(path)?;
        rustix::fs::symlinkat(target, parent, name)
            .map_err(|e| failed("create the symbolic link", path, e))?;
        rustix::fs::utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| failed("set the time of", path, e))
    }

    /// Mode and time of a hard link are those of its file, which has them.
    fn make_hard_link(&mut self, entry: &Entry, target: &[u8]) -> Result<(), UnpackError> {
        let (target_parent, target_name) = path::split_last(target);
        let from = self.open(target_parent)?;
        let (parent, name) = self.parent(&entry.path)?;
        rustix::fs::linkat(&from, target_name, parent, name, AtFlags::empty())
            .map_err(|e| failed("create the hard link", &entry.path, e))
    }

    fn remove(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        let (parent, name) = self.parent(&entry.path)?;
        rustix::fs::unlinkat(parent, name, AtFlags::empty()).map_err(|e| failed("replace", &entry.path, e))
    }

    /// The parent directory, opened, and the last component.
    fn parent<'p>(&mut self, path: &'p [u8]) -> Result<(BorrowedFd<'_>, &'p [u8]), UnpackError> {
        let (parent, name) = path::split_last(path);
        let opened = match self.recent.take() {
            Some(recent) if recent.0 == parent => recent,
            _ => (parent.to_vec(), self.open(parent)?),
        };
        Ok((self.recent.insert(opened).1.as_fd(), name))
    }

    fn open(&self, path: &[u8]) -> Result<OwnedFd, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        rustix::fs::openat2(self.root, path, flags, Mode::empty(), resolve)
            .map_err(|e| failed("open the directory", path, e))
    }
}

/// Whole seconds for both times, so that unpacking twice gives the same tree.
fn times(mtime: i64) -> Timestamps {
    let time = Timespec { tv_sec: mtime, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn failed(doing: &'static str, path: &[u8], source: impl Into<io::Error>) -> UnpackError {
    UnpackError::Disk { doing, path: Name::of(path), source: source.into() }
}
