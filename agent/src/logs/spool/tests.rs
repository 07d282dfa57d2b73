use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const LIMITS: Limits = Limits { head_bytes: 300, tail_bytes: 1_600 };

/// Bytes on disk under a directory.
fn usage(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries.map(|e| if e.path().is_dir() { usage(&e.path()) } else { e.metadata().unwrap().len() }).sum()
}

fn spool(limits: Limits) -> (TempDir, PathBuf, Spool) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("log");
    let spool = Spool::create(&path, limits).unwrap();
    (dir, path, spool)
}

fn lines(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| format!("this is line {i}\n").into_bytes()).collect()
}

/// What stands before and after the marker, and the numbers in it.
fn parts(text: &[u8]) -> (&[u8], &[u8], u64, u64) {
    let at = text.windows(7).position(|window| window == b"[kiln: ").expect("a marker");
    let length = text[at..].iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let marker = str::from_utf8(&text[at..at + length]).unwrap();
    let numbers: Vec<u64> =
        marker.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    let expected = format!(
        "[kiln: {} bytes ({} lines) dropped here; the cap is {} bytes, key logs.max_bytes]\n",
        numbers[0], numbers[1], numbers[2]
    );
    assert_eq!(marker, expected);
    (&text[..at], &text[at + length..], numbers[0], numbers[1])
}

/// The file against the log: complete, or head, marker and tail with a gap of exactly the length told.
fn check(text: &[u8], log: &[u8], limits: Limits) -> u64 {
    if text == log {
        return 0;
    }
    let (head, tail, bytes, lines) = parts(text);
    let told = |head: &[u8]| length(head) + bytes + length(tail) == length(log);
    // The marker gets a line of its own.
    let head = if told(head) { head } else { head.strip_suffix(b"\n").unwrap() };
    assert!(told(head) && log.starts_with(head) && log.ends_with(tail));
    let dropped = &log[head.len()..log.len() - tail.len()];
    assert_eq!(dropped.split(|byte| *byte == b'\n').count() as u64 - 1, lines);
    assert!(length(tail) <= limits.tail_bytes);
    bytes
}

#[test]
fn a_short_log_is_the_file() {
    let (dir, path, mut spool) = spool(LIMITS);
    spool.write(b"one\n");
    spool.write(b"two");
    assert!(spool.inside_line());
    assert_eq!(fs::read(&path).unwrap(), b"one\ntwo", "on disk before the end");
    assert_eq!(spool.last_lines(1), ["two"]);
    let SpoolReport { summary, fault } = spool.finish();
    assert!(fault.is_none());
    assert_eq!((summary.lines, summary.bytes, summary.dropped_bytes), (2, 7, 0));
    assert_eq!(summary.sha256, Digest::from_sha256(Sha256::digest(b"one\ntwo").into()));
    assert_eq!(usage(dir.path()), 7);
}

#[test]
fn a_long_log_keeps_start_and_end_and_never_more_than_the_cap() {
    let (dir, path, mut spool) = spool(LIMITS);
    let log = lines(1_000);
    // The plan of the tail is a few dozen bytes.
    let most = LIMITS.cap() + 64;
    for chunk in log.chunks(37) {
        spool.write(chunk);
        assert!(usage(dir.path()) <= most, "{} on disk", usage(dir.path()));
    }
    let SpoolReport { summary, fault } = spool.finish();
    assert!(fault.is_none());
    let text = fs::read(&path).unwrap();
    let dropped = check(&text, &log, LIMITS);
    assert_eq!((summary.lines, summary.bytes, summary.dropped_bytes), (1_000, length(&log), dropped));
    assert_eq!(summary.sha256, Digest::from_sha256(Sha256::digest(&log).into()));
    let (head, tail, ..) = parts(&text);
    assert!(head.ends_with(b"\n") && tail.starts_with(b"this is line "), "cut between lines");
    assert!(length(head) > LIMITS.head_bytes - 20 && length(tail) > LIMITS.tail_bytes * 3 / 4);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the file");
}

#[test]
fn a_log_without_newlines_and_one_that_just_fits() {
    for (log, fits) in [(vec![b'x'; 10_000], false), (vec![b'x'; 1_900], true), (vec![b'x'; 301], true)] {
        let (_dir, path, mut spool) = spool(LIMITS);
        spool.write(&log);
        let dropped = spool.finish().summary.dropped_bytes;
        assert_eq!(dropped == 0, fits);
        assert_eq!(check(&fs::read(&path).unwrap(), &log, LIMITS), dropped);
    }
}

#[test]
fn limits_of_nothing_still_work() {
    let (_dir, path, mut spool) = spool(Limits { head_bytes: 0, tail_bytes: 0 });
    let log = lines(500);
    spool.write(&log);
    assert!(spool.finish().summary.dropped_bytes > 0);
    let text = fs::read(&path).unwrap();
    assert!(text.starts_with(b"[kiln: ") && text.ends_with(b"line 499\n"));
}

#[test]
fn an_existing_file_is_not_touched() {
    let (_dir, path, spool) = spool(LIMITS);
    fs::write(&path, "precious").unwrap();
    assert!(matches!(Spool::create(&path, LIMITS), Err(SpoolError::Create { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    drop(spool);
}

#[test]
fn what_a_killed_writer_left_is_put_together() {
    let log = lines(400);
    for written in (0..log.len()).step_by(41) {
        let (_dir, path, mut spool) = spool(LIMITS);
        log[..written].chunks(29).for_each(|chunk| spool.write(chunk));
        drop(spool);
        let recovered = recover(&path).unwrap();
        let text = fs::read(&path).unwrap();
        assert_eq!(recovered.bytes, length(&text));
        assert_eq!(check(&text, &log[..written], LIMITS), recovered.dropped_bytes);
        recover(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), text, "a second time changes nothing");
    }
}

/// Ends the join at its `n`-th step; false if it has fewer.
fn die_at(path: &Path, n: usize) -> bool {
    let mut left = n;
    let result = join::finish_with(path, &mut || {
        left = left.checked_sub(1).ok_or_else(|| io::Error::other("killed"))?;
        Ok(())
    });
    result.is_err()
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_death_at_any_step_of_the_end_loses_nothing() {
    for log in [lines(100), lines(400), vec![b'x'; 5_000]] {
        let (dir, path, mut spool) = spool(LIMITS);
        spool.write(&log);
        drop(spool);
        let mut steps = 0;
        loop {
            let other = TempDir::new().unwrap();
            copy_dir(dir.path(), other.path());
            let copy = other.path().join(path.file_name().unwrap());
            let died = die_at(&copy, steps);
            assert!(usage(other.path()) <= LIMITS.cap() + LIMITS.segment() + 256);
            recover(&copy).unwrap();
            check(&fs::read(&copy).unwrap(), &log, LIMITS);
            assert_eq!(fs::read_dir(other.path()).unwrap().count(), 1);
            if !died {
                break;
            }
            steps += 1;
        }
        assert!(steps > 10, "only {steps} steps");
    }
}

#[test]
fn a_death_in_the_middle_of_a_write_loses_nothing() {
    let log = lines(400);
    let (dir, path, mut spool) = spool(LIMITS);
    spool.write(&log);
    drop(spool);
    // The marker, and the first segment, in any length.
    die_at(&path, 2);
    let full = fs::metadata(&path).unwrap().len();
    let head = TailDir::of(&path).plan().unwrap().unwrap().head_bytes;
    assert!(full > head + 150, "marker and a segment");
    for kept in head..=full {
        let other = TempDir::new().unwrap();
        copy_dir(dir.path(), other.path());
        let copy = other.path().join("log");
        OpenOptions::new().write(true).open(&copy).unwrap().set_len(kept).unwrap();
        recover(&copy).unwrap();
        check(&fs::read(&copy).unwrap(), &log, LIMITS);
    }
    // Power loss may take bytes from the head too; the rest is still worth having.
    OpenOptions::new().write(true).open(&path).unwrap().set_len(head - 50).unwrap();
    recover(&path).unwrap();
    assert!(fs::read(&path).unwrap().ends_with(b"line 399\n"));
}

/// A file on which every write fails as on a full disk.
fn full_disk() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

#[test]
fn a_full_disk_does_not_stop_the_build_and_is_told() {
    let log = lines(100);
    for before in [5, 60] {
        let (_dir, path, mut spool) = spool(LIMITS);
        let kept = lines(before);
        spool.write(&kept);
        match &mut spool.sink {
            Sink::Head(section) | Sink::Tail(section) => section.file = full_disk(),
            Sink::Lost(_) => unreachable!(),
        }
        spool.write(&log[kept.len()..]);
        spool.write(b"the end\n");
        assert_eq!(spool.last_lines(1), ["the end"], "memory does not need the disk");
        let SpoolReport { summary, fault } = spool.finish();
        let Some(fault @ SpoolError::Write { .. }) = fault else { panic!("{fault:?}") };
        assert!(fault.to_string().contains("not kept"));
        let text = String::from_utf8(fs::read(&path).unwrap()).unwrap();
        let lost = log.len() - kept.len() + 8;
        assert_eq!(
            (summary.lines, summary.bytes, summary.dropped_bytes),
            (101, length(&log) + 8, lost as u64)
        );
        assert!(text.starts_with(str::from_utf8(&kept).unwrap()));
        assert!(text.contains(&format!("[kiln: {lost} bytes dropped from here on")), "{text}");
    }
}

#[test]
fn a_segment_that_cannot_be_made_is_a_full_disk() {
    let (_dir, path, mut spool) = spool(LIMITS);
    fs::write(TailDir::of(&path).segment(0, 0).parent().unwrap(), "in the way").unwrap();
    spool.write(&lines(100));
    fs::remove_file(TailDir::of(&path).segment(0, 0).parent().unwrap()).unwrap();
    let report = spool.finish();
    assert!(matches!(report.fault, Some(SpoolError::Write { .. })));
    assert!(report.summary.dropped_bytes > 0);
}

#[test]
fn a_join_that_fails_can_be_tried_again() {
    let (_dir, path, mut spool) = spool(LIMITS);
    let log = lines(100);
    spool.write(&log);
    let away = path.with_extension("away");
    fs::rename(&path, &away).unwrap();
    let report = spool.finish();
    assert!(matches!(report.fault, Some(SpoolError::Join { .. })));
    assert_eq!(report.summary.bytes, length(&log));
    fs::rename(&away, &path).unwrap();
    recover(&path).unwrap();
    check(&fs::read(&path).unwrap(), &log, LIMITS);
}

#[test]
fn remove_leaves_nothing() {
    let (dir, path, mut spool) = spool(LIMITS);
    spool.write(&lines(100));
    drop(spool);
    remove(&path).unwrap();
    remove(&path).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_log_in_any_chunks_is_kept_as_told(
        lengths in prop::collection::vec(0..400_usize, 0..40),
        chunks in prop::collection::vec(1..700_usize, 1..5),
        head_bytes in 0..600_u64,
        tail_bytes in 1_024..2_000_u64,
    ) {
        let limits = Limits { head_bytes, tail_bytes };
        let log: Vec<u8> = lengths.iter().flat_map(|n| [vec![b'a'; *n], b"\n".to_vec()].concat()).collect();
        let (dir, path, mut spool) = spool(limits);
        let mut rest = log.as_slice();
        for &n in chunks.iter().cycle() {
            let (chunk, left) = rest.split_at(n.min(rest.len()));
            spool.write(chunk);
            prop_assert!(usage(dir.path()) <= limits.cap() + 64);
            rest = left;
            if rest.is_empty() { break; }
        }
        let summary = spool.finish().summary;
        let dropped = check(&fs::read(&path).unwrap(), &log, limits);
        prop_assert_eq!((summary.lines, summary.dropped_bytes), (lengths.len() as u64, dropped));
    }
}
