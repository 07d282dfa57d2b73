//! Deleting and measuring trees that untrusted code wrote (shell).
//!
//! No path is ever followed: every step opens one name below a directory descriptor, without links.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Deeper directories are first moved up, so that neither descriptors nor the stack run out.
const MAX_DEPTH: u32 = 64;

/// Deletes `name` below `parent`, whatever it holds. Missing is fine.
pub(super) fn remove_tree(parent: BorrowedFd<'_>, name: &CStr) -> nix::Result<()> {
    let top = match open_dir(parent, name) {
        Ok(dir) => dir,
        Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::ENOTDIR | Errno::ELOOP) => return unlinkat(parent, name, UnlinkatFlags::NoRemoveDir),
        Err(error) => return Err(error),
    };
    let mut moved = 0;
    loop {
        let before = moved;
        empty(top.as_fd(), top.as_fd(), 0, &mut moved)?;
        if moved == before {
            break;
        }
    }
    unlink(parent, name, UnlinkatFlags::RemoveDir)
}

fn empty(top: BorrowedFd<'_>, dir: BorrowedFd<'_>, depth: u32, moved: &mut u64) -> nix::Result<()> {
    for (name, is_dir) in entries(dir)? {
        if !is_dir {
            unlink(dir, &name, UnlinkatFlags::NoRemoveDir)?;
            continue;
        }
        if depth >= MAX_DEPTH {
            move_up(top, dir, &name, moved)?;
            continue;
        }
        let child = match open_dir(dir, &name) {
            // Another cleaner was here.
            Err(Errno::ENOENT) => continue,
            other => other?,
        };
        empty(top, child.as_fd(), depth + 1, moved)?;
        unlink(dir, &name, UnlinkatFlags::RemoveDir)?;
    }
    Ok(())
}

/// What somebody else deleted is deleted.
fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: UnlinkatFlags) -> nix::Result<()> {
    match unlinkat(dir, name, flags) {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// The tree may hold our own names already: the next number then.
fn move_up(top: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr, moved: &mut u64) -> nix::Result<()> {
    loop {
        *moved += 1;
        match renameat(dir, name, top, format!(".deep-{moved}").as_str()) {
            Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR | Errno::EISDIR) => {}
            Err(Errno::ENOENT) => return Ok(()),
            other => return other,
        }
    }
}

fn entries(dir: BorrowedFd<'_>) -> nix::Result<Vec<(std::ffi::CString, bool)>> {
    let mut listing = Dir::from_fd(dir.try_clone_to_owned().map_err(|_| Errno::EMFILE)?)?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let is_dir = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            None => is_directory(dir, name)?,
        };
        names.push((name.to_owned(), is_dir));
    }
    Ok(names)
}

fn is_directory(dir: BorrowedFd<'_>, name: &CStr) -> nix::Result<bool> {
    let meta = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(meta.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

fn open_dir(parent: BorrowedFd<'_>, name: &CStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// Bytes that the tree below `dir` occupies. Names longer than a path can be are not counted; the node's
/// free-space floor catches those who hide bytes there.
pub(super) fn disk_usage(dir: BorrowedFd<'_>) -> u64 {
    let mut total = 0;
    let mut waiting = vec![std::path::PathBuf::new()];
    while let Some(path) = waiting.pop() {
        let name = if path.as_os_str().is_empty() { std::path::Path::new(".") } else { &path };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(child) = openat(dir, name, flags, Mode::empty()) else { continue };
        let Ok(names) = entries(child.as_fd()) else { continue };
        for (name, is_dir) in names {
            let Ok(meta) = fstatat(&child, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
            // st_blocks counts 512-byte units whatever the file system.
            total += u64::try_from(meta.st_blocks).unwrap_or(0) * 512;
            if is_dir {
                use std::os::unix::ffi::OsStrExt as _;
                waiting.push(path.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
            }
        }
    }
    total
}

/// Bytes of files that have no name any more but are still open in this PID namespace. Those in memory do not
/// count. A file of an overlay shows the overlay's device, so devices tell nothing.
pub(super) fn unlinked_usage() -> u64 {
    let mut seen = std::collections::BTreeMap::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let open = std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        for descriptor in open {
            use std::os::unix::fs::MetadataExt as _;
            let Ok(meta) = std::fs::metadata(descriptor.path()) else { continue };
            let in_memory = || {
                let kind = nix::sys::statfs::statfs(&descriptor.path()).map(|fs| fs.filesystem_type());
                kind.is_ok_and(|kind| kind == nix::sys::statfs::TMPFS_MAGIC)
            };
            if meta.nlink() == 0 && meta.is_file() && !in_memory() {
                seen.insert((meta.dev(), meta.ino()), meta.blocks() * 512);
            }
        }
    }
    seen.values().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_a_path_can_name_is_deleted() {
        let temp = tempfile::tempdir().unwrap();
        let top = std::fs::File::open(temp.path()).unwrap();
        let mut here = OwnedFd::from(top.try_clone().unwrap());
        nix::sys::stat::mkdirat(&here, "job", Mode::S_IRWXU).unwrap();
        here = open_dir(here.as_fd(), c"job").unwrap();
        for _ in 0..3_000 {
            nix::sys::stat::mkdirat(&here, "dddd", Mode::S_IRWXU).unwrap();
            let file = openat(&here, "f", OFlag::O_CREAT | OFlag::O_WRONLY, Mode::S_IRWXU).unwrap();
            drop(file);
            here = open_dir(here.as_fd(), c"dddd").unwrap();
        }
        remove_tree(top.as_fd(), c"job").unwrap();
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_tree_that_holds_the_names_we_would_use_is_deleted() {
        let temp = tempfile::tempdir().unwrap();
        let mut deep = temp.path().join("job");
        std::fs::create_dir(&deep).unwrap();
        for number in 1..5 {
            std::fs::create_dir_all(deep.join(format!(".deep-{number}/x"))).unwrap();
        }
        std::fs::write(deep.join(".deep-5"), "x").unwrap();
        for _ in 0..80 {
            deep = deep.join("d");
        }
        std::fs::create_dir_all(&deep).unwrap();
        let top = std::fs::File::open(temp.path()).unwrap();
        remove_tree(top.as_fd(), c"job").unwrap();
        assert!(!temp.path().join("job").exists());
        remove_tree(top.as_fd(), c"job").unwrap();
    }

    #[test]
    fn links_are_deleted_and_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let outside = temp.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("keep"), "x").unwrap();
        std::fs::create_dir(temp.path().join("job")).unwrap();
        std::os::unix::fs::symlink(&outside, temp.path().join("job/link")).unwrap();
        let top = std::fs::File::open(temp.path()).unwrap();
        remove_tree(top.as_fd(), c"job").unwrap();
        assert!(outside.join("keep").exists());
        assert!(!temp.path().join("job").exists());
    }

    #[test]
    fn disk_usage_sees_what_was_written() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir(temp.path().join("d")).unwrap();
        std::fs::write(temp.path().join("d/f"), vec![1; 300_000]).unwrap();
        let top = std::fs::File::open(temp.path()).unwrap();
        let used = disk_usage(top.as_fd());
        assert!((300_000..600_000).contains(&used), "{used}");
    }
}
