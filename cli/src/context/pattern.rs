//! One pattern of an ignore file: what it matches, and where below a directory it could match (pure).
//!
//! The outcome is Docker's for every pattern, the surprising ones included: a pattern without wildcards is
//! compared as bytes, one whose only wildcard is a `**` at an end is compared as bytes with that end of the path,
//! and everything else becomes a regular expression.

use std::borrow::Cow;

use regex::bytes::Regex;

use super::goregex::{self, BadRegex};

/// A pattern that can be asked about paths.
#[derive(Debug)]
pub(super) struct Pattern {
    /// Whether a leading `!` takes paths back in.
    pub(super) exception: bool,
    matcher: Matcher,
    reach: Reach,
}

#[derive(Debug)]
enum Matcher {
    Exact(Vec<u8>),
    /// `dir/**`
    Prefix(Vec<u8>),
    /// `**/name` (kept with its slash) and `**name`
    Suffix(Vec<u8>),
    Regex(Regex),
}

/// A bound on the paths that a pattern can match, to tell which directories need no visit.
#[derive(Debug)]
struct Reach {
    /// Every matching path begins with these bytes.
    prefix: Vec<u8>,
    /// No matching path has more slashes; `None` if there is no such bound.
    max_slashes: Option<usize>,
}

/// Why a pattern cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadPattern {
    /// Nothing is left to take back in.
    #[error("an exception needs a path after the `!`")]
    EmptyException,
    /// Go's `filepath.Match` refuses it.
    #[error("it has a `[` without its `]`, an incomplete range or a `\\` at the end")]
    Syntax,
    /// Go's regular expressions refuse what Docker makes of it.
    #[error(transparent)]
    Regex(#[from] BadRegex),
}

impl Pattern {
    /// Reads a pattern; `None` if nothing is left after trimming.
    pub(super) fn parse(text: &[u8]) -> Result<Option<Self>, BadPattern> {
        let trimmed = trim(text);
        if trimmed.is_empty() {
            return Ok(None);
        }
        let cleaned = clean(trimmed);
        let (exception, glob) = match cleaned.strip_prefix(b"!") {
            Some(b"") => return Err(BadPattern::EmptyException),
            Some(glob) => (true, glob),
            None => (false, &cleaned[..]),
        };
        if !is_well_formed(glob) {
            return Err(BadPattern::Syntax);
        }
        let (shape, go_regex) = translate(glob);
        let reach = Reach::of(shape, glob);
        Ok(Some(Self { exception, matcher: Matcher::new(shape, glob, &go_regex)?, reach }))
    }

    /// Whether the pattern matches this very path; its parents are the caller's business.
    pub(super) fn matches(&self, path: &[u8]) -> bool {
        match &self.matcher {
            Matcher::Exact(text) => path == text,
            Matcher::Prefix(start) => path.starts_with(start),
            Matcher::Suffix(end) => path.ends_with(end) || end.strip_prefix(b"/") == Some(path),
            Matcher::Regex(regex) => regex.is_match(go_text(path).as_bytes()),
        }
    }

    /// Whether some path below `dir`, which the pattern itself does not match, could match.
    pub(super) fn could_match_below(&self, dir: &[u8]) -> bool {
        let Reach { prefix, max_slashes } = &self.reach;
        let below = [dir, b"/"].concat();
        let slashes = count_slashes(&below);
        (prefix.starts_with(&below) || below.starts_with(prefix))
            && max_slashes.is_none_or(|max| max >= slashes)
    }
}

impl Matcher {
    fn new(shape: Shape, glob: &[u8], go_regex: &str) -> Result<Self, BadPattern> {
        Ok(match shape {
            Shape::Exact => Self::Exact(glob.to_vec()),
            Shape::Prefix => Self::Prefix(glob[..glob.len() - 2].to_vec()),
            Shape::Suffix => Self::Suffix(glob[2..].to_vec()),
            Shape::Regex => Self::Regex(goregex::compile(go_regex)?),
        })
    }
}

impl Reach {
    fn of(shape: Shape, glob: &[u8]) -> Self {
        let slashes = count_slashes(glob);
        match shape {
            Shape::Exact => Self { prefix: glob.to_vec(), max_slashes: Some(slashes) },
            Shape::Prefix => Self { prefix: glob[..glob.len() - 2].to_vec(), max_slashes: None },
            Shape::Regex if is_plain_glob(glob) => {
                let literal = glob.iter().take_while(|b| !b"*?[]".contains(b)).copied().collect();
                // A class may match a slash, a lone `*` or `?` never does.
                let deep = glob.contains(&b'[') || glob.windows(2).any(|pair| pair == b"**");
                Self { prefix: literal, max_slashes: (!deep).then_some(slashes) }
            }
            Shape::Suffix | Shape::Regex => Self::anywhere(),
        }
    }

    fn anywhere() -> Self {
        Self { prefix: Vec::new(), max_slashes: None }
    }
}

fn count_slashes(path: &[u8]) -> usize {
    path.split(|b| *b == b'/').count() - 1
}

/// Whether all but the wildcards of a pattern stands for itself: no escape, alternative, repetition or anchor,
/// and no character that stands for undecodable bytes.
fn is_plain_glob(glob: &[u8]) -> bool {
    !glob.iter().any(|b| b"\\|{}^".contains(b))
        && !go_text(glob).contains(char::REPLACEMENT_CHARACTER)
        && !glob.starts_with(BYTE_ORDER_MARK)
}

pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Exact,
    Prefix,
    Suffix,
    Regex,
}

/// The kind of comparison that a pattern needs, and the Go regular expression in case it is one.
fn translate(glob: &[u8]) -> (Shape, String) {
    let text = go_text(glob);
    // Docker's character reader drops a byte order mark at the start, though only here.
    let mut chars = text.strip_prefix('\u{FEFF}').unwrap_or(&text).chars().peekable();
    let (mut shape, mut regex) = (Shape::Exact, String::from("^"));
    let mut is_first = true;
    while let Some(c) = chars.next() {
        match c {
            '*' if chars.next_if_eq(&'*').is_some() => {
                chars.next_if_eq(&'/');
                let at_end = chars.peek().is_none();
                shape = double_star(shape, is_first, at_end, &mut regex);
            }
            '*' | '?' | '[' | ']' => {
                shape = Shape::Regex;
                regex.push_str(match c {
                    '*' => "[^/]*",
                    '?' => "[^/]",
                    '[' => "[",
                    _ => "]",
                });
            }
            '.' | '+' | '(' | ')' | '$' => regex.extend(['\\', c]),
            '\\' => {
                regex.push('\\');
                if let Some(escaped) = chars.next() {
                    regex.push(escaped);
                    shape = Shape::Regex;
                }
            }
            // Also `{`, `|`, `}` and `^`, which Docker leaves active in a regular expression.
            _ => regex.push(c),
        }
        is_first = false;
    }
    regex.push('$');
    (shape, regex)
}

fn double_star(shape: Shape, is_first: bool, at_end: bool, regex: &mut String) -> Shape {
    let plain_so_far = shape == Shape::Exact;
    if !at_end {
        regex.push_str("(.*/)?");
    } else if !plain_so_far {
        regex.push_str(".*");
    }
    match (is_first, at_end && plain_so_far) {
        (true, _) => Shape::Suffix,
        (false, true) => Shape::Prefix,
        (false, false) => Shape::Regex,
    }
}

/// The text that Go's decoder sees: each byte that is not part of a character is one replacement character.
fn go_text(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = str::from_utf8(bytes) {
        return Cow::Borrowed(text);
    }
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    Cow::Owned(text)
}

/// Whether Go's `filepath.Match` accepts the pattern. It is stricter than the regular expression about classes:
/// no empty member, no `-` at either end.
fn is_well_formed(glob: &[u8]) -> bool {
    let mut rest = glob;
    while let [first, after @ ..] = rest {
        let next = match first {
            b'[' => after_class(after),
            b'\\' => after.get(1..),
            _ => Some(after),
        };
        let Some(next) = next else { return false };
        rest = next;
    }
    true
}

/// What follows a class whose bracket was just read.
fn after_class(class: &[u8]) -> Option<&[u8]> {
    let mut rest = after_member(class.strip_prefix(b"^").unwrap_or(class))?;
    loop {
        match rest.strip_prefix(b"]") {
            Some(after) => return Some(after),
            None => rest = after_member(rest)?,
        }
    }
}

fn after_member(class: &[u8]) -> Option<&[u8]> {
    let rest = after_class_char(class)?;
    match rest.strip_prefix(b"-") {
        Some(high) => after_class_char(high),
        None => Some(rest),
    }
}

fn after_class_char(class: &[u8]) -> Option<&[u8]> {
    if matches!(class, [] | [b'-' | b']', ..]) {
        return None;
    }
    let text = class.strip_prefix(b"\\").unwrap_or(class);
    let width = text.utf8_chunks().next()?.valid().chars().next()?.len_utf8();
    text.get(width..).filter(|rest| !rest.is_empty())
}

/// Without the white space (as Unicode defines it) at both ends.
pub(super) fn trim(text: &[u8]) -> &[u8] {
    let start =
        text.utf8_chunks().next().map_or(0, |chunk| chunk.valid().len() - chunk.valid().trim_start().len());
    let end = match text.utf8_chunks().last() {
        Some(chunk) if chunk.invalid().is_empty() => chunk.valid().len() - chunk.valid().trim_end().len(),
        _ => 0,
    };
    // All of it is white space: both ends claim every byte.
    text.get(start..text.len() - end).unwrap_or_default()
}

/// The shortest spelling of a path, found by its text alone, as Go's `filepath.Clean`.
pub(super) fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.starts_with(b"/");
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." if parts.last().is_some_and(|last| *last != b"..") => {
                parts.pop();
            }
            b".." if rooted => {}
            _ => parts.push(part),
        }
    }
    match (rooted, parts.is_empty()) {
        (true, _) => [b"/", &parts.join(&b'/')[..]].concat(),
        (false, true) => b".".to_vec(),
        (false, false) => parts.join(&b'/'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of Docker's own table: how a pattern is compared, and by which expression.
    const TRANSLATIONS: &[(&str, Shape, &str)] = &[
        ("*", Shape::Regex, "^[^/]*$"),
        ("file*", Shape::Regex, "^file[^/]*$"),
        ("*file", Shape::Regex, "^[^/]*file$"),
        ("a*/b", Shape::Regex, "^a[^/]*/b$"),
        ("**", Shape::Suffix, ""),
        ("**/**", Shape::Regex, "^(.*/)?.*$"),
        ("dir/**", Shape::Prefix, ""),
        ("**/dir", Shape::Suffix, ""),
        ("**/dir2/*", Shape::Regex, "^(.*/)?dir2/[^/]*$"),
        ("**/dir2/**", Shape::Regex, "^(.*/)?dir2/.*$"),
        ("**file", Shape::Suffix, ""),
        ("**/file*txt", Shape::Regex, "^(.*/)?file[^/]*txt$"),
        ("**/**/*.txt", Shape::Regex, r"^(.*/)?(.*/)?[^/]*\.txt$"),
        ("a[b-d]e", Shape::Regex, "^a[b-d]e$"),
        (".*", Shape::Regex, r"^\.[^/]*$"),
        ("abc.def", Shape::Exact, ""),
        ("abc?def", Shape::Regex, "^abc[^/]def$"),
        ("**/foo/bar", Shape::Suffix, ""),
        ("a(b)c/def", Shape::Exact, ""),
        ("a.|)$(}+{bc", Shape::Exact, ""),
        ("dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", Shape::Exact, ""),
        // Ours: what the rules make of the rest.
        ("a.|)$(}+{b?", Shape::Regex, r"^a\.|\)\$\(}\+{b[^/]$"),
        ("a**", Shape::Prefix, ""),
        ("a/**/b", Shape::Regex, "^a/(.*/)?b$"),
        ("***", Shape::Regex, "^(.*/)?[^/]*$"),
        ("a?/**", Shape::Regex, "^a[^/]/.*$"),
        ("**a/**", Shape::Regex, "^(.*/)?a/.*$"),
        ("\u{FEFF}a*", Shape::Regex, "^a[^/]*$"),
    ];

    #[test]
    fn patterns_become_what_docker_makes_of_them() {
        for (pattern, shape, regex) in TRANSLATIONS {
            let (ours, expression) = translate(&clean(pattern.as_bytes()));
            assert_eq!(ours, *shape, "{pattern}");
            if ours == Shape::Regex {
                assert_eq!(expression, *regex, "{pattern}");
            }
        }
    }

    fn parsed(pattern: &[u8]) -> Pattern {
        Pattern::parse(pattern).unwrap().unwrap()
    }

    #[test]
    fn undecodable_bytes_are_one_character_each() {
        let cases: &[(&[u8], &[u8], bool)] = &[
            (b"a\xFFb", b"a\xFFb", true),
            (b"a\xFFb", b"a\xFEb", false),
            (b"a?b", b"a\xFFb", true),
            (b"a?b", b"a\xE2\x98b", false),
            (b"a??b", b"a\xE2\x98b", true),
            (b"a*b", b"a\xFF\xFEb", true),
            (b"a[^x]b", b"a\xFFb", true),
            (b"**/\xFF", b"d/\xFF", true),
            (b"d\xFF/**", b"d\xFF/x", true),
            // An undecodable byte next to a wildcard is any undecodable byte.
            (b"\xFF*", b"\xFEx", true),
            (b"\xFF*", b"x", false),
        ];
        for (pattern, path, expected) in cases {
            let shown = (pattern.escape_ascii().to_string(), path.escape_ascii().to_string());
            assert_eq!(parsed(pattern).matches(path), *expected, "{shown:?}");
        }
    }

    #[test]
    fn line_breaks_in_names_stop_only_double_stars_in_expressions() {
        assert!(parsed(b"a*b").matches(b"a\nb"));
        assert!(parsed(b"**/b").matches(b"a\n/b"));
        assert!(!parsed(b"**/b*").matches(b"a\n/b"));
    }

    #[test]
    fn paths_are_cleaned_by_their_text() {
        for (path, expected) in [
            ("", "."),
            (".", "."),
            ("./", "."),
            ("a/", "a"),
            ("./a//b", "a/b"),
            ("a/../b", "b"),
            ("a/..", "."),
            ("..", ".."),
            ("../../a", "../../a"),
            ("a/../../b", "../b"),
            ("/", "/"),
            ("//a", "/a"),
            ("/..", "/"),
            ("/../a/./b/", "/a/b"),
            ("...", "..."),
            ("a/b/../..", "."),
        ] {
            assert_eq!(clean(path.as_bytes()).escape_ascii().to_string(), expected, "{path}");
        }
    }

    #[test]
    fn white_space_is_trimmed_as_unicode_defines_it() {
        for (text, expected) in [
            (&b" \t a b\r\x0B\x0C"[..], &b"a b"[..]),
            (b"", b""),
            (b"  ", b""),
            ("\u{A0}\u{85}é\u{3000}".as_bytes(), "é".as_bytes()),
            (b" \xFF ", b"\xFF"),
            (b"\xFF", b"\xFF"),
            (b" a\xE2\x80 ", b"a\xE2\x80"),
            (b"\xC2 x \xA0", b"\xC2 x \xA0"),
        ] {
            assert_eq!(trim(text).escape_ascii().to_string(), expected.escape_ascii().to_string());
        }
    }

    #[test]
    fn directories_out_of_reach_are_known() {
        let cases = [
            ("a/b", "a", true),
            ("a/b", "a/b", false),
            ("a/b", "b", false),
            ("a/b", "ab", false),
            ("ab", "a", false),
            ("a/**", "a", true),
            ("a/**", "b", false),
            ("a**", "b", false),
            ("a/b**", "a", true),
            ("**", "x", true),
            ("**/a", "x/y", true),
            ("*.md", "x", false),
            ("*/*.md", "x", true),
            ("*/*.md", "x/y", false),
            ("x?/a", "xy", true),
            ("x?/a", "y", false),
            ("a/[b]/c", "a", true),
            ("a/[b]/c", "b", false),
            ("x[+-9]y", "x", true),
            ("[^a]", "x", true),
            ("a[^b]c", "a", true),
            ("x/**/a*", "x/y/z", true),
            ("x/**/a*", "y", false),
            ("a|b*", "b", true),
            ("a\\*/b", "x", true),
            ("ab{0}/*", "a", true),
        ];
        for (pattern, dir, expected) in cases {
            assert_eq!(
                parsed(pattern.as_bytes()).could_match_below(dir.as_bytes()),
                expected,
                "{pattern} {dir}"
            );
        }
    }
}
