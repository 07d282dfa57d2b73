//! The whole module on real trees.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_protocol::Digest;
use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps};
use sha2::Digest as _;
use tempfile::TempDir;

use super::ignore::{Ignore, literally_ignored};
use super::pack::Scan;
use super::walk::{Kind, Walk};
use super::*;

/// A fixed time, so that two trees can be equal.
const THEN: i64 = 1_000_000_000;

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn rules(patterns: &str) -> Ignore {
    Ignore::parse(Path::new(".dockerignore"), patterns.as_bytes()).unwrap()
}

fn set_time(path: &Path, seconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// A directory in memory where there is one: some tests make many thousand files.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Makes files (their content is their name), directories (`name/`) and links (`name -> target`).
fn tree(paths: &[&str]) -> TempDir {
    let root = scratch();
    for path in paths {
        let (name, target) =
            path.split_once(" -> ").map_or((*path, None), |(name, target)| (name, Some(target)));
        let full = root.path().join(name);
        fs::create_dir_all(full.parent().unwrap()).unwrap();
        match target {
            Some(target) => symlink(target, &full).unwrap(),
            None if name.ends_with('/') => fs::create_dir_all(&full).unwrap(),
            None => fs::write(&full, name).unwrap(),
        }
    }
    for path in all_paths(root.path()) {
        set_time(&root.path().join(path), THEN);
    }
    root
}

/// Every path below `root`, relative, in the order of `Path`, found without the code under test.
fn all_paths(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![PathBuf::new()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(root.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                open.push(path.clone());
            }
            found.insert(path);
        }
    }
    found
}

/// The paths that the visit finds, in its order.
fn visited(root: &Path, ignore: &Ignore) -> Vec<PathBuf> {
    Walk::open(root, ignore).unwrap().map(|entry| walk::to_path(&entry.unwrap().path)).collect()
}

fn packed(root: &Path, ignore: &Ignore) -> (Packed, Vec<u8>) {
    let mut archive = Vec::new();
    let packed = pack(root, ignore, &mut archive).unwrap();
    (packed, archive)
}

/// Runs without the rights of root, whoever runs the tests.
fn as_ordinary_user<T: Send>(action: impl FnOnce() -> T + Send) -> T {
    let restricted = || {
        if rustix::process::geteuid().is_root() {
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        }
        action()
    };
    std::thread::scope(|scope| scope.spawn(restricted).join().unwrap())
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn entries_come_in_the_order_of_paths_with_parents_first() {
    let root = tree(&["b", "a/c", "a-b", "a/b/z", "a.d/x", "A", "empty/", "link -> a", "é"]);
    let expected: Vec<PathBuf> = all_paths(root.path()).into_iter().collect();
    assert_eq!(visited(root.path(), &Ignore::default()), expected);
}

#[test]
fn the_archive_depends_on_the_tree_alone() {
    let mut names: Vec<String> = (0..300).map(|n| format!("d{}/f{n}", n % 7)).collect();
    let paths = |names: &[String]| tree(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let first = paths(&names);
    names.reverse();
    let second = paths(&names);
    let (packed_first, archive) = packed(first.path(), &Ignore::default());
    let (packed_second, _) = packed(second.path(), &Ignore::default());
    assert_eq!(packed_first.digest, packed_second.digest);
    assert_eq!(packed_first.digest, Digest::from_sha256(sha2::Sha256::digest(&archive).into()));
    assert_eq!((packed_first.bytes, packed_first.entries), (archive.len() as u64, 307));
    set_time(&second.path().join("d0"), THEN + 1);
    assert_ne!(packed_first.digest, packed(second.path(), &Ignore::default()).0.digest);
}

/// A tree with everything that an archive can carry and that is easily lost.
fn odd_tree() -> TempDir {
    let long = "n".repeat(255);
    let deep = format!("{}/{long}/{long}", "p".repeat(100));
    let target = format!("-> {}", "t/".repeat(1000));
    let root = tree(&[
        "empty/",
        "file",
        "-dash",
        "line\nbreak",
        "quote\"back\\slash",
        "dir/ends.with ",
        "zero",
        &"m".repeat(100),
        &"m".repeat(101),
        &format!("{}/", "e".repeat(99)),
        &format!("{}/", "e".repeat(100)),
        &deep,
        "up -> ../x/./y//",
        "loop -> loop",
        "root -> /",
        "exact -> eeee",
        &format!("far {target}"),
        &format!("{} {target}", "l".repeat(150)),
        &format!("{} -> {}", "k".repeat(101), "t".repeat(100)),
        &format!("kk -> {}", "t".repeat(101)),
    ]);
    let path = |name: &str| root.path().join(name);
    fs::write(path("zero"), "").unwrap();
    fs::write(path("big"), vec![7; 300_000]).unwrap();
    fs::write(root.path().join(OsStr::from_bytes(b"latin\xE9\xFF")), "x").unwrap();
    fs::create_dir(root.path().join(OsStr::from_bytes(b"dir\xFE"))).unwrap();
    fs::write(root.path().join(OsStr::from_bytes(b"dir\xFE/\x01")), "x").unwrap();
    symlink(OsStr::from_bytes(b"to\xFF"), path("bytes")).unwrap();
    fs::hard_link(path("file"), path("hard")).unwrap();
    for (name, mode) in
        [("file", 0o4755), ("zero", 0o400), ("big", 0o2640), ("empty", 0o1777), ("dir", 0o700)]
    {
        chmod(&path(name), mode);
    }
    for path in all_paths(root.path()) {
        set_time(&root.path().join(path), THEN);
    }
    for (name, time) in [("file", 0), ("zero", 1), ("empty", 12), ("up", 12)] {
        set_time(&path(name), time);
    }
    root
}

/// Runs GNU tar on an archive, in the directory that it may write to.
fn gnu_tar(archive: &[u8], arguments: &[&str], directory: &Path) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), archive).unwrap();
    let mut tar = Command::new("tar");
    tar.env("TZ", "UTC0").env("LC_ALL", "C").args(arguments).arg("--file").arg(file.path());
    let done = tar.arg("--directory").arg(directory).output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
    done.stdout
}

#[test]
fn gnu_tar_lists_what_was_packed() {
    let root = odd_tree();
    let (packed, archive) = packed(root.path(), &Ignore::default());
    let paths = all_paths(root.path());
    assert_eq!(packed.entries, paths.len() as u64);

    let expected: Vec<u8> = paths.iter().flat_map(|path| listing(root.path(), path)).collect();
    let flags = ["--list", "--verbose", "--full-time", "--numeric-owner", "--quoting-style=literal"];
    let listed = gnu_tar(&archive, &flags, root.path());
    let columns = String::from_utf8_lossy(&listed).replace("  ", " ");
    let squeezed = columns.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    let expected = String::from_utf8_lossy(&expected).into_owned();
    let expected = expected.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    assert_eq!(squeezed, expected);
}

/// The line that GNU tar prints for a path.
fn listing(root: &Path, path: &Path) -> Vec<u8> {
    let meta = fs::symlink_metadata(root.join(path)).unwrap();
    let (letter, size, mut end) = match meta.file_type() {
        kind if kind.is_dir() => ('d', 0, b"/".to_vec()),
        kind if kind.is_symlink() => {
            ('l', 0, [b" -> ", &bytes(&fs::read_link(root.join(path)).unwrap())[..]].concat())
        }
        _ => ('-', meta.len(), Vec::new()),
    };
    let time = date(meta.mtime());
    let mut line = format!("{letter}{} 0/0 {size} {time} ", permissions(meta.mode())).into_bytes();
    line.extend(bytes(path));
    line.append(&mut end);
    line.push(b'\n');
    line
}

fn permissions(mode: u32) -> String {
    let mut text: Vec<u8> =
        (0..9).map(|bit| if mode & (0o400 >> bit) == 0 { b'-' } else { b"rwx"[bit % 3] }).collect();
    for (bit, place, letters) in [(0o4000, 2, b"Ss"), (0o2000, 5, b"Ss"), (0o1000, 8, b"Tt")] {
        if mode & bit != 0 {
            text[place] = letters[usize::from(text[place] == b'x')];
        }
    }
    String::from_utf8(text).unwrap()
}

/// The few times that the tests use, as text.
fn date(seconds: i64) -> &'static str {
    match seconds {
        0 => "1970-01-01 00:00:00",
        1 => "1970-01-01 00:00:01",
        12 => "1970-01-01 00:00:12",
        THEN => "2001-09-09 01:46:40",
        other => panic!("{other}"),
    }
}

/// All that an archive keeps of a path.
#[derive(Debug, PartialEq)]
struct Facts {
    path: PathBuf,
    kind: &'static str,
    /// Links have none of their own.
    mode: Option<u32>,
    mtime: i64,
    content: Vec<u8>,
}

fn facts(root: &Path) -> Vec<Facts> {
    let facts = |path: PathBuf| {
        let full = root.join(&path);
        let meta = fs::symlink_metadata(&full).unwrap();
        let (kind, content) = match meta.file_type() {
            kind if kind.is_dir() => ("directory", Vec::new()),
            kind if kind.is_symlink() => ("link", bytes(&fs::read_link(&full).unwrap())),
            kind if kind.is_file() => ("file", fs::read(&full).unwrap()),
            _ => ("other", Vec::new()),
        };
        let mode = (kind != "link").then_some(meta.mode() & 0o7777);
        Facts { path, kind, mode, mtime: meta.mtime(), content }
    };
    all_paths(root).into_iter().map(facts).collect()
}

#[test]
fn gnu_tar_unpacks_what_was_packed() {
    let root = odd_tree();
    let copy = scratch();
    gnu_tar(
        &packed(root.path(), &Ignore::default()).1,
        &["--extract", "--preserve-permissions"],
        copy.path(),
    );
    assert_eq!(facts(copy.path()), facts(root.path()));
    let hard = fs::symlink_metadata(copy.path().join("hard")).unwrap();
    assert_eq!(hard.nlink(), 1, "hard links are files of their own");
    // The second generation is the same archive.
    assert_eq!(
        packed(copy.path(), &Ignore::default()).0.digest,
        packed(root.path(), &Ignore::default()).0.digest
    );
}

#[test]
fn ignored_directories_appear_only_around_what_is_kept_in_them() {
    let root = tree(&[
        "docs/README.md",
        "docs/a/b.md",
        "docs/a/c.txt",
        "docs-old/x",
        "docs/z/deep/er/keep.md",
        "none/x",
        "empty/",
    ]);
    let ignore = rules("docs\nnone\nempty\n!docs/*.md\n!**/keep.md\n");
    let expected =
        ["docs", "docs/README.md", "docs/z", "docs/z/deep", "docs/z/deep/er", "docs/z/deep/er/keep.md"];
    let kept = ["docs-old", "docs-old/x"];
    assert_eq!(
        visited(root.path(), &ignore),
        expected.iter().chain(&kept).map(PathBuf::from).collect::<Vec<_>>()
    );
}

#[test]
fn nothing_at_all_is_an_archive_too() {
    let root = tree(&["a", "b/c"]);
    let (packed, archive) = packed(root.path(), &rules("**"));
    assert_eq!((packed.entries, packed.bytes, archive), (0, 1024, vec![0; 1024]));
}

#[test]
fn a_context_must_be_a_directory_or_a_link_to_one() {
    let root = tree(&["dir/file", "link -> dir", "dangling -> nowhere", "to-file -> dir/file"]);
    let entries = |name| {
        pack(&root.path().join(name), &Ignore::default(), &mut Vec::new()).map(|packed| packed.entries)
    };
    assert_eq!(entries("dir").unwrap(), 1);
    assert_eq!(entries("link").unwrap(), 1);
    for (name, expected) in [
        ("nowhere", "does not exist"),
        ("dangling", "does not exist"),
        ("dir/file", "is not a directory"),
        ("to-file", "is not a directory"),
        ("dir/file/x", "is not a directory"),
    ] {
        let error = entries(name).unwrap_err().to_string();
        assert!(error.contains(&format!("/{name}\" {expected}; give the directory")), "{error}");
    }
}

#[test]
fn what_an_archive_cannot_carry_is_noted() {
    let root = tree(&["a/file", "b/file"]);
    let _socket = UnixListener::bind(root.path().join("a/socket")).unwrap();
    let pipe = root.path().join("a/pi\u{1b}pe");
    rustix::fs::mkfifoat(CWD, &pipe, Mode::RUSR).unwrap();
    assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
    let (packed, _) = packed(root.path(), &Ignore::default());
    assert_eq!(packed.skipped, ["\"a/pi\\u{1b}pe\" is a named pipe", "\"a/socket\" is a socket"]);
    assert_eq!(packed.entries, 4);
    let counts = |patterns| {
        let scan = scan(root.path(), &rules(patterns)).unwrap();
        (scan.skipped.len(), scan.entries)
    };
    assert_eq!(counts("a/*\n!a/file"), (0, 4));
    assert_eq!(counts("a\n!a/socket"), (1, 2), "a note keeps no directory");
}

#[test]
fn the_largest_files_are_named() {
    let root = tree(&["c/4", "small", "c/dir/", "c/link -> 1"]);
    for (name, size) in [("c/1", 10_u64), ("c/2", 5000), ("a", 5000), ("c/3", 1 << 33), ("b", 7), ("d", 700)]
    {
        fs::File::create(root.path().join(name)).unwrap().set_len(size).unwrap();
    }
    let scan = scan(root.path(), &rules("d")).unwrap();
    let expected = [("c/3", 1 << 33), ("a", 5000), ("c/2", 5000), ("c/1", 10), ("b", 7)];
    assert_eq!(scan.largest, expected.map(|(path, size)| (PathBuf::from(path), size)));
    assert_eq!((scan.bytes, scan.entries), ((1 << 33) + 10_000 + 10 + 7 + 5 + 3, 10));
}

#[test]
fn packing_stops_at_the_first_unreadable_path_and_scanning_names_all() {
    let root = tree(&["a/secret", "b/", "c/x/file", "d/file", "ok", "pruned/file"]);
    let path = |name: &str| root.path().join(name);
    chmod(root.path(), 0o755);
    for (name, mode) in [("a/secret", 0o000), ("b", 0o000), ("c/x", 0o444), ("d", 0o711), ("pruned", 0o000)] {
        chmod(&path(name), mode);
    }
    let ignore = "pruned\n!pruned-not/x";
    let denied = |name: &str| {
        format!(
            "may not read \"{name}\" in the context; allow it with `chmod u+rX` or add it to .dockerignore"
        )
    };
    let messages = |scan: &Scan| scan.problems.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (scanned, packed, inner) = as_ordinary_user(|| {
        let inner = scan(&path("b"), &Ignore::default()).unwrap_err().to_string();
        (
            scan(root.path(), &rules(ignore)).unwrap(),
            pack(root.path(), &rules(ignore), &mut Vec::new()),
            inner,
        )
    });
    // `d` keeps its name secret from others than root only.
    let mut expected = vec![denied("a/secret"), denied("b"), denied("c/x")];
    if rustix::process::geteuid().is_root() {
        expected.push(denied("d"));
    }
    assert_eq!(messages(&scanned), expected);
    assert_eq!(packed.unwrap_err().to_string(), denied("a/secret"));
    assert_eq!(inner, denied("."));
    // So that an ordinary user can remove the tree.
    for name in ["b", "c/x", "pruned"] {
        chmod(&path(name), 0o755);
    }
}

#[test]
fn problems_of_a_scan_are_limited_and_the_rest_is_counted() {
    let names: Vec<String> = (0..1003).map(|n| format!("{n:04}")).collect();
    let root = tree(&names.iter().map(String::as_str).collect::<Vec<_>>());
    chmod(root.path(), 0o755);
    for name in &names {
        chmod(&root.path().join(name), 0o000);
    }
    let scan = as_ordinary_user(|| scan(root.path(), &Ignore::default()).unwrap());
    assert_eq!(scan.problems.len(), 1001);
    assert_eq!(scan.problems[1000].to_string(), "3 more paths of the context cannot be packed");
}

#[test]
fn a_directory_that_is_replaced_by_a_link_is_not_followed() {
    let outside = tree(&["host-file"]);
    let root = tree(&["a", "b/inner/file", "c/x"]);
    let ignore = Ignore::default();
    let mut walk = Walk::open(root.path(), &ignore).unwrap();
    assert_eq!(walk.next().unwrap().unwrap().path, b"a");
    for name in ["b", "c"] {
        fs::remove_dir_all(root.path().join(name)).unwrap();
    }
    symlink(outside.path(), root.path().join("b")).unwrap();
    let rest: Vec<_> = walk.map(Result::unwrap).collect();
    // The link is packed as the link that it is now; what vanished is as if it had never been there.
    assert_eq!(rest.len(), 1);
    assert!(matches!(&rest[0].kind, Kind::Symlink(target) if *target == bytes(outside.path())));
}

#[test]
fn a_directory_that_is_replaced_during_its_visit_does_not_lead_out() {
    let outside = tree(&["dir/x", "dir/y"]);
    let root = tree(&["dir/x", "dir/y", "z"]);
    fs::write(outside.path().join("dir/y"), "not ours").unwrap();
    let ignore = Ignore::default();
    let mut walk = Walk::open(root.path(), &ignore).unwrap();
    assert_eq!(walk.next().unwrap().unwrap().path, b"dir");
    assert_eq!(walk.next().unwrap().unwrap().path, b"dir/x");
    fs::rename(root.path().join("dir"), root.path().join("moved")).unwrap();
    symlink(outside.path().join("dir"), root.path().join("dir")).unwrap();
    let entry = walk.next().unwrap().unwrap();
    assert_eq!(entry.path, b"dir/y");
    assert!(matches!(entry.kind, Kind::File { size: 5, .. }), "{entry:?}");
}

/// Makes a directory in a directory in a directory …, each named `d`, with a file `e` beside each.
fn chain(root: &Path, depth: usize) {
    let mut at = rustix::fs::open(root, OFlags::DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..depth {
        rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
        rustix::fs::openat(&at, "e", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        at = rustix::fs::openat(&at, "d", OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
}

#[test]
fn depth_is_bounded_by_nothing() {
    const DEPTH: usize = 10_000;
    let root = scratch();
    chain(root.path(), DEPTH);
    let ignore = rules("**/x");
    let (mut entries, mut longest) = (0, 0);
    for entry in Walk::open(root.path(), &ignore).unwrap() {
        longest = longest.max(entry.unwrap().path.len());
        entries += 1;
        if entries == DEPTH {
            // The tests beside this one hold some files as well.
            assert!(fs::read_dir("/proc/self/fd").unwrap().count() < 1000, "at the deepest place");
        }
    }
    // Too deep for the recursion of `TempDir`.
    let removed = Command::new("rm").arg("-r").arg(root.path().join("d")).status().unwrap();
    assert!(removed.success());
    assert_eq!((entries, longest), (2 * DEPTH, 2 * DEPTH - 1));
}

#[test]
fn a_closed_parent_that_moved_is_noticed() {
    let root = tree(&["here/", "there/"]);
    chain(&root.path().join("here"), 100);
    let ignore = Ignore::default();
    let mut walk = Walk::open(root.path(), &ignore).unwrap();
    let deepest = walk.by_ref().take(101).last().unwrap().unwrap();
    assert_eq!(deepest.path.len(), "here".len() + 2 * 100);
    let (middle, elsewhere) = (root.path().join("here/d/d"), root.path().join("there/d"));
    fs::rename(middle, elsewhere).unwrap();
    let rest: Vec<_> = walk.collect();
    let (last, before) = rest.split_last().unwrap();
    assert_eq!(
        last.as_ref().unwrap_err().to_string().split(';').next().unwrap(),
        "\"here/d/d\" was moved while the context was read"
    );
    assert_eq!(before.len(), 98);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The visit with all its short cuts finds what the rule says, applied to every path there is.
    #[test]
    fn the_visit_equals_the_literal_filter(
        paths in proptest::collection::vec("[abA-]{1,2}(/[abA-]{1,2}){0,3}/?", 1..25),
        patterns in proptest::collection::vec("!?([abA]|\\*|\\*\\*|\\?|/|[ab]/|/\\*\\*|\\[\\^?a\\]|\\{2\\}|\\||\\\\b|-){1,5}", 1..7),
    ) {
        let root = scratch();
        for path in &paths {
            let full = root.path().join(path);
            // A file may stand where another path wants a directory.
            if fs::create_dir_all(full.parent().unwrap()).is_ok() {
                let _ = if path.ends_with('/') { fs::create_dir_all(full) } else { fs::write(full, "") };
            }
        }
        let Ok(ignore) = Ignore::parse(Path::new("p"), patterns.join("\n").as_bytes()) else { return Ok(()) };
        let kept = all_paths(root.path()).into_iter().filter(|path| !literally_ignored(&ignore, &bytes(path)));
        let with_parents = kept.flat_map(|path| path.ancestors().map(Path::to_owned).collect::<Vec<_>>());
        let expected: BTreeSet<PathBuf> = with_parents.filter(|path| path != Path::new("")).collect();
        prop_assert_eq!(visited(root.path(), &ignore), expected.into_iter().collect::<Vec<_>>());
    }

    /// No text makes the reader panic, and what it accepts can be asked about any path.
    #[test]
    fn no_ignore_file_panics(text in proptest::collection::vec(any::<u8>(), 0..60), path in "[^/\0]{1,4}(/[^/\0]{1,4})?") {
        if let Ok(ignore) = Ignore::parse(Path::new("p"), &text) {
            let _ = ignore.verdict(&ignore.root(), path.as_bytes());
            let _ = literally_ignored(&ignore, path.as_bytes());
        }
    }
}
