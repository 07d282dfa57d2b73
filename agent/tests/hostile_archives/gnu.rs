//! Archives made by GNU tar in each of its formats: the same entries, and the same tree on the disk.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Output;

use kiln_agent::unpack::{Limits, Modes};

use super::arena::{Arena, snapshot};
use super::forge::gzip;
use super::oracle::{difference, listed, tar};

const OLD_TIME: &str = "--mtime=2001-02-03 04:05:06";

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A tree with everything that the format can hold.
fn plant(root: &Path, can_be_long: bool) {
    fs::create_dir_all(root.join("dir/empty")).unwrap();
    fs::write(root.join("dir/file"), "content").unwrap();
    fs::write(root.join("empty file"), "").unwrap();
    fs::write(root.join("block"), [7; 512]).unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"caf\xc3\xa9 \xff\n")), "odd").unwrap();
    fs::hard_link(root.join("dir/file"), root.join("zz hard")).unwrap();
    symlink("/usr/share/zoneinfo/UTC", root.join("outward")).unwrap();
    symlink("dir", root.join("inward")).unwrap();
    fs::set_permissions(root.join("block"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(root.join("dir/empty"), fs::Permissions::from_mode(0o1777)).unwrap();
    if can_be_long {
        let deep = root.join("long").join("n".repeat(120)).join("m".repeat(200));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("leaf"), "deep").unwrap();
        fs::hard_link(deep.join("leaf"), root.join("zz long hard")).unwrap();
        symlink("t".repeat(180), deep.join("link")).unwrap();
    }
}

fn check(format: &str, members: &[&str], can_be_long: bool) {
    let work = tempfile::tempdir().unwrap();
    let (source, theirs) = (work.path().join("source"), work.path().join("theirs"));
    plant(&source, can_be_long);
    fs::create_dir(&theirs).unwrap();
    let create = [&["--create", "--file=../a.tar", "--sort=name", OLD_TIME, format][..], members].concat();
    succeeded(&tar(&create, &source));
    succeeded(&tar(&["--extract", "--file=../a.tar", "--preserve-permissions", "--no-same-owner"], &theirs));
    let archive = fs::read(work.path().join("a.tar")).unwrap();

    let ours = listed(&archive, &Limits::default()).unwrap_or_else(|error| panic!("{format}: {error}"));
    let different = difference(&archive, &ours);
    assert_eq!(different, None, "{format}: {}", different.as_deref().unwrap_or_default());

    let arena = Arena::new();
    arena.unpack_as(Modes::Verbatim, &gzip(&archive)[..], &Limits::default()).unwrap();
    assert_eq!(snapshot(&arena.root()), snapshot(&theirs), "{format}");
    arena.assert_untouched(format);
}

#[test]
fn gnu_format() {
    check("--format=gnu", &["."], true);
    check("--format=oldgnu", &["."], true);
}

#[test]
fn pax_format() {
    check("--format=pax", &["."], true);
}

#[test]
fn pax_format_with_global_header() {
    check("--format=pax", &["--pax-option=globexthdr.name=g,comment=hello", "."], true);
}

#[test]
fn ustar_format() {
    check("--format=ustar", &["."], false);
}

#[test]
fn v7_format() {
    check("--format=v7", &["."], false);
}

#[test]
fn members_named_twice() {
    check("--format=gnu", &["dir", "dir/file", "zz hard", "zz hard"], false);
}
