//! Says at the end of a log file that writing failed (edge: files).

use std::error::Error as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::{SpoolError, length};

/// Writes the note; returns the bytes of the log that it took the place of.
pub(super) fn note(path: &Path, lost: u64, fault: &SpoolError) -> io::Result<u64> {
    let cause = fault.source().map(ToString::to_string).unwrap_or_default();
    let file = OpenOptions::new().write(true).open(path)?;
    let end = file.metadata()?.len();
    if file.write_all_at(text(lost, &cause).as_bytes(), end).is_ok() {
        return Ok(0);
    }
    overwrite_end(&file, end, lost, &cause)
}

/// A full disk still takes bytes in the place of others.
fn overwrite_end(file: &File, end: u64, lost: u64, cause: &str) -> io::Result<u64> {
    // One more, because the number may get one more digit.
    let overwritten = length(text(lost, cause).as_bytes()) + 1;
    let place = end.checked_sub(overwritten).ok_or(io::ErrorKind::StorageFull)?;
    let text = text(lost + overwritten, cause);
    file.write_all_at(text.as_bytes(), place)?;
    file.set_len(place + length(text.as_bytes()))?;
    Ok(overwritten)
}

fn text(lost: u64, cause: &str) -> String {
    format!("\n[kiln: {lost} bytes dropped from here on, because the log could not be written: {cause}]\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_makes_room_for_the_note_on_a_full_disk() {
        for lost in [1, 850, 99_999] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log");
            let log = "0123456789".repeat(100);
            std::fs::write(&path, &log).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            let overwritten = overwrite_end(&file, 1_000, lost, "full").unwrap();
            let found = std::fs::read_to_string(&path).unwrap();
            let (kept, note) = found.split_once('\n').unwrap();
            assert!(log.starts_with(kept) && found.len() <= 1_000);
            assert_eq!(length(kept.as_bytes()) + overwritten, 1_000);
            assert!(
                note.starts_with(&format!("[kiln: {} bytes dropped", lost + overwritten))
                    && note.ends_with("]\n")
            );
        }
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("log")).unwrap();
        assert!(overwrite_end(&file, 20, 5, "full").is_err(), "nothing to overwrite");
    }
}
