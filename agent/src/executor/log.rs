//! The log pipe of a build (shell).

use std::io::{PipeReader, Read as _};
use std::os::fd::OwnedFd;
use std::time::Duration;

use kiln_protocol::Reason;
use kiln_protocol::result::{Failure, LogSummary, Steps};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinHandle;

use super::{Attempt, Event, Run};
use crate::config::ProxyConfig;
use crate::error::chain;
use crate::logs::display::{is_cache_hit, parse_step};
use crate::logs::redact::{MIN_SECRET_BYTES, Redactor, SecretValue};
use crate::logs::spool::{Limits, Spool};
use crate::logs::{LogPipeline, LogStream};
use crate::stop::StopSignal;

/// Lines that a failure message repeats.
pub const LAST_LINES: usize = 20;
/// A line that a program leaves unfinished, a prompt or a progress bar, is shown after this.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
/// Every writer is dead by then; only one that hangs in the kernel, or a watcher that does not read, is not.
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for room in a full channel before looking again.
const SLOW_WATCHER: Duration = Duration::from_millis(10);
const BUFFER_BYTES: usize = 64 * 1024;

/// A log that is being written.
pub(super) struct Log {
    reader: JoinHandle<Read>,
    redactor: Redactor,
}

/// What the reader saw.
struct Read {
    summary: LogSummary,
    last_lines: Vec<String>,
    last_step: Option<String>,
    steps: Steps,
}

impl Read {
    fn nothing() -> Self {
        let steps = Steps::default();
        Self { summary: super::empty_log(), last_lines: Vec::new(), last_step: None, steps }
    }
}

/// A log that was written.
pub(super) struct Ended {
    pub(super) summary: LogSummary,
    pub(super) last_lines: Vec<String>,
    /// The instruction that buildah announced last. A RUN can print such a line too: it is shown, and decides
    /// nothing.
    pub(super) last_step: Option<String>,
    pub(super) steps: Steps,
    redactor: Option<Redactor>,
}

impl Ended {
    /// The log of a build that never came to print.
    pub(super) fn nothing() -> Self {
        Self::new(Read::nothing(), None)
    }

    fn new(read: Read, redactor: Option<Redactor>) -> Self {
        let Read { summary, last_lines, last_step, steps } = read;
        Self { summary, last_lines, last_step, steps, redactor }
    }

    /// What ended a command silently is told by a line of the log: good enough for a hint, not for a reason.
    pub(super) fn hint(&self, failure: Failure) -> Failure {
        let said = |text: &str| self.last_lines.iter().any(|line| line.contains(text));
        if failure.run_exit_code.is_none() || failure.hint.is_some() || !said("file size limit exceeded") {
            return failure;
        }
        Failure {
            hint: Some("a file grew past build.limits.file_size; raise it if the build needs it".to_owned()),
            ..failure
        }
    }

    /// A message may quote an instruction, and that a build argument.
    pub(super) fn redact(&self, mut failure: Failure) -> Failure {
        let Some(redactor) = &self.redactor else { return failure };
        failure.message = redactor.redact_text(&failure.message);
        failure.hint = failure.hint.map(|hint| redactor.redact_text(&hint));
        if let Some(location) = &mut failure.location {
            location.text = redactor.redact_text(&location.text);
        }
        failure
    }
}

/// Starts reading; the writer goes to the slot.
pub(super) fn start(run: &Run) -> Attempt<(Log, OwnedFd)> {
    let secrets = run.inputs.secrets.iter();
    let secrets = secrets.map(|s| SecretValue { name: s.id.clone(), bytes: s.value.clone() });
    let redactor = Redactor::new(secrets.chain(proxy_passwords(&run.agent.config.build.proxy)))
        .map_err(|e| run.fail(Reason::BadRequest, chain(&e)))?;
    let (reader, writer) =
        crate::bases::log_pipe(&run.job).map_err(|e| run.fail(Reason::Unknown, chain(&e)))?;
    let limits = Limits::with_cap(run.agent.config.logs.max_bytes);
    let spool = Spool::create(&run.agent.state.log_path(run.build, run.attempt), limits)
        .map_err(|e| run.fail(Reason::DiskFull, chain(&e)))?;
    let events = run.events.clone();
    let ours = redactor.fresh();
    let stop = run.stop.clone();
    let reader = tokio::task::spawn_blocking(move || read(reader, &redactor, spool, &events, &stop));
    Ok((Log { reader, redactor: ours }, writer))
}

/// RUN has them in its environment, and `env` prints that. Shorter ones cannot be masked.
fn proxy_passwords(proxy: &ProxyConfig) -> impl Iterator<Item = SecretValue> {
    let urls = [&proxy.http, &proxy.https].into_iter().flatten();
    let passwords = urls.filter_map(|url| {
        let (user, _) = url.split_once("://")?.1.rsplit_once('@')?;
        Some(user.split_once(':')?.1.as_bytes().to_vec())
    });
    let long = passwords.filter(|password| password.len() >= MIN_SECRET_BYTES);
    long.map(|bytes| SecretValue { name: "build.proxy".to_owned(), bytes })
}

impl Log {
    /// Waits for the last byte: every writer is gone once the slot is.
    pub(super) async fn finish(self) -> Ended {
        let read = tokio::time::timeout(END_TIMEOUT, self.reader).await;
        let failed = |error: &dyn std::fmt::Display| {
            tracing::error!(%error, "the log did not end; its numbers are lost");
            Read::nothing()
        };
        let read = match read {
            Ok(read) => read.unwrap_or_else(|error| failed(&error)),
            Err(error) => failed(&error),
        };
        Ended::new(read, Some(self.redactor))
    }
}

fn read(
    mut pipe: PipeReader,
    redactor: &Redactor,
    spool: Spool,
    events: &mpsc::Sender<Event>,
    stop: &StopSignal,
) -> Read {
    let mut last_step = None;
    let mut steps = Steps::default();
    let observer = |line: &crate::logs::LogLine<'_>| {
        if let Some(step) = parse_step(&line.text) {
            steps.total = steps.total.saturating_add(u32::from(!step.is_from()));
            last_step = Some(step.text.to_owned());
        }
        // More hits than steps are something that a RUN printed.
        steps.cached = (steps.cached + u32::from(is_cache_hit(&line.text))).min(steps.total);
        deliver(events, stop, Event::Line(line.text.clone().into_owned()));
    };
    let mut pipeline = LogPipeline::new(redactor, spool, observer);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        if pipeline.pending() && quiet(&pipe) {
            pipeline.flush();
        }
        match pipe.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => pipeline.push(LogStream::Run, &buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::error!(%error, "the log pipe broke; the rest of the log is lost");
                break;
            }
        }
    }
    let (report, last_lines) = pipeline.finish(LAST_LINES);
    if let Some(fault) = &report.fault {
        // The build goes on without its log, and the watcher is told.
        deliver(events, stop, Event::Note(format!("the log is incomplete: {}", chain(fault))));
    }
    Read { summary: report.summary, last_lines, last_step, steps }
}

/// Waits for a watcher that is slow, but not once the build is to stop. The spool has the line in any case.
fn deliver(events: &mpsc::Sender<Event>, stop: &StopSignal, mut event: Event) {
    while let Err(TrySendError::Full(back)) = events.try_send(event) {
        if stop.current().is_some() {
            return;
        }
        std::thread::sleep(SLOW_WATCHER);
        event = back;
    }
}

fn quiet(pipe: &PipeReader) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&QUIET)), Ok(0))
}
