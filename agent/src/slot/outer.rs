//! PID 1 of a slot's outer namespaces: builds the root, runs the steps, deletes the job (shell).
//!
//! It lives in the first user namespace, which owns mounts and network; steps live one namespace deeper.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{SFlag, fstatat};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, pipe2, setgroups, setresgid, setresuid};

use kiln_protocol::request::NetworkMode;

use super::sys::{self, Side};
use super::wire::{self, Breach, Command, Exit, Report, SetupError, SlotSpec, Step, StepEnd};
use super::{init, network, reap, root};

/// How often the free space is looked at. At 1 GB/s a build gets half a gigabyte past its limit.
const DISK_PERIOD: Duration = Duration::from_millis(250);
/// The tree is walked when the file system lost this share of the limit since the last walk, or this much …
const WALK_SHARE: u64 = 20;
const WALK_BYTES: u64 = 256 * 1024 * 1024;
/// … and now and then: a neighbour that frees space hides what we take.
const WALK_PERIOD: Duration = Duration::from_secs(5);

/// What the shim handed over.
pub(super) struct Inheritance {
    pub(super) spec: SlotSpec,
    pub(super) shim: UnixStream,
    pub(super) store: OwnedFd,
    pub(super) archive: Option<File>,
}

/// Becomes uid 0 of the user namespace, which is the first subordinate uid outside.
pub(super) fn become_root() -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    // Both are lost at the change of uid. Dumpable, so that the id maps of our children belong to us; a
    // step still cannot trace us, because that needs a capability in our user namespace, above its own.
    // The shim has one thread, so its death is meant.
    nix::sys::prctl::set_dumpable(true)?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
}

/// Serves commands of the shim until it says `Finish` or is gone.
pub(super) fn serve(mut this: Inheritance) {
    let ready = prepare(&this);
    let failed = ready.is_err();
    let report = ready.map_or_else(Report::Failed, |()| Report::Ready);
    if wire::send(&mut this.shim, &report).is_err() || failed {
        return;
    }
    while let Ok(Some(command)) = wire::receive(&mut this.shim) {
        let Some(report) = execute(&mut this, command) else { continue };
        let last = matches!(report, Report::Finished(_));
        if wire::send(&mut this.shim, &report).is_err() || last {
            return;
        }
    }
}

fn prepare(this: &Inheritance) -> Result<(), SetupError> {
    become_root().map_err(|e| SetupError::new("become root of the namespace", e))?;
    if this.spec.network != NetworkMode::UnsafeHost {
        network::loopback_up()?;
    }
    if this.spec.network == NetworkMode::Isolated {
        network::restrict(&this.spec)?;
    }
    root::enter(&this.spec)?;
    nix::unistd::sethostname("kiln").map_err(|e| SetupError::new("set the host name", e))?;
    // Bounds every process of the user namespaces made from here on, whatever uid it takes inside.
    let pids = this.spec.limits.pids;
    setrlimit(Resource::RLIMIT_NPROC, pids, pids).map_err(|e| SetupError::new("limit processes", e))
}

fn execute(this: &mut Inheritance, command: Command) -> Option<Report> {
    match command {
        Command::Run(step) => Some(Report::StepEnded(run_step(this, step))),
        Command::Promote { from, to } => {
            Some(Report::Done(promote(this, &from, &to).map_err(|e| e.to_string())))
        }
        Command::Remove(names) => Some(Report::Done(remove(this, &names).map_err(|e| e.to_string()))),
        // Between two steps there is nothing to terminate. To be renewed is the shim's affair: it ends us.
        Command::Terminate | Command::Renew(_) => None,
        Command::Finish => Some(Report::Finished(finish(this).map_err(|e| e.to_string()))),
    }
}

fn promote(this: &Inheritance, from: &str, to: &str) -> nix::Result<()> {
    // Not synced: flushing a busy disk takes minutes. What was published counts only until the next boot.
    let from = format!("jobs/{}/{from}", this.spec.job);
    let meta = fstatat(&this.store, from.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if SFlag::from_bits_truncate(meta.st_mode) & SFlag::S_IFMT != SFlag::S_IFDIR {
        return Err(Errno::ENOTDIR);
    }
    nix::fcntl::renameat(&this.store, from.as_str(), &this.store, to)
}

fn remove(this: &Inheritance, names: &[String]) -> nix::Result<()> {
    // One that cannot be deleted must not keep the others.
    names.iter().map(|name| remove_below(this.store.as_fd(), name)).fold(Ok(()), nix::Result::and)
}

fn finish(this: &Inheritance) -> nix::Result<()> {
    root::unmount_job();
    remove_job(this.store.as_fd(), &this.spec.job)
}

/// Deletes a job directory below the store.
pub(super) fn remove_job(store: std::os::fd::BorrowedFd<'_>, job: &str) -> nix::Result<()> {
    remove_below(store, &format!("jobs/{job}"))
}

fn remove_below(store: std::os::fd::BorrowedFd<'_>, path: &str) -> nix::Result<()> {
    let name = CString::new(path).map_err(|_| Errno::EINVAL)?;
    reap::remove_tree(store, &name)
}

fn run_step(this: &mut Inheritance, step: Step) -> StepEnd {
    match start_step(this, step) {
        Ok((pid, end)) => Supervision::new(this, pid, end).until_the_end(),
        Err(error) => init::failed(&format!("kiln: cannot start a step: {error}\n")),
    }
}

fn start_step(this: &Inheritance, step: Step) -> nix::Result<(Pid, OwnedFd)> {
    let (go, go_write) = pipe2(OFlag::O_CLOEXEC)?;
    let (end, end_write) = pipe2(OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    if !matches!(step, Step::Exec { network: true, .. }) {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    match sys::clone_process(flags)? {
        Side::Parent(pid) => {
            drop((go, end_write));
            map_all_ids(pid, this.spec.ids.count)?;
            nix::unistd::write(&go_write, b"g")?;
            Ok((pid, end))
        }
        Side::Child => {
            drop(go_write);
            step_main(this, step, &go, end_write)
        }
    }
}

/// The inner namespace has the same ids: only its mounts are out of reach.
fn map_all_ids(pid: Pid, count: u32) -> nix::Result<()> {
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{map}"), format!("0 0 {count}\n"))
            .map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    }
    Ok(())
}

fn step_main(this: &Inheritance, step: Step, go: &OwnedFd, end: OwnedFd) -> ! {
    // Written once the id maps are; its end means that they could not be.
    let mut byte = [0];
    if nix::unistd::read(go, &mut byte) != Ok(1) {
        super::leave(1);
    }
    // Its memory holds the specification with the build's secrets.
    let _ = nix::sys::prctl::set_dumpable(false);
    // A key that a step leaves in its session's keyring must not be there for the next one.
    if !matches!(sys::leave_keyring(), Ok(()) | Err(Errno::ENOSYS)) {
        super::leave(1);
    }
    let archive = this.archive.as_ref().and_then(|file| file.try_clone().ok());
    close_what_steps_must_not_hold(this);
    let report = init::run(
        step,
        init::StepContext { limits: this.spec.limits, archive, stores: this.spec.stores.len() },
    );
    let sent = serde_json::to_writer(File::from(end), &report);
    super::leave(i32::from(sent.is_err()))
}

fn close_what_steps_must_not_hold(this: &Inheritance) {
    let descriptors = [this.store.as_raw_fd(), this.shim.as_raw_fd()];
    for number in descriptors.into_iter().filter_map(|n| u32::try_from(n).ok()) {
        let _ = sys::close_range(number, number);
    }
}

struct Supervision<'a> {
    this: &'a mut Inheritance,
    pid: Pid,
    end: OwnedFd,
    /// What was read of the step's report.
    report: Vec<u8>,
    disk: Disk,
    kill_at: Option<Instant>,
    terminated: bool,
    breach: Option<Breach>,
}

impl<'a> Supervision<'a> {
    fn new(this: &'a mut Inheritance, pid: Pid, end: OwnedFd) -> Self {
        let disk = Disk::new(this.spec.limits.disk_bytes);
        Self { this, pid, end, report: Vec::new(), disk, kill_at: None, terminated: false, breach: None }
    }

    fn until_the_end(mut self) -> StepEnd {
        let mask: SigSet = [Signal::SIGCHLD].into_iter().collect();
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK).ok();
        loop {
            if self.ended() {
                self.read_report();
                return self.into_end();
            }
            self.read_report();
            let wait = self.timeout();
            let mut fds = vec![PollFd::new(self.this.shim.as_fd(), PollFlags::POLLIN)];
            fds.push(PollFd::new(self.end.as_fd(), PollFlags::POLLIN));
            fds.extend(signals.as_ref().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)));
            let _ = poll(&mut fds, wait);
            let spoken = fds[0].any().unwrap_or(false);
            drop(fds);
            while let Some(Ok(Some(_))) = signals.as_ref().map(SignalFd::read_signal) {}
            if spoken {
                self.listen();
            }
            self.enforce();
        }
    }

    fn ended(&self) -> bool {
        // The shim waits for nobody else here: a step's PID 1 is our only child.
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => false,
            Ok(_) | Err(_) => true,
        }
    }

    fn timeout(&self) -> PollTimeout {
        let left = self.kill_at.map_or(DISK_PERIOD, |at| at.saturating_duration_since(Instant::now()));
        PollTimeout::try_from(left.min(DISK_PERIOD)).unwrap_or(PollTimeout::ZERO)
    }

    fn listen(&mut self) {
        match wire::receive(&mut self.this.shim) {
            Ok(Some(Command::Terminate)) if !self.terminated => {
                self.terminated = true;
                self.kill_at = Some(Instant::now() + Duration::from_millis(self.this.spec.grace_ms));
                let _ = kill(self.pid, Signal::SIGTERM);
                let _ = kill(self.pid, Signal::SIGCONT);
            }
            // A second request does not wait.
            Ok(Some(Command::Terminate)) => self.kill(),
            Ok(Some(_)) => {}
            // The shim is gone: as PID 1 we take everything along.
            Ok(None) | Err(_) => super::leave(1),
        }
    }

    fn enforce(&mut self) {
        if self.kill_at.is_some_and(|at| at <= Instant::now()) {
            self.kill();
        }
        if self.breach.is_none() {
            self.breach = self.disk.check().map(|peak| Breach::Disk { peak });
            if self.breach.is_some() {
                self.kill();
            }
        }
    }

    fn kill(&self) {
        let _ = kill(self.pid, Signal::SIGKILL);
    }

    /// While the step still runs: its PID 1 must never wait for us at the end.
    fn read_report(&mut self) {
        let mut buffer = [0; 8192];
        while self.report.len() < init::MAX_REPORT_BYTES
            && let Ok(count @ 1..) = nix::unistd::read(&self.end, &mut buffer)
        {
            self.report.extend_from_slice(&buffer[..count]);
        }
    }

    fn into_end(self) -> StepEnd {
        let killed = || StepEnd { exit: Exit::Killed, ..init::failed("") };
        let mut end: StepEnd = serde_json::from_slice(&self.report).unwrap_or_else(|_| killed());
        end.breach = self.breach.or(end.breach);
        end.terminated |= self.terminated;
        end.leftovers = leftovers();
        end
    }
}

/// Processes of the slot besides ourselves. The step's PID 1 is reaped, so there must be none.
fn leftovers() -> u32 {
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_string_lossy().parse::<u32>().ok());
    u32::try_from(pids.filter(|pid| *pid != 1).count()).unwrap_or(u32::MAX)
}

struct Disk {
    limit: u64,
    last_look: Instant,
    last_walk: Instant,
    free_at_last_walk: Option<u64>,
}

impl Disk {
    fn new(limit: u64) -> Self {
        Self { limit, last_look: Instant::now(), last_walk: Instant::now(), free_at_last_walk: None }
    }

    /// The usage, if it passed the limit.
    fn check(&mut self) -> Option<u64> {
        if self.last_look.elapsed() < DISK_PERIOD {
            return None;
        }
        self.last_look = Instant::now();
        let free = free_bytes()?;
        let lost = self.free_at_last_walk.map(|before| before.saturating_sub(free));
        let little = lost.is_some_and(|lost| lost < WALK_BYTES.min(self.limit / WALK_SHARE));
        if little && self.last_walk.elapsed() < WALK_PERIOD {
            return None;
        }
        self.free_at_last_walk = Some(free);
        self.last_walk = Instant::now();
        // Only an export has a place to write to beside the job's.
        let trees = ["/job", "/out"].into_iter().filter_map(|path| File::open(path).ok());
        let used = trees.map(|tree| reap::disk_usage(tree.as_fd())).sum::<u64>() + reap::unlinked_usage();
        (used > self.limit).then_some(used)
    }
}

fn free_bytes() -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs("/job").ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}
