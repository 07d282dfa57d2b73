//! Shell: unpacks, lists or reads an untrusted archive within limits.
//!
//! An archive is judged entry by entry on plain data ([`UnpackError`] has the rules); only then does anything reach
//! the disk. What is accepted means the same to GNU tar: where the format leaves room for two readings, the archive
//! is refused. Everything is synchronous and in one thread, so that it also works in a process that was forked
//! and not replaced. Memory is bounded: some buffers, the decompressor's window, and one record per path.

mod disk;
mod entries;
mod error;
mod header;
pub mod limits;
mod packed;
mod path;
mod pax;
mod stream;
mod tree;

use std::io::Read;
use std::os::fd::BorrowedFd;

pub use disk::Modes;
pub use entries::{Entry, Kind};
pub use error::{Defect, Excess, ForbiddenKind, LinkFault, Name, PathFault, UnpackError};
pub use limits::Limits;
pub use packed::Packing;
pub use stream::Body;

use disk::Disk;
use entries::Entries;
use tree::{Step, Tree};

/// What an accepted archive held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Entries, each as often as the archive has it.
    pub entries: u64,
    /// Bytes of content of all files.
    pub content_bytes: u64,
    /// Bytes of the archive.
    pub packed_bytes: u64,
    /// Bytes of the tar stream in it.
    pub unpacked_bytes: u64,
    /// How it was packed.
    pub packing: Packing,
}

/// Unpacks the archive below `root`, an empty directory of the caller, who owns all that is made.
///
/// Owners, extended attributes and the mode and time of the root itself are not taken from the archive. After an
/// error the directory holds a part of the tree; remove it.
pub fn unpack(
    mut archive: impl Read,
    root: BorrowedFd<'_>,
    modes: Modes,
    limits: &Limits,
) -> Result<Summary, UnpackError> {
    let mut disk = Disk::new(root, modes);
    let (summary, tree) = walk(&mut archive, limits, |entry, step, body| disk.write(entry, step, body))?;
    disk.finish(&tree)?;
    Ok(summary)
}

/// Shows each entry of the archive, with the same verdicts as [`unpack`] and without a disk.
pub fn list(
    archive: impl Read,
    limits: &Limits,
    mut see: impl FnMut(&Entry),
) -> Result<Summary, UnpackError> {
    visit(archive, limits, |entry, _| {
        see(entry);
        Ok(())
    })
}

/// Like [`list`], with the content of each entry, of which as much may be read as is wanted. An error of `see` ends
/// the reading and is handed on.
///
/// The verdict on the whole archive is known at the end only: what `see` was shown counts if this answers [`Ok`].
pub fn visit<E: From<UnpackError>>(
    mut archive: impl Read,
    limits: &Limits,
    mut see: impl FnMut(&Entry, &mut Body<'_, '_>) -> Result<(), E>,
) -> Result<Summary, E> {
    walk(&mut archive, limits, |entry, _, body| see(entry, body)).map(|(summary, _)| summary)
}

fn walk<E: From<UnpackError>>(
    archive: &mut dyn Read,
    limits: &Limits,
    mut see: impl FnMut(&Entry, Step, &mut Body<'_, '_>) -> Result<(), E>,
) -> Result<(Summary, Tree), E> {
    let mut entries = Entries::open(archive, limits)?;
    let mut tree = Tree::new(limits.max_entries);
    let (mut count, mut content_bytes) = (0, 0);
    while let Some(entry) = entries.next()? {
        let step = tree.place(&entry)?;
        see(&entry, step, &mut entries.body(&entry))?;
        entries.finish_body(&entry)?;
        count += 1;
        content_bytes += entry.size();
    }
    let stream = entries.stream();
    let summary = Summary {
        entries: count,
        content_bytes,
        packed_bytes: stream.packed_bytes(),
        unpacked_bytes: stream.position(),
        packing: stream.packing(),
    };
    Ok((summary, tree))
}
