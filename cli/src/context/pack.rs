//! Packs a context into an archive, or tells beforehand what that would meet (shell).
//!
//! Sockets, named pipes and devices are skipped with a note rather than refused: they have no content to pack,
//! agents do not unpack them, and a pipe left behind by a development tool must not stop a build that does not
//! use it. A build that does use it fails at its `COPY`, and the note says why.

use std::io::Write;
use std::path::{Path, PathBuf};

use kiln_protocol::Digest;

use super::archive::Archive;
use super::error::PackError;
use super::ignore::Ignore;
use super::quoted;
use super::walk::{Entry, Kind, Walk, to_path};

/// How many of the largest files are named: enough to find what is missing in the ignore file.
const LARGEST: usize = 5;
/// Notes and problems that are kept, so that a strange tree cannot fill the memory.
const MAX_MESSAGES: usize = 1000;

/// A context that was packed.
#[derive(Debug)]
pub(crate) struct Packed {
    /// Sha256 of the archive.
    pub(crate) digest: Digest,
    /// Length of the archive.
    pub(crate) bytes: u64,
    /// Directories, files and links.
    pub(crate) entries: u64,
    /// The five largest files and their sizes in bytes, largest first, equal ones by path.
    pub(crate) largest: Vec<(PathBuf, u64)>,
    /// A note for each path that an archive cannot carry; above 1000 the last one counts the others.
    pub(crate) skipped: Vec<String>,
}

/// What packing a context would meet.
#[derive(Debug)]
pub(crate) struct Scan {
    /// All that would stop the packing, in the order of the paths; above 1000 the last one counts the others.
    pub(crate) problems: Vec<PackError>,
    /// Content of all files together.
    pub(crate) bytes: u64,
    /// Directories, files and links.
    pub(crate) entries: u64,
    /// The five largest files and their sizes in bytes, largest first, equal ones by path.
    pub(crate) largest: Vec<(PathBuf, u64)>,
    /// A note for each path that an archive cannot carry; above 1000 the last one counts the others.
    pub(crate) skipped: Vec<String>,
}

/// Writes all that `ignore` leaves of `context` to `out`, as an uncompressed tar whose bytes depend on nothing
/// but names, types, permissions, times, link targets and contents. Needs the same memory for any size.
pub(crate) fn pack(context: &Path, ignore: &Ignore, out: &mut impl Write) -> Result<Packed, PackError> {
    let mut tally = Tally::default();
    let walk = Walk::open(context, ignore)?;
    let mut archive = Archive::new(out);
    for entry in walk {
        let entry = entry?;
        tally.count(&entry);
        archive.append(entry)?;
    }
    let (digest, bytes) = archive.finish()?;
    let skipped = tally.notes();
    Ok(Packed { digest, bytes, entries: tally.entries, largest: tally.largest, skipped })
}

/// Visits what `pack` would pack and opens every file, but reads none. Fails only if there is no context.
pub(crate) fn scan(context: &Path, ignore: &Ignore) -> Result<Scan, PackError> {
    let mut tally = Tally::default();
    let (mut problems, mut count) = (Vec::new(), 0);
    for entry in Walk::open(context, ignore)? {
        match entry {
            Ok(entry) => tally.count(&entry),
            Err(problem) if problems.len() < MAX_MESSAGES => problems.push(problem),
            Err(_) => count += 1,
        }
    }
    problems.extend((count > 0).then_some(PackError::More { count }));
    let skipped = tally.notes();
    let Tally { entries, bytes, largest, .. } = tally;
    Ok(Scan { problems, bytes, entries, largest, skipped })
}

/// Sums up the entries of a context.
#[derive(Default)]
struct Tally {
    entries: u64,
    bytes: u64,
    largest: Vec<(PathBuf, u64)>,
    skipped: Vec<String>,
    more_skipped: u64,
}

impl Tally {
    fn count(&mut self, entry: &Entry) {
        match entry.kind {
            Kind::Skipped(_) if self.skipped.len() == MAX_MESSAGES => self.more_skipped += 1,
            Kind::Skipped(what) => self.skipped.push(format!("{} is {what}", quoted(&to_path(&entry.path)))),
            Kind::File { size, .. } => {
                self.entries += 1;
                self.bytes = self.bytes.saturating_add(size);
                self.rank(entry, size);
            }
            Kind::Directory | Kind::Symlink(_) => self.entries += 1,
        }
    }

    fn rank(&mut self, entry: &Entry, size: u64) {
        // Paths come in order, so that an equal one belongs behind.
        let place = self.largest.partition_point(|(_, other)| *other >= size);
        if place < LARGEST {
            self.largest.truncate(LARGEST - 1);
            self.largest.insert(place, (to_path(&entry.path), size));
        }
    }

    fn notes(&mut self) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.skipped);
        if self.more_skipped > 0 {
            notes.push(format!("{} more paths are sockets, named pipes or devices", self.more_skipped));
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_limited_and_the_rest_is_counted() {
        let mut tally = Tally::default();
        let pipe = Entry { path: b"a".to_vec(), mode: 0, mtime: 0, kind: Kind::Skipped("a named pipe") };
        for _ in 0..MAX_MESSAGES {
            tally.count(&pipe);
        }
        assert_eq!(tally.notes().len(), MAX_MESSAGES);
        for _ in 0..MAX_MESSAGES + 7 {
            tally.count(&pipe);
        }
        let notes = tally.notes();
        assert_eq!(notes.len(), MAX_MESSAGES + 1);
        assert_eq!(notes[MAX_MESSAGES], "7 more paths are sockets, named pipes or devices");
    }
}
