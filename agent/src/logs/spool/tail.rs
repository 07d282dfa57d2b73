//! The directory beside a log file that holds the end of the log (edge: files).
//!
//! `plan` says where the head ends. Each segment is named after where it begins, so that the gap is known
//! from the names alone. `gap` fixes the gap when the segments are about to be appended, because their
//! names are gone afterwards. Both files appear by a rename, complete.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

const PLAN: &str = "plan";
const GAP: &str = "gap";
const MODE: u32 = 0o700;

/// The directory of one log.
pub(super) struct TailDir(PathBuf);

/// Written before the first segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// The cap, for the marker.
    pub(super) cap: u64,
    /// Bytes in the head.
    pub(super) head_bytes: u64,
    /// Newlines in the head.
    pub(super) head_lines: u64,
}

/// What was dropped between head and tail.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) bytes: u64,
    pub(super) lines: u64,
}

/// A piece of the tail.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Segment {
    /// Bytes of the log before it.
    pub(super) start: u64,
    /// Newlines of the log before it.
    pub(super) lines: u64,
    pub(super) path: PathBuf,
}

impl TailDir {
    pub(super) fn of(log: &Path) -> Self {
        let mut name = OsString::from(log);
        name.push(".tail");
        Self(name.into())
    }

    pub(super) fn create(&self, plan: Plan) -> io::Result<()> {
        fs::DirBuilder::new().mode(MODE).create(&self.0)?;
        self.publish(PLAN, [plan.cap, plan.head_bytes, plan.head_lines])
    }

    pub(super) fn exists(&self) -> io::Result<bool> {
        self.0.try_exists()
    }

    /// None if the process died before it had a segment.
    pub(super) fn plan(&self) -> io::Result<Option<Plan>> {
        let numbers = self.numbers(PLAN)?;
        Ok(numbers.map(|[cap, head_bytes, head_lines]| Plan { cap, head_bytes, head_lines }))
    }

    pub(super) fn segment(&self, start: u64, lines: u64) -> PathBuf {
        self.0.join(format!("{start}.{lines}"))
    }

    /// The segments, oldest first.
    pub(super) fn segments(&self) -> io::Result<Vec<Segment>> {
        let mut segments = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            let position = entry.file_name().to_str().and_then(parse_name);
            segments.extend(position.map(|(start, lines)| Segment { start, lines, path: entry.path() }));
        }
        segments.sort_unstable();
        Ok(segments)
    }

    /// The gap, once it is fixed.
    pub(super) fn gap(&self) -> io::Result<Option<Gap>> {
        Ok(self.numbers(GAP)?.map(|[bytes, lines]| Gap { bytes, lines }))
    }

    pub(super) fn fix_gap(&self, gap: Gap) -> io::Result<()> {
        self.publish(GAP, [gap.bytes, gap.lines])
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn publish<const N: usize>(&self, name: &str, numbers: [u64; N]) -> io::Result<()> {
        let temporary = self.0.join(format!("{name}.tmp"));
        fs::write(&temporary, numbers.map(|number| number.to_string()).join(" "))?;
        fs::rename(temporary, self.0.join(name))
    }

    fn numbers<const N: usize>(&self, name: &str) -> io::Result<Option<[u64; N]>> {
        let text = match fs::read_to_string(self.0.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let numbers: Result<Vec<u64>, _> = text.split(' ').map(str::parse).collect();
        let numbers = numbers.ok().and_then(|numbers| numbers.try_into().ok());
        numbers
            .map(Some)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("`{name}` is damaged")))
    }
}

fn parse_name(name: &str) -> Option<(u64, u64)> {
    let (start, lines) = name.split_once('.')?;
    Some((start.parse().ok()?, lines.parse().ok()?))
}
