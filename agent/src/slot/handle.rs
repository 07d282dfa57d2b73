//! The agent's side of a slot (shell).

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::{Child, Command as Program};
use tokio::time::timeout;

use super::cgroup::Cgroup;
use super::wire::{self, Breach, Command, Report, SetupError, SlotSpec, Step, StepEnd};
use crate::stop::StopSignal;

/// Namespaces, mounts and network take 50 ms; slirp4netns has its own bound of 5 s inside this one.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Beyond the grace and the shim's own backstop: then the shim itself is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(15);
/// Deleting a job directory with a million files takes half a minute on a slow disk.
const FINISH_TIMEOUT: Duration = Duration::from_mins(5);
/// Where the shim finds newuidmap and slirp4netns.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Open files that a slot gets.
#[derive(Debug)]
pub struct SlotFiles {
    /// The store directory.
    pub store: File,
    /// The job's lock; the slot holds it as long as anything of it lives.
    pub lock: File,
    /// The context archive.
    pub archive: Option<File>,
    /// Where RUN's output goes.
    pub log: OwnedFd,
}

/// The slot could not be made, or ended without an answer.
#[derive(Debug, thiserror::Error)]
pub enum SlotLost {
    /// Making it failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// Speaking to it failed.
    #[error("lost the slot while it was to {doing}")]
    Gone {
        /// What it was asked for.
        doing: &'static str,
        /// What the socket said.
        #[source]
        source: std::io::Error,
    },
    /// It was asked to stop and did not.
    #[error("the slot did not end {seconds} s after it was told to; a process may hang in the kernel")]
    Stuck {
        /// How long it had.
        seconds: u64,
    },
}

/// A running slot. Dropping it kills everything in it and deletes its job.
#[derive(Debug)]
pub struct Slot {
    socket: UnixStream,
    child: Child,
    grace: Duration,
    buffer: Vec<u8>,
    cgroup: Option<Cgroup>,
}

impl Slot {
    /// Starts a slot and waits until it can run steps.
    pub async fn start(spec: &SlotSpec, files: SlotFiles) -> Result<Self, SlotLost> {
        let lost = |source| SlotLost::Gone { doing: "start", source };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(lost)?;
        ours.set_nonblocking(true).map_err(lost)?;
        send_descriptors(&ours, &files).map_err(|e| lost(e.into()))?;
        let child = spawn(theirs.into(), files.log).map_err(lost)?;
        let cgroup = limit(spec, &child)?;
        let socket = UnixStream::from_std(ours).map_err(lost)?;
        let mut slot =
            Self { socket, child, grace: Duration::from_millis(spec.grace_ms), buffer: Vec::new(), cgroup };
        slot.write("start", spec).await?;
        slot.until_ready("start").await.map(|()| slot)
    }

    /// Ends every process and every namespace of the slot, then makes new ones over the same job directory.
    pub async fn renew(&mut self, spec: SlotSpec) -> Result<(), SlotLost> {
        self.write("start afresh", &Command::Renew(Box::new(spec))).await?;
        self.until_ready("start afresh").await
    }

    async fn until_ready(&mut self, doing: &'static str) -> Result<(), SlotLost> {
        match timeout(START_TIMEOUT, self.next(doing)).await {
            Ok(Ok(Report::Ready)) => Ok(()),
            Ok(Ok(Report::Failed(error))) => Err(error.into()),
            Ok(Ok(_)) => Err(unexpected(doing)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.give_up(START_TIMEOUT)),
        }
    }

    /// Process id of the shim, which is also its process group.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Runs one step; a stop request ends it by SIGTERM, grace, SIGKILL.
    pub async fn run(&mut self, step: Step, signal: &mut StopSignal) -> Result<StepEnd, SlotLost> {
        self.write("run a step", &Command::Run(step)).await?;
        let mut terminated = false;
        if signal.current().is_some() {
            terminated = true;
            self.write("stop", &Command::Terminate).await?;
        }
        loop {
            let patience = self.grace + STUCK_AFTER;
            tokio::select! {
                report = self.next("run a step") => match self.or_memory_breach(report)? {
                    Report::StepEnded(end) => return Ok(self.with_memory_breach(end)),
                    Report::Finished(_) => return Err(unexpected("run a step")),
                    _ => {}
                },
                request = signal.changed() => {
                    terminated = true;
                    self.write("stop", &Command::Terminate).await?;
                    if request.force {
                        self.write("stop", &Command::Terminate).await?;
                    }
                }
                () = tokio::time::sleep(patience), if terminated => return Err(self.give_up(patience)),
            }
        }
    }

    /// The kernel ends a whole cgroup, and so the shim too.
    fn or_memory_breach(&self, report: Result<Report, SlotLost>) -> Result<Report, SlotLost> {
        let lost = report.is_err() || matches!(report, Ok(Report::Finished(_)));
        match self.cgroup.as_ref().and_then(Cgroup::memory_breach) {
            Some(peak) if lost => Ok(Report::StepEnded(StepEnd {
                exit: super::wire::Exit::Killed,
                stderr: String::new(),
                breach: Some(Breach::Memory { peak }),
                terminated: false,
                left: 0,
                leftovers: 0,
            })),
            _ => report,
        }
    }

    fn with_memory_breach(&self, end: StepEnd) -> StepEnd {
        let memory = self.cgroup.as_ref().and_then(Cgroup::memory_breach).map(|peak| Breach::Memory { peak });
        StepEnd { breach: end.breach.or(memory), ..end }
    }

    /// Publishes a directory of the job, or deletes published ones.
    pub async fn change_store(&mut self, command: Command) -> Result<Result<(), String>, SlotLost> {
        self.write("change the store", &command).await?;
        match timeout(FINISH_TIMEOUT, self.next("change the store")).await {
            Ok(Ok(Report::Done(result))) => Ok(result),
            Ok(Ok(_)) => Err(unexpected("change the store")),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.give_up(FINISH_TIMEOUT)),
        }
    }

    /// Deletes the job and waits until nothing of the slot is left.
    pub async fn finish(mut self) -> Result<(), SlotLost> {
        // A slot that just lost its processes may already be deleting.
        let _ = self.write("finish", &Command::Finish).await;
        match timeout(FINISH_TIMEOUT, self.until_finished()).await {
            Ok(result) => result?,
            Err(_) => return Err(self.give_up(FINISH_TIMEOUT)),
        }
        match timeout(STUCK_AFTER, self.child.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.give_up(STUCK_AFTER)),
        }
    }

    async fn until_finished(&mut self) -> Result<(), SlotLost> {
        loop {
            if let Report::Finished(result) = self.next("finish").await? {
                return result.map_err(|cause| SetupError::new("delete the job directory", cause).into());
            }
        }
    }

    /// The shim is stuck: end it hard. Its children follow, because they watch it.
    fn give_up(&self, waited: Duration) -> SlotLost {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        SlotLost::Stuck { seconds: waited.as_secs() }
    }

    async fn write<T: serde::Serialize>(&mut self, doing: &'static str, message: &T) -> Result<(), SlotLost> {
        let lost = |source| SlotLost::Gone { doing, source };
        let frame = wire::encode(message).map_err(lost)?;
        let written = timeout(START_TIMEOUT, self.socket.write_all(&frame)).await;
        written.map_err(|_| lost(std::io::ErrorKind::TimedOut.into()))?.map_err(lost)
    }

    /// The next report. Cancel-safe: what was read of a frame stays in the buffer.
    async fn next(&mut self, doing: &'static str) -> Result<Report, SlotLost> {
        let lost = |source| SlotLost::Gone { doing, source };
        loop {
            if let Some(report) = self.buffered().map_err(lost)? {
                return Ok(report);
            }
            if self.socket.read_buf(&mut self.buffer).await.map_err(lost)? == 0 {
                return Err(lost(std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    fn buffered(&mut self) -> std::io::Result<Option<Report>> {
        let Some(head) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let end = 4 + wire::body_length(*head)?;
        let Some(body) = self.buffer.get(4..end) else { return Ok(None) };
        let report = serde_json::from_slice(body)?;
        self.buffer.drain(..end);
        Ok(Some(report))
    }
}

/// Puts the shim into a cgroup of its own, if limits are set that only a cgroup can hold. Everything that it
/// starts follows; it has started nothing yet, because it waits for its specification.
fn limit(spec: &SlotSpec, shim: &Child) -> Result<Option<Cgroup>, SlotLost> {
    let (memory, cpus) = (spec.limits.memory_bytes, spec.limits.cpus);
    if memory.is_none() && cpus.is_none() {
        return Ok(None);
    }
    let parent = super::cgroup::delegated().map_err(|e| {
        SetupError::new(
            "limit memory and CPU (build.limits.memory, build.limits.cpus)",
            crate::error::chain(&e),
        )
    })?;
    let failed = |e: std::io::Error| SetupError::new(format!("make a cgroup below {}", parent.display()), e);
    let cgroup = Cgroup::create(&parent, &spec.job, memory, cpus).map_err(failed)?;
    if let Some(pid) = shim.id() {
        cgroup.adopt(pid).map_err(failed)?;
    }
    Ok(Some(cgroup))
}

fn unexpected(doing: &'static str) -> SlotLost {
    SlotLost::Gone { doing, source: std::io::Error::other("its processes were killed from outside") }
}

fn send_descriptors(socket: &std::os::unix::net::UnixStream, files: &SlotFiles) -> nix::Result<()> {
    let mut descriptors: Vec<RawFd> = vec![files.store.as_raw_fd(), files.lock.as_raw_fd()];
    descriptors.extend(files.archive.as_ref().map(AsRawFd::as_raw_fd));
    let control = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"d")], &control, MsgFlags::empty(), None).map(drop)
}

#[expect(clippy::disallowed_methods, reason = "this is the slot: it owns the process and guarantees its end")]
fn spawn(socket: OwnedFd, log: OwnedFd) -> std::io::Result<Child> {
    Program::new("/proc/self/exe")
        .arg0("kiln-slot")
        .arg(super::SHIM_ARGUMENT)
        .env_clear()
        .env("PATH", SYSTEM_PATH)
        .stdin(socket)
        .stdout(log)
        .stderr(Stdio::inherit())
        .spawn()
}
