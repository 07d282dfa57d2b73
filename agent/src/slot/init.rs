//! PID 1 of one step: starts the program, reaps everything, watches the number of processes (shell).
//!
//! When it ends, the kernel kills whatever is left in its PID namespace before anyone can see its end.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, execve, pipe2, setpgid};

use crate::error::chain;

use super::wire::{Breach, Exit, SlotLimits, Step, StepEnd};

/// Enough for buildah's own error, which is one line; RUN's output goes elsewhere.
const STDERR_TAIL_BYTES: usize = 32 * 1024;
/// Six bytes is the longest JSON escape of one byte; the rest of a report is small.
pub(super) const MAX_REPORT_BYTES: usize = 256 * 1024;
/// How often the processes are counted: a shell whose forks fail gives up within a tenth of a second, and
/// then nobody would know why. One look costs some 50 µs.
const COUNT_PERIOD: Duration = Duration::from_millis(25);
/// How often while their number grows by more than a 64th of the limit from look to look.
const HURRIED_PERIOD: Duration = Duration::from_millis(2);
/// Threads are only counted when there are this many processes, or in every sixteenth look.
const FEW_PROCESSES: u64 = 64;

/// Exit code of an archive or an image that is not unpacked or exported because of what it holds.
pub(crate) const REFUSED: i32 = 1;
/// What container tools answer when they themselves fail.
const OWN_FAULT: i32 = 125;

/// What a step needs from its parent.
pub(super) struct StepContext {
    pub(super) limits: SlotLimits,
    pub(super) archive: Option<File>,
    /// Number of base stores.
    pub(super) stores: usize,
}

/// Runs the step and returns its end. The caller writes it to the parent and leaves.
pub(super) fn run(step: Step, context: StepContext) -> StepEnd {
    match start(step, context) {
        Ok((child, stderr, limits)) => Watch::new(child, stderr, limits).until_the_end(),
        Err(error) => failed(&format!("kiln: cannot start the step: {error}\n")),
    }
}

/// A step that could not even start.
pub(super) fn failed(message: &str) -> StepEnd {
    StepEnd {
        exit: Exit::NotStarted,
        stderr: message.to_owned(),
        breach: None,
        terminated: false,
        left: 0,
        leftovers: 0,
    }
}

fn start(step: Step, context: StepContext) -> nix::Result<(Pid, OwnedFd, SlotLimits)> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)?;
    let (stderr, stderr_write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    match super::fork()? {
        ForkResult::Parent { child } => {
            // Also set by the child: whoever comes first, so that no signal meets a missing group.
            let _ = setpgid(child, child);
            Ok((child, stderr, context.limits))
        }
        ForkResult::Child => {
            drop(stderr);
            program(step, context, &stderr_write)
        }
    }
}

fn program(step: Step, context: StepContext, stderr: &OwnedFd) -> ! {
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    let _ = SigSet::all().thread_unblock();
    // The write end must block for the program; only our reading end must not.
    let _ = nix::fcntl::fcntl(stderr, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty()));
    let _ = nix::unistd::dup2_stderr(stderr);
    let code = match step {
        Step::Unpack(limits) => unpack(context.archive, &limits),
        Step::Export(order) => export(context.stores, &order),
        Step::Exec { argv, env, .. } => exec(&argv, &env, context.limits),
    };
    super::leave(code)
}

fn unpack(archive: Option<File>, limits: &crate::unpack::Limits) -> i32 {
    let Some(mut archive) = archive else {
        return complain("kiln: no context archive was sent");
    };
    // The descriptor shares its position with every other holder.
    let rewound = std::io::Seek::rewind(&mut archive);
    if let Err(error) = rewound {
        return complain(&format!("kiln: rewind the context archive: {error}"));
    }
    match File::open("/job/ctx").map(|root| unpack_into(archive, &root, limits)) {
        Ok(Ok(_)) => 0,
        Ok(Err(error)) => {
            complain(&format!("{}: {error}", error.code()));
            if error.is_the_archives_fault() { REFUSED } else { OWN_FAULT }
        }
        Err(error) => complain(&format!("kiln: open the context directory: {error}")),
    }
}

fn unpack_into(
    archive: File,
    root: &File,
    limits: &crate::unpack::Limits,
) -> Result<crate::unpack::Summary, crate::unpack::UnpackError> {
    crate::unpack::unpack(archive, root.as_fd(), crate::unpack::Modes::Verbatim, limits)
}

fn export(bases: usize, order: &crate::export::Order) -> i32 {
    let stores = std::iter::once("/job/root".to_owned()).chain((0..bases).map(|index| format!("/b/{index}")));
    let opened: nix::Result<Vec<_>> = stores.map(|path| open_directory(&path)).collect();
    let (stores, out) = match opened.and_then(|stores| Ok((stores, open_directory("/out")?))) {
        Ok(opened) => opened,
        Err(error) => return complain(&format!("kiln: open the stores: {error}")),
    };
    let stores: Vec<_> = stores.iter().map(AsFd::as_fd).collect();
    match crate::export::export(&stores, out.as_fd(), order) {
        Ok(()) => 0,
        Err(error) => {
            complain(&chain(&error));
            if error.is_the_stores_fault() { REFUSED } else { OWN_FAULT }
        }
    }
}

/// The build could have put a link in the place of `/job/root`.
fn open_directory(path: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
}

fn exec(argv: &[String], env: &[(String, String)], limits: SlotLimits) -> i32 {
    if let Err(error) = apply_limits(limits) {
        return complain(&format!("kiln: set limits: {error}"));
    }
    let argv: Vec<CString> = argv.iter().filter_map(|a| CString::new(a.as_str()).ok()).collect();
    let env: Vec<CString> = env.iter().filter_map(|(k, v)| CString::new(format!("{k}={v}")).ok()).collect();
    let Some(program) = argv.first() else { return complain("kiln: empty command") };
    if let Err(error) = super::sys::close_on_exec_from(3) {
        return complain(&format!("kiln: seal descriptors: {error}"));
    }
    let Err(error) = execve(program, &argv, &env);
    complain(&format!("kiln: run {}: {error}", program.to_string_lossy()))
}

fn apply_limits(limits: SlotLimits) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, limits.open_files, limits.open_files)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes)
}

#[expect(clippy::print_stderr, reason = "standard error is the step's report channel")]
fn complain(message: &str) -> i32 {
    eprintln!("{message}");
    OWN_FAULT
}

struct Watch {
    child: Pid,
    stderr: OwnedFd,
    tail: Vec<u8>,
    limit: u64,
    peak: u64,
    counted: Instant,
    looks: u64,
    last_count: u64,
    period: Duration,
    exit: Option<Exit>,
    breached: bool,
    terminated: bool,
}

impl Watch {
    fn new(child: Pid, stderr: OwnedFd, limits: SlotLimits) -> Self {
        Self {
            child,
            stderr,
            tail: Vec::new(),
            limit: limits.pids,
            peak: 0,
            counted: Instant::now(),
            looks: 0,
            last_count: 0,
            period: COUNT_PERIOD,
            exit: None,
            breached: false,
            terminated: false,
        }
    }

    fn until_the_end(mut self) -> StepEnd {
        let mask: SigSet = [Signal::SIGCHLD, Signal::SIGTERM].into_iter().collect();
        let Ok(signals) = SignalFd::with_flags(&mask, nix::sys::signalfd::SfdFlags::SFD_NONBLOCK) else {
            return failed("kiln: no signal descriptor\n");
        };
        while self.exit.is_none() && !self.breached {
            let mut fds = [
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stderr.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::try_from(self.period).unwrap_or(PollTimeout::ZERO)) {
                Ok(0) => self.count(),
                Ok(_) => self.events(&signals),
                Err(_) => {}
            }
        }
        self.read_stderr();
        let failed = !matches!(self.exit, Some(Exit::Code(0)));
        let close = self.peak >= self.limit / 4 * 3;
        let breach = (self.breached || failed && close).then_some(Breach::Pids { peak: self.peak });
        StepEnd {
            exit: self.exit.unwrap_or(Exit::Killed),
            stderr: String::from_utf8_lossy(&self.tail).into_owned(),
            breach,
            terminated: self.terminated,
            left: u32::try_from(processes().saturating_sub(1)).unwrap_or(u32::MAX),
            leftovers: 0,
        }
    }

    fn events(&mut self, signals: &SignalFd) {
        while let Ok(Some(info)) = signals.read_signal() {
            // Zero for a sender outside of this PID namespace: a step cannot end itself in the agent's name.
            if info.ssi_signo == Signal::SIGTERM as u32 && info.ssi_pid == 0 {
                self.terminated = true;
                let _ = killpg(self.child, Signal::SIGTERM);
                // A stopped process sees no SIGTERM until it goes on.
                let _ = killpg(self.child, Signal::SIGCONT);
            }
        }
        self.read_stderr();
        self.reap();
        if self.counted.elapsed() >= self.period {
            self.count();
        }
    }

    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == self.child => self.exit = Some(Exit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == self.child => {
                    self.exit = Some(Exit::Signal(signal as i32));
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn read_stderr(&mut self) {
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = nix::unistd::read(&self.stderr, &mut buffer) {
            self.tail.extend_from_slice(&buffer[..count]);
            let excess = self.tail.len().saturating_sub(STDERR_TAIL_BYTES);
            self.tail.drain(..excess);
        }
    }

    fn count(&mut self) {
        self.counted = Instant::now();
        self.looks += 1;
        let mut count = processes();
        if count > FEW_PROCESSES || self.looks.is_multiple_of(16) {
            count = threads();
        }
        let grows = count > self.last_count + self.limit / 64;
        self.period = if grows { HURRIED_PERIOD } else { COUNT_PERIOD };
        self.last_count = count;
        self.peak = self.peak.max(count);
        // The limit itself is enforced by RLIMIT_NPROC; whoever comes this close only forks against it. Who gives
        // up by itself after it came three quarters of the way, between two looks, failed for the same reason.
        self.breached = count + count / 16 >= self.limit;
    }
}

/// Processes in this PID namespace.
fn processes() -> u64 {
    pids().count() as u64
}

/// Threads in this PID namespace. A task directory has one link per thread and two of its own.
fn threads() -> u64 {
    pids()
        .map(|pid| std::fs::metadata(format!("/proc/{pid}/task")))
        .map(|task| task.map_or(1, |task| task.nlink().saturating_sub(2).max(1)))
        .sum()
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}
