//! Why a step of buildah failed, from its own standard error (pure).
//!
//! RUN's output goes to another pipe, so a RUN that prints "503" is still a failed RUN. The texts are not
//! a stable interface: the tests hold captured ones.

use std::sync::LazyLock;

use kiln_protocol::Reason;
use regex::Regex;

use crate::slot::wire::{Exit, StepEnd};

/// What a failed step means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The class.
    pub reason: Reason,
    /// One sentence for the user.
    pub message: String,
    /// Text of the instruction, as buildah names it.
    pub step: Option<String>,
    /// Exit code of the RUN command.
    pub run_exit_code: Option<i32>,
    /// What to do about it.
    pub hint: Option<&'static str>,
}

/// SIGXFSZ: a file grew past `RLIMIT_FSIZE`. A shell reports it as 128 + 25.
const FILE_SIZE_SIGNAL: i32 = 25;
const SIGNAL_BASE: i32 = 128;
/// SIGKILL, which nobody inside sent if the kernel ran out of memory.
const KILL_SIGNAL: i32 = 9;

struct Rule {
    pattern: &'static str,
    reason: Reason,
    hint: Option<&'static str>,
}

/// First match wins. Matched against the cause, that is buildah's last error without the step's own text:
/// the text of a RUN instruction is the user's.
const RULES: &[Rule] = &[
    Rule {
        pattern: r"(?i)no space left on device|disk quota exceeded|io: read/write on closed pipe",
        reason: Reason::DiskFull,
        hint: Some("free space below the data directory: `kiln prune`"),
    },
    Rule {
        pattern: r"(?i)file size limit exceeded|file too large",
        reason: Reason::LimitExceeded,
        hint: Some("raise build.limits.file_size"),
    },
    Rule {
        pattern: r"(?i)cannot allocate memory|out of memory|signal: killed|exited on killed|Unable to determine exit status",
        reason: Reason::OutOfMemory,
        hint: Some("the kernel ended buildah; give the node more memory or run fewer builds at once"),
    },
    Rule {
        pattern: r"(?i)(newuidmap|newgidmap|unshare\(CLONE_NEWUSER\)|backing file system is unsupported|not supported over|userxattr)",
        reason: Reason::NodeUnfit,
        hint: Some("run `kiln doctor`"),
    },
    Rule {
        pattern: r"(?i)image not known|layer not known|identifier is not a (layer|container|image)|not found in layer tree|incomplete layer",
        reason: Reason::StoreCorrupt,
        hint: Some("`kiln prune --all` deletes the local stores; they are made again"),
    },
    Rule {
        pattern: r"(?i)unknown instruction|dockerfile parse error|syntax error|unknown flag|missing instruction|bad mount option|invalid mount (option|type)|unsupported mount|target .* not found|target .* was not found|failed to find.* stage|no FROM statement",
        reason: Reason::BadRequest,
        hint: None,
    },
    Rule {
        pattern: r"(?i)checking on sources under|no items matching|possible escaping context",
        reason: Reason::NotFound,
        hint: Some("check the path, and whether .dockerignore excludes it"),
    },
    Rule {
        pattern: r"(?i)secret .*(not found|required)|required secret",
        reason: Reason::BadRequest,
        hint: None,
    },
    Rule {
        pattern: r"(?i)temporary failure in name resolution|server misbehaving|no such host|connection refused|connection reset|i/o timeout|network is unreachable|no route to host|TLS handshake timeout|unexpected EOF",
        reason: Reason::Network,
        hint: None,
    },
];

static COMPILED: LazyLock<Vec<(Option<Regex>, &'static Rule)>> =
    LazyLock::new(|| RULES.iter().map(|rule| (Regex::new(rule.pattern).ok(), rule)).collect());

/// Classifies a step that did not end with code 0 and was neither stopped nor over a limit.
pub fn classify(end: &StepEnd) -> Verdict {
    let error = last_error(&end.stderr);
    let (step, cause) = split_step(error);
    let run = step.is_some_and(|s| s.trim_start().to_ascii_uppercase().starts_with("RUN"));
    if run && let Some(code) = run_exit_code(cause) {
        return run_failed(step, code);
    }
    let rule = COMPILED.iter().find(|(regex, _)| regex.as_ref().is_some_and(|r| r.is_match(cause)));
    let (reason, hint) = match rule {
        Some((_, rule)) => (rule.reason, rule.hint),
        None if step.is_some() => (Reason::BuildFailed, None),
        None => by_exit(end.exit),
    };
    let message = if cause.is_empty() { describe_exit(end.exit) } else { cause.to_owned() };
    Verdict { reason, message, step: step.map(str::to_owned), run_exit_code: None, hint }
}

fn run_failed(step: Option<&str>, code: i32) -> Verdict {
    let (reason, hint) = if code == SIGNAL_BASE + FILE_SIZE_SIGNAL {
        (Reason::LimitExceeded, Some("raise build.limits.file_size"))
    } else if code == SIGNAL_BASE + KILL_SIGNAL {
        (
            Reason::BuildFailed,
            Some("something sent SIGKILL: if nothing in the step did, the node ran out of memory"),
        )
    } else {
        (Reason::BuildFailed, None)
    };
    let message = format!("the command exited with code {code}");
    Verdict { reason, message, step: step.map(str::to_owned), run_exit_code: Some(code), hint }
}

fn by_exit(exit: Exit) -> (Reason, Option<&'static str>) {
    match exit {
        Exit::Killed | Exit::Signal(KILL_SIGNAL) => (
            Reason::OutOfMemory,
            Some("something outside the build killed it, most likely for want of memory"),
        ),
        Exit::Code(_) | Exit::Signal(_) | Exit::NotStarted => (Reason::Unknown, None),
    }
}

fn describe_exit(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("buildah exited with code {code} and said nothing"),
        Exit::Signal(signal) => format!("signal {signal} ended buildah"),
        Exit::Killed => "the slot was killed from outside".to_owned(),
        Exit::NotStarted => "the step could not be started".to_owned(),
    }
}

/// buildah prints `Error: …` last; the text may hold line feeds of the instruction.
fn last_error(stderr: &str) -> &str {
    let start = stderr.rfind("\nError: ").map(|at| at + 1).or_else(|| stderr.find("Error: "));
    match start {
        Some(at) => stderr[at..].trim_start_matches("Error: ").trim(),
        None => stderr.trim(),
    }
}

/// Splits `building at STEP "TEXT": CAUSE`. The text of a RUN may hold anything, and its cause is short: split
/// at the last `": `. Causes of other instructions quote paths, their texts hardly ever end in a quote.
fn split_step(error: &str) -> (Option<&str>, &str) {
    let Some(rest) = error.split_once("building at STEP \"").map(|(_, rest)| rest) else {
        return (None, error);
    };
    let run = rest.trim_start().to_ascii_uppercase().starts_with("RUN");
    let border = if run { rest.rfind("\": ") } else { rest.find("\": ") };
    match border {
        Some(at) => (Some(&rest[..at]), &rest[at + 3..]),
        None => (Some(rest), ""),
    }
}

/// `exit status N` at the end of a cause, and nothing of buildah's own before it.
fn run_exit_code(cause: &str) -> Option<i32> {
    let code = cause.trim().strip_prefix("while running runtime: ").unwrap_or(cause.trim());
    code.strip_prefix("exit status ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(stderr: &str) -> StepEnd {
        StepEnd {
            exit: Exit::Code(125),
            stderr: stderr.to_owned(),
            breach: None,
            terminated: false,
            leftovers: 0,
        }
    }

    /// Texts on buildah's standard error, and what they mean. Captured from 1.28.2, some paths and ids shortened,
    /// except these, which are written after its known wording because they were not provoked here: exit code 153,
    /// no space left, layer not known, newuidmap, signal: killed, and the last two.
    const WORDINGS: &[(&str, Reason, Option<i32>)] = &[
        ("Error: building at STEP \"RUN exit 37\": exit status 37\n", Reason::BuildFailed, Some(37)),
        ("Error: building at STEP \"RUN nosuchcmd\": exit status 127\n", Reason::BuildFailed, Some(127)),
        ("Error: building at STEP \"RUN exit 125\": exit status 125\n", Reason::BuildFailed, Some(125)),
        ("Error: building at STEP \"RUN kill -9 $$\": exit status 1\n", Reason::BuildFailed, Some(1)),
        ("Error: building at STEP \"RUN exit 153\": exit status 153\n", Reason::LimitExceeded, Some(153)),
        (
            "Error: building at STEP \"RUN echo \"a\\\": exit status 9\" && exit 3\": exit status 3\n",
            Reason::BuildFailed,
            Some(3),
        ),
        (
            "Error: building at STEP \"COPY x /x\": checking on sources under \"/job/ctx\": copier: stat: \"/x\": no such file or directory\n",
            Reason::NotFound,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://127.0.0.1:9/x /x\": reading \"http://127.0.0.1:9/x\": Get \"http://127.0.0.1:9/x\": dial tcp 127.0.0.1:9: connect: connection refused\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=foo,target=/x true\": resolving mountpoints for container \"883d\": invalid mount type \"foo\"\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=secret,id=zz,required=true true\": resolving mountpoints for container \"77a0\": secret required but no secret with id zz found\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN true\": determining run uid: user: unknown user error looking up user \"nosuch\"\n",
            Reason::BuildFailed,
            None,
        ),
        (
            "Error: building at STEP \"WORKDIR /f/x\": copier: mkdir: error checking directory \"/f/x\": mkdir /f/x: not a directory\n",
            Reason::BuildFailed,
            None,
        ),
        (
            "Error: committing container for step {Env:[PATH=/bin] Command:run}: storing layer \"077f\" to file: io: read/write on closed pipe\n",
            Reason::DiskFull,
            None,
        ),
        (
            "time=\"x\" level=error msg=\"y\"\nError: write /job/run/.tmp-mountpoints.json1: no space left on device\n",
            Reason::DiskFull,
            None,
        ),
        ("Error: creating build container: busybox:1: image not known\n", Reason::StoreCorrupt, None),
        ("Error: layer not known\n", Reason::StoreCorrupt, None),
        (
            "Error: cannot clone: newuidmap: open of uid_map failed: Permission denied\n",
            Reason::NodeUnfit,
            None,
        ),
        (
            "level=error msg=\"signal: killed\"\nlevel=error msg=\"(Unable to determine exit status)\"\n",
            Reason::OutOfMemory,
            None,
        ),
        ("Error: The target \"nope\" was not found in the provided Dockerfile\n", Reason::BadRequest, None),
        ("Error: something nobody has seen\n", Reason::Unknown, None),
        ("", Reason::Unknown, None),
    ];

    #[test]
    fn errors_mean_what_the_table_says() {
        for (stderr, reason, code) in WORDINGS {
            let verdict = classify(&end(stderr));
            assert_eq!((verdict.reason, verdict.run_exit_code), (*reason, *code), "{stderr}");
            assert!(!verdict.message.is_empty(), "{stderr}");
        }
    }

    #[test]
    fn the_text_of_an_instruction_decides_nothing() {
        for text in ["no space left on device", "image not known", "connection refused", "newuidmap"] {
            let stderr = format!("Error: building at STEP \"RUN echo {text}; exit 1\": exit status 1\n");
            assert_eq!(classify(&end(&stderr)).reason, Reason::BuildFailed, "{text}");
            let stderr = format!("Error: building at STEP \"COPY \"{text}\" /x\": user: unknown user\n");
            assert_eq!(classify(&end(&stderr)).reason, Reason::BuildFailed, "{text}");
        }
    }

    #[test]
    fn the_failing_step_is_named_whole() {
        let stderr = "Error: building at STEP \"RUN a \"b\": c\": exit status 3\n";
        assert_eq!(classify(&end(stderr)).step.as_deref(), Some("RUN a \"b\": c"));
    }

    #[test]
    fn every_rule_is_a_regular_expression() {
        assert!(COMPILED.iter().all(|(regex, _)| regex.is_some()));
    }

    #[test]
    fn an_end_without_a_word_is_told_by_its_exit() {
        let killed = StepEnd { exit: Exit::Killed, ..end("") };
        assert_eq!(classify(&killed).reason, Reason::OutOfMemory);
        let signal = StepEnd { exit: Exit::Signal(11), ..end("") };
        assert!(classify(&signal).message.contains("signal 11"));
    }
}
