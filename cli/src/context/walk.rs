//! Visits what belongs to a context, in a fixed order and without following links (shell).
//!
//! The order is that of `Path`: by bytes, name by name, so that a directory comes right before what it holds.
//! Everything is opened relative to its directory and without following links, so that a tree which changes
//! during the visit can make it fail but cannot lead it out of the context. Nothing recurses, and only the
//! deepest directories stay open, so the depth is bounded by nothing but the memory for the path.

use std::collections::VecDeque;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::error::PackError;
use super::ignore::{Ancestry, Ignore, Verdict};

/// Directories kept open, counted from the deepest; far below the usual limit of 1024 files for a process.
const OPEN_DIRECTORIES: usize = 64;
/// Names that wait to be visited, over all open levels: about 100 bytes each. An agent accepts fewer entries.
const MAX_WAITING: usize = 1_000_000;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// `NONBLOCK` and `NOCTTY` in case that a device or FIFO takes the place of the file.
const FILE: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);

/// One path of the context.
#[derive(Debug)]
pub(super) struct Entry {
    /// Relative to the context, never empty, without `.` and `..`.
    pub(super) path: Vec<u8>,
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub(super) mode: u32,
    /// Whole seconds since 1970, possibly negative.
    pub(super) mtime: i64,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Directory,
    File {
        content: File,
        size: u64,
    },
    /// With the target exactly as it is stored.
    Symlink(Vec<u8>),
    /// Not part of the context, with the reason.
    Skipped(&'static str),
}

/// The visit. After an error about one path it goes on with the next; pick it up to collect all errors.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    ignore: &'a Ignore,
    /// The directories from the context down to the one being visited.
    levels: Vec<Level>,
    /// The path last visited, relative to the context.
    path: Vec<u8>,
    /// Names in all levels together.
    waiting: usize,
    ready: VecDeque<Entry>,
}

#[derive(Debug)]
struct Level {
    /// Closed while the visit is far below.
    directory: Option<OwnedFd>,
    identity: Identity,
    /// How much of the current path names this directory.
    path_length: usize,
    ancestry: Ancestry,
    /// In reverse order.
    names: Vec<Name>,
    /// The directory's own entry, if it is ignored and so only belongs to the context once something in it does.
    withheld: Option<Entry>,
}

#[derive(Debug)]
struct Name {
    text: CString,
    /// Such a name waits only because it may be a directory with exceptions in it.
    ignored: bool,
}

/// Device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity(u64, u64);

impl Identity {
    fn of(stat: &Stat) -> Self {
        Self(stat.st_dev, stat.st_ino)
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Entry, PackError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Some(Ok(entry));
            }
            let done = match self.levels.last_mut()?.names.pop() {
                Some(name) => self.visit(&name),
                None => self.leave(),
            };
            if let Err(error) = done {
                return Some(Err(error));
            }
        }
    }
}

/// What a name turned out to be.
enum Found {
    Directory(OwnedFd, Stat),
    Other(Stat, Kind),
    /// An ignored name that is no directory.
    Ignored,
}

impl<'a> Walk<'a> {
    /// Opens the context. Its own path may be a link; no path in it is followed.
    pub(super) fn open(context: &Path, ignore: &'a Ignore) -> Result<Self, PackError> {
        let path = context.to_owned();
        let flags = DIRECTORY.difference(OFlags::NOFOLLOW);
        let directory =
            rustix::fs::openat(CWD, context, flags, Mode::empty()).map_err(|error| match error {
                Errno::NOENT => PackError::NoContext { path },
                Errno::NOTDIR => PackError::NotADirectory { path },
                _ => problem(b".", error),
            })?;
        let stat = rustix::fs::fstat(&directory).map_err(|error| problem(b".", error))?;
        let mut walk =
            Self { ignore, levels: Vec::new(), path: Vec::new(), waiting: 0, ready: VecDeque::new() };
        walk.descend(directory, &stat, ignore.root(), None)?;
        Ok(walk)
    }

    fn visit(&mut self, name: &Name) -> Result<(), PackError> {
        self.waiting -= 1;
        let Some(level) = self.levels.last() else { return Ok(()) };
        let Some(directory) = &level.directory else { return Err(self.moved()) };
        self.path.truncate(level.path_length);
        append(&mut self.path, name.text.to_bytes());
        let stat = rustix::fs::statat(directory, &name.text, AtFlags::SYMLINK_NOFOLLOW);
        match stat.and_then(|stat| look(directory, name, stat)) {
            Ok(Found::Directory(inner, stat)) => self.enter(inner, &stat, name.ignored),
            Ok(Found::Other(stat, kind)) => {
                self.emit(Entry::new(&self.path, &stat, kind));
                Ok(())
            }
            // What vanished is as if it had gone before the visit: the tree really had that state.
            Ok(Found::Ignored) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(problem(&self.path, error)),
        }
    }

    fn enter(&mut self, directory: OwnedFd, stat: &Stat, ignored: bool) -> Result<(), PackError> {
        let Some(level) = self.levels.last() else { return Ok(()) };
        let ancestry = self.ignore.enter(&level.ancestry, &self.path);
        let entry = Entry::new(&self.path, stat, Kind::Directory);
        let withheld = if ignored {
            Some(entry)
        } else {
            self.emit(entry);
            None
        };
        self.descend(directory, stat, ancestry, withheld)
    }

    fn descend(
        &mut self,
        directory: OwnedFd,
        stat: &Stat,
        ancestry: Ancestry,
        withheld: Option<Entry>,
    ) -> Result<(), PackError> {
        let path_length = self.path.len();
        let names = self.list(&directory, &ancestry)?;
        self.waiting += names.len();
        let (directory, identity) = (Some(directory), Identity::of(stat));
        self.levels.push(Level { directory, identity, path_length, ancestry, names, withheld });
        if let Some(far) = self.levels.len().checked_sub(OPEN_DIRECTORIES + 1) {
            self.levels[far].directory = None;
        }
        Ok(())
    }

    /// The names in the current directory that need a visit, in reverse order.
    fn list(&mut self, directory: &OwnedFd, ancestry: &Ancestry) -> Result<Vec<Name>, PackError> {
        let path_length = self.path.len();
        let mut names = Vec::new();
        for entry in Dir::read_from(directory).map_err(|error| problem(&self.path, error))? {
            self.path.truncate(path_length);
            let entry = entry.map_err(|error| problem(&self.path, error))?;
            let text = entry.file_name();
            if [c".", c".."].contains(&text) {
                continue;
            }
            if self.waiting + names.len() >= MAX_WAITING {
                return Err(PackError::TooManyEntries { path: to_path(&self.path), limit: MAX_WAITING });
            }
            append(&mut self.path, text.to_bytes());
            if let Some(ignored) = self.is_needed(ancestry, entry.file_type()) {
                names.push(Name { text: text.to_owned(), ignored });
            }
        }
        self.path.truncate(path_length);
        names.sort_unstable_by(|a, b| b.text.cmp(&a.text));
        Ok(names)
    }

    /// Whether the current path needs a visit, and if so, whether it is ignored.
    fn is_needed(&self, ancestry: &Ancestry, file_type: FileType) -> Option<bool> {
        let may_be_directory = matches!(file_type, FileType::Directory | FileType::Unknown);
        match self.ignore.verdict(ancestry, &self.path) {
            Verdict::Kept => Some(false),
            Verdict::Ignored(by) => {
                (may_be_directory && self.ignore.may_keep_below(by, &self.path)).then_some(true)
            }
        }
    }

    /// Queues an entry, after the withheld directories that it is in.
    fn emit(&mut self, entry: Entry) {
        if !matches!(entry.kind, Kind::Skipped(_)) {
            // Each entry releases all of them, so they are always the innermost ones.
            let parents: Vec<Entry> =
                self.levels.iter_mut().rev().map_while(|level| level.withheld.take()).collect();
            self.ready.extend(parents.into_iter().rev());
        }
        self.ready.push_back(entry);
    }

    /// Goes back to the parent, which may have been closed in the meantime.
    fn leave(&mut self) -> Result<(), PackError> {
        let Some(left) = self.levels.pop() else { return Ok(()) };
        let Some(parent) = self.levels.last_mut() else { return Ok(()) };
        if parent.directory.is_none() {
            self.path.truncate(left.path_length);
            parent.directory = left.directory.and_then(|left| reopen_parent(&left, parent.identity));
            if parent.directory.is_none() {
                return Err(self.moved());
            }
        }
        Ok(())
    }

    /// Ends the visit: there is no safe way back to the directories that remain.
    fn moved(&mut self) -> PackError {
        self.levels.clear();
        PackError::Changed { path: to_path(&self.path), what: "was moved" }
    }
}

impl Entry {
    fn new(path: &[u8], stat: &Stat, kind: Kind) -> Self {
        Self { path: path.to_owned(), mode: stat.st_mode & 0o7777, mtime: stat.st_mtime, kind }
    }
}

/// Opens what a name stands for.
fn look(directory: &OwnedFd, name: &Name, stat: Stat) -> Result<Found, Errno> {
    let text = &name.text;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let inner = rustix::fs::openat(directory, text, DIRECTORY, Mode::empty())?;
            let stat = rustix::fs::fstat(&inner)?;
            Found::Directory(inner, stat)
        }
        _ if name.ignored => Found::Ignored,
        FileType::RegularFile => {
            let content = rustix::fs::openat(directory, text, FILE, Mode::empty())?;
            let stat = rustix::fs::fstat(&content)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(TYPE_CHANGED);
            }
            let size = stat.st_size.cast_unsigned();
            Found::Other(stat, Kind::File { content: File::from(content), size })
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(directory, text, Vec::new())?;
            Found::Other(stat, Kind::Symlink(target.into_bytes()))
        }
        FileType::Socket => Found::Other(stat, Kind::Skipped("a socket")),
        FileType::Fifo => Found::Other(stat, Kind::Skipped("a named pipe")),
        _ => Found::Other(stat, Kind::Skipped("a device")),
    })
}

/// What the system answers when a link stands where a file was.
const TYPE_CHANGED: Errno = Errno::LOOP;

fn problem(path: &[u8], error: Errno) -> PackError {
    let path = to_path(path);
    match error {
        Errno::ACCESS | Errno::PERM => PackError::Denied { path },
        TYPE_CHANGED | Errno::NOTDIR | Errno::INVAL | Errno::NXIO => {
            PackError::Changed { path, what: "was replaced" }
        }
        _ => PackError::Read { path, source: error.into() },
    }
}

/// `None` unless the parent is the directory that it was on the way down.
fn reopen_parent(child: &OwnedFd, expected: Identity) -> Option<OwnedFd> {
    let parent = rustix::fs::openat(child, c"..", DIRECTORY, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&parent).ok()?;
    (Identity::of(&stat) == expected).then_some(parent)
}

fn append(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}

/// For messages, where the context itself is `.`.
pub(super) fn to_path(path: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(if path.is_empty() { b".".to_vec() } else { path.to_owned() }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_takes_a_place_between_look_and_opening_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("file"), "x").unwrap();
        std::fs::create_dir(root.path().join("dir")).unwrap();
        symlink("file", root.path().join("to-file")).unwrap();
        symlink("dir", root.path().join("to-dir")).unwrap();
        rustix::fs::mkfifoat(CWD, root.path().join("pipe"), Mode::RUSR | Mode::WUSR).unwrap();
        let directory = rustix::fs::open(root.path(), DIRECTORY, Mode::empty()).unwrap();
        let stale = |name: &str| rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        for (was, is) in [
            ("file", "to-file"),
            ("file", "pipe"),
            ("file", "dir"),
            ("dir", "to-dir"),
            ("dir", "file"),
            ("to-file", "file"),
        ] {
            let name = Name { text: CString::new(is).unwrap(), ignored: false };
            let error = look(&directory, &name, stale(was)).err().map(|error| problem(is.as_bytes(), error));
            let expected = format!(
                "\"{is}\" was replaced while the context was read; stop what writes to it or add it to .dockerignore"
            );
            assert_eq!(error.unwrap().to_string(), expected, "{was}");
        }
    }

    #[test]
    fn waiting_names_are_limited() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dir")).unwrap();
        for name in ["a", "b", "dir/a", "dir/b"] {
            std::fs::write(root.path().join(name), "").unwrap();
        }
        let ignore = Ignore::default();
        let mut walk = Walk::open(root.path(), &ignore).unwrap();
        assert_eq!(walk.waiting, 3);
        walk.waiting = MAX_WAITING + 2;
        let results: Vec<_> = walk.by_ref().take(3).collect();
        let error = results[2].as_ref().unwrap_err().to_string();
        assert!(
            error.starts_with("the directory \"dir\" brings the context above 1000000 waiting entries"),
            "{error}"
        );
        assert_eq!(walk.count(), 1, "the directory itself is known");
    }
}
