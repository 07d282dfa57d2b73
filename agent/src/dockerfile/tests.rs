//! Tests of reading, and what the tests of the parts share.

use kiln_protocol::request::ImageFormat;
use proptest::prelude::*;

use super::*;

pub(super) const BUILDAH_1_28: Version = Version::new(1, 28, 2);
pub(super) const BUILDAH_NEW: Version = Version::new(1, 45, 0);

pub(super) fn args(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

pub(super) fn input(build_args: &BTreeMap<String, String>) -> BuildInput<'_> {
    BuildInput { build_args, target: None, buildah: BUILDAH_1_28, architecture: "amd64" }
}

#[test]
fn reads_a_whole_file() {
    let text = "# syntax=docker/dockerfile:1\nARG V=1\nFROM a:$V AS b\n\nRUN --mount=type=cache,target=/c \\\n    make\nONBUILD RUN x\n";
    let file = Dockerfile::parse(text).unwrap();
    let lines: Vec<_> = file.instructions().iter().map(|i| (i.keyword, i.start_line, i.end_line)).collect();
    assert_eq!(
        lines,
        [(Keyword::Arg, 2, 2), (Keyword::From, 3, 3), (Keyword::Run, 5, 6), (Keyword::Onbuild, 7, 7)]
    );
    let run = &file.instructions()[2];
    assert_eq!((run.flags.join(" ").as_str(), run.args.as_str()), ("--mount=type=cache,target=/c", "make"));
    assert_eq!(file.instructions()[3].trigger.as_ref().unwrap().keyword, Keyword::Run);
    assert!(file.uses_cache_mounts());
    assert!(!Dockerfile::parse("FROM a\nRUN echo type=cache").unwrap().uses_cache_mounts());
    assert!(
        Dockerfile::parse("FROM a\nONBUILD RUN --mount=target=/x,type=cache y").unwrap().uses_cache_mounts()
    );
}

/// The line, a word of the message, a word of the hint.
#[test]
fn errors_have_a_line_and_a_way_out() {
    let stages = "FROM a\n".repeat(MAX_STAGES + 1);
    let many = format!("FROM a\n{}", "RUN x\n".repeat(MAX_INSTRUCTIONS));
    for (text, line, word, hint) in [
        ("", None, "no instruction", "FROM scratch"),
        ("# only\n\n", None, "no instruction", "FROM scratch"),
        ("ARG A=1\n", None, "no FROM", "FROM scratch"),
        ("RUN x\nFROM a\n", Some(1), "RUN before the first FROM", "ARG"),
        ("FROM a\nRUM x\n", Some(2), "unknown instruction `RUM`", "RUN"),
        ("FROM a\nRUN x\n  && y\n", Some(3), "unknown instruction `&&`", ""),
        ("FROM a\n\u{a0}RUN x\n", Some(2), "not a blank", ""),
        ("FROM a\nRUN\u{a0}x\n", Some(2), "unknown instruction", ""),
        ("FROM\n", Some(1), "FROM takes an image", "comment"),
        ("FROM a # b\n", Some(1), "FROM takes an image", "comment"),
        ("FROM a as\n", Some(1), "FROM takes an image", "comment"),
        ("FROM a as b c\n", Some(1), "FROM takes an image", "comment"),
        ("FROM a AS 1\n", Some(1), "cannot be the name", "letter"),
        ("FROM a AS ${X}\n", Some(1), "cannot be the name", "letter"),
        ("FROM a AS scratch\n", Some(1), "cannot be the name", "letter"),
        ("FROM a AS b\nFROM c AS B\n", Some(2), "already that of line 1", ""),
        ("FROM --pull a\n", Some(1), "does not take the flag", ""),
        ("FROM a\nCMD --x y\n", Some(2), "CMD does not take the flag `--x`", "JSON"),
        ("FROM a\nRUN --$X=type=bind y\n", Some(2), "does not take the flag", ""),
        ("FROM a\nCOPY --chown=ü a b\n", Some(2), "not ASCII", ""),
        ("FROM a\nCOPY a\n", Some(2), "at least two arguments", ""),
        ("FROM a\nARG\n", Some(2), "at least one argument", ""),
        ("FROM a\nONBUILD\n", Some(2), "needs an argument", ""),
        ("FROM a\nONBUILD FROM b\n", Some(2), "cannot be an ONBUILD trigger", ""),
        ("FROM a\nONBUILD ONBUILD RUN b\n", Some(2), "cannot be an ONBUILD trigger", ""),
        ("FROM a\nONBUILD FOO\n", Some(2), "unknown instruction `FOO`", ""),
        ("FROM a\nRUN <<E\nx\n", Some(2), "has no end", ""),
        ("# syntax=x\n# escape=`\nFROM a\n", Some(1), "escape directive", "first line"),
        ("# escape=x\nFROM a\n", Some(1), "escape directive", ""),
        (many.as_str(), Some(MAX_INSTRUCTIONS + 1), "more than 10000 instructions", ""),
        (stages.as_str(), Some(MAX_STAGES + 1), "more than 200 stages", ""),
    ] {
        let error = Dockerfile::parse(text).unwrap_err();
        assert_eq!(error.line(), line, "{text:.60?}: {error}");
        assert!(error.to_string().contains(word), "{text:.60?}: {error}");
        assert!(error.hint().unwrap_or_default().contains(hint), "{text:.60?}: {:?}", error.hint());
    }
}

#[test]
fn heredocs_are_no_instructions() {
    let text = "FROM a\nRUN cat <<EOF >/x\nFROM dir:/\nEOF\nCOPY <<A <<B /d/\nRUN x\nA\nFROM y\nB\nCMD z\n";
    let file = Dockerfile::parse(text).unwrap();
    let keywords: Vec<_> = file.instructions().iter().map(|i| (i.keyword, i.end_line)).collect();
    assert_eq!(keywords, [(Keyword::From, 1), (Keyword::Run, 4), (Keyword::Copy, 9), (Keyword::Cmd, 10)]);
    assert_eq!(file.instructions()[2].heredocs.len(), 2);
}

#[test]
fn triggers_of_a_base_image_are_checked_alike() {
    let triggers = ["COPY --from=nginx / /".to_owned(), "RUN --mount=source=/etc,target=/x y".to_owned()];
    let file = Dockerfile::parse_triggers(&triggers).unwrap();
    let none = args(&[]);
    assert_eq!(file.references(&input(&none)).unwrap()[0].lookup, "nginx");
    assert_eq!(file.check(&input(&none), ImageFormat::Docker)[0].line, 3);
}

/// Pieces that make texts which come far into the reader.
fn dockerfile_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("FROM a AS b\n".to_owned()),
        Just("ARG V=x\n".to_owned()),
        Just("ONBUILD ".to_owned()),
        Just("RUN --mount=type=cache,from=b,target=/x ".to_owned()),
        Just("COPY --from=0 a b".to_owned()),
        Just("HEALTHCHECK CMD [\"x\"]\n".to_owned()),
        Just("ENV A=$A$V".to_owned()),
        Just("# escape=`\n".to_owned()),
        Just("<<E\nE\n".to_owned()),
        Just("[\"a\", ".to_owned()),
        Just("\\\n".to_owned()),
        Just("\r\n".to_owned()),
        Just("\n".to_owned()),
        "[ \t\\\\'\"$\\{\\}<#`=,:\\-\\[\\]A-Za-z0-9é\u{a0}]{0,12}",
        any::<String>(),
    ];
    prop::collection::vec(piece, 0..20).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics(text in dockerfile_text(), prefix in prop::bool::ANY, step in ".{0,40}") {
        let text = if prefix { format!("FROM scratch\n{text}") } else { text };
        if let Ok(file) = Dockerfile::parse(&text) {
            let none = args(&[]);
            for buildah in [BUILDAH_1_28, BUILDAH_NEW] {
                let input = BuildInput { buildah, ..input(&none) };
                let _ = file.references(&input);
                let _ = file.check(&input, ImageFormat::Oci);
                let _ = file.forced_build_args(&input);
                let _ = file.bind_sources(&input);
                let _ = file.secret_ids(&input);
            }
            let _ = file.locate(&step);
            for instruction in file.instructions() {
                prop_assert!(file.locate(&instruction.text).is_some());
                prop_assert!(1 <= instruction.start_line && instruction.start_line <= instruction.end_line);
            }
        }
    }
}

#[test]
fn the_bases_that_run_steps_work_on_are_found_through_stages() {
    let text = "FROM debian AS build\nRUN x\nFROM busybox\nCOPY --from=build /x /\nFROM alpine AS a\nFROM A\nRUN y\n";
    let lines = Dockerfile::parse(text).unwrap().lines_of_running_bases();
    assert_eq!(lines.into_iter().collect::<Vec<_>>(), [1, 5]);
}
