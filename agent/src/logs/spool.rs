//! Keeps a build's log on disk within a cap, whatever the build prints (edge: files).
//!
//! The first bytes go to the file itself. What comes after them goes to a ring of small segment files in a
//! directory beside it, of which the oldest is deleted for every new one. At the end the segments are
//! appended to the file, each deleted as soon as it is appended, so that the disk never holds more than the
//! cap and one segment. Every byte is handed to the kernel before [`Spool::write`] returns and every step of
//! the end can be repeated, so that [`recover`] gets everything out of what a killed process left.

mod join;
mod loss;
mod recent;
mod tail;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use kiln_protocol::Digest;
use kiln_protocol::result::LogSummary;
use sha2::{Digest as _, Sha256};

use recent::Recent;
use tail::{Plan, TailDir};

pub use join::{Recovered, recover, remove};

/// Enough for any log that a person reads, and little beside the images of the build.
pub const DEFAULT_CAP: u64 = 64 << 20;

/// The log holds build output, which belongs to whoever may read the build.
const MODE: u32 = 0o600;

/// Segments of the ring: more of them lose less at its start, fewer make fewer files.
const SEGMENTS: u64 = 16;

/// The longest segment; it bounds what the disk holds above the cap while the file is put together.
const LONGEST_SEGMENT: u64 = 1 << 20;

/// The shortest tail that can be divided sensibly.
const SHORTEST_TAIL: u64 = 1 << 10;

/// How much of a log is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes from the start.
    pub head_bytes: u64,
    /// Bytes up to the end, at least one KiB. The start of the tail may give up to a sixteenth of it.
    pub tail_bytes: u64,
}

impl Limits {
    /// Half of the cap for the start and half for the end.
    pub const fn with_cap(bytes: u64) -> Self {
        Self { head_bytes: bytes / 2, tail_bytes: bytes - bytes / 2 }
    }

    const fn cap(self) -> u64 {
        self.head_bytes + self.tail_bytes
    }

    fn segment(self) -> u64 {
        (self.tail_bytes / SEGMENTS).min(LONGEST_SEGMENT)
    }

    /// Segments that may exist at a time.
    fn segments(self) -> usize {
        usize::try_from(self.tail_bytes / self.segment()).unwrap_or(usize::MAX)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::with_cap(DEFAULT_CAP)
    }
}

/// The log cannot be kept, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file cannot be made; it must not exist yet.
    #[error("cannot create the log file {path}")]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The log is not kept from some byte on; the build goes on.
    #[error("cannot write to the log file {path}; the rest of the log is counted but not kept")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Start and end of the log lie apart; putting them together can be tried again.
    #[error("cannot append the end of the log to {path}; it stays beside the file until the next try")]
    Join {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What became of a log.
#[derive(Debug)]
#[must_use]
pub struct SpoolReport {
    /// The log in numbers.
    pub summary: LogSummary,
    /// Why a part of it is not in the file, other than by the cap.
    pub fault: Option<SpoolError>,
}

/// Where the next byte goes.
enum Sink {
    /// To the file, as long as there is room.
    Head(Section),
    /// To the newest segment.
    Tail(Section),
    /// Nowhere, because writing failed.
    Lost(SpoolError),
}

/// A file with room for some more bytes.
struct Section {
    file: File,
    size: u64,
    room: u64,
}

/// The log of one build.
pub struct Spool {
    path: PathBuf,
    limits: Limits,
    sink: Sink,
    /// Bytes and lines in the head, once it is full.
    head: (u64, u64),
    /// Where the segments that exist begin, oldest first; with the lines before them.
    segments: VecDeque<(u64, u64)>,
    hasher: Sha256,
    bytes: u64,
    /// Newlines.
    lines: u64,
    /// The last byte was not a newline.
    inside_line: bool,
    /// Bytes that came after writing had failed.
    lost: u64,
    recent: Recent,
}

impl Spool {
    /// A log in a new file, which must lie outside of everything that the build can reach.
    pub fn create(path: &Path, limits: Limits) -> Result<Self, SpoolError> {
        let limits = Limits { tail_bytes: limits.tail_bytes.max(SHORTEST_TAIL), ..limits };
        let file = create_new(path).map_err(|source| SpoolError::Create { path: path.to_owned(), source })?;
        Ok(Self {
            path: path.to_owned(),
            limits,
            sink: Sink::Head(Section { file, size: limits.head_bytes, room: limits.head_bytes }),
            head: (0, 0),
            segments: VecDeque::new(),
            hasher: Sha256::new(),
            bytes: 0,
            lines: 0,
            inside_line: false,
            lost: 0,
            recent: Recent::default(),
        })
    }

    /// Takes the next bytes. Never fails: what cannot be kept is counted.
    ///
    /// Each call is a system call or two, so the caller gathers what it has.
    pub fn write(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.recent.push(bytes);
        let mut rest = bytes;
        while !rest.is_empty() {
            let (kept, result) = self.store(rest);
            self.count(&rest[..kept]);
            rest = &rest[kept..];
            if let Err(source) = result {
                self.sink = Sink::Lost(SpoolError::Write { path: self.path.clone(), source });
            }
        }
    }

    /// Whether the bytes so far end within a line.
    pub fn inside_line(&self) -> bool {
        self.inside_line
    }

    /// The last lines for a failure message, of bounded length and safe to show.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        self.recent.lines(count)
    }

    /// Puts the file together.
    pub fn finish(self) -> SpoolReport {
        let gap = self.segments.front().map_or(0, |(start, _)| start.saturating_sub(self.head.0));
        let mut summary = LogSummary {
            lines: self.lines + u64::from(self.inside_line),
            bytes: self.bytes,
            dropped_bytes: gap + self.lost,
            sha256: Digest::from_sha256(self.hasher.finalize().into()),
        };
        let fault = match (self.sink, join::finish(&self.path)) {
            (Sink::Lost(fault), joined) => {
                if joined.is_ok() {
                    // If even that fails, the summary still tells the loss.
                    summary.dropped_bytes += loss::note(&self.path, self.lost, &fault).unwrap_or(0);
                }
                Some(fault)
            }
            (_, Err(source)) => Some(SpoolError::Join { path: self.path, source }),
            (_, Ok(_)) => None,
        };
        SpoolReport { summary, fault }
    }

    /// Writes as much of `bytes` as fits into the current file, or opens the next one.
    fn store(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let section = match &mut self.sink {
            Sink::Head(section) | Sink::Tail(section) => section,
            Sink::Lost(_) => {
                self.lost += length(bytes);
                return (bytes.len(), Ok(()));
            }
        };
        let fitting = section.fitting(bytes, self.inside_line);
        if fitting == 0 {
            return (0, self.open_segment());
        }
        let (written, result) = write_counted(&mut section.file, &bytes[..fitting]);
        section.room -= length(&bytes[..written]);
        (written, result)
    }

    fn open_segment(&mut self) -> io::Result<()> {
        let tail = TailDir::of(&self.path);
        if matches!(self.sink, Sink::Head(_)) {
            self.head = (self.bytes, self.lines);
            let (head_bytes, head_lines) = self.head;
            tail.create(Plan { cap: self.limits.cap(), head_bytes, head_lines })?;
        }
        // Deleted first, so that the disk holds no more than the cap.
        if self.segments.len() >= self.limits.segments()
            && let Some((start, lines)) = self.segments.pop_front()
        {
            std::fs::remove_file(tail.segment(start, lines))?;
        }
        let file = create_new(&tail.segment(self.bytes, self.lines))?;
        self.segments.push_back((self.bytes, self.lines));
        let size = self.limits.segment();
        self.sink = Sink::Tail(Section { file, size, room: size });
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) {
        self.bytes += length(bytes);
        self.lines += bytes.iter().map(|byte| u64::from(*byte == b'\n')).sum::<u64>();
        if let Some(last) = bytes.last() {
            self.inside_line = *last != b'\n';
        }
    }
}

impl Section {
    /// How many bytes of `bytes` go into this file: all, or the lines that fit, or 0 if the next line
    /// belongs to the next file. Only a line longer than a whole file is cut.
    fn fitting(&self, bytes: &[u8], inside_line: bool) -> usize {
        let room = usize::try_from(self.room).unwrap_or(usize::MAX);
        if bytes.len() <= room {
            return bytes.len();
        }
        match bytes[..room].iter().rposition(|byte| *byte == b'\n') {
            Some(newline) => newline + 1,
            None if self.room == self.size || inside_line => room,
            None => 0,
        }
    }
}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)
}

/// `write_all` that tells how far it got.
fn write_counted(file: &mut File, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

/// Lengths in memory fit into 64 bits.
fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
