//! `.dockerignore` with the outcome that Docker has for every file and path (pure).
//!
//! Patterns are rooted at the context. A path is ignored if the last pattern that matches it or one of its
//! parents is not an exception (`!`). A pattern that Docker would only refuse once it is compared with a path is
//! refused here when the file is read, so that the answer does not depend on what the context holds.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::pattern::{BYTE_ORDER_MARK, BadPattern, Pattern, clean, trim};
use super::quoted;

/// More patterns than any file written by hand; each may hold a compiled regular expression.
const MAX_PATTERNS: usize = 10_000;

/// The patterns of an ignore file; the default ignores nothing.
#[derive(Debug, Default)]
pub(crate) struct Ignore {
    patterns: Vec<Pattern>,
}

/// Why an ignore file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IgnoreError {
    /// A line holds no usable pattern.
    #[error("{}, line {line}: cannot use the pattern {pattern}", quoted(.file))]
    Pattern {
        /// The ignore file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The pattern as Docker reads it, in quotes.
        pattern: String,
        /// What is wrong with it.
        #[source]
        reason: BadPattern,
    },
    /// The file holds too many patterns to compare every path with.
    #[error("{} has more than {limit} patterns; combine some with `*` or `**`", quoted(.file))]
    TooManyPatterns {
        /// The ignore file.
        file: PathBuf,
        /// The most that is accepted.
        limit: usize,
    },
    /// The file is larger than any list of patterns.
    #[error("{} is larger than {limit} bytes; it should hold a list of patterns", quoted(.file))]
    TooLarge {
        /// The ignore file.
        file: PathBuf,
        /// The most that is accepted, in bytes.
        limit: u64,
    },
    /// Something other than a file has its name.
    #[error("{} is not a regular file; rename it or replace it with a list of patterns", quoted(.file))]
    NotAFile {
        /// The ignore file.
        file: PathBuf,
    },
    /// The file exists but cannot be read.
    #[error("cannot read {}", quoted(.file))]
    Read {
        /// The ignore file.
        file: PathBuf,
        /// What the system answered.
        #[source]
        source: std::io::Error,
    },
}

/// Which patterns match a directory or one of its parents, so that they need not be asked again below it.
#[derive(Debug, Clone)]
pub(super) struct Ancestry(Rc<[bool]>);

/// Whether a path belongs to the context.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is packed.
    Kept,
    /// The pattern with this index, the last one that matches, ignores it.
    Ignored(usize),
}

impl Ignore {
    /// Reads the text of an ignore file; `file` only names it in errors.
    pub(super) fn parse(file: &Path, text: &[u8]) -> Result<Self, IgnoreError> {
        let mut patterns = Vec::new();
        for (line, text) in lines(text) {
            let pattern = Pattern::parse(&text).map_err(|reason| refusal(file, line, &text, reason))?;
            patterns.extend(pattern);
            if patterns.len() > MAX_PATTERNS {
                return Err(IgnoreError::TooManyPatterns { file: file.to_owned(), limit: MAX_PATTERNS });
            }
        }
        Ok(Self { patterns })
    }

    /// What is known about parents before any directory was entered.
    pub(super) fn root(&self) -> Ancestry {
        Ancestry(self.patterns.iter().map(|_| false).collect())
    }

    /// What is known about parents inside `dir`.
    pub(super) fn enter(&self, above: &Ancestry, dir: &[u8]) -> Ancestry {
        let matches = |(above, pattern): (&bool, &Pattern)| *above || pattern.matches(dir);
        let inside: Vec<bool> = above.0.iter().zip(&self.patterns).map(matches).collect();
        // Most directories match nothing new; deep trees then share one list.
        if inside[..] == above.0[..] { above.clone() } else { Ancestry(inside.into()) }
    }

    /// Whether a path directly inside the directory that `above` describes is ignored.
    pub(super) fn verdict(&self, above: &Ancestry, path: &[u8]) -> Verdict {
        let matched = |(_, (pattern, above)): &(usize, (&Pattern, &bool))| **above || pattern.matches(path);
        match self.patterns.iter().zip(above.0.iter()).enumerate().rfind(matched) {
            Some((index, (pattern, _))) if !pattern.exception => Verdict::Ignored(index),
            _ => Verdict::Kept,
        }
    }

    /// Whether an exception could keep something below a directory that the pattern `by` ignores.
    pub(super) fn may_keep_below(&self, by: usize, dir: &[u8]) -> bool {
        // Earlier exceptions lose against `by`, which matches everything below `dir` as well.
        self.patterns[by + 1..].iter().any(|pattern| pattern.exception && pattern.could_match_below(dir))
    }
}

fn refusal(file: &Path, line: usize, pattern: &[u8], reason: BadPattern) -> IgnoreError {
    let pattern = quoted(Path::new(OsStr::from_bytes(pattern)));
    IgnoreError::Pattern { file: file.to_owned(), line, pattern, reason }
}

/// The patterns with their line numbers: no byte order mark, no comments, no empty lines, paths cleaned and
/// without a leading slash.
fn lines(text: &[u8]) -> impl Iterator<Item = (usize, Vec<u8>)> {
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    let patterns =
        text.split(|b| *b == b'\n').map(|line| if line.starts_with(b"#") { b"" } else { trim(line) });
    (1..).zip(patterns).filter(|(_, line)| !line.is_empty()).map(|(number, line)| (number, normalise(line)))
}

fn normalise(line: &[u8]) -> Vec<u8> {
    let (mark, path): (&[u8], _) = match line.strip_prefix(b"!") {
        Some(path) => (b"!", trim(path)),
        None => (b"", line),
    };
    if path.is_empty() {
        return mark.to_vec();
    }
    let cleaned = clean(path);
    let relative = cleaned.strip_prefix(b"/").filter(|rest| !rest.is_empty()).unwrap_or(&cleaned);
    [mark, relative].concat()
}

/// The rule as Docker states it, without any short cut: what the tests compare with.
#[cfg(test)]
pub(super) fn literally_ignored(ignore: &Ignore, path: &[u8]) -> bool {
    let mut ignored = false;
    for pattern in &ignore.patterns {
        if pattern.exception == ignored {
            let mut parents =
                path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(end, _)| &path[..end]);
            if pattern.matches(path) || parents.any(|parent| pattern.matches(parent)) {
                ignored = !pattern.exception;
            }
        }
    }
    ignored
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a single pattern says about a path.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Match {
        Itself,
        Parent,
        Nothing,
    }
    use Match::{Itself, Nothing, Parent};

    /// Docker's table for single patterns, then that of Go's `filepath.Match` as Docker adopted it.
    #[rustfmt::skip]
    const SINGLE: &[(&str, &str, Match)] = &[
        ("*", "fileutils.go", Itself),
        ("*.go", "fileutils.go", Itself),
        ("**", "file", Itself),
        ("**", "file/", Itself),
        ("**/", "file", Itself),
        ("**/", "file/", Itself),
        ("**", "/", Itself),
        ("**/", "/", Itself),
        ("**", "dir/file", Itself),
        ("**/", "dir/file", Itself),
        ("**", "dir/file/", Itself),
        ("**/", "dir/file/", Itself),
        ("**/**", "dir/file", Itself),
        ("**/**", "dir/file/", Itself),
        ("dir/**", "dir/file", Itself),
        ("dir/**", "dir/file/", Itself),
        ("dir/**", "dir/dir2/file", Itself),
        ("dir/**", "dir/dir2/file/", Itself),
        ("**/dir", "dir", Itself),
        ("**/dir", "dir/file", Parent),
        ("**/dir2/*", "dir/dir2/file", Itself),
        ("**/dir2/*", "dir/dir2/file/", Parent),
        ("**/dir2/**", "dir/dir2/dir3/file", Itself),
        ("**/dir2/**", "dir/dir2/dir3/file/", Itself),
        ("**file", "file", Itself),
        ("**file", "dir/file", Itself),
        ("**/file", "dir/file", Itself),
        ("**file", "dir/dir/file", Itself),
        ("**/file", "dir/dir/file", Itself),
        ("**/file*", "dir/dir/file", Itself),
        ("**/file*", "dir/dir/file.txt", Itself),
        ("**/file*txt", "dir/dir/file.txt", Itself),
        ("**/file*.txt", "dir/dir/file.txt", Itself),
        ("**/file*.txt*", "dir/dir/file.txt", Itself),
        ("**/**/*.txt", "dir/dir/file.txt", Itself),
        ("**/**/*.txt2", "dir/dir/file.txt", Nothing),
        ("**/*.txt", "file.txt", Itself),
        ("**/**/*.txt", "file.txt", Itself),
        ("a**/*.txt", "a/file.txt", Itself),
        ("a**/*.txt", "a/dir/file.txt", Itself),
        ("a**/*.txt", "a/dir/dir/file.txt", Itself),
        ("a/*.txt", "a/dir/file.txt", Nothing),
        ("a/*.txt", "a/file.txt", Itself),
        ("a/*.txt**", "a/file.txt", Itself),
        ("a[b-d]e", "ae", Nothing),
        ("a[b-d]e", "ace", Itself),
        ("a[b-d]e", "aae", Nothing),
        ("a[^b-d]e", "aze", Itself),
        (".*", ".foo", Itself),
        (".*", "foo", Nothing),
        ("abc.def", "abcdef", Nothing),
        ("abc.def", "abc.def", Itself),
        ("abc.def", "abcZdef", Nothing),
        ("abc?def", "abcZdef", Itself),
        ("abc?def", "abcdef", Nothing),
        ("**/foo/bar", "foo/bar", Itself),
        ("**/foo/bar", "dir/foo/bar", Itself),
        ("**/foo/bar", "dir/dir2/foo/bar", Itself),
        ("abc/**", "abc", Nothing),
        ("abc/**", "abc/def", Itself),
        ("abc/**", "abc/def/ghi", Itself),
        ("**/.foo", ".foo", Itself),
        ("**/.foo", "bar.foo", Nothing),
        ("a(b)c/def", "a(b)c/def", Itself),
        ("a(b)c/def", "a(b)c/xyz", Nothing),
        ("a.|)$(}+{bc", "a.|)$(}+{bc", Itself),
        ("dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", Itself),
        ("dist/*.whl", "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", Itself),
        (r"a\\", r"a\", Itself),
        (r"a\*b", "a*b", Itself),
        ("abc", "abc", Itself),
        ("*", "abc", Itself),
        ("*c", "abc", Itself),
        ("a*", "a", Itself),
        ("a*", "abc", Itself),
        ("a*", "ab/c", Parent),
        ("a*/b", "abc/b", Itself),
        ("a*/b", "a/c/b", Nothing),
        ("a*b*c*d*e*/f", "axbxcxdxe/f", Itself),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/f", Itself),
        ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", Nothing),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", Nothing),
        ("a*b?c*x", "abxbbxdbxebxczzx", Itself),
        ("a*b?c*x", "abxbbxdbxebxczzy", Nothing),
        ("ab[c]", "abc", Itself),
        ("ab[b-d]", "abc", Itself),
        ("ab[e-g]", "abc", Nothing),
        ("ab[^c]", "abc", Nothing),
        ("ab[^b-d]", "abc", Nothing),
        ("ab[^e-g]", "abc", Itself),
        (r"a\*b", "a*b", Itself),
        (r"a\*b", "ab", Nothing),
        ("a?b", "a☺b", Itself),
        ("a[^a]b", "a☺b", Itself),
        ("a???b", "a☺b", Nothing),
        ("a[^a][^a][^a]b", "a☺b", Nothing),
        ("[a-ζ]*", "α", Itself),
        ("*[a-ζ]", "A", Nothing),
        ("a?b", "a/b", Nothing),
        ("a*b", "a/b", Nothing),
        (r"[\]a]", "]", Itself),
        (r"[\-]", "-", Itself),
        (r"[x\-]", "x", Itself),
        (r"[x\-]", "-", Itself),
        (r"[x\-]", "z", Nothing),
        (r"[\-x]", "x", Itself),
        (r"[\-x]", "-", Itself),
        (r"[\-x]", "a", Nothing),
        ("*x", "xxx", Itself),
    ];

    /// Docker's table for lists of patterns; whether the path is ignored.
    #[rustfmt::skip]
    const LISTS: &[(&[&str], &str, bool)] = &[
        (&["!fileutils.go", "*.go"], "fileutils.go", true),
        (&["docs", "!docs/README.md"], "docs/README.md", false),
        (&["docs/", "!docs/README.md"], "docs/README.md", false),
        (&["docs/*", "!docs/README.md"], "docs/README.md", false),
        (&["*.go", "!fileutils.go"], "fileutils.go", false),
        (&["docs", "  !docs/README.md"], "docs/README.md", false),
        (&["docs", "!docs/README.md  "], "docs/README.md", false),
        (&["*.go"], ".", false),
        (&[], "any/path/there", false),
        (&["**", "!util/docker/web"], "util/docker/web/foo", false),
        (&["**", "!util/docker/web", "util/docker/web/foo"], "util/docker/web/foo", true),
        (&["**", "!dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl"], "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", false),
        (&["**", "!dist/*.whl"], "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", false),
        // Ours.
        (&["a/b", "!a"], "a/b", false),
        (&["a", "!a/b", "a/b/c"], "a/b/c", true),
        (&["!a", "a"], "a", true),
        (&["*", "!a/*"], "a/b/c", false),
        (&["a|b*"], "a-and-more", true),
        (&["a|b*"], "more-b", true),
        (&["x{2}*"], "xxy", true),
        (&["x{a,b}*"], "x{a,b}c", true),
        (&["[[:upper:]]*"], "Makefile", true),
        (&["foo"], "a/foo", false),
    ];

    /// Patterns of both tables that are refused, with the paths that they stand beside there.
    #[rustfmt::skip]
    const REFUSED: &[(&str, &str)] = &[
        ("!", "fileutils.go"),
        ("[", "/any/path/there"),
        ("[Local-Only]/", "x"),
        ("[]a]", "]"),
        ("[-]", "-"),
        ("[x-]", "x"),
        ("[x-]", "-"),
        ("[x-]", "z"),
        ("[-x]", "x"),
        ("[-x]", "-"),
        ("[-x]", "a"),
        (r"\", "a"),
        ("[a-b-c]", "a"),
        ("[", "a"),
        ("[^", "a"),
        ("[^bc", "a"),
        ("a[", "a"),
        ("a[", "ab"),
    ];

    fn ignore(patterns: &[&str]) -> Result<Ignore, IgnoreError> {
        Ignore::parse(Path::new(".dockerignore"), patterns.join("\n").as_bytes())
    }

    /// What the visit of a tree comes to for a path: one directory after the other.
    fn ignored_by_steps(ignore: &Ignore, path: &str) -> bool {
        let mut above = ignore.root();
        for (end, _) in path.match_indices('/') {
            above = ignore.enter(&above, &path.as_bytes()[..end]);
        }
        ignore.verdict(&above, path.as_bytes()) != Verdict::Kept
    }

    #[test]
    fn single_patterns_match_as_in_docker() {
        for (pattern, path, expected) in SINGLE {
            let ignore = ignore(&[pattern]).unwrap();
            assert_eq!(ignore.patterns[0].matches(path.as_bytes()), *expected == Itself, "{pattern} {path}");
            assert_eq!(literally_ignored(&ignore, path.as_bytes()), *expected != Nothing, "{pattern} {path}");
            assert_eq!(ignored_by_steps(&ignore, path), *expected != Nothing, "{pattern} {path}");
        }
        assert_eq!(SINGLE.iter().filter(|row| row.2 == Parent).count(), 3);
    }

    #[test]
    fn lists_of_patterns_match_as_in_docker() {
        for (patterns, path, expected) in LISTS {
            let ignore = ignore(patterns).unwrap();
            assert_eq!(literally_ignored(&ignore, path.as_bytes()), *expected, "{patterns:?} {path}");
            assert_eq!(ignored_by_steps(&ignore, path), *expected, "{patterns:?} {path}");
        }
    }

    #[test]
    fn no_row_of_dockers_tables_is_lost() {
        // 68 and 4 rows of its match table, 54 of Go's, 11 single tests and one regression test.
        let ours = 10;
        assert_eq!(SINGLE.len() + LISTS.len() - ours + REFUSED.len(), 68 + 4 + 54 + 13 + 1);
    }

    #[test]
    fn bad_patterns_are_refused_with_their_place() {
        for (pattern, _) in REFUSED {
            let error = ignore(&["# comment", "", "fine", pattern, "fine"]).unwrap_err();
            let IgnoreError::Pattern { line, .. } = &error else { panic!("{error}") };
            assert_eq!(*line, 4, "{pattern}");
            assert!(std::error::Error::source(&error).is_some(), "{pattern}");
        }
    }

    #[test]
    fn a_refusal_names_file_line_pattern_and_reason() {
        let cases = [
            ("!", "\"!\"", "an exception needs a path after the `!`"),
            ("! /", "\"!/\"", "an exception needs a path after the `!`"),
            ("é[", "\"é[\"", "it has a `[` without its `]`, an incomplete range or a `\\` at the end"),
            ("*/./[z-a]/", "\"*/[z-a]\"", "a character range that runs backwards"),
            ("*{2}", "\"*{2}\"", "a repetition of a repetition"),
            ("\\q", "\"\\\\q\"", "unknown escape"),
        ];
        for (text, pattern, reason) in cases {
            let error = ignore(&[text]).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("\".dockerignore\", line 1: cannot use the pattern {pattern}")
            );
            assert_eq!(std::error::Error::source(&error).unwrap().to_string(), reason, "{text}");
        }
    }

    #[test]
    fn too_many_patterns_are_refused() {
        assert!(ignore(&vec!["a"; MAX_PATTERNS]).is_ok());
        let error = ignore(&vec!["a"; MAX_PATTERNS + 1]).unwrap_err();
        assert!(error.to_string().starts_with("\".dockerignore\" has more than 10000 patterns"), "{error}");
    }

    fn read(text: &[u8]) -> Vec<(usize, String)> {
        lines(text).map(|(line, pattern)| (line, pattern.escape_ascii().to_string())).collect()
    }

    #[test]
    fn files_are_read_as_docker_reads_them() {
        assert_eq!(read(b""), []);
        let text =
            b"test1\n/test2\n/a/file/here\n\nlastfile\n# this is a comment\n! /inverted/abs/path\n!\n! ";
        let expected = [
            (1, "test1"),
            (2, "test2"),
            (3, "a/file/here"),
            (5, "lastfile"),
            (7, "!inverted/abs/path"),
            (8, "!"),
            (9, "!"),
        ];
        assert_eq!(read(text), expected.map(|(line, pattern)| (line, pattern.to_owned())));
    }

    #[test]
    fn lines_are_normalised_as_docker_does() {
        for (line, expected) in [
            ("foo/", "foo"),
            ("./a//b", "a/b"),
            ("a/../b", "b"),
            ("  a b \t\r", "a b"),
            ("/", "/"),
            ("//a", "a"),
            ("\u{FEFF}a", "a"),
            (" # a", "# a"),
            ("\\#a", "\\\\#a"),
            ("!a/", "!a"),
            ("  !  /a", "!a"),
            ("! !a", "!!a"),
            ("!/", "!/"),
            ("..", ".."),
            ("/..", "/"),
            (".", "."),
            ("/!a", "!a"),
        ] {
            assert_eq!(read(line.as_bytes()), [(1, expected.to_owned())], "{line}");
        }
        for nothing in ["#a", "\u{FEFF}#a", "   ", "\r", "\u{A0}", "\n\n"] {
            assert_eq!(read(nothing.as_bytes()), [], "{nothing:?}");
        }
        assert_eq!(read("a\n\u{FEFF}b".as_bytes())[1].1, "\\xef\\xbb\\xbfb");
        assert_eq!(read(b"a\r\nb\r\n"), [(1, "a".to_owned()), (2, "b".to_owned())]);
    }

    #[test]
    fn only_later_exceptions_can_keep_something_below() {
        let ignore = ignore(&["!x/keep", "x", "!y/keep", "x/deep", "!x/deep/er/*.md"]).unwrap();
        let by = |path: &str| match ignore.verdict(&ignore.root(), path.as_bytes()) {
            Verdict::Ignored(by) => by,
            Verdict::Kept => panic!("{path} is kept"),
        };
        assert!(ignore.may_keep_below(by("x"), b"x"));
        assert!(ignore.may_keep_below(by("x/deep"), b"x/deep"));
        assert!(!ignore.may_keep_below(1, b"x/other"));
        assert!(!ignore.may_keep_below(1, b"x/deep/er/est"));
    }
}
