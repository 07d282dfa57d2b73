//! Memory and CPU limits by cgroup v2, where it is delegated to the agent (shell).
//!
//! A process may only be moved inside the subtree that its user owns, so the agent must have been started
//! in a delegated cgroup. It moves itself into a leaf there, because a cgroup with processes of its own
//! cannot hand controllers to its children.

use std::io;
use std::path::{Path, PathBuf};

/// Controllers that a limit needs.
const CONTROLLERS: [&str; 2] = ["memory", "cpu"];
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

const LEAF: &str = "kiln-agent";

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
        std::fs::write(leaf.join("cgroup.procs"), std::process::id().to_string())?;
        std::fs::write(parent.join("cgroup.subtree_control"), "+memory +cpu")?;
        let cgroup = Self { path: parent.join(format!("kiln-{job}")) };
        make_dir(&cgroup.path)?;
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
        std::fs::write(self.path.join(name), value)
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
