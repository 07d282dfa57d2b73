//! The forms in which a secret value may be printed (pure).
//!
//! Only forms that a tool makes without being told how: the value, its lines, and what JSON, Go's `%q`,
//! URLs and base64 make of it. A build step that reverses or encrypts a secret before it prints it means
//! to leak it, which masking cannot stop.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};

use super::MIN_SECRET_BYTES;

/// Where tools break base64 text: coreutils, and PEM.
const BASE64_COLUMNS: [usize; 2] = [76, 64];

/// What URLs never escape.
const UNRESERVED: &[u8] = b"-_.~";

/// What JavaScript's `encodeURIComponent` leaves besides letters and digits.
const UNRESERVED_IN_SCRIPTS: &[u8] = b"-_.~!*'()";

/// What may stand in a path segment or in user info (Go's `url.PathEscape`, and what people type).
const UNRESERVED_IN_PATHS: &[u8] = b"-_.~$&+=:@";

/// No server takes a longer URL; the forms for URLs are the longest ones.
const LONGEST_IN_URL: usize = 8 << 10;

/// All forms of a value, each at least [`MIN_SECRET_BYTES`] long; nothing for white space alone.
///
/// White space around the value is no part of a form: a form with it contains the form without it.
pub(super) fn of(bytes: &[u8]) -> Vec<Vec<u8>> {
    let value = bytes.trim_ascii();
    if value.is_empty() {
        return Vec::new();
    }
    let mut forms = vec![value.to_vec()];
    forms.extend(lines(value));
    forms.extend(json(value));
    forms.extend(go(value));
    forms.extend(url(value));
    forms.extend(base64(value));
    forms.extend(wrapped_base64(bytes));
    forms.retain(|form| form.len() >= MIN_SECRET_BYTES);
    forms.sort_unstable();
    forms.dedup();
    forms
}

fn lines(value: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    value.split(|byte| matches!(byte, b'\n' | b'\r')).map(|line| line.trim_ascii().to_vec())
}

/// Inside of a JSON string: as most encoders write it, as Go does (safe in HTML), and in ASCII as Python does.
fn json(value: &[u8]) -> Vec<Vec<u8>> {
    let Ok(text) = str::from_utf8(value) else { return Vec::new() };
    let plain: fn(char) -> bool = |_| false;
    let html: fn(char) -> bool = |c| matches!(c, '<' | '>' | '&' | '\u{2028}' | '\u{2029}');
    let ascii: fn(char) -> bool = |c| c >= '\u{7f}';
    [plain, html, ascii].map(|escaped| json_string(text, escaped)).into()
}

fn json_string(text: &str, escaped: fn(char) -> bool) -> Vec<u8> {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match short_escape(c) {
            Some(letter) if !matches!(letter, 'a' | 'v') => out.extend(['\\', letter]),
            _ if c < ' ' || escaped(c) => {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| hex(&mut out, 'u', u32::from(*unit), 4));
            }
            _ => out.push(c),
        }
    }
    out.into_bytes()
}

/// Escapes of one letter that JSON and Go share, and `\a` and `\v`, which only Go has.
fn short_escape(c: char) -> Option<char> {
    Some(match c {
        '"' | '\\' => c,
        '\n' => 'n',
        '\r' => 'r',
        '\t' => 't',
        '\u{8}' => 'b',
        '\u{c}' => 'f',
        '\u{7}' => 'a',
        '\u{b}' => 'v',
        _ => return None,
    })
}

/// Inside of Go's `%q` and `%+q`, in which buildah quotes arguments.
fn go(value: &[u8]) -> Vec<Vec<u8>> {
    [false, true].map(|ascii| go_string(value, ascii)).into()
}

fn go_string(value: &[u8], ascii: bool) -> Vec<u8> {
    let mut out = String::with_capacity(value.len());
    for chunk in value.utf8_chunks() {
        chunk.valid().chars().for_each(|c| go_char(c, ascii, &mut out));
        chunk.invalid().iter().for_each(|byte| hex(&mut out, 'x', u32::from(*byte), 2));
    }
    out.into_bytes()
}

fn go_char(c: char, ascii: bool, out: &mut String) {
    let code = u32::from(c);
    match short_escape(c) {
        Some(letter) => out.extend(['\\', letter]),
        None if c < ' ' || c == '\u{7f}' => hex(out, 'x', code, 2),
        None if c.is_ascii() || (!ascii && printable(c)) => out.push(c),
        None if code < 0x1_0000 => hex(out, 'u', code, 4),
        None => hex(out, 'U', code, 8),
    }
}

fn hex(out: &mut String, letter: char, code: u32, width: usize) {
    // Writing to a String cannot fail.
    let _ = write!(out, "\\{letter}{code:0width$x}");
}

/// The standard library escapes what cannot be printed; both languages follow Unicode's classes.
fn printable(c: char) -> bool {
    c.escape_debug().len() == 1
}

fn url(value: &[u8]) -> Vec<Vec<u8>> {
    if value.len() > LONGEST_IN_URL {
        return Vec::new();
    }
    let upper = b"0123456789ABCDEF";
    let lower = b"0123456789abcdef";
    vec![
        percent(value, UNRESERVED, upper, false),
        percent(value, UNRESERVED, lower, false),
        percent(value, UNRESERVED, upper, true),
        percent(value, UNRESERVED_IN_SCRIPTS, upper, false),
        percent(value, UNRESERVED_IN_PATHS, upper, false),
    ]
}

/// Percent-encoding; `form` writes a space as `+`.
fn percent(value: &[u8], kept: &[u8], digits: &[u8; 16], form: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    for &byte in value {
        if byte.is_ascii_alphanumeric() || kept.contains(&byte) {
            out.push(byte);
        } else if form && byte == b' ' {
            out.push(b'+');
        } else {
            out.extend([b'%', digits[usize::from(byte >> 4)], digits[usize::from(byte & 15)]]);
        }
    }
    out
}

/// What the base64 text of any text around the value has in common, at the three ways in which the value
/// can lie in groups of three bytes.
fn base64(value: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = Vec::new();
    for shift in 0..3 {
        let mut shifted = vec![0; shift];
        shifted.extend_from_slice(value);
        // Characters of which all six bits come from the value.
        let stable = (shift * 8).div_ceil(6)..shifted.len() * 8 / 6;
        for engine in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
            forms.push(engine.encode(&shifted).as_bytes()[stable.clone()].to_vec());
        }
    }
    forms
}

/// The lines of the base64 text of the whole file, which tools break where they like.
fn wrapped_base64(bytes: &[u8]) -> Vec<Vec<u8>> {
    let text = STANDARD.encode(bytes);
    let wrapped = BASE64_COLUMNS.iter().filter(|columns| text.len() > **columns);
    wrapped.flat_map(|columns| text.as_bytes().chunks(*columns)).map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(value: &[u8], form: &[u8]) -> bool {
        of(value).iter().any(|found| found == form)
    }

    #[test]
    fn the_forms_of_a_value_with_special_characters() {
        let value = "p\u{e4}ss\"<w\\ord>\t&\u{1f511}\u{200b} x".as_bytes();
        for form in [
            "p\u{e4}ss\"<w\\ord>\t&\u{1f511}\u{200b} x",
            r#"päss\"<w\\ord>\t&🔑"#,
            r#"päss\"\u003cw\\ord\u003e\t\u0026🔑"#,
            r#"p\u00e4ss\"<w\\ord>\t&\ud83d\udd11\u200b x"#,
            r#"päss\"<w\\ord>\t&🔑\u200b x"#,
            r#"p\u00e4ss\"<w\\ord>\t&\U0001f511\u200b x"#,
            "p%C3%A4ss%22%3Cw%5Cord%3E%09%26%F0%9F%94%91%E2%80%8B%20x",
            "p%c3%a4ss%22%3cw%5cord%3e%09%26%f0%9f%94%91%e2%80%8b%20x",
            "p%C3%A4ss%22%3Cw%5Cord%3E%09%26%F0%9F%94%91%E2%80%8B+x",
        ] {
            let found = of(value).iter().any(|found| found.starts_with(form.as_bytes()));
            assert!(found, "{form} is missing");
        }
        assert!(has(b"it's(fine)!", b"it's(fine)!"));
        assert!(has(b"it's(fine)&", b"it's(fine)%26"), "encodeURIComponent");
        assert!(has(b"user:p@ss/w", b"user:p@ss%2Fw"), "user info");
        assert!(has(
            b"a\x01bcdef\x7f",
            br"a\u0001bcdef".iter().chain(b"\x7f").copied().collect::<Vec<_>>().as_slice()
        ));
        assert!(has(b"a\x01bcd\xff\x07\x0be", br"a\x01bcd\xff\a\ve"));
    }

    #[test]
    fn white_space_around_is_no_part_and_lines_are_forms() {
        let forms = of(b" \tfirst line\r\n  second line\nxy\n\n");
        assert!(forms.iter().any(|form| form == b"first line\r\n  second line\nxy"));
        assert!(forms.iter().any(|form| form == b"first line"));
        assert!(forms.iter().any(|form| form == b"second line"));
        assert!(forms.iter().all(|form| form.len() >= MIN_SECRET_BYTES));
        assert!(of(b" \n\t").is_empty());
    }

    #[test]
    fn base64_of_any_surroundings_contains_a_form() {
        for value in [b"sixsix".as_slice(), b"sevense", b"eight888", &[0xff; 9], b"\xfb\xef\xbe\xfb\xef\xbe"]
        {
            let forms = of(value);
            for (before, after) in (0..4).flat_map(|before| (0..4).map(move |after| (before, after))) {
                let mut text = vec![b'a'; before];
                text.extend_from_slice(value);
                text.extend(vec![b'z'; after]);
                for encoded in [STANDARD.encode(&text), URL_SAFE_NO_PAD.encode(&text)] {
                    let hit =
                        forms.iter().any(|form| encoded.as_bytes().windows(form.len()).any(|w| w == form));
                    assert!(hit, "{value:?} after {before} and before {after} bytes");
                }
            }
        }
    }

    #[test]
    fn every_line_of_wrapped_base64_is_a_form() {
        let value: Vec<u8> = (0..=255).chain(b"\n".iter().copied()).collect();
        let text = STANDARD.encode(&value);
        for columns in BASE64_COLUMNS {
            for line in text.as_bytes().chunks(columns).filter(|line| line.len() >= MIN_SECRET_BYTES) {
                assert!(has(&value, line));
            }
        }
    }

    #[test]
    fn a_secret_of_64_kib_fits_several_times() {
        let value: Vec<u8> =
            (0..65_536_u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        let total: usize = of(&value).iter().map(Vec::len).sum();
        assert!(total < crate::logs::redact::MAX_NEEDLE_BYTES / 3, "{total}");
    }
}
