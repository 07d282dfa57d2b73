//! The tree that an accepted archive makes, and what happens when the disk or the source does not play along.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use kiln_agent::unpack::{self, Limits, Modes, Packing, UnpackError};

use super::arena::Arena;
use super::forge::{Forge, gzip, set_octal, zstd};

fn unpacked(archive: &[u8]) -> Arena {
    unpacked_as(Modes::Owned, archive)
}

fn unpacked_as(modes: Modes, archive: &[u8]) -> Arena {
    let arena = Arena::new();
    arena.unpack_as(modes, archive, &Limits::default()).unwrap();
    arena.assert_untouched("an accepted archive");
    arena
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn mtime(path: &Path) -> i64 {
    fs::symlink_metadata(path).unwrap().mtime()
}

fn with_mode(forge: Forge, flag: u8, name: &str, mode: u64) -> Forge {
    forge.with(flag, name.as_bytes(), b"", |header| set_octal(&mut header[100..108], mode))
}

#[test]
fn times_of_files_links_and_directories_stick() {
    let arena = unpacked(
        &Forge::new().directory("d").file("d/f", "x").symlink("d/s", "/nowhere").file("i/f", "").end(),
    );
    for name in ["d", "d/f", "d/s", "i/f"] {
        assert_eq!(mtime(&arena.root().join(name)), 1_700_000_000, "{name}");
    }
    assert_eq!(mtime(&arena.root().join("i")), 0, "an implied directory");
    let fraction = Forge::new().pax(&[("mtime", "1234.999")]).file("f", "").end();
    let meta = fs::metadata(unpacked(&fraction).root().join("f")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1234, 0));
}

#[test]
fn modes_are_kept_in_a_slot() {
    let archive = with_mode(
        with_mode(with_mode(Forge::new(), b'0', "su", 0o4755), b'5', "tmp", 0o1777),
        b'0',
        "none",
        0,
    );
    let arena = unpacked_as(Modes::Verbatim, &archive.file("i/f", "").end());
    for (name, wanted) in [("su", 0o4755), ("tmp", 0o1777), ("none", 0), ("i", 0o755)] {
        assert_eq!(mode(&arena.root().join(name)), wanted, "{name}");
    }
}

#[test]
fn modes_are_tamed_for_a_user() {
    let archive = with_mode(
        with_mode(with_mode(Forge::new(), b'0', "su", 0o6755), b'5', "tmp", 0o3000),
        b'0',
        "none",
        0,
    );
    let arena = unpacked_as(Modes::Owned, &archive.end());
    for (name, wanted) in [("su", 0o755), ("tmp", 0o700), ("none", 0o600)] {
        assert_eq!(mode(&arena.root().join(name)), wanted, "{name}");
    }
}

#[test]
fn a_read_only_directory_can_still_be_filled() {
    let archive = with_mode(Forge::new(), b'5', "d", 0o555).file("d/e/f", "x").end();
    let arena = unpacked_as(Modes::Verbatim, &archive);
    assert_eq!(mode(&arena.root().join("d")), 0o555);
    assert_eq!(fs::read(arena.root().join("d/e/f")).unwrap(), b"x");
    // An ordinary user could not remove it otherwise.
    fs::set_permissions(arena.root().join("d"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn the_root_keeps_its_mode() {
    let arena = Arena::new();
    let before = mode(&arena.root());
    arena
        .unpack_as(Modes::Verbatim, &with_mode(Forge::new(), b'5', "./", 0o001).end()[..], &Limits::default())
        .unwrap();
    assert_eq!(mode(&arena.root()), before);
}

#[test]
fn files_belong_to_the_caller() {
    let root_owned = Forge::new().with(b'0', b"f", b"", |header| header[108..124].fill(0)).end();
    let other_owned = Forge::new().file("f", "").end();
    let caller = rustix::process::geteuid().as_raw();
    for archive in [root_owned, other_owned] {
        assert_eq!(fs::metadata(unpacked(&archive).root().join("f")).unwrap().uid(), caller);
    }
}

#[test]
fn the_later_entry_counts() {
    let arena = unpacked(&Forge::new().file("f", "first, and longer").file("f", "second").end());
    assert_eq!(fs::read(arena.root().join("f")).unwrap(), b"second");
    let arena = unpacked(&Forge::new().symlink("f", "../canary/victim").file("f", "second").end());
    assert!(fs::symlink_metadata(arena.root().join("f")).unwrap().is_file());
    let arena = unpacked(&with_mode(Forge::new().directory("d"), b'5', "d", 0o711).end());
    assert_eq!(mode(&arena.root().join("d")), 0o711);
}

#[test]
fn hard_links_share_a_file_until_one_is_replaced() {
    let arena = unpacked(
        &Forge::new().file("a", "1").hard_link("d/b", "a").hard_link("c", "d/b").file("a", "2").end(),
    );
    let inode = |name: &str| fs::metadata(arena.root().join(name)).unwrap().ino();
    assert_eq!(inode("d/b"), inode("c"));
    assert_ne!(inode("a"), inode("c"));
    assert_eq!(fs::read(arena.root().join("c")).unwrap(), b"1");
    let arena = unpacked(&Forge::new().file("a", "kept").hard_link("a", "./a").end());
    assert_eq!(fs::read(arena.root().join("a")).unwrap(), b"kept");
}

#[test]
fn symlink_targets_are_stored_verbatim() {
    let arena = unpacked(&Forge::new().symlink("s", "/usr//share/../x/").end());
    assert_eq!(fs::read_link(arena.root().join("s")).unwrap().as_os_str(), "/usr//share/../x/");
}

#[test]
fn every_packing_gives_the_same_tree() {
    let (first, second) = (Forge::new().file("f", "x").cut(), Forge::new().file("g", "y").end());
    let archive = [&first[..], &second].concat();
    let table = [
        (archive.clone(), Packing::Plain),
        (gzip(&archive), Packing::Gzip),
        ([gzip(&first), gzip(b""), gzip(&second)].concat(), Packing::Gzip),
        (zstd(&archive), Packing::Zstd),
        ([zstd(&first), zstd(&second)].concat(), Packing::Zstd),
    ];
    for (packed, packing) in table {
        let arena = Arena::new();
        let summary = arena.unpack(&packed[..], &Limits::default()).unwrap();
        let figures = (summary.packing, summary.packed_bytes, summary.unpacked_bytes, summary.content_bytes);
        assert_eq!(figures, (packing, packed.len() as u64, archive.len() as u64, 2));
        assert_eq!(fs::read(arena.root().join("g")).unwrap(), b"y");
    }
}

#[test]
fn content_can_be_read_in_passing() {
    let archive = Forge::new().file("a", "skipped").file("Dockerfile", "FROM scratch").file("b", "").end();
    let mut found = Vec::new();
    let summary = unpack::visit(&archive[..], &Limits::default(), |entry, body| {
        if entry.path == b"Dockerfile" {
            assert_eq!(&archive[usize::try_from(entry.data_offset).unwrap()..][..4], b"FROM");
            let mut buffer = [0; 5];
            loop {
                match body.read(&mut buffer)? {
                    0 => break,
                    count => found.extend_from_slice(&buffer[..count]),
                }
            }
        }
        Ok::<_, UnpackError>(())
    });
    assert_eq!(summary.unwrap().entries, 3);
    assert_eq!(found, b"FROM scratch");
}

#[test]
fn an_error_of_the_visitor_is_handed_on() {
    #[derive(Debug)]
    struct Enough;
    impl From<UnpackError> for Enough {
        fn from(error: UnpackError) -> Self {
            panic!("{error}")
        }
    }
    let archive = Forge::new().file("a", "content").end();
    assert!(unpack::visit(&archive[..], &Limits::default(), |_, _| Err(Enough)).is_err());
}

#[test]
fn a_failing_source_is_no_fault_of_the_archive() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    let archive = Forge::new().file("f", "content").end();
    for start in [&b""[..], &archive[..700], &gzip(&archive)[..40], &zstd(&archive)[..40]] {
        let error = unpack::list(start.chain(Broken), &Limits::default(), |_| ()).unwrap_err();
        assert_eq!(error.code(), "context_io");
    }
}

#[test]
fn what_is_in_the_root_already_is_neither_followed_nor_replaced() {
    let arena = Arena::new();
    symlink(arena.canary(), arena.root().join("s")).unwrap();
    symlink(arena.canary().join("victim"), arena.root().join("v")).unwrap();
    fs::write(arena.root().join("f"), "here first").unwrap();
    for archive in [
        Forge::new().file("s/evil", "x").end(),
        Forge::new().file("s", "x").end(),
        Forge::new().directory("s").end(),
        Forge::new().symlink("s", "/").end(),
        Forge::new().file("v", "x").end(),
        Forge::new().file("f", "x").end(),
        Forge::new().file("new", "").hard_link("f", "new").end(),
    ] {
        let error = arena.unpack(&archive[..], &Limits::default()).unwrap_err();
        assert_eq!(error.code(), "context_io", "{error}");
        arena.assert_untouched("a root that is not empty");
        assert_eq!(fs::read(arena.root().join("f")).unwrap(), b"here first");
    }
}

/// Does something to the disk once it has handed out its first part.
struct Meddling<'a, F: FnOnce()> {
    parts: [&'a [u8]; 2],
    meddle: RefCell<Option<F>>,
}

impl<F: FnOnce()> Read for Meddling<'_, F> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.parts[0].is_empty()
            && let Some(meddle) = self.meddle.take()
        {
            meddle();
            self.parts.swap(0, 1);
        }
        self.parts[0].read(into)
    }
}

/// What the second part of an archive may do if the first one made `d` and `d/sub`.
fn second_parts() -> Vec<Vec<u8>> {
    vec![
        Forge::new().file("d/evil", "x").end(),
        Forge::new().file("d/sub/evil", "x").end(),
        Forge::new().directory("d/sub/evil").end(),
        Forge::new().symlink("d/sub/evil", "x").end(),
        Forge::new().hard_link("d/sub/evil", "other/f").end(),
        Forge::new().hard_link("h", "d/sub/f").end(),
        Forge::new().file("d/sub/f", "replaces").end(),
        Forge::new().end(),
    ]
}

#[test]
fn a_directory_swapped_for_a_symlink_meanwhile_is_not_entered() {
    let arena = Arena::new();
    let directory = arena.root().join("d");
    let before = Forge::new().directory("d").directory("d/sub").file("d/sub/f", "").file("other/f", "").cut();
    // More than a read buffer, so that the first part is on the disk before the second is asked for.
    let filler = Forge::new().entry(b'0', b"filler", &vec![0; 200_000]).cut();
    let first = [before, filler].concat();
    for second in second_parts() {
        let meddle = || {
            fs::remove_dir_all(&directory).unwrap();
            symlink("../canary", &directory).unwrap();
        };
        let source = Meddling { parts: [&first, &second], meddle: RefCell::new(Some(meddle)) };
        let error = arena.unpack(source, &Limits::default()).unwrap_err();
        assert_eq!(error.code(), "context_io", "{error}");
        arena.assert_untouched("a swapped directory");
        arena.clear();
    }
}
