//! The sealed slot: namespaces, limits and process control around untrusted build steps (shell).
//!
//! The only place with `nix` and `unsafe`. Processes, from the outside in:
//!
//! ```text
//! agent ── socket ──► shim            own session and process group, one thread, the agent's user
//!                      └─ outer       PID 1: user, PID, mount, IPC, UTS, network namespaces; builds the root
//!                          └─ init    PID 1 of one step, in a nested user namespace: mounts are locked
//!                              └─ buildah and everything a RUN step starts
//! ```
//! Each process watches the one to its left, and the kernel kills a PID namespace with its PID 1: whoever
//! dies first, nothing to its right survives.

mod cgroup;
mod handle;
mod identity;
mod init;
mod network;
mod outer;
mod reap;
mod root;
mod shim;
mod sys;
pub mod wire;

pub use cgroup::{NoCgroup, delegated as delegated_cgroup};
pub use handle::{Slot, SlotFiles, SlotLost};
pub use identity::{Identity, IdentityError, REQUIRED_IDS, SYSTEM_USER, discover as discover_identity};
pub(crate) use init::REFUSED;
pub(crate) use network::{RESOLVER, host_networks, is_never_reached};

/// First argument of the process image that serves as the shim.
pub const SHIM_ARGUMENT: &str = "__slot";

/// The entry of the shim. Call it first in `main`, before any thread exists, when the first argument is
/// [`SHIM_ARGUMENT`]. Returns the exit code of the process.
pub fn shim_main() -> i32 {
    shim::run()
}

/// Ends this process without running what belongs to the parent it was forked from.
#[expect(unsafe_code, reason = "a forked child must not run its parent's exit handlers")]
fn leave(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory.
    unsafe { libc::_exit(code) }
}

/// `fork` in a process with one thread.
#[expect(unsafe_code, reason = "fork is unsafe in programs with threads; the slot's processes have one")]
fn fork() -> nix::Result<nix::unistd::ForkResult> {
    // SAFETY: the shim and everything forked from it are single-threaded.
    unsafe { nix::unistd::fork() }
}
