//! What a line of a build's log looks like to a person (pure).
//!
//! The spool keeps what the build printed; a terminal or a page must not obey it. Every place that shows a
//! line shows the result of [`sanitize`].

use std::borrow::Cow;

/// What happens to colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colours {
    /// They go, like all control sequences.
    Strip,
    /// They stay, and are reset at the end of the line. Everything else goes.
    Keep,
}

/// What ends the colours of a line.
const RESET: &str = "\u{1b}[0m";

/// Real colour sequences are shorter; a longer one is not passed on to a terminal.
const LONGEST_COLOUR: usize = 64;

/// The line as a terminal would show it at last, without anything that a terminal obeys.
///
/// Of text separated by carriage returns the last one wins, as on a terminal. Control sequences go, with the
/// payload of the complete ones (titles, links, images); a tab stays; a newline becomes a space; other
/// controls go; marks that reorder or break the rest of the line become the replacement character.
pub fn sanitize(line: &str, colours: Colours) -> Cow<'_, str> {
    let line = line.trim_end_matches('\r');
    let line = line.rfind('\r').map_or(line, |at| &line[at + 1..]);
    if line.bytes().any(is_suspicious) { Cow::Owned(clean(line, colours)) } else { Cow::Borrowed(line) }
}

/// [`sanitize`] for bytes; what is not UTF-8 becomes the replacement character.
pub fn sanitize_bytes(line: &[u8], colours: Colours) -> String {
    sanitize(&String::from_utf8_lossy(line), colours).into_owned()
}

/// A control character, or the first byte of one (C1 controls, and marks for direction and line breaks).
fn is_suspicious(byte: u8) -> bool {
    (byte < b' ' && byte != b'\t') || matches!(byte, 0x7f | 0xc2 | 0xe2)
}

fn clean(line: &str, colours: Colours) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    let mut coloured = false;
    while let Some(c) = rest.chars().next() {
        let length = match escape(rest) {
            Some(Escape::Colour(length)) if colours == Colours::Keep => {
                out.push_str(&rest[..length]);
                coloured = true;
                length
            }
            Some(Escape::Colour(length) | Escape::Other(length)) => length,
            None => {
                out.extend(inert(c));
                c.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    if coloured {
        out.push_str(RESET);
    }
    out
}

/// What stands for a character outside of a control sequence.
fn inert(c: char) -> Option<char> {
    match c {
        '\t' => Some(c),
        '\n' => Some(' '),
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            Some(char::REPLACEMENT_CHARACTER)
        }
        _ => (!c.is_control()).then_some(c),
    }
}

/// A control sequence at the start of a text, with its length.
enum Escape {
    Colour(usize),
    Other(usize),
}

fn escape(text: &str) -> Option<Escape> {
    let body = text.strip_prefix('\u{1b}')?;
    let other = match body.bytes().next() {
        Some(b'[') => return Some(control_sequence(body)),
        Some(b']' | b'P' | b'X' | b'^' | b'_') => string_sequence(body),
        _ => short_sequence(body),
    };
    Some(Escape::Other(1 + other))
}

/// `[`, parameters, intermediates, one final byte. Of an incomplete one only the introducer goes, so that
/// no text disappears.
fn control_sequence(body: &str) -> Escape {
    let parameters = run(&body[1..], |byte| matches!(byte, 0x30..=0x3f));
    let intermediates = run(&body[1 + parameters..], |byte| matches!(byte, 0x20..=0x2f));
    let end = 1 + parameters + intermediates;
    let plain = body[1..=parameters].bytes().all(|byte| matches!(byte, b'0'..=b'9' | b';' | b':'));
    match body.as_bytes().get(end) {
        Some(b'm') if intermediates == 0 && plain && parameters <= LONGEST_COLOUR => Escape::Colour(end + 2),
        Some(0x40..=0x7e) => Escape::Other(end + 2),
        _ => Escape::Other(2),
    }
}

/// A string up to BEL or ESC `\`. Only to the next escape is searched, which keeps hostile lines linear.
fn string_sequence(body: &str) -> usize {
    let Some(end) = body.find(['\u{7}', '\u{1b}']) else { return 1 };
    let tail = &body[end..];
    if tail.starts_with('\u{7}') {
        end + 1
    } else if tail.starts_with("\u{1b}\\") {
        end + 2
    } else {
        1
    }
}

/// Intermediates and one final byte.
fn short_sequence(body: &str) -> usize {
    let intermediates = run(body, |byte| matches!(byte, 0x20..=0x2f));
    let complete = matches!(body.as_bytes().get(intermediates), Some(0x30..=0x7e));
    if complete { intermediates + 1 } else { 0 }
}

fn run(text: &str, matches: impl Fn(u8) -> bool) -> usize {
    text.bytes().take_while(|byte| matches(*byte)).count()
}

/// The line with which buildah begins an instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step<'a> {
    /// The stage and the number of stages, if there is more than one.
    pub stage: Option<(u32, u32)>,
    /// The instruction within its stage, from 1.
    pub number: u32,
    /// Instructions of the stage.
    pub total: u32,
    /// The instruction, with continuation lines joined.
    pub text: &'a str,
}

/// Reads `STEP 2/5: RUN …` and `[1/2] STEP 2/5: RUN …`.
///
/// For display only: buildah prints these lines where it prints the output of RUN, and a RUN can print
/// them too. Nothing may be decided by them.
pub fn parse_step(line: &str) -> Option<Step<'_>> {
    let (stage, rest) = match line.strip_prefix('[') {
        Some(inside) => {
            let (stage, rest) = inside.split_once("] ")?;
            (Some(fraction(stage)?), rest)
        }
        None => (None, line),
    };
    let (position, text) = rest.strip_prefix("STEP ")?.split_once(": ")?;
    let (number, total) = fraction(position)?;
    Some(Step { stage, number, total, text: text.trim_end() })
}

impl Step<'_> {
    /// Whether it begins a stage.
    pub fn is_from(&self) -> bool {
        self.text.split_whitespace().next().is_some_and(|word| word.eq_ignore_ascii_case("from"))
    }
}

/// Reads `--> Using cache ID`. For display only, as [`parse_step`].
pub fn is_cache_hit(line: &str) -> bool {
    /// Characters of an image id.
    const ID_CHARS: usize = 64;
    let id = line.trim_end().strip_prefix("--> Using cache ");
    id.is_some_and(|id| id.len() == ID_CHARS && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// `n/m` with 1 ≤ n ≤ m.
fn fraction(text: &str) -> Option<(u32, u32)> {
    let (number, total) = text.split_once('/')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
    let (number, total) = (digits(number)?, digits(total)?);
    (1 <= number && number <= total).then_some((number, total))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn cached_steps_are_recognised() {
        let id = "0a".repeat(32);
        assert!(is_cache_hit(&format!("--> Using cache {id}")));
        for line in [format!("--> Using cache {id}0"), format!("x --> Using cache {id}"), format!("--> {id}")]
        {
            assert!(!is_cache_hit(&line), "{line}");
        }
        assert!(parse_step("STEP 1/2: from x AS y").unwrap().is_from());
        assert!(!parse_step("STEP 2/2: RUN from").unwrap().is_from());
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        let table = [
            (
                "plain \u{e4}\u{20ac}\t\u{1f511}",
                "plain \u{e4}\u{20ac}\t\u{1f511}",
                "plain \u{e4}\u{20ac}\t\u{1f511}",
            ),
            ("\u{1b}[1;31mred\u{1b}[0m", "red", "\u{1b}[1;31mred\u{1b}[0m\u{1b}[0m"),
            ("\u{1b}[38:2::1:2:3mx", "x", "\u{1b}[38:2::1:2:3mx\u{1b}[0m"),
            ("\u{1b}[2J\u{1b}[1;1Htop\u{1b}[?25l", "top", "top"),
            ("\u{1b}[>4;2m\u{1b}[ mx", "x", "x"),
            ("\u{1b}]0;title\u{7}after", "after", "after"),
            ("\u{1b}]8;;javascript:alert(1)\u{1b}\\text\u{1b}]8;;\u{1b}\\", "text", "text"),
            ("\u{1b}Pq#0\u{1b}\\a\u{1b}_Gi=1;\u{1b}\\b\u{1b}^c\u{1b}\\", "ab", "ab"),
            ("\u{1b}]0;never ends", "0;never ends", "0;never ends"),
            ("\u{1b}]0;one\u{1b}[31mtwo", "0;onetwo", "0;one\u{1b}[31mtwo\u{1b}[0m"),
            ("\u{1b}[12;", "12;", "12;"),
            ("\u{1b}[12\u{e4}", "12\u{e4}", "12\u{e4}"),
            ("\u{1b}(B\u{1b}c\u{1b}=\u{1b}", "", ""),
            ("a\u{7}b\u{8}c\u{0}d\u{7f}e\u{9b}31mf\u{85}g", "abcde31mfg", "abcde31mfg"),
            ("a\u{202e}b\u{2066}c\u{2028}d", "a\u{fffd}b\u{fffd}c\u{fffd}d", "a\u{fffd}b\u{fffd}c\u{fffd}d"),
            ("two\nlines", "two lines", "two lines"),
            ("50%\r60%\r", "60%", "60%"),
            ("windows\r\r", "windows", "windows"),
            ("\r", "", ""),
            ("<script>", "<script>", "<script>"),
        ];
        for (line, stripped, coloured) in table {
            assert_eq!(sanitize(line, Colours::Strip), stripped, "{line:?}");
            assert_eq!(sanitize(line, Colours::Keep), coloured, "{line:?}");
        }
        assert_eq!(sanitize_bytes(b"a\xffb\x1b[1m", Colours::Strip), "a\u{fffd}b");
        let long = format!("\u{1b}[{}mx", "1;".repeat(LONGEST_COLOUR));
        assert_eq!(sanitize(&long, Colours::Keep), "x");
    }

    #[test]
    fn an_ordinary_line_is_not_copied() {
        assert!(matches!(sanitize("ordinary\tline\r", Colours::Strip), Cow::Borrowed("ordinary\tline")));
    }

    /// Escape characters that are not the start of a colour.
    fn commands(text: &str) -> usize {
        let colour = |part: &str| {
            let end = part.find(|c: char| !matches!(c, '0'..='9' | ';' | ':' | '['));
            part.starts_with('[') && end.is_some_and(|end| part[end..].starts_with('m'))
        };
        text.split('\u{1b}').skip(1).filter(|part| !colour(part)).count()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 5_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_control_survives(pieces in prop::collection::vec(prop::sample::select(vec![
            "\u{1b}", "[", "]", "P", "31", ";", "m", "H", "\u{7}", "\\", "a", "\u{9b}", "\u{202e}", "?", " ", "\r", "\n", "ä",
        ]), 0..24)) {
            let line = pieces.concat();
            let stripped = sanitize(&line, Colours::Strip);
            prop_assert!(!stripped.chars().any(char::is_control), "{:?}", stripped);
            let coloured = sanitize(&line, Colours::Keep);
            prop_assert!(!coloured.chars().any(|c| c.is_control() && c != '\u{1b}'), "{:?}", coloured);
            prop_assert_eq!(commands(&coloured), 0, "{:?}", coloured);
            prop_assert_eq!(sanitize(&coloured, Colours::Strip), stripped);
        }
    }

    #[test]
    fn steps_are_read_as_buildah_prints_them() {
        let step = |stage, number, total, text| Some(Step { stage, number, total, text });
        let table = [
            ("STEP 2/5: RUN make  \\", step(None, 2, 5, "RUN make  \\")),
            ("[1/2] STEP 2/2: COPY f /f", step(Some((1, 2)), 2, 2, "COPY f /f")),
            ("STEP 1/1: FROM a: b\r", step(None, 1, 1, "FROM a: b")),
            ("STEP 3/2: RUN x", None),
            ("STEP 0/2: RUN x", None),
            ("STEP +1/2: RUN x", None),
            ("STEP 1/99999999999: RUN x", None),
            ("STEP 1: FROM x", None),
            ("STEP 1/2:RUN x", None),
            ("[1/2 STEP 2/2: COPY f /f", None),
            ("[x] STEP 2/2: COPY f /f", None),
            (" STEP 1/2: RUN x", None),
            ("COMMIT", None),
            ("", None),
        ];
        for (line, expected) in table {
            assert_eq!(parse_step(line), expected, "{line}");
        }
    }
}
