//! Each limit: one less passes, one more gives its code, and nothing is written beyond it.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use kiln_agent::unpack::{self, Limits};

use super::arena::Arena;
use super::forge::{BLOCK, Forge, gzip, zstd};
use super::oracle::listed;

const MIB: u64 = 1024 * 1024;
const TOO_LARGE: &str = "context_too_large";

fn code(archive: &[u8], limits: &Limits) -> Option<&'static str> {
    listed(archive, limits).err().map(|error| error.code())
}

#[test]
fn unpacked_bytes() {
    let archive = Forge::new().file("f", "content").end();
    for packed in [archive.clone(), gzip(&archive), zstd(&archive)] {
        let limits = |max| Limits { max_unpacked_bytes: max, ..Limits::default() };
        assert_eq!(code(&packed, &limits(archive.len() as u64)), None);
        assert_eq!(code(&packed, &limits(archive.len() as u64 - 1)), Some(TOO_LARGE));
    }
}

#[test]
fn packed_bytes() {
    let archive = gzip(&Forge::new().file("f", "content").end());
    let limits = |max| Limits { max_packed_bytes: max, ..Limits::default() };
    assert_eq!(code(&archive, &limits(archive.len() as u64)), None);
    assert_eq!(code(&archive, &limits(archive.len() as u64 - 1)), Some(TOO_LARGE));
}

#[test]
fn entries() {
    let limits = Limits { max_entries: 10, ..Limits::default() };
    let files = |count: usize| {
        (0..count).fold(Forge::new(), |forge, index| forge.file(&format!("f{index}"), "")).end()
    };
    assert_eq!(code(&files(10), &limits), None);
    assert_eq!(code(&files(11), &limits), Some("context_too_many_entries"));
    let same = |count: usize| (0..count).fold(Forge::new(), |forge, _| forge.directory("d")).end();
    assert_eq!(code(&same(11), &limits), Some("context_too_many_entries"));
    let implied = Forge::new().file(&format!("{}f", "d/".repeat(10)), "").end();
    assert_eq!(code(&implied, &limits), Some("context_too_many_entries"));
}

/// The same bytes for ever.
struct Endless {
    bytes: Vec<u8>,
    at: usize,
}

impl Read for Endless {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = (&self.bytes[self.at..]).read(into)?;
        self.at = (self.at + count) % self.bytes.len();
        Ok(count)
    }
}

#[test]
fn an_endless_archive_of_empty_files_ends_at_the_default_limit() {
    let endless = Endless { bytes: Forge::new().file("f", "").cut(), at: 0 };
    let mut seen = 0;
    let error = unpack::list(endless, &Limits::default(), |_| seen += 1).unwrap_err();
    assert_eq!((error.code(), seen), ("context_too_many_entries", 200_000));
}

#[test]
fn a_declared_size_is_refused_before_anything_is_written() {
    let arena = Arena::new();
    for size in [100 << 30, 1 << 62, i64::MAX as u64] {
        let archive = Forge::new().file("first", "x").lying("huge", size, "").end();
        let error = arena.unpack(&archive[..], &Limits::default()).unwrap_err();
        assert_eq!(error.code(), TOO_LARGE);
        assert!(error.to_string().contains("`huge`"), "{error}");
        assert!(!arena.root().join("huge").exists());
        let pax = Forge::new().pax(&[("size", &size.to_string())]).file("huge", "").end();
        assert_eq!(code(&pax, &Limits::default()), Some(TOO_LARGE));
        arena.clear();
    }
}

/// An archive of one file of zeros.
fn zeros(bytes: usize) -> Vec<u8> {
    Forge::new().entry(b'0', b"zeros", &vec![0; bytes]).end()
}

#[test]
fn bombs_stop_at_the_ratio() {
    let arena = Arena::new();
    let archive = zeros(100 << 20);
    for (what, bomb) in [("gzip", gzip(&archive)), ("zstd", zstd(&archive))] {
        let began = Instant::now();
        let error = arena.unpack(&bomb[..], &Limits::default()).unwrap_err();
        assert_eq!(error.code(), TOO_LARGE, "{what}");
        assert!(error.to_string().contains("context.max_ratio"), "{error}");
        assert!(arena.bytes_on_disk() <= 65 * MIB, "{what}: {} bytes", arena.bytes_on_disk());
        // The work up to the limit is included, in an unoptimised build on a busy machine.
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", began.elapsed());
        arena.assert_untouched(what);
        arena.clear();
    }
    assert_eq!(code(&archive, &Limits::default()), None, "a plain archive has no ratio");
}

#[test]
fn small_archives_of_zeros_are_no_bombs() {
    assert_eq!(code(&gzip(&zeros(60 << 20)), &Limits::default()), None);
}

#[test]
fn padding_can_be_a_bomb_too() {
    let limits = Limits { ratio_floor_bytes: MIB, ..Limits::default() };
    let padded = Forge::new().file("f", "").zero_blocks(4 << 20 >> 9).end();
    assert_eq!(code(&gzip(&padded), &limits), Some(TOO_LARGE));
}

#[test]
fn writing_stops_within_one_mebibyte_of_the_limit() {
    let arena = Arena::new();
    let limits = Limits { max_unpacked_bytes: 4 * MIB, ..Limits::default() };
    let quarter = vec![7; 1 << 20];
    let archive =
        (0..8).fold(Forge::new(), |forge, at| forge.entry(b'0', format!("f{at}").as_bytes(), &quarter)).end();
    for packed in [archive.clone(), gzip(&archive), zstd(&archive)] {
        assert_eq!(arena.unpack(&packed[..], &limits).unwrap_err().code(), TOO_LARGE);
        let written = arena.bytes_on_disk();
        assert!(written > 2 * MIB && written <= 5 * MIB, "{written}");
        arena.clear();
    }
}

#[test]
fn a_zstd_window_is_memory() {
    use zstd::zstd_safe::CParameter;
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.set_parameter(CParameter::WindowLog(24)).unwrap();
    io::Write::write_all(&mut encoder, &zeros(1 << 20)).unwrap();
    let archive = encoder.finish().unwrap();
    let limits = |log| Limits { zstd_window_log_max: log, ..Limits::default() };
    assert_eq!(code(&archive, &limits(24)), None);
    assert_eq!(code(&archive, &limits(23)), Some(TOO_LARGE));
    // A frame header by hand: no single segment, and a window of 2 GiB.
    let huge = [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3][..], &[1, 0, 0]].concat();
    assert_eq!(code(&huge, &Limits::default()), Some(TOO_LARGE));
    assert_eq!(code(&huge, &limits(0)), Some(TOO_LARGE), "a setting out of range is brought into it");
}

#[test]
fn depth_and_path_limits_are_exact() {
    let deep = |depth: usize| Forge::new().file(&vec!["d"; depth].join("/"), "").end();
    let limits = Limits { max_depth: 5, ..Limits::default() };
    assert_eq!(code(&deep(5), &limits), None);
    assert_eq!(code(&deep(6), &limits), Some("tar_unsafe_path"));
    let arena = Arena::new();
    let longest = vec!["c".repeat(255); 16].join("/");
    assert_eq!(longest.len(), 4095);
    let archive = Forge::new().pax(&[("path", &longest)]).file("f", "x").end();
    // The longest path is one that the kernel still takes.
    assert_eq!(arena.unpack(&archive[..], &Limits::default()).unwrap().entries, 1);
    assert!(archive.len() > 8 * BLOCK);
}
