//! The shim: one single-threaded process per slot, between the agent and the namespaces (shell).
//!
//! Its standard input is a socket to the agent: commands, reports and lifeline in one. When the agent
//! dies, the socket ends, and the shim kills the slot and deletes the job.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Command as Program, Stdio};
use std::time::{Duration, Instant};

use kiln_protocol::request::NetworkMode;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Pid, Uid, pipe2};

use super::network::Slirp;
use super::outer::{self, Inheritance};
use super::sys::{self, Side};
use super::wire::{self, Command, IdRange, Report, SetupError, SlotSpec};

/// After the grace, this long for the kernel to take a slot apart before the shim kills it as a whole.
const BACKSTOP: Duration = Duration::from_secs(5);
/// Halfway between an ordinary process (0) and the first to be killed (1000).
const OOM_SCORE: &str = "500";
/// Descriptors that the agent sends: store, lock, and perhaps the context archive.
const MAX_DESCRIPTORS: usize = 3;

/// Leaves everything of the agent's that a process inherits and a build must not have.
fn detach() -> nix::Result<()> {
    // A session of its own has no terminal: nobody can type into the user's.
    nix::unistd::setsid()?;
    match sys::leave_keyring() {
        // Kernels without keyrings have nothing to leave.
        Ok(()) | Err(nix::errno::Errno::ENOSYS) => {}
        Err(error) => return Err(error),
    }
    // The agent reads what a slot exports.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    // If memory runs out, a build dies before the agent. Raising the score needs no privilege; a kernel
    // that refuses only chooses less well.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    Ok(())
}

struct Received {
    spec: SlotSpec,
    store: OwnedFd,
    /// Held until the shim ends: whoever gets this lock knows that the job is nobody's.
    _lock: OwnedFd,
    archive: Option<File>,
}

/// Runs the shim on standard input. Returns the exit code.
pub(super) fn run() -> i32 {
    // Signals of a terminal reach only the agent (own process group); those for us are read, not taken.
    let mask: SigSet = SigSet::all();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None);
    if detach().is_err() {
        return 1;
    }
    let Ok(stdin) = std::io::stdin().as_fd().try_clone_to_owned() else { return 1 };
    let mut agent = UnixStream::from(stdin);
    let Ok(received) = receive(&mut agent) else { return 1 };
    match enter(&received).and_then(|()| start(&received)) {
        Ok(slot) => {
            Relay { agent, slot, retired: None, kill_at: None, finished: false }.until_the_end(received)
        }
        Err(error) => {
            let _ = wire::send(&mut agent, &Report::Failed(error));
            1
        }
    }
}

fn receive(agent: &mut UnixStream) -> std::io::Result<Received> {
    let mut descriptors = receive_descriptors(agent)?.into_iter();
    let missing = || std::io::Error::other("a descriptor is missing");
    let spec = wire::receive(agent)?.ok_or_else(missing)?;
    let store = descriptors.next().ok_or_else(missing)?;
    let lock = descriptors.next().ok_or_else(missing)?;
    Ok(Received { spec, store, _lock: lock, archive: descriptors.next().map(File::from) })
}

fn receive_descriptors(agent: &UnixStream) -> std::io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(agent.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            received.extend(numbers.into_iter().map(sys::own));
        }
    }
    Ok(received)
}

struct Slot {
    outer: Pid,
    socket: UnixStream,
    network: Option<Slirp>,
}

fn enter(received: &Received) -> Result<(), SetupError> {
    // While we still are who may pass the directories above; a new mount namespace keeps the place.
    nix::unistd::fchdir(&received.store).map_err(|e| SetupError::new("enter the store directory", e))?;
    drop_privileges(received.spec.drop_to)
}

fn start(received: &Received) -> Result<Slot, SetupError> {
    let mut flags = namespaces();
    if received.spec.network != NetworkMode::UnsafeHost {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    let (ours, theirs) = UnixStream::pair().map_err(|e| SetupError::new("make a socket", e))?;
    let outer = spawn(flags, received.spec.ids, &kept(received, Some(&theirs)), || {
        serve(received, theirs.try_clone());
    })?;
    let network = match received.spec.network {
        NetworkMode::Isolated => Some(Slirp::start(outer.pid)),
        NetworkMode::None | NetworkMode::UnsafeHost => None,
    };
    match network.transpose() {
        Ok(network) => {
            outer.go()?;
            Ok(Slot { outer: outer.pid, socket: ours, network })
        }
        Err(error) => {
            end(outer.pid);
            Err(error)
        }
    }
}

fn namespaces() -> CloneFlags {
    CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
}

/// Descriptors that the outer process goes on with. Every other one belongs to somebody whose death it would
/// hide: the agent's socket, the job's lock, the shim's own end.
fn kept(received: &Received, shim: Option<&UnixStream>) -> Vec<RawFd> {
    let archive = received.archive.as_ref().map(AsRawFd::as_raw_fd);
    [Some(received.store.as_raw_fd()), archive, shim.map(AsRawFd::as_raw_fd)].into_iter().flatten().collect()
}

fn serve(received: &Received, shim: std::io::Result<UnixStream>) {
    let (Ok(store), Ok(shim)) = (received.store.try_clone(), shim) else { return };
    let archive = received.archive.as_ref().and_then(|f| f.try_clone().ok());
    outer::serve(Inheritance { spec: received.spec.clone(), shim, store, archive });
}

struct Spawned {
    pid: Pid,
    go: OwnedFd,
}

impl Spawned {
    /// Lets the process go on.
    fn go(&self) -> Result<(), SetupError> {
        nix::unistd::write(&self.go, b"g").map(drop).map_err(|e| SetupError::new("start the slot", e))
    }
}

/// Starts `body` as root of new namespaces with the subordinate ids mapped.
fn spawn(
    flags: CloneFlags,
    ids: IdRange,
    kept: &[RawFd],
    body: impl FnOnce(),
) -> Result<Spawned, SetupError> {
    let failed = |what: &str, e: nix::errno::Errno| SetupError::new(what, e);
    let (go_read, go) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed("make a pipe", e))?;
    match sys::clone_process(flags).map_err(|e| failed("create namespaces", e))? {
        Side::Parent(pid) => {
            let mapped = map_ids("newuidmap", pid, ids.first_uid, ids.count)
                .and_then(|()| map_ids("newgidmap", pid, ids.first_gid, ids.count));
            mapped.inspect_err(|_| end(pid)).map(|()| Spawned { pid, go })
        }
        Side::Child => {
            wait_for_go(&go_read, kept);
            body();
            super::leave(0)
        }
    }
}

/// In the new process: keeps only what it needs, dies with the shim, and waits for its ids.
fn wait_for_go(go: &OwnedFd, kept: &[RawFd]) {
    // Lost again at the change of uid, and set again there.
    let watched = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    let null = File::open("/dev/null");
    let detached = null.and_then(|null| Ok(nix::unistd::dup2_stdin(&null)?));
    let mut kept = kept.to_vec();
    kept.push(go.as_raw_fd());
    let closed = sys::close_all_but(&mut kept);
    let mut byte = [0];
    // The end of the pipe means that the shim is gone.
    if watched.is_err() || detached.is_err() || closed.is_err() || nix::unistd::read(go, &mut byte) != Ok(1) {
        super::leave(1);
    }
}

fn map_ids(program: &str, pid: Pid, first: u32, count: u32) -> Result<(), SetupError> {
    let arguments = [pid.to_string(), "0".to_owned(), first.to_string(), count.to_string()];
    let output = Program::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| SetupError::new(format!("run {program}"), e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(SetupError::new(format!("map {count} ids from {first} with {program}"), said))
}

fn drop_privileges(user: Option<super::wire::User>) -> Result<(), SetupError> {
    let Some(user) = user else { return Ok(()) };
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let failed = |e: nix::errno::Errno| SetupError::new(format!("become user {uid}"), e);
    nix::unistd::setgroups(&[gid]).map_err(failed)?;
    nix::unistd::setresgid(gid, gid, gid).map_err(failed)?;
    nix::unistd::setresuid(uid, uid, uid).map_err(failed)?;
    // newuidmap looks at the owner of /proc/PID, which is root for a process that changed its uid.
    nix::sys::prctl::set_dumpable(true).map_err(failed)
}

fn end(pid: Pid) {
    let _ = kill(pid, Signal::SIGKILL);
    while matches!(waitpid(pid, None), Err(nix::errno::Errno::EINTR)) {}
}

struct Relay {
    agent: UnixStream,
    slot: Slot,
    /// Helper of an earlier slot's network, told to end. It is waited for when we end ourselves.
    retired: Option<Slirp>,
    kill_at: Option<Instant>,
    finished: bool,
}

impl Relay {
    fn until_the_end(mut self, mut received: Received) -> i32 {
        while self.turn(&mut received).is_some() {}
        end(self.slot.outer);
        if self.finished {
            return 0;
        }
        // The slot died, or the agent did: nobody else deletes the job.
        let report = Report::Finished(delete(&received).map_err(|e| e.to_string()));
        let clean = matches!(report, Report::Finished(Ok(())));
        let _ = wire::send(&mut self.agent, &report);
        i32::from(!clean)
    }

    /// `None` when it is over.
    fn turn(&mut self, received: &mut Received) -> Option<()> {
        let wait = self.kill_at.map(|at| at.saturating_duration_since(Instant::now()));
        if wait.is_some_and(|left| left.is_zero()) {
            return None;
        }
        let timeout =
            wait.map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        let mut fds = [
            PollFd::new(self.agent.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.slot.socket.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, timeout);
        let (from_agent, from_slot) = (fds[0].any().unwrap_or(false), fds[1].any().unwrap_or(false));
        if from_slot {
            self.hear_slot()?;
        }
        if from_agent { self.hear_agent(received) } else { Some(()) }
    }

    fn hear_slot(&mut self) -> Option<()> {
        let report: Report = wire::receive(&mut self.slot.socket).ok().flatten()?;
        if matches!(report, Report::StepEnded(_)) {
            self.kill_at = None;
        }
        self.finished = matches!(report, Report::Finished(Ok(())));
        let over = matches!(report, Report::Finished(_) | Report::Failed(_));
        wire::send(&mut self.agent, &report).ok()?;
        (!over).then_some(())
    }

    fn hear_agent(&mut self, received: &mut Received) -> Option<()> {
        let command = match wire::receive(&mut self.agent).ok().flatten()? {
            Command::Renew(spec) => return self.renew(received, *spec),
            command => command,
        };
        if command == Command::Terminate && self.kill_at.is_none() {
            self.kill_at = Some(Instant::now() + Duration::from_millis(received.spec.grace_ms) + BACKSTOP);
        }
        if command == Command::Finish
            && let Some(network) = &mut self.slot.network
        {
            // It takes as long to end as the job takes to delete; nothing needs it any more.
            network.kill();
        }
        wire::send(&mut self.slot.socket, &command).ok()
    }
}

impl Relay {
    /// Lifeline, lock and duty to delete stay here: there is no moment in which nobody has them.
    fn renew(&mut self, received: &mut Received, spec: SlotSpec) -> Option<()> {
        // Its end is the end of its PID namespace, and so of every process in it.
        end(self.slot.outer);
        self.retired = self.slot.network.take();
        self.retired.iter_mut().for_each(Slirp::kill);
        received.spec = spec;
        match start(received) {
            Ok(slot) => {
                self.slot = slot;
                Some(())
            }
            Err(error) => {
                let _ = wire::send(&mut self.agent, &Report::Failed(error));
                None
            }
        }
    }
}

/// Deletes the job directory from a user namespace of its own.
fn delete(received: &Received) -> Result<(), SetupError> {
    let (done, done_write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| SetupError::new("make a pipe", e))?;
    let mut kept = kept(received, None);
    kept.push(done_write.as_raw_fd());
    let child = spawn(namespaces(), received.spec.ids, &kept, || {
        let result =
            outer::become_root().and_then(|()| outer::remove_job(received.store.as_fd(), &received.spec.job));
        let answer = result.map_or_else(|e| e.to_string(), |()| "ok".to_owned());
        let _ = nix::unistd::write(&done_write, answer.as_bytes());
    })?;
    child.go()?;
    drop(done_write);
    let mut answer = [0; 256];
    let count = nix::unistd::read(&done, &mut answer).unwrap_or(0);
    end(child.pid);
    match &answer[..count] {
        b"ok" => Ok(()),
        other => Err(SetupError::new("delete the job directory", String::from_utf8_lossy(other))),
    }
}
