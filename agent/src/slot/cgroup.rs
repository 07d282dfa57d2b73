//! Memory and CPU limits by cgroup v2, where it is delegated to the agent (shell).
//!
//! A process may only be moved inside the subtree that its user owns, so the agent must have been started
//! in a delegated cgroup. It moves itself into a leaf there, because a cgroup with processes of its own
//! cannot hand controllers to its children.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Controllers that a limit needs.
const CONTROLLERS: [&str; 2] = ["memory", "cpu"];
/// Where the agent itself goes.
const LEAF: &str = "kiln-agent";
/// Before the job's name; not that of the leaf, which stays.
const SLOT_PREFIX: &str = "kiln-slot-";
/// The period of `cpu.max`, in microseconds: the kernel's default.
const CPU_PERIOD: u32 = 100_000;

/// No cgroup limits here, and why.
#[derive(Debug, thiserror::Error)]
pub enum NoCgroup {
    /// There is no cgroup v2 hierarchy.
    #[error("this process is in no cgroup v2 hierarchy")]
    NoHierarchy,
    /// A controller is not there.
    #[error("{} has no {missing} controller", path.display())]
    NoController {
        /// The cgroup.
        path: PathBuf,
        /// The controller.
        missing: &'static str,
    },
    /// The subtree is not ours.
    #[error("{} is not delegated to this user", path.display())]
    NotDelegated {
        /// The cgroup.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A cgroup of one slot. Dropping it deletes it.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    /// Held while an agent needs the cgroup. One that was killed deletes nothing, and the next one can tell.
    _lock: File,
}

/// The cgroup that this process may divide.
pub fn delegated() -> Result<PathBuf, NoCgroup> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = own_path(&own, &mounts).ok_or(NoCgroup::NoHierarchy)?;
    require_controllers(&path)?;
    let probe = rustix::fs::access(path.join("cgroup.procs"), rustix::fs::Access::WRITE_OK)
        .and_then(|()| rustix::fs::access(&path, rustix::fs::Access::WRITE_OK));
    match probe {
        Ok(()) => Ok(path),
        Err(error) => Err(NoCgroup::NotDelegated { path, source: error.into() }),
    }
}

/// Path of the cgroup from `/proc/self/cgroup` and the mount point from `/proc/self/mountinfo` (proc(5)).
fn own_path(own: &str, mounts: &str) -> Option<PathBuf> {
    let relative = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mount = mounts.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| fields.split(' ').nth(4))?
    })?;
    let path = Path::new(mount).join(relative);
    // A predecessor of ours, or we ourselves, sit in the leaf: its parent is what was delegated.
    if path.ends_with(LEAF) { path.parent().map(Path::to_owned) } else { Some(path) }
}

fn require_controllers(path: &Path) -> Result<(), NoCgroup> {
    let present = std::fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    match CONTROLLERS.iter().find(|wanted| !present.split_whitespace().any(|c| c == **wanted)) {
        Some(missing) => Err(NoCgroup::NoController { path: path.to_owned(), missing }),
        None => Ok(()),
    }
}

impl Cgroup {
    /// Makes a cgroup with limits below `parent`.
    pub(super) fn create(
        parent: &Path,
        job: &str,
        memory: Option<u64>,
        cpus: Option<f64>,
    ) -> io::Result<Self> {
        let leaf = parent.join(LEAF);
        make_dir(&leaf)?;
        write(&leaf.join("cgroup.procs"), &std::process::id().to_string())?;
        write(&parent.join("cgroup.subtree_control"), "+memory +cpu")?;
        let cgroup = Self::make(parent, job)?;
        if let Some(bytes) = memory {
            cgroup.write("memory.max", &bytes.to_string())?;
            // Swap would only make a build over its limit slow instead of ended.
            cgroup.write("memory.swap.max", "0")?;
            cgroup.write("memory.oom.group", "1")?;
        }
        if let Some(cpus) = cpus {
            cgroup.write("cpu.max", &cpu_max(cpus))?;
        }
        Ok(cgroup)
    }

    /// Nobody takes the new one for a stale one, because whoever looks for those holds the lock of the parent.
    fn make(parent: &Path, job: &str) -> io::Result<Self> {
        let guard = File::open(parent)?;
        guard.lock()?;
        delete_stale(parent)?;
        let path = parent.join(format!("{SLOT_PREFIX}{job}"));
        make_dir(&path)?;
        let lock = File::open(&path)?;
        lock.lock()?;
        Ok(Self { path, _lock: lock })
    }

    /// Moves a process, and so everything it starts, into the cgroup.
    pub(super) fn adopt(&self, pid: u32) -> io::Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// The highest memory use in bytes, if the limit ended something.
    pub(super) fn memory_breach(&self) -> Option<u64> {
        let events = std::fs::read_to_string(self.path.join("memory.events")).ok()?;
        let kills =
            events.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse::<u64>().ok()?;
        let peak = std::fs::read_to_string(self.path.join("memory.peak")).ok();
        (kills > 0).then(|| peak.and_then(|p| p.trim().parse().ok()).unwrap_or(0))
    }

    fn write(&self, name: &str, value: &str) -> io::Result<()> {
        write(&self.path.join(name), value)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Empty once the shim is gone; a stuck one stays visible to the operator.
        if let Err(error) = std::fs::remove_dir(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot delete the slot's cgroup");
        }
    }
}

/// The kernel makes these files; a controller that lacks one must not get a name of ours beside it.
fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// Deletes the cgroups of agents that were killed. The kernel keeps those in which something still lives.
fn delete_stale(parent: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(parent)?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(SLOT_PREFIX) {
            continue;
        }
        if File::open(entry.path()).is_ok_and(|lock| lock.try_lock().is_ok()) {
            // One that cannot be deleted costs nothing, and the next agent tries again.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

fn make_dir(path: &Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// `cpu.max` is quota and period in microseconds (cgroup-v2.rst).
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "CPUs are a small positive number"
)]
fn cpu_max(cpus: f64) -> String {
    let quota = (cpus * f64::from(CPU_PERIOD)) as u64;
    format!("{} {CPU_PERIOD}", quota.max(1_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_path_is_found_in_unified_and_hybrid_hierarchies() {
        let unified = "24 23 0:21 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
        let hybrid = "33 24 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      41 24 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let own = "4:memory:/x\n0::/user.slice/a.scope\n";
        assert_eq!(own_path(own, unified).unwrap(), Path::new("/sys/fs/cgroup/user.slice/a.scope"));
        assert_eq!(own_path(own, hybrid).unwrap(), Path::new("/sys/fs/cgroup/unified/user.slice/a.scope"));
        assert_eq!(own_path("0::/a/kiln-agent\n", unified).unwrap(), Path::new("/sys/fs/cgroup/a"));
        assert_eq!(own_path("4:memory:/x\n", unified), None);
    }

    /// A directory with the files that the kernel would make in a delegated cgroup and below it.
    fn hierarchy(job: &str) -> tempfile::TempDir {
        let temp = tempfile::tempdir().unwrap();
        let slot = format!("{SLOT_PREFIX}{job}");
        for dir in [LEAF, &slot] {
            std::fs::create_dir(temp.path().join(dir)).unwrap();
        }
        let files = ["cgroup.procs", "memory.max", "memory.swap.max", "memory.oom.group", "cpu.max"];
        let files = files.iter().map(|name| format!("{slot}/{name}"));
        for file in files.chain(["cgroup.subtree_control".to_owned(), format!("{LEAF}/cgroup.procs")]) {
            std::fs::write(temp.path().join(file), "").unwrap();
        }
        temp
    }

    fn read(parent: &Path, path: &str) -> String {
        std::fs::read_to_string(parent.join(path)).unwrap()
    }

    #[test]
    fn a_slot_gets_its_limits_and_the_agent_leaves_the_way() {
        let temp = hierarchy("a");
        let cgroup = Cgroup::create(temp.path(), "a", Some(1 << 30), Some(1.5)).unwrap();
        cgroup.adopt(4711).unwrap();
        for (path, text) in [
            ("kiln-agent/cgroup.procs", &*std::process::id().to_string()),
            ("cgroup.subtree_control", "+memory +cpu"),
            ("kiln-slot-a/memory.max", "1073741824"),
            ("kiln-slot-a/memory.swap.max", "0"),
            ("kiln-slot-a/memory.oom.group", "1"),
            ("kiln-slot-a/cpu.max", "150000 100000"),
            ("kiln-slot-a/cgroup.procs", "4711"),
        ] {
            assert_eq!(read(temp.path(), path), text, "{path}");
        }
    }

    #[test]
    fn what_is_not_limited_is_not_written() {
        let temp = hierarchy("a");
        drop(Cgroup::create(temp.path(), "a", None, Some(1.0)).unwrap());
        assert_eq!(read(temp.path(), "kiln-slot-a/memory.max"), "");
        drop(Cgroup::create(temp.path(), "a", Some(1), None).unwrap());
        assert_eq!(read(temp.path(), "kiln-slot-a/memory.max"), "1");
    }

    #[test]
    fn a_limit_that_the_kernel_does_not_know_is_an_error() {
        let temp = hierarchy("a");
        std::fs::remove_file(temp.path().join("kiln-slot-a/memory.max")).unwrap();
        let error = Cgroup::create(temp.path(), "a", Some(1), None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_breach_is_told_with_its_peak() {
        let temp = hierarchy("a");
        let cgroup = Cgroup::create(temp.path(), "a", Some(1), None).unwrap();
        assert_eq!(cgroup.memory_breach(), None, "no file");
        let events = temp.path().join("kiln-slot-a/memory.events");
        std::fs::write(&events, "low 0\nhigh 0\nmax 17\noom 1\noom_kill 0\noom_group_kill 0\n").unwrap();
        assert_eq!(cgroup.memory_breach(), None, "the limit was met, nothing was killed");
        std::fs::write(&events, "low 0\nhigh 0\nmax 17\noom 1\noom_kill 2\noom_group_kill 1\n").unwrap();
        assert_eq!(cgroup.memory_breach(), Some(0), "kernels before 5.19 know no peak");
        std::fs::write(temp.path().join("kiln-slot-a/memory.peak"), "1048576\n").unwrap();
        assert_eq!(cgroup.memory_breach(), Some(1_048_576));
    }

    #[test]
    fn cgroups_of_killed_agents_go_and_those_in_use_stay() {
        let temp = tempfile::tempdir().unwrap();
        let names = || {
            let entries = std::fs::read_dir(temp.path()).unwrap().flatten();
            let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        };
        for stale in ["kiln-slot-stale", "kiln-agent", "other"] {
            std::fs::create_dir(temp.path().join(stale)).unwrap();
        }
        let first = Cgroup::make(temp.path(), "1").unwrap();
        let second = Cgroup::make(temp.path(), "2").unwrap();
        assert_eq!(names(), ["kiln-agent", "kiln-slot-1", "kiln-slot-2", "other"]);
        drop(first);
        assert_eq!(names(), ["kiln-agent", "kiln-slot-2", "other"]);
        drop(second);
    }

    #[test]
    fn cpus_become_quota_and_period() {
        assert_eq!(cpu_max(1.5), "150000 100000");
        assert_eq!(cpu_max(0.0), "1000 100000");
    }

    #[test]
    fn a_missing_controller_is_named() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
        let error = require_controllers(temp.path()).unwrap_err();
        assert!(error.to_string().contains("no memory controller"), "{error}");
    }
}
