//! The last lines of a log, kept in memory for the message about a failure (pure).

use crate::logs::display::{Colours, sanitize_bytes};

/// Many screens of text; a failure message shows a fraction of one.
const KEPT: usize = 64 << 10;

/// The last [`KEPT`] bytes of a log, at least.
#[derive(Default)]
pub(super) struct Recent {
    /// Up to twice of what is kept, so that most bytes are moved once only.
    buffer: Vec<u8>,
    /// The buffer does not begin where the log begins.
    cut: bool,
}

impl Recent {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let new = &bytes[bytes.len().saturating_sub(KEPT)..];
        if self.buffer.len() + new.len() > 2 * KEPT {
            let kept = KEPT - new.len();
            self.buffer.drain(..self.buffer.len() - kept);
            self.cut = true;
        }
        self.cut |= new.len() < bytes.len();
        self.buffer.extend_from_slice(new);
    }

    /// Up to `count` lines, oldest first. A line of which the start is gone is told only if it is the last.
    pub(super) fn lines(&self, count: usize) -> Vec<String> {
        let text = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
        if text.is_empty() && self.buffer.is_empty() {
            return Vec::new();
        }
        let mut lines: Vec<&[u8]> = text.rsplit(|byte| *byte == b'\n').take(count).collect();
        let reaches_start = lines.iter().map(|line| line.len() + 1).sum::<usize>() > text.len();
        if self.cut && reaches_start && lines.len() > 1 {
            lines.pop();
        }
        lines.iter().rev().map(|line| sanitize_bytes(line, Colours::Strip)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recent(chunks: &[&[u8]]) -> Recent {
        let mut recent = Recent::default();
        for chunk in chunks {
            recent.push(chunk);
        }
        recent
    }

    #[test]
    fn the_last_lines_in_order_and_inert() {
        assert!(recent(&[]).lines(3).is_empty());
        assert_eq!(recent(&[b"\n"]).lines(3), [""]);
        assert_eq!(recent(&[b"a\nb\n", b"c\x1b[2J\nd"]).lines(3), ["b", "c", "d"]);
        assert_eq!(recent(&[b"a\nb\n"]).lines(9), ["a", "b"]);
        assert!(recent(&[b"a\nb\n"]).lines(0).is_empty());
    }

    #[test]
    fn memory_is_bounded_and_cut_lines_are_left_out() {
        let mut recent = Recent::default();
        for i in 0..100_000 {
            recent.push(format!("line {i}\n").as_bytes());
            assert!(recent.buffer.len() <= 2 * KEPT);
        }
        let lines = recent.lines(usize::MAX);
        assert!(lines.len() > 5_000);
        assert!(lines.iter().all(|line| line.starts_with("line ")), "no line without its start");
        assert_eq!(lines.last().unwrap(), "line 99999");
        recent.push(&vec![b'x'; 3 * KEPT]);
        assert_eq!(recent.lines(5), ["x".repeat(KEPT)]);
    }
}
