//! System calls that `nix` does not wrap (shell). The only `unsafe` of Kiln.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sched::CloneFlags;
use nix::unistd::Pid;

/// Which side of a clone we are.
#[must_use]
pub(super) enum Side {
    /// The caller; the child has this id in the caller's PID namespace.
    Parent(Pid),
    /// The new process.
    Child,
}

/// `fork` into new namespaces: the child continues here, in a copy of the whole process.
///
/// Only called in processes with one thread, so the copy is whole: no lock is held by a thread that the
/// child lacks.
#[expect(
    unsafe_code,
    reason = "clone without a stack, as fork does; nix offers only the form with a callback"
)]
pub(super) fn clone_process(flags: CloneFlags) -> nix::Result<Side> {
    let flags = libc::c_long::from(flags.bits() | libc::SIGCHLD);
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: no CLONE_VM and no new stack: the child gets a copy of the address space and returns like fork.
    // The process has a single thread (contract of this module's callers).
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, null, null, null, null) };
    match nix::errno::Errno::result(result)? {
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent(Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX)))),
    }
}

/// Makes a mount and everything below it read-only. Unlike a remount it keeps the flags that are locked.
pub(super) fn make_read_only(path: &CStr) -> nix::Result<()> {
    set_read_only(path, libc::AT_RECURSIVE)
}

/// Makes one mount read-only; those below it stay as they are.
pub(super) fn make_only_this_read_only(path: &CStr) -> nix::Result<()> {
    set_read_only(path, 0)
}

#[expect(unsafe_code, reason = "mount_setattr has no wrapper in nix")]
fn set_read_only(path: &CStr, flags: libc::c_int) -> nix::Result<()> {
    #[repr(C)]
    struct MountAttributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    const READ_ONLY: u64 = 1;
    let attributes = MountAttributes { set: READ_ONLY, clear: 0, propagation: 0, user_namespace: 0 };
    // SAFETY: the path is a NUL-terminated string and the structure has the size that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    nix::errno::Errno::result(result).map(drop)
}

/// Marks every descriptor from `first` on close-on-exec, so that no program inherits one by accident.
#[expect(unsafe_code, reason = "close_range has no wrapper in nix")]
pub(super) fn close_on_exec_from(first: u32) -> nix::Result<()> {
    // SAFETY: only flags of descriptors change.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    nix::errno::Errno::result(result).map(drop)
}

/// Closes every descriptor from `first` to `last`.
#[expect(unsafe_code, reason = "close_range has no wrapper in nix")]
pub(super) fn close_range(first: u32, last: u32) -> nix::Result<()> {
    // SAFETY: the callers own these descriptors, or inherited copies in a fresh child, and use none of
    // them afterwards.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    nix::errno::Errno::result(result).map(drop)
}

/// Leaves the session keyring of whoever started the agent: its keys would be a build's to read.
#[expect(unsafe_code, reason = "keyctl has no wrapper in nix")]
pub(super) fn leave_keyring() -> nix::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    let unnamed = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name makes an anonymous keyring; nothing is read or written through it.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, unnamed) };
    nix::errno::Errno::result(result).map(drop)
}

/// Closes every descriptor above standard error except these.
pub(super) fn close_all_but(kept: &mut [i32]) -> nix::Result<()> {
    kept.sort_unstable();
    let mut first = 3;
    for number in kept.iter().filter_map(|n| u32::try_from(*n).ok()) {
        if number > first {
            close_range(first, number - 1)?;
        }
        first = first.max(number + 1);
    }
    close_range(first, u32::MAX)
}

/// Takes ownership of a descriptor that another process sent.
#[expect(unsafe_code, reason = "a received descriptor arrives as a number")]
pub(super) fn own(descriptor: i32) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd as _;
    // SAFETY: recvmsg just installed this descriptor and nobody else knows it.
    unsafe { std::os::fd::OwnedFd::from_raw_fd(descriptor) }
}

/// `ioctl(SIOCSIFFLAGS)` for the loopback interface: new network namespaces have it down.
#[expect(unsafe_code, reason = "interface ioctls have no wrapper in nix")]
pub(super) fn loopback_up(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(1);
    // SAFETY: the request is fully initialised and outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
