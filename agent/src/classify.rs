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

    /// Texts on the standard error of buildah 1.28.2, run as in a slot, and what they mean. Each was printed; hex ids
    /// are shortened, as are the dumps of `copier.request`, which have a page of options.
    ///
    /// How they came about. *Disk*: the job on a tmpfs of 24 MiB that a file fills up to some KiB. *File size*:
    /// `ulimit -f`; a limit below the size of buildah's own program stops every RUN. *Killed*: SIGKILL to the
    /// process `buildah-chroot-runtime` of a RUN, and to the child of a buildah that makes its own namespace.
    /// *Memory*: `ulimit -v`. *Node*: an empty PATH; `max_user_namespaces` of 0; a store on an overlay mount.
    /// *Store*: a base store with an empty `layers.json`, a layer's directory, its `link`, the directory `l` or its
    /// tar-split file removed, that file or one of the layer's overwritten. *Network*: servers on the loopback
    /// interface that close, reset, say nothing or answer with an error, and `unreachable` and `prohibit` routes; the
    /// C library's resolver speaks of a temporary failure, and GODEBUG chose it. A RUN command
    /// that is killed looks like one that exits with 1, and a killed buildah says nothing.
    const WORDINGS: &[(&str, Reason, Option<i32>)] = &[
        // A file of somebody whom a slot does not know.
        (
            "Error: writing blob: adding layer with blob \"sha256:70f7\": processing tar file(potentially insufficient UIDs or GIDs available in user namespace (requested 65536:7 for /far): Check /etc/subuid and /etc/subgid if configured locally and run podman-system-migrate: lchown /far: invalid argument): exit status 1\n",
            Reason::LimitExceeded,
            None,
        ),
        (
            "Error: building at STEP \"ADD far.tar /d/\": storing \"/job/ctx/far.tar\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error setting ownership of \"/far\" to 65536:7: lchown /far: invalid argument\n",
            Reason::LimitExceeded,
            None,
        ),
        // A command that failed.
        ("Error: building at STEP \"RUN exit 37\": exit status 37\n", Reason::BuildFailed, Some(37)),
        ("Error: building at STEP \"RUN nosuchcmd\": exit status 127\n", Reason::BuildFailed, Some(127)),
        ("Error: building at STEP \"RUN exit 125\": exit status 125\n", Reason::BuildFailed, Some(125)),
        ("Error: building at STEP \"RUN kill -9 $$\": exit status 1\n", Reason::BuildFailed, Some(1)),
        (
            "Error: building at STEP \"RUN dd if=/dev/zero of=/x bs=1M count=40; exit $?\": exit status 153\n",
            Reason::LimitExceeded,
            Some(153),
        ),
        (
            "Error: building at STEP \"RUN /bin/dd if=/dev/zero of=/x bs=1M count=40\": exit status 1\n",
            Reason::BuildFailed,
            Some(1),
        ),
        (
            "Error: building at STEP \"RUN echo \"a\\\": exit status 9\" && exit 3\": exit status 3\n",
            Reason::BuildFailed,
            Some(3),
        ),
        (
            "Error: building at STEP \"RUN echo Error: no space left on device >&2; echo 'Error: building at STEP \"RUN x\": image not known' >&2; exit 4\": exit status 4\n",
            Reason::BuildFailed,
            Some(4),
        ),
        (
            "time=\"2026-11-23T18:48:12Z\" level=error msg=\"error unmounting container: unmounting build container \\\"9e8a\\\": write /job/run/containers/overlay-layers/.tmp-mountpoints.json2518739142: no space left on device\"\nError: building at STEP \"RUN dd if=/dev/zero of=/x bs=1k count=8000\": exit status 1\n",
            Reason::BuildFailed,
            Some(1),
        ),
        // An instruction that failed.
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
            "Error: building at STEP \"WORKDIR \"/image not known/x\"\": copier: mkdir: error checking directory \"/image not known/x\": mkdir /image not known/x: not a directory\n",
            Reason::BuildFailed,
            None,
        ),
        (
            "Error: building at STEP \"COPY . /bin/sh\": destination /bin/sh already exists but is not a directory\n",
            Reason::BuildFailed,
            None,
        ),
        (
            "Error: building at STEP \"COPY file /f/x\": 3 errors occurred:\n\t* reading \"/job/ctx/file\": passing bulk output from subprocess: io: read/write on closed pipe\n\t* closing \"/job/ctx/file\": reading tar archive: copying content for \"file\": io: read/write on closed pipe\n\t* storing \"/job/ctx/file\": error in copier subprocess: changing to intended-new-root directory \"/job/root/overlay/4f0d/merged/f\": chdir /job/root/overlay/4f0d/merged/f: not a directory\n\n\n",
            Reason::BuildFailed,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://10.8.0.1/x /x\": reading \"http://10.8.0.1/x\": Get \"http://10.8.0.1/x\": dial tcp 10.8.0.1:80: connect: permission denied\n",
            Reason::BuildFailed,
            None,
        ),
        // A file that is not there.
        (
            "Error: building at STEP \"COPY nofile /x\": checking on sources under \"/job/ctx\": copier: stat: \"/nofile\": no such file or directory\n",
            Reason::NotFound,
            None,
        ),
        (
            "Error: building at STEP \"COPY ../nofile /x\": checking on sources under \"/job/ctx\": possible escaping context directory error: copier: stat: \"/nofile\": no such file or directory\n",
            Reason::NotFound,
            None,
        ),
        (
            "Error: building at STEP \"COPY no space left on device /x\": checking on sources under \"/job/ctx\": copier: stat: \"/no space left on device\": no such file or directory\n",
            Reason::NotFound,
            None,
        ),
        (
            "Error: building at STEP \"COPY file /x\": no items matching glob \"/job/ctx/file\" copied (1 filtered out using /etc/kiln/ign): no such file or directory\n",
            Reason::NotFound,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://127.0.0.1:86/x /x\": reading \"http://127.0.0.1:86/x\": invalid response status 404\n",
            Reason::NotFound,
            None,
        ),
        // The network.
        (
            "Error: building at STEP \"ADD http://127.0.0.1:9/x /x\": reading \"http://127.0.0.1:9/x\": Get \"http://127.0.0.1:9/x\": dial tcp 127.0.0.1:9: connect: connection refused\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://nx.test/x /x\": reading \"http://nx.test/x\": Get \"http://nx.test/x\": dial tcp: lookup nx.test on 127.0.0.1:53: no such host\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://servfail.test/x /x\": reading \"http://servfail.test/x\": Get \"http://servfail.test/x\": dial tcp: lookup servfail.test on 127.0.0.1:53: server misbehaving\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://silent.test/x /x\": reading \"http://silent.test/x\": Get \"http://silent.test/x\": dial tcp: lookup silent.test on 127.0.0.1:53: read udp 127.0.0.1:54340->127.0.0.1:53: i/o timeout\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://servfail.test/x /x\": reading \"http://servfail.test/x\": Get \"http://servfail.test/x\": dial tcp: lookup servfail.test: Temporary failure in name resolution\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://127.0.0.1:81/x /x\": reading \"http://127.0.0.1:81/x\": Get \"http://127.0.0.1:81/x\": read tcp 127.0.0.1:39614->127.0.0.1:81: read: connection reset by peer\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://10.1.2.3/x /x\": reading \"http://10.1.2.3/x\": Get \"http://10.1.2.3/x\": dial tcp 10.1.2.3:80: connect: network is unreachable\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://10.9.0.1/x /x\": reading \"http://10.9.0.1/x\": Get \"http://10.9.0.1/x\": dial tcp 10.9.0.1:80: connect: no route to host\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD https://127.0.0.1:83/x /x\": reading \"https://127.0.0.1:83/x\": Get \"https://127.0.0.1:83/x\": net/http: TLS handshake timeout\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://127.0.0.1:84/x /x\": reading \"http://127.0.0.1:84/x\": Get \"http://127.0.0.1:84/x\": EOF\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://127.0.0.1:85/x /x\": reading \"http://127.0.0.1:85/x\": invalid response status 503\n",
            Reason::Network,
            None,
        ),
        (
            "Error: building at STEP \"ADD http://127.0.0.1:82/x /x\": 2 errors occurred:\n\t* reading \"http://127.0.0.1:82/x\": writing content from \"http://127.0.0.1:82/x\" to tar stream: unexpected EOF\n\t* storing \"http://127.0.0.1:82/x\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error creating \"/x\": copier: put: error writing file \"/x\": unexpected EOF\n\n\n",
            Reason::Network,
            None,
        ),
        // A Dockerfile or request that buildah refuses.
        (
            "Error: building at STEP \"FOO \": Build error: Unknown instruction: \"FOO\" &imagebuilder.Step{Env:[]string{\"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\"}, Command:\"foo\", Args:[]string{\"\"}, Flags:[]string{}, Attrs:map[string]bool(nil), Message:\"FOO \", Original:\"FOO bar\"}\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=foo,target=/x true\": resolving mountpoints for container \"a98c\": invalid mount type \"foo\"\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=bind,foo=bar true\": resolving mountpoints for container \"a98c\": foo: invalid mount option\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=bind,source=/x true\": resolving mountpoints for container \"a98c\": must set volume destination\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=secret,id=zz,required=true true\": resolving mountpoints for container \"a98c\": secret required but no secret with id zz found\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=secret,foo=bar true\": resolving mountpoints for container \"a98c\": secret should have syntax id=id[,target=path,required=bool,mode=uint,uid=uint,gid=uint\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: building at STEP \"RUN --mount=type=bind,from=nosuch,target=/x true\": type=bind,from=nosuch,target=/x from=nosuch: no stage or image found with that name\n",
            Reason::BadRequest,
            None,
        ),
        ("Error: COPY --from=nostage: no stage or image found with that name\n", Reason::BadRequest, None),
        ("Error: The target \"nope\" was not found in the provided Dockerfile\n", Reason::BadRequest, None),
        ("Error: no FROM statement found\n", Reason::BadRequest, None),
        ("Error: no contents in \"/etc/kiln/Dockerfile\"\n", Reason::BadRequest, None),
        ("Error: unknown flag: --nosuch\n", Reason::BadRequest, None),
        (
            "Error: parsing main Dockerfile: /etc/kiln/Dockerfile: invalid ESCAPE 'x'. Must be ` or \\\n",
            Reason::BadRequest,
            None,
        ),
        (
            "Error: resolving step {Value:env Next:0xc0003bac40 Children:[] Attributes:map[] Original:ENV a=\"b Flags:[] StartLine:2 EndLine:2}: unexpected end of statement while looking for matching double-quote\n",
            Reason::BadRequest,
            None,
        ),
        ("Error: creating build container: invalid reference format\n", Reason::BadRequest, None),
        // A full disk.
        (
            "Error: building at STEP \"COPY big /x\": 3 errors occurred:\n\t* reading \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"GET\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: get: \"/big\": copying /big: write bulk-writer: broken pipe\n\t* closing \"/job/ctx/big\": reading tar archive: copying content for \"big\": io: read/write on closed pipe\n\t* storing \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error creating \"/x\": copier: put: error writing file \"/x\": write /x: no space left on device\n\n\n",
            Reason::DiskFull,
            None,
        ),
        (
            "Error: committing container for step {Env:[PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin] Command:copy Args:[big /x] Flags:[] Attrs:map[] Message:COPY big /x Original:COPY big /x}: copying layers and metadata for container \"d62e\": initializing source containers-storage:busybox-working-container: storing layer \"2c40\" to file: io: read/write on closed pipe\nFailed to write to log, write /proc/self/fd/1: file already closed\nFailed to write to log, write /proc/self/fd/1: file already closed\n",
            Reason::DiskFull,
            None,
        ),
        (
            "Error: committing container for step {Env:[PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin] Command:copy Args:[big /x] Flags:[] Attrs:map[] Message:COPY big /x Original:COPY big /x}: copying layers and metadata for container \"d62e\": writing blob: storing blob to file \"/job/tmp/storage2115705450/1\": write /job/tmp/storage2115705450/1: no space left on device\n",
            Reason::DiskFull,
            None,
        ),
        (
            "Error: creating build container: creating container: write /job/root/overlay-layers/.tmp-layers.json4109956768: no space left on device\nFailed to write to log, write /proc/self/fd/1: file already closed\n",
            Reason::DiskFull,
            None,
        ),
        (
            "Error: mounting new container: mounting build container \"c50c\": write /job/run/containers/overlay-layers/.tmp-mountpoints.json3399576934: no space left on device\n",
            Reason::DiskFull,
            None,
        ),
        (
            "Error: pushing image \"localhost/busybox:1\" to \"dir:/job/export/x\": reading blob sha256:5a1c: write /job/tmp/2772608775: no space left on device\n",
            Reason::DiskFull,
            None,
        ),
        (
            "Error: writing blob: storing blob to file \"/job/tmp/storage537522514/1\": write /job/tmp/storage537522514/1: no space left on device\n",
            Reason::DiskFull,
            None,
        ),
        // A file past its limit, in buildah itself.
        (
            "Error: building at STEP \"RUN true\": signal: file size limit exceeded\n",
            Reason::LimitExceeded,
            None,
        ),
        (
            "Error: building at STEP \"COPY big /x\": 3 errors occurred:\n\t* reading \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"GET\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: get: \"/big\": copying /big: write bulk-writer: broken pipe\n\t* closing \"/job/ctx/big\": reading tar archive: copying content for \"big\": io: read/write on closed pipe\n\t* storing \"/job/ctx/big\": error during bulk transfer for copier.request{Request:\"PUT\", Root:\"/\", RemoveOptions:copier.RemoveOptions{All:false}}: copier: put: error creating \"/x\": copier: put: error writing file \"/x\": write /x: file too large\n\n\n",
            Reason::LimitExceeded,
            None,
        ),
        (
            "Error: pushing image \"localhost/busybox:1\" to \"dir:/job/export/x\": reading blob sha256:8c32: write /job/tmp/2533951675: file too large\n",
            Reason::LimitExceeded,
            None,
        ),
        // Killed, or no memory.
        ("Error: building at STEP \"RUN sleep 12; true\": signal: killed\n", Reason::OutOfMemory, None),
        (
            "time=\"2026-11-23T19:03:01Z\" level=error msg=\"signal: killed\"\ntime=\"2026-11-23T19:03:01Z\" level=error msg=\"(Unable to determine exit status)\"\n",
            Reason::OutOfMemory,
            None,
        ),
        (
            "fatal error: failed to reserve page summary memory\n\nruntime stack:\nruntime.throw({0xfbd1d7?, 0x7ffcb9baa190?})\n",
            Reason::OutOfMemory,
            None,
        ),
        // A node that cannot.
        (
            "time=\"2026-11-23T19:00:16Z\" level=error msg=\"finding newgidmap: exec: \\\"newgidmap\\\": executable file not found in $PATH\"\ntime=\"2026-11-23T19:00:16Z\" level=error msg=\"(Unable to determine exit status)\"\n",
            Reason::NodeUnfit,
            None,
        ),
        (
            "Error during unshare(CLONE_NEWUSER): No space left on device\nUser namespaces are not enabled in /proc/sys/user/max_user_namespaces.\n",
            Reason::NodeUnfit,
            None,
        ),
        (
            "Error: 'overlay' is not supported over overlayfs, a mount_program is required: backing file system is unsupported for this graph driver\nFailed to write to log, write /proc/self/fd/1: file already closed\n",
            Reason::NodeUnfit,
            None,
        ),
        // A damaged store.
        (
            "Error: creating build container: localhost/busybox:1: image not known\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading layer \"3384\" in image \"67eb\": layer not known\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: creating build container: creating container: creating read-write layer with ID \"9b28\": Stat /job/root/overlay/3384: no such file or directory\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: creating build container: creating container: creating read-write layer with ID \"bbc1\": open /b/0/overlay/3384/link: no such file or directory\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: mounting new container: mounting build container \"85f2\": creating overlay mount to /job/root/overlay/339b/merged, mount_data=\"lowerdir=/job/root/overlay/l/3GQD,upperdir=/job/root/overlay/339b/diff,workdir=/job/root/overlay/339b/work,,userxattr,volatile\": no such file or directory\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading blob sha256:3384: 1 error occurred:\n\t* creating file-getter: readlink /job/root/overlay/3384/diff: no such file or directory\n\n\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading blob sha256:3384: unexpected EOF\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": reading blob sha256:3384: file integrity checksum failed for \"bin/[\"\n",
            Reason::StoreCorrupt,
            None,
        ),
        (
            "Error: pushing image \"sha256:f31d\" to \"dir:/job/export/x\": writing blob: happened during read: Digest did not match, expected sha256:3384, got sha256:85ec\n",
            Reason::StoreCorrupt,
            None,
        ),
    ];

    #[test]
    fn a_foreign_owner_is_named_without_advice_for_another_program() {
        let texts = WORDINGS.iter().filter(|(text, ..)| text.contains(": lchown /far: "));
        let messages: Vec<_> = texts.map(|(text, ..)| classify(&end(text)).message).collect();
        let wanted = "/far belongs to 65536:7; a slot has the user and group ids 0 to 65535";
        assert_eq!(messages, [wanted, wanted]);
    }

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
    fn every_rule_has_a_captured_text() {
        for (regex, rule) in COMPILED.iter() {
            let regex = regex.as_ref().unwrap();
            let hit = WORDINGS.iter().any(|(text, reason, _)| {
                let cause = own_error(text).map_or(text.trim(), |error| split_step(error).1);
                *reason == rule.reason && regex.is_match(cause)
            });
            assert!(hit, "{}", rule.pattern);
        }
    }

    #[test]
    fn what_no_rule_knows_is_unknown() {
        for stderr in ["Error: something nobody has seen\n", "", "\n", "Error: "] {
            let verdict = classify(&end(stderr));
            assert_eq!(verdict.reason, Reason::Unknown, "{stderr}");
            assert!(!verdict.message.is_empty());
        }
    }

    #[test]
    fn a_run_that_prints_any_of_these_texts_is_a_failed_run() {
        for (text, ..) in WORDINGS {
            for quoted in [(*text).to_owned(), format!("printf '{text}'"), format!("cat <<EOF\n{text}EOF")] {
                let stderr = format!(
                    "level=warning\nError: building at STEP \"RUN {quoted}; exit 7\": exit status 7\n"
                );
                let verdict = classify(&end(&stderr));
                assert_eq!(
                    (verdict.reason, verdict.run_exit_code),
                    (Reason::BuildFailed, Some(7)),
                    "{stderr}"
                );
            }
        }
    }

    #[test]
    fn a_run_whose_text_is_longer_than_what_is_kept_is_a_failed_run() {
        let stderr = "no space left on device\nimage not known\": exit status 3\n";
        let verdict = classify(&StepEnd { exit: Exit::Code(3), ..end(stderr) });
        assert_eq!((verdict.reason, verdict.run_exit_code), (Reason::BuildFailed, Some(3)));
    }

    #[test]
    fn a_quoted_cause_does_not_belong_to_the_text_of_a_run() {
        let stderr = "Error: building at STEP \"RUN --mount=type=foo true\": resolving mountpoints for container \"883d\": invalid mount type \"foo\"\n";
        assert_eq!(classify(&end(stderr)).step.as_deref(), Some("RUN --mount=type=foo true"));
    }

    #[test]
    fn messages_leave_buildahs_structures_out() {
        for (text, ..) in WORDINGS
            .iter()
            .filter(|(text, ..)| text.contains(" for copier.request{") || text.contains(" for step {"))
        {
            let message = classify(&end(text)).message;
            assert!(!message.contains('{') && !message.contains('}'), "{message}");
        }
    }

    #[test]
    fn every_rule_is_a_regular_expression() {
        assert!(COMPILED.iter().all(|(regex, _)| regex.is_some()));
        assert!(DUMPS.is_some() && FOREIGN_OWNER.is_some());
    }

    #[test]
    fn an_end_without_a_word_is_told_by_its_exit() {
        let killed = StepEnd { exit: Exit::Killed, ..end("") };
        assert_eq!(classify(&killed).reason, Reason::OutOfMemory);
        let signal = StepEnd { exit: Exit::Signal(11), ..end("") };
        assert!(classify(&signal).message.contains("signal 11"));
    }
}
