use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::redact::SecretValue;
use super::spool::Limits;
use super::*;

const SECRET: &str = "hunter2-hunter2";

fn redactor() -> Redactor {
    Redactor::new([SecretValue { name: "s".into(), bytes: SECRET.into() }]).unwrap()
}

fn spool() -> (TempDir, PathBuf, Spool) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("log");
    let spool = Spool::create(&path, Limits::default()).unwrap();
    (dir, path, spool)
}

type Seen = Vec<(LogStream, String, Part)>;

/// Feeds the pieces and gives the file and what the observer saw.
fn run(pieces: &[(LogStream, &[u8])]) -> (Vec<u8>, Seen, SpoolReport) {
    let (_dir, path, spool) = spool();
    let mut seen = Vec::new();
    let mut pipeline = LogPipeline::new(&redactor(), spool, |line| {
        seen.push((line.stream, line.text.to_string(), line.part));
    });
    for (stream, bytes) in pieces {
        pipeline.push(*stream, bytes);
    }
    let (report, _) = pipeline.finish(10);
    (fs::read(path).unwrap(), seen, report)
}

#[test]
fn a_secret_is_caught_across_chunks_and_the_line_cap() {
    let filler = "x".repeat(frame::LINE_CAP - 4);
    let text = format!("{filler}{SECRET} end\n");
    for cut in 0..=SECRET.len() {
        let (first, second) = text.as_bytes().split_at(filler.len() + cut);
        let (file, seen, report) = run(&[(LogStream::Run, first), (LogStream::Run, second)]);
        assert_eq!(file, format!("{filler}*** end\n").as_bytes());
        assert_eq!(seen.len(), 2);
        assert!(seen[1].2.continues());
        assert_eq!(report.summary.bytes, file.len() as u64);
    }
}

#[test]
fn streams_do_not_mix_within_a_line() {
    use LogStream::{Run, Tool};
    let (file, seen, report) =
        run(&[(Run, b"run 1 "), (Tool, b"tool 1\nto"), (Run, b"a\nrun 2"), (Tool, b"ol 2\n")]);
    assert_eq!(file, b"tool 1\nrun 1 a\ntool 2\nrun 2");
    let expected = [(Tool, "tool 1"), (Run, "run 1 a"), (Tool, "tool 2"), (Run, "run 2")];
    let short: Vec<_> = seen.iter().map(|(stream, text, _)| (*stream, text.as_str())).collect();
    assert_eq!(short, expected);
    assert_eq!(seen[3].2, Part::First, "no newline came");
    assert_eq!(report.summary.lines, 4);
}

#[test]
fn a_flush_shows_a_prompt_but_not_the_start_of_a_secret() {
    let (_dir, path, spool) = spool();
    let seen = std::cell::RefCell::new(Vec::new());
    let mut pipeline = LogPipeline::new(&redactor(), spool, |line| {
        seen.borrow_mut().push((line.text.to_string(), line.truncated()));
    });
    pipeline.push(LogStream::Run, b"Continue? hunter2-");
    assert!(pipeline.pending() && seen.borrow().is_empty());
    pipeline.flush();
    assert!(!pipeline.pending());
    assert_eq!(*seen.borrow(), [("Continue? ".to_owned(), true)]);
    pipeline.push(LogStream::Tool, b"level=info\n");
    pipeline.push(LogStream::Run, b"hunter2 yes\n");
    assert_eq!(pipeline.last_lines(1), ["*** yes"]);
    let (_, lines) = pipeline.finish(2);
    assert_eq!(lines, ["level=info", "*** yes"]);
    assert_eq!(fs::read(path).unwrap(), b"Continue? \nlevel=info\n*** yes\n");
}

#[test]
fn the_observer_gets_raw_text_and_shows_it_inert() {
    let (_dir, _path, spool) = spool();
    let mut shown = Vec::new();
    let mut pipeline = LogPipeline::new(&redactor(), spool, |line| {
        shown.push((line.display(Colours::Strip).into_owned(), line.display(Colours::Keep).into_owned()));
    });
    pipeline.push(LogStream::Run, b"\x1b[31m50%\r\x1b[32mdone\x1b]0;title\x07\xff\n");
    let _ = pipeline.finish(0);
    assert_eq!(shown, [("done\u{fffd}".to_owned(), "\u{1b}[32mdone\u{fffd}\u{1b}[0m".to_owned())]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_is_the_redacted_stream(
        pieces in prop::collection::vec(prop::sample::select(vec![SECRET, "hunter2-", "\n", "text", "\r", "ä"]), 0..30),
        chunk in 1..40_usize,
    ) {
        let text = pieces.concat();
        let chunks: Vec<_> = text.as_bytes().chunks(chunk).map(|bytes| (LogStream::Run, bytes)).collect();
        let (file, seen, report) = run(&chunks);
        let mut expected = Vec::new();
        let mut whole = redactor();
        whole.push(text.as_bytes(), &mut expected);
        whole.finish(&mut expected);
        prop_assert_eq!(&file, &expected);
        prop_assert!(!String::from_utf8(file).unwrap().contains(SECRET));
        let lines: String = seen.iter().map(|(_, text, part)| text.clone() + if part.ends_line() { "\n" } else { "" }).collect();
        prop_assert_eq!(lines.as_bytes(), expected.as_slice());
        prop_assert_eq!(report.summary.lines, seen.len() as u64);
    }
}
