//! Cuts a stream of bytes into lines of bounded length (pure).
//!
//! Only a newline ends a line. A carriage return does not: a progress bar is one line that rewrites itself,
//! and what a person sees of it is decided where it is shown ([`super::display::sanitize`]: the last state
//! wins), while the spool keeps every byte. A bar that never ends its line is shown by the flush after a
//! quiet time, and at the latest when it reaches the cap.

use std::io::BufRead as _;

/// The longest piece of a line, and the most that is kept in memory.
pub const LINE_CAP: usize = 64 << 10;

/// Which part of its line a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The whole line.
    Whole,
    /// The start of a line; the rest is longer than the cap, came after a quiet time, or never came.
    First,
    /// Neither its start nor its end.
    Middle,
    /// Its end, up to the newline.
    Last,
}

impl Part {
    /// A newline followed.
    pub const fn ends_line(self) -> bool {
        matches!(self, Self::Whole | Self::Last)
    }

    /// It continues what was delivered before.
    pub const fn continues(self) -> bool {
        matches!(self, Self::Middle | Self::Last)
    }

    const fn new(continues: bool, ends: bool) -> Self {
        match (continues, ends) {
            (false, true) => Self::Whole,
            (false, false) => Self::First,
            (true, false) => Self::Middle,
            (true, true) => Self::Last,
        }
    }
}

/// A line, or a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The bytes without the newline, at most [`LINE_CAP`].
    pub bytes: &'a [u8],
    /// What of its line it is.
    pub part: Part,
}

/// Cuts one stream into lines.
#[derive(Debug, Default)]
pub struct Framer {
    /// What has come of the line and was not delivered; never more than [`LINE_CAP`].
    partial: Vec<u8>,
    /// A piece of the line has been delivered.
    inside: bool,
}

impl Framer {
    /// Takes the next bytes and delivers every line that is complete, or longer than the cap.
    pub fn push(&mut self, bytes: &[u8], mut deliver: impl FnMut(Piece<'_>)) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (line, after) = rest.split_at(line_length(rest));
            if let Some(text) = line.strip_suffix(b"\n") {
                self.end_line(text, &mut deliver);
            } else {
                let kept = self.cut(line, &mut deliver);
                self.partial.extend_from_slice(kept);
            }
            rest = after;
        }
    }

    /// Bytes of a line that has not ended; the caller flushes them after a quiet time, so that a prompt or
    /// a progress bar is seen.
    pub fn pending(&self) -> usize {
        self.partial.len()
    }

    /// Delivers what there is of a line that has not ended, except for the bytes of an incomplete character.
    pub fn flush(&mut self, mut deliver: impl FnMut(Piece<'_>)) {
        let end = whole_characters(&self.partial);
        if end > 0 {
            deliver(Piece { bytes: &self.partial[..end], part: Part::new(self.inside, false) });
            self.inside = true;
            self.partial.drain(..end);
        }
    }

    /// Delivers the last line if no newline ended it.
    pub fn finish(self, mut deliver: impl FnMut(Piece<'_>)) {
        if !self.partial.is_empty() {
            deliver(Piece { bytes: &self.partial, part: Part::new(self.inside, false) });
        }
    }

    fn end_line(&mut self, text: &[u8], deliver: &mut impl FnMut(Piece<'_>)) {
        let rest = self.cut(text, deliver);
        let part = Part::new(self.inside, true);
        if self.partial.is_empty() {
            deliver(Piece { bytes: rest, part });
        } else {
            self.partial.extend_from_slice(rest);
            deliver(Piece { bytes: &self.partial, part });
            self.partial.clear();
        }
        self.inside = false;
    }

    /// Delivers pieces of the length of the cap until what is pending fits; returns what is not in
    /// `partial` of it. Where the cuts are depends on the line alone.
    fn cut<'a>(&mut self, mut text: &'a [u8], deliver: &mut impl FnMut(Piece<'_>)) -> &'a [u8] {
        while self.partial.len() + text.len() > LINE_CAP {
            let (fill, rest) = text.split_at(LINE_CAP - self.partial.len());
            text = rest;
            self.partial.extend_from_slice(fill);
            self.flush(&mut *deliver);
        }
        text
    }
}

/// Bytes up to and including the first newline, or all. (The one fast search for a byte that the standard
/// library offers; reading from a slice cannot fail.)
fn line_length(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    rest.skip_until(b'\n').unwrap_or(bytes.len())
}

/// Where to cut so that a character that is incomplete so far stays whole.
fn whole_characters(bytes: &[u8]) -> usize {
    for (back, &byte) in (1..=3).zip(bytes.iter().rev()) {
        let length = match byte {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 1,
        };
        return if length > back { bytes.len() - back } else { bytes.len() };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Owned = (Vec<u8>, Part);

    fn frames(text: &[u8], chunks: &[usize]) -> Vec<Owned> {
        let mut framer = Framer::default();
        let mut pieces = Vec::new();
        let mut keep = |piece: Piece<'_>| pieces.push((piece.bytes.to_vec(), piece.part));
        let mut rest = text;
        for &length in chunks.iter().cycle() {
            let (chunk, left) = rest.split_at(length.min(rest.len()));
            framer.push(chunk, &mut keep);
            assert!(framer.pending() <= LINE_CAP);
            rest = left;
            if rest.is_empty() {
                break;
            }
        }
        framer.finish(keep);
        pieces
    }

    fn joined(pieces: &[Owned]) -> Vec<u8> {
        let lines = pieces.iter().map(|(bytes, part)| (bytes.clone(), part.ends_line()));
        lines.flat_map(|(bytes, ends)| if ends { [bytes, b"\n".to_vec()].concat() } else { bytes }).collect()
    }

    #[test]
    fn lines_end_at_newlines_only() {
        let whole = |text: &str| (text.as_bytes().to_vec(), Part::Whole);
        assert_eq!(
            frames(b"a\n\nb\r\n5%\r6%\r\n", &[3]),
            [whole("a"), whole(""), whole("b\r"), whole("5%\r6%\r")]
        );
        assert_eq!(frames(b"a\nrest", &[1]), [whole("a"), (b"rest".to_vec(), Part::First)]);
        assert_eq!(frames(b"", &[1]), []);
    }

    #[test]
    fn a_long_line_is_cut_and_marked() {
        let text = [vec![b'x'; LINE_CAP * 2 + 1], b"\ny\n".to_vec()].concat();
        for chunk in [1_000, LINE_CAP, LINE_CAP + 1, text.len()] {
            let pieces = frames(&text, &[chunk]);
            let shape: Vec<_> = pieces.iter().map(|(bytes, part)| (bytes.len(), *part)).collect();
            let expected =
                [(LINE_CAP, Part::First), (LINE_CAP, Part::Middle), (1, Part::Last), (1, Part::Whole)];
            assert_eq!(shape, expected, "in chunks of {chunk}");
        }
        let exact = [vec![b'x'; LINE_CAP], b"\n".to_vec()].concat();
        assert_eq!(frames(&exact, &[1_000]).len(), 1, "the cap itself is not too long");
    }

    #[test]
    fn a_cut_keeps_characters_whole() {
        for (character, lead) in [("ä", 1), ("€", 1), ("€", 2), ("🔑", 1), ("🔑", 2), ("🔑", 3)] {
            let text = format!("{}{character}{}", "x".repeat(LINE_CAP - lead), "y".repeat(9));
            let pieces = frames(text.as_bytes(), &[4_096]);
            assert_eq!(pieces[0].0.len(), LINE_CAP - lead);
            assert!(String::from_utf8_lossy(&pieces[1].0).starts_with(character));
        }
        let garbage = vec![0xbf; LINE_CAP + 1];
        assert_eq!(frames(&garbage, &[4_096])[0].0.len(), LINE_CAP);
    }

    #[test]
    fn a_quiet_time_delivers_what_there_is_once() {
        let mut framer = Framer::default();
        let mut pieces = Vec::new();
        let mut keep = |piece: Piece<'_>| pieces.push((piece.bytes.to_vec(), piece.part));
        framer.push("Password: \u{20ac}".as_bytes().split_last().unwrap().1, &mut keep);
        assert_eq!(framer.pending(), 12);
        framer.flush(&mut keep);
        framer.flush(&mut keep);
        framer.push(b"\xac\nnext\n", &mut keep);
        framer.flush(&mut keep);
        let expected = [("Password: ", Part::First), ("\u{20ac}", Part::Last), ("next", Part::Whole)];
        assert_eq!(pieces, expected.map(|(text, part)| (text.as_bytes().to_vec(), part)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_byte_is_lost_and_splits_do_not_show(
            text in prop::collection::vec(prop::sample::select(b"ab\n\r\xe2\x82\xac\xff".to_vec()), 0..60),
            chunks in prop::collection::vec(1..9_usize, 1..5),
        ) {
            let pieces = frames(&text, &chunks);
            prop_assert_eq!(joined(&pieces), text.clone());
            prop_assert_eq!(pieces, frames(&text, &[usize::MAX]));
        }
    }
}
