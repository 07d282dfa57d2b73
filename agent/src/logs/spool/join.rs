//! Puts head and tail of a log together, as often as it takes (edge: files).
//!
//! Every step finds out from the disk how far an earlier try came: the length of the file tells how many
//! bytes of the segments it holds already.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::SpoolError;
use super::tail::{Gap, Plan, Segment, TailDir};

/// What was found of a log whose writer died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// Bytes in the file, markers included.
    pub bytes: u64,
    /// Bytes dropped from the middle because the log had passed its cap.
    pub dropped_bytes: u64,
}

/// Puts together what a killed process left; afterwards the file holds head, marker and tail. Does no harm
/// to a file that is complete. Nobody may be writing the log.
pub fn recover(path: &Path) -> Result<Recovered, SpoolError> {
    let recovered = finish(path).and_then(|gap| {
        let bytes = fs::metadata(path)?.len();
        Ok(Recovered { bytes, dropped_bytes: gap.bytes })
    });
    recovered.map_err(|source| SpoolError::Join { path: path.to_owned(), source })
}

/// Deletes a log with everything that belongs to it; it need not exist.
pub fn remove(path: &Path) -> io::Result<()> {
    TailDir::of(path).remove()?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(super) fn finish(path: &Path) -> io::Result<Gap> {
    finish_with(path, &mut || Ok(()))
}

/// `checkpoint` is called between any two steps; tests end the process there, so to speak.
pub(super) fn finish_with(path: &Path, checkpoint: &mut dyn FnMut() -> io::Result<()>) -> io::Result<Gap> {
    let tail = TailDir::of(path);
    if !tail.exists()? {
        return Ok(Gap::default());
    }
    let Some(plan) = tail.plan()? else {
        tail.remove()?;
        return Ok(Gap::default());
    };
    let segments = tail.segments()?;
    let gap = match tail.gap()? {
        Some(gap) => gap,
        None => plan.gap(segments.first()),
    };
    tail.fix_gap(gap)?;
    checkpoint()?;
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut end = plan.put_marker(&mut file, gap)?;
    checkpoint()?;
    for segment in segments {
        end = append(&mut file, end, &segment)?;
        checkpoint()?;
        fs::remove_file(&segment.path)?;
        checkpoint()?;
    }
    tail.remove()?;
    Ok(gap)
}

impl Plan {
    fn gap(self, oldest: Option<&Segment>) -> Gap {
        oldest.map_or_else(Gap::default, |segment| Gap {
            bytes: segment.start.saturating_sub(self.head_bytes),
            lines: segment.lines.saturating_sub(self.head_lines),
        })
    }

    /// Makes sure that the marker stands after the head, if something was dropped. Leaves the file at its
    /// end and returns the place of this end in the log.
    fn put_marker(self, file: &mut File, gap: Gap) -> io::Result<u64> {
        let marker = self.marker(file, gap)?;
        let body = self.head_bytes + super::length(marker.as_bytes());
        if file.metadata()?.len() < body {
            file.set_len(self.head_bytes)?;
            file.seek(SeekFrom::End(0))?;
            file.write_all(marker.as_bytes())?;
        }
        let length = file.seek(SeekFrom::End(0))?;
        Ok(self.head_bytes + gap.bytes + length.saturating_sub(body))
    }

    fn marker(self, file: &File, gap: Gap) -> io::Result<String> {
        let Gap { bytes, lines } = gap;
        if bytes == 0 {
            return Ok(String::new());
        }
        let mut last = [b'\n'];
        if let Some(at) = self.head_bytes.checked_sub(1) {
            // Short only if the head lost its end with the power; nothing to keep apart then.
            file.read_at(&mut last, at)?;
        }
        let own_line = if last == [b'\n'] { "" } else { "\n" };
        let cap = self.cap;
        Ok(format!(
            "{own_line}[kiln: {bytes} bytes ({lines} lines) dropped here; the cap is {cap} bytes, key logs.max_bytes]\n"
        ))
    }
}

/// Appends what the file, which ends at `end` of the log, has not got of a segment.
fn append(file: &mut File, end: u64, segment: &Segment) -> io::Result<u64> {
    let mut source = File::open(&segment.path)?;
    let length = source.metadata()?.len();
    let known = end.saturating_sub(segment.start).min(length);
    source.seek(SeekFrom::Start(known))?;
    io::copy(&mut source, file)?;
    Ok(end.max(segment.start + length))
}
