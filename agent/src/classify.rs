//! Why a step of buildah failed, from its own standard error (pure).
//!
//! RUN's output goes to another pipe, so a RUN that prints "503" is still a failed RUN. The texts are not
//! a stable interface: the tests hold captured ones of every rule.

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

/// A slot has 65,536 ids.
const LAST_ID: u32 = 65_535;

struct Rule {
    pattern: &'static str,
    reason: Reason,
    hint: Option<&'static str>,
}

/// First match wins. Matched against the cause, that is buildah's error without the step's own text: the text of
/// a RUN instruction is the user's. Causes quote names that the user chose, so a rule is tied to the beginning of
/// the cause, or to the end of a line, where buildah puts what happened.
///
/// Two texts are without a captured row, because nothing here could provoke them: "disk quota exceeded" and "cannot
/// allocate memory". They are the names that Go's table of error numbers gives EDQUOT and ENOMEM.
const RULES: &[Rule] = &[
    Rule {
        pattern: r"(?m)(?:^|: )(?:no space left on device|disk quota exceeded)$",
        reason: Reason::DiskFull,
        hint: Some("free space below the data directory: `kiln prune`"),
    },
    // The same words in a COPY say that its other end failed, for whatever reason.
    Rule {
        pattern: r#"storing layer "[0-9a-f]+" to file: io: read/write on closed pipe$"#,
        reason: Reason::DiskFull,
        hint: Some(
            "free space: `kiln prune`; or raise build.limits.file_size, if the layer is larger than that",
        ),
    },
    Rule {
        pattern: r"(?m)(?:^|: )(?:signal: file size limit exceeded|file too large)$",
        reason: Reason::LimitExceeded,
        hint: Some("raise build.limits.file_size"),
    },
    // See FOREIGN_OWNER for its message.
    Rule {
        pattern: r"(?m): lchown .*: invalid argument(?:\): exit status 1)?$",
        reason: Reason::LimitExceeded,
        hint: Some("`chown` the file to lower ids in the image, archive or instruction that it comes from"),
    },
    Rule {
        pattern: r#"(?m)(?:^|: |msg=")signal: killed"?$|: cannot allocate memory$|^fatal error: .*memory$"#,
        reason: Reason::OutOfMemory,
        hint: Some("the kernel ended buildah; give the node more memory or run fewer builds at once"),
    },
    Rule {
        pattern: r"finding new[ug]idmap: |^Error during unshare\(CLONE_NEWUSER\)|backing file system is unsupported for this graph driver$",
        reason: Reason::NodeUnfit,
        hint: Some("run `kiln doctor`"),
    },
    Rule { pattern: r"(?:^|: )(?:image|layer) not known$", reason: Reason::StoreCorrupt, hint: STORE_HINT },
    Rule {
        pattern: r"creating (?:read-write layer with ID|overlay mount to) .*: no such file or directory$|\* creating file-getter: ",
        reason: Reason::StoreCorrupt,
        hint: STORE_HINT,
    },
    Rule {
        pattern: r"reading blob sha256:[0-9a-f]+: (?:unexpected EOF|file integrity checksum failed for .*)$|: Digest did not match, expected ",
        reason: Reason::StoreCorrupt,
        hint: STORE_HINT,
    },
    Rule {
        pattern: r#"^(?:Build error: Unknown instruction: |parsing main Dockerfile: |resolving step \{|no FROM statement found|no contents in |unknown flag: |The target ".*" was not found)"#,
        reason: Reason::BadRequest,
        hint: None,
    },
    Rule {
        pattern: r#": (?:invalid reference format|no stage or image found with that name|invalid mount type ".*"|invalid mount option|must set volume destination)$"#,
        reason: Reason::BadRequest,
        hint: None,
    },
    Rule {
        pattern: r": secret (?:required but no secret with id|should have syntax) ",
        reason: Reason::BadRequest,
        hint: None,
    },
    Rule {
        pattern: r"^(?:checking on sources under|no items matching glob) ",
        reason: Reason::NotFound,
        hint: Some("check the path, and whether .dockerignore excludes it"),
    },
    Rule { pattern: r": invalid response status (?:404|410)$", reason: Reason::NotFound, hint: None },
    Rule {
        pattern: r": (?:Temporary failure in name resolution|server misbehaving|no such host|connection refused|connection reset by peer|i/o timeout|network is unreachable|no route to host|net/http: TLS handshake timeout)$",
        reason: Reason::Network,
        hint: None,
    },
    Rule {
        pattern: r#"(?m): Get ".*": EOF$|to tar stream: unexpected EOF$|: invalid response status (?:429|5\d\d)$"#,
        reason: Reason::Network,
        hint: None,
    },
    Rule {
        pattern: r": dial tcp \S+: connect: permission denied$",
        reason: Reason::BuildFailed,
        hint: Some("an isolated build may not reach this address"),
    },
];

const STORE_HINT: Option<&str> = Some("`kiln prune --all` deletes the local stores; they are made again");

/// What buildah prints of its own structures: of no use to a reader, and full of the user's text.
static DUMPS: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?s) for (?:copier\.request\{.*?All:(?:true|false)\}\}|step \{.*\}): ").ok()
});

/// What buildah says of a file whose owner a slot has not; the advice that it adds is for its own installation.
static FOREIGN_OWNER: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?m)(?:\(requested | to )(\d+:\d+)(?: for .*)?: lchown (.*): invalid argument\b").ok()
});

static COMPILED: LazyLock<Vec<(Option<Regex>, &'static Rule)>> =
    LazyLock::new(|| RULES.iter().map(|rule| (Regex::new(rule.pattern).ok(), rule)).collect());

/// Classifies a step that did not end with code 0 and was neither stopped nor over a limit.
pub fn classify(end: &StepEnd) -> Verdict {
    let Some(error) = own_error(&end.stderr) else { return without_error(end) };
    let (step, cause) = split_step(error);
    if step.is_some_and(is_run)
        && let Some(code) = run_exit_code(cause)
    {
        return run_failed(step, code);
    }
    by_rule(end.exit, step, cause)
}

/// No `Error: `: buildah was killed, or the text of the instruction is longer than what is kept of the error.
fn without_error(end: &StepEnd) -> Verdict {
    let text = end.stderr.trim();
    let code = text.rfind(BORDER).and_then(|at| run_exit_code(&text[at + BORDER.len()..]));
    match code {
        Some(code) if end.exit == Exit::Code(code) => run_failed(None, code),
        Some(_) | None => by_rule(end.exit, None, text),
    }
}

fn by_rule(exit: Exit, step: Option<&str>, cause: &str) -> Verdict {
    let rule = COMPILED.iter().find(|(regex, _)| regex.as_ref().is_some_and(|r| r.is_match(cause)));
    let (reason, hint) = match rule {
        Some((_, rule)) => (rule.reason, rule.hint),
        None if step.is_some() => (Reason::BuildFailed, None),
        None => by_exit(exit),
    };
    let message = match foreign_owner(cause) {
        Some(message) => message,
        None if cause.is_empty() => describe_exit(exit),
        None => without_dumps(cause),
    };
    Verdict { reason, message, step: step.map(str::to_owned), run_exit_code: None, hint }
}

fn foreign_owner(cause: &str) -> Option<String> {
    let found = FOREIGN_OWNER.as_ref()?.captures(cause)?;
    let (owner, path) = (&found[1], &found[2]);
    Some(format!("{path} belongs to {owner}; a slot has the user and group ids 0 to {LAST_ID}"))
}

fn without_dumps(cause: &str) -> String {
    match DUMPS.as_ref() {
        Some(dumps) => dumps.replace_all(cause, ": ").into_owned(),
        None => cause.to_owned(),
    }
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

/// What follows buildah's `Error: `. The first one at the beginning of a line: a later one is text of an
/// instruction. Lines that its log adds afterwards do not belong to it.
fn own_error(stderr: &str) -> Option<&str> {
    const PREFIX: &str = "Error: ";
    let start = if stderr.starts_with(PREFIX) { 0 } else { stderr.find("\nError: ")? + 1 };
    let mut error = stderr[start + PREFIX.len()..].trim();
    while let Some((before, line)) = error.rsplit_once('\n') {
        if !line.starts_with("Failed to write to log, ") && !line.starts_with("time=\"") {
            break;
        }
        error = before.trim_end();
    }
    Some(error)
}

/// Between the text of an instruction and the cause.
const BORDER: &str = "\": ";

/// Splits `building at STEP "TEXT": CAUSE`.
fn split_step(error: &str) -> (Option<&str>, &str) {
    let Some(rest) = error.strip_prefix("building at STEP \"") else {
        return (None, error);
    };
    // Other texts hardly ever end in a quote, and their causes quote paths.
    let border = if is_run(rest) { run_border(rest) } else { rest.find(BORDER) };
    match border {
        Some(at) => (Some(&rest[..at]), &rest[at + BORDER.len()..]),
        None => (Some(rest), ""),
    }
}

fn is_run(text: &str) -> bool {
    text.trim_start().get(..3).is_some_and(|word| word.eq_ignore_ascii_case("RUN"))
}

/// The text of a RUN may hold anything. An exit status is behind the last border; other causes may quote.
fn run_border(rest: &str) -> Option<usize> {
    let last = rest.rfind(BORDER)?;
    if run_exit_code(&rest[last + BORDER.len()..]).is_some() {
        return Some(last);
    }
    rest.rfind("\": resolving mountpoints for container \"").or(Some(last))
}

/// `exit status N` at the end of a cause, and nothing of buildah's own before it.
fn run_exit_code(cause: &str) -> Option<i32> {
    let code = cause.trim().strip_prefix("while running runtime: ").unwrap_or(cause.trim());
    code.strip_prefix("exit status ")?.parse().ok()
}

#[cfg(test)]
mod tests;
