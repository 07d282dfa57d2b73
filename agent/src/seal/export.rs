//! Opens files in a directory that untrusted code wrote and may still change (shell).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

use super::SealError;

/// A plain file of the export, and its size when it was opened.
#[derive(Debug)]
pub(super) struct ExportedFile {
    pub(super) name: String,
    pub(super) file: File,
    pub(super) size: u64,
}

/// Opens `name` below `directory`: no link, no other file system, nothing that blocks.
pub(super) fn open(directory: BorrowedFd<'_>, name: &str) -> Result<ExportedFile, SealError> {
    // NONBLOCK so that a pipe without a writer cannot hold the agent.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let fail = |errno: rustix::io::Errno| SealError::Open { name: name.to_owned(), source: errno.into() };
    let descriptor = openat2(directory, name, flags, Mode::empty(), resolve).map_err(fail)?;
    let stat = fstat(&descriptor).map_err(fail)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(SealError::NotAFile { name: name.to_owned() });
    }
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    Ok(ExportedFile { name: name.to_owned(), file: File::from(descriptor), size })
}

impl ExportedFile {
    /// Refuses a file whose size is over the limit.
    pub(super) fn at_most(self, limit: u64, key: &'static str) -> Result<Self, SealError> {
        if self.size <= limit {
            return Ok(self);
        }
        Err(SealError::TooLarge {
            what: format!("exported file {}", self.name),
            found: self.size,
            limit,
            key,
        })
    }

    /// The whole content; at most the size that the file had when it was opened.
    pub(super) fn read_small(&self) -> Result<Vec<u8>, SealError> {
        let mut bytes = Vec::new();
        (&self.file).take(self.size).read_to_end(&mut bytes).map_err(|e| self.read_error(e))?;
        Ok(bytes)
    }

    /// Wraps an error of reading this file.
    pub(super) fn read_error(&self, source: io::Error) -> SealError {
        SealError::Read { name: self.name.clone(), source }
    }
}
