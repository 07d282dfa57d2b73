//! GNU tar as the second opinion on what an archive holds.

use std::path::Path;
use std::process::{Command, Output};

use kiln_agent::unpack::{self, Entry, Kind, Limits, UnpackError};

/// Runs GNU tar without what a user's environment could change.
pub(crate) fn tar(arguments: &[&str], directory: &Path) -> Output {
    let mut command = Command::new("tar");
    command.args(arguments).current_dir(directory);
    command.env_remove("TAR_OPTIONS").env("LC_ALL", "C").env("TZ", "UTC");
    command.output().expect("GNU tar must be installed for these tests")
}

pub(crate) fn listed(archive: &[u8], limits: &Limits) -> Result<Vec<Entry>, UnpackError> {
    let mut entries = Vec::new();
    unpack::list(archive, limits, |entry| entries.push(entry.clone()))?;
    Ok(entries)
}

/// What differs between our entries of a plain archive and GNU tar's listing of it.
pub(crate) fn difference(archive: &[u8], ours: &[Entry]) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("a.tar"), archive).unwrap();
    let arguments = ["--quoting-style=escape", "--numeric-owner", "-tvf", "a.tar"];
    let output = tar(&arguments, directory.path());
    let lines: Vec<&[u8]> =
        output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).collect();
    if !output.status.success() || lines.len() != ours.len() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        return Some(format!("we list {ours:#?}\nGNU tar ends with {}:\n{out}{err}", output.status));
    }
    let wrong = lines.iter().zip(ours).find(|(line, entry)| !is_same(line, entry));
    wrong.map(|(line, entry)| format!("we list {entry:?}\nGNU tar lists {}", String::from_utf8_lossy(line)))
}

/// `-rw-r--r-- 0/0  5 2020-01-01 00:00 name`, with ` -> target` or ` link to target`.
fn is_same(line: &[u8], entry: &Entry) -> bool {
    let Some((columns, name)) = split_columns(line) else { return false };
    let size = String::from_utf8_lossy(columns[2]).parse();
    columns[0] == mode_text(entry).as_bytes()
        && size == Ok(entry.size())
        && is_same_name(&unescape(name), entry)
}

fn is_same_name(name: &[u8], entry: &Entry) -> bool {
    match &entry.kind {
        Kind::File { .. } | Kind::Directory => normal(name) == entry.path,
        Kind::Symlink { target } => {
            any_split(name, b" -> ", |path, to| normal(path) == entry.path && to == target)
        }
        Kind::HardLink { target } => {
            any_split(name, b" link to ", |path, to| normal(path) == entry.path && normal(to) == *target)
        }
    }
}

/// Five columns and, one space behind them, the name, which may start with spaces itself.
fn split_columns(line: &[u8]) -> Option<(Vec<&[u8]>, &[u8])> {
    let mut columns = Vec::new();
    let mut rest = line;
    while columns.len() < 5 {
        let start = rest.iter().position(|&byte| byte != b' ')?;
        let end = start + rest[start..].iter().position(|&byte| byte == b' ')?;
        columns.push(&rest[start..end]);
        rest = &rest[end..];
    }
    Some((columns, &rest[1..]))
}

/// As `ls -l` has it; a hard link shows as `h`.
fn mode_text(entry: &Entry) -> String {
    let kind = match entry.kind {
        Kind::File { .. } => '-',
        Kind::Directory => 'd',
        Kind::Symlink { .. } => 'l',
        Kind::HardLink { .. } => 'h',
    };
    let bit = |shift: u32, letter| if entry.mode >> shift & 1 == 1 { letter } else { '-' };
    let special = |shift: u32, execute: u32, letter: char| match (entry.mode >> shift & 1, bit(execute, 'x'))
    {
        (1, 'x') => letter,
        (1, _) => letter.to_ascii_uppercase(),
        (_, plain) => plain,
    };
    let mut text = String::from(kind);
    for (shift, letter) in [(11, 's'), (10, 's'), (9, 't')] {
        let base = (shift - 9) * 3;
        text.extend([bit(base + 2, 'r'), bit(base + 1, 'w'), special(shift, base, letter)]);
    }
    text
}

fn any_split(name: &[u8], between: &[u8], is_right: impl Fn(&[u8], &[u8]) -> bool) -> bool {
    let starts = name.windows(between.len()).enumerate().filter(|(_, window)| *window == between);
    starts
        .map(|(at, _)| (&name[..at], &name[at + between.len()..]))
        .any(|(left, right)| is_right(left, right))
}

fn normal(name: &[u8]) -> Vec<u8> {
    let parts: Vec<&[u8]> =
        name.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') }
}

/// Undoes `--quoting-style=escape`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, length) = if first == b'\\' { unescape_one(tail) } else { (first, 0) };
        bytes.push(byte);
        rest = &tail[length..];
    }
    bytes
}

/// The byte that an escape stands for, and the length of the escape behind its backslash.
fn unescape_one(tail: &[u8]) -> (u8, usize) {
    let letters = b"abtnvfr";
    match tail.first() {
        Some(b'0'..=b'7') => (tail[..3].iter().fold(0, |value, digit| value << 3 | (digit - b'0')), 3),
        Some(letter) => match letters.iter().position(|known| known == letter) {
            Some(at) => (7 + u8::try_from(at).unwrap(), 1),
            None => (*letter, 1),
        },
        None => (b'\\', 0),
    }
}
