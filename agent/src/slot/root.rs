//! The minimal root that a slot sees (shell).
//!
//! Built by the outer PID 1 in its own mount namespace. The steps run in a user namespace below, so every
//! mount made here is locked for them: they can neither unmount nor remount it.

use std::ffi::CString;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{chdir, pivot_root, symlinkat};

use super::wire::{Purpose, SetupError, SlotFile, SlotSpec};
use super::{sys, wire::CacheMount};

/// Room for generated files, secrets and mount points; nothing a build writes lands here.
const ROOT_SIZE: &str = "size=64m,mode=0755";
/// Top-level system directories: real ones are mounted, links of a merged `/usr` are copied.
const SYSTEM_DIRS: [&str; 5] = ["usr", "bin", "sbin", "lib", "lib64"];
/// What buildah needs of `/etc`: certificates for `ADD https://…`, and the loader's cache.
const SYSTEM_FILES: [&str; 5] =
    ["etc/ssl", "etc/pki", "etc/ca-certificates", "etc/ld.so.cache", "etc/alternatives"];
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const NO_DATA: Option<&str> = None;

type Setup<T = ()> = Result<T, SetupError>;

/// The store directory, seen from the new root before the pivot: the shim entered it, and the directories
/// above it need not be passable for the slot's user.
const STORE: &str = "..";

/// Builds the root and makes it the process's own. The old root is gone afterwards.
pub(super) fn enter(spec: &SlotSpec) -> Setup {
    mount_flags(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    make_job_directory(spec)?;
    // Without nodev and nosuid: they would be locked, and buildah remounts its copy of /dev without nodev. A
    // file system of a user namespace has no working device nodes anyway.
    mount_flags(Some("tmpfs"), "mnt", Some(("tmpfs", ROOT_SIZE)), MsFlags::empty())?;
    chdir("mnt").map_err(|e| SetupError::new("enter the new root", e))?;
    make_tree()?;
    kernel_file_systems()?;
    stores(spec)?;
    match spec.purpose {
        Purpose::Work => for_work(spec)?,
        Purpose::Export => for_export(spec)?,
    }
    pivot()?;
    sys::make_only_this_read_only(c"/").map_err(|e| SetupError::new("make the root read-only", e))
}

fn for_work(spec: &SlotSpec) -> Setup {
    system_directories()?;
    devices()?;
    job_mounts(spec)?;
    for file in &spec.files {
        write_file(file)?;
    }
    writable_directories()
}

/// Nothing that a step of the build could have written is looked up on the way to what is mounted.
fn for_export(spec: &SlotSpec) -> Setup {
    let job = format!("{STORE}/jobs/{}", spec.job);
    bind_read_only(&format!("{job}/job"), "job", true)?;
    make_dir("out")?;
    bind_unmasked(&format!("{job}/layout"), "out")
}

fn stores(spec: &SlotSpec) -> Setup {
    for (index, name) in spec.stores.iter().enumerate() {
        bind_read_only(&format!("{STORE}/{name}"), &format!("b/{index}"), true)?;
    }
    Ok(())
}

fn make_job_directory(spec: &SlotSpec) -> Setup {
    let job = format!("jobs/{}", spec.job);
    if spec.purpose == Purpose::Export {
        return make_dir(&format!("{job}/layout"));
    }
    make_dir(&job)?;
    // The slot sees `job`. What becomes a generation of a cache lies beside it, out of the reach of a step
    // that would put a link in its place.
    for part in ["job", "cache", "cache/upper", "cache/work", "cache/flat"] {
        make_dir(&format!("{job}/{part}"))?;
    }
    for part in ["root", "run", "tmp", "home", "xdg", "ctx", "export"] {
        make_dir(&format!("{job}/job/{part}"))?;
    }
    Ok(())
}

/// What programs write outside of the job directory. The rest of the root is read-only, so that a step
/// cannot leave something there for the next one.
fn writable_directories() -> Setup {
    mount_flags(Some("tmpfs"), "run", Some(("tmpfs", "size=16m,mode=0755")), MsFlags::empty())?;
    make_dir("run/lock")?;
    for dir in ["var/lib", "var/cache"] {
        mount_flags(Some("tmpfs"), dir, Some(("tmpfs", "size=16m,mode=0755")), MsFlags::empty())?;
    }
    Ok(())
}

fn make_tree() -> Setup {
    for dir in [
        "dev",
        "proc",
        "sys",
        "job",
        "in",
        "b",
        "etc",
        "etc/containers",
        "etc/kiln",
        "run",
        "tmp",
        "var",
        "old",
    ] {
        make_dir(dir)?;
    }
    for dir in ["dev/shm", "var/tmp", "var/lib", "var/cache", "root"] {
        make_dir(dir)?;
    }
    Ok(())
}

fn system_directories() -> Setup {
    for name in SYSTEM_DIRS {
        let host = format!("/{name}");
        match std::fs::symlink_metadata(&host) {
            Ok(meta) if meta.is_symlink() => copy_link(&host, name)?,
            Ok(meta) if meta.is_dir() => bind_read_only(&host, name, true)?,
            _ => {}
        }
    }
    for name in SYSTEM_FILES {
        let host = format!("/{name}");
        if let Ok(meta) = std::fs::metadata(&host) {
            bind_read_only(&host, name, meta.is_dir())?;
        }
    }
    Ok(())
}

fn copy_link(host: &str, name: &str) -> Setup {
    let target = std::fs::read_link(host).map_err(|e| SetupError::new(format!("read {host}"), e))?;
    let here = nix::fcntl::AT_FDCWD;
    symlinkat(&target, here, name).map_err(|e| SetupError::new(format!("link {name}"), e))
}

fn devices() -> Setup {
    for name in DEVICES {
        let target = format!("dev/{name}");
        make_file(&target)?;
        mount_flags(Some(&format!("/dev/{name}")), &target, None, MsFlags::MS_BIND)?;
    }
    for (link, target) in [
        ("dev/fd", "/proc/self/fd"),
        ("dev/stdin", "/proc/self/fd/0"),
        ("dev/stdout", "/proc/self/fd/1"),
        ("dev/stderr", "/proc/self/fd/2"),
    ] {
        let here = nix::fcntl::AT_FDCWD;
        symlinkat(target, here, link).map_err(|e| SetupError::new(format!("link {link}"), e))?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_flags(Some("shm"), "dev/shm", Some(("tmpfs", "size=64m,mode=1777")), flags)
}

/// `/proc` of the slot's own PID namespace, and `/sys` of its network namespace.
fn kernel_file_systems() -> Setup {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_flags(Some("proc"), "proc", Some(("proc", "")), flags)?;
    // A fresh sysfs needs a network namespace of our own; with the host's network there is none.
    if mount_flags(Some("sysfs"), "sys", Some(("sysfs", "")), flags | MsFlags::MS_RDONLY).is_ok() {
        return Ok(());
    }
    bind_read_only("/sys", "sys", true)
}

fn job_mounts(spec: &SlotSpec) -> Setup {
    let job = format!("{STORE}/jobs/{}/job", spec.job);
    bind_unmasked(&job, "job")?;
    bind_unmasked(&format!("{job}/tmp"), "tmp")?;
    bind_unmasked(&format!("{job}/tmp"), "var/tmp")?;
    if let Some(input) = &spec.input {
        bind_read_only(&format!("{STORE}/{input}"), "in", true)?;
    }
    if spec.input.is_none() {
        // buildah keeps the secrets of a running step among its containers: in memory, not on a disk.
        make_dir("job/root/overlay-containers")?;
        let flags = MsFlags::empty();
        let options = Some(("tmpfs", "size=64m,mode=0700"));
        mount_flags(Some("containers"), "job/root/overlay-containers", options, flags)?;
    }
    spec.cache.as_ref().map_or(Ok(()), |cache| cache_mount(spec, cache))
}

/// buildah keeps cache mounts in `$TMPDIR/buildah-cache` (1.28) or `$TMPDIR/buildah-cache-UID`.
fn cache_mount(spec: &SlotSpec, cache: &CacheMount) -> Setup {
    make_dir("c")?;
    let mut lower = Vec::new();
    for (index, generation) in cache.generations.iter().enumerate() {
        let target = format!("c/{index}");
        bind_read_only(&format!("{STORE}/{generation}"), &target, true)?;
        lower.push(target);
    }
    if lower.is_empty() {
        make_dir("c/empty")?;
        lower.push("c/empty".to_owned());
    }
    let own = format!("{STORE}/jobs/{}/cache", spec.job);
    let options =
        format!("lowerdir={},upperdir={own}/upper,workdir={own}/work,userxattr,volatile", lower.join(":"));
    for name in ["buildah-cache", "buildah-cache-0"] {
        let target = format!("job/tmp/{name}");
        make_dir(&target)?;
    }
    mount_flags(Some("overlay"), "job/tmp/buildah-cache", Some(("overlay", &options)), MsFlags::empty())?;
    mount_flags(Some("job/tmp/buildah-cache"), "job/tmp/buildah-cache-0", None, MsFlags::MS_BIND)?;
    // Where a long chain is copied into one generation.
    make_dir("flat")?;
    bind_unmasked(&format!("{own}/flat"), "flat")
}

/// A directory with a mount on it can neither be deleted nor moved from here.
pub(super) fn unmount_job() {
    // Only some jobs have each of them.
    let _ = umount2("/job/root/overlay-containers", MntFlags::MNT_DETACH);
    for name in ["buildah-cache-0", "buildah-cache"] {
        for dir in ["/job/tmp", "/tmp", "/var/tmp"] {
            let _ = umount2(format!("{dir}/{name}").as_str(), MntFlags::MNT_DETACH);
        }
    }
}

fn pivot() -> Setup {
    pivot_root(".", "old").map_err(|e| SetupError::new("pivot into the new root", e))?;
    chdir("/").map_err(|e| SetupError::new("enter the new root", e))?;
    umount2("/old", MntFlags::MNT_DETACH).map_err(|e| SetupError::new("detach the old root", e))?;
    std::fs::remove_dir("/old").map_err(|e| SetupError::new("remove /old", e))
}

fn write_file(file: &SlotFile) -> Setup {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = Path::new(file.path.trim_start_matches('/'));
    if path.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        return Err(SetupError::new(format!("write {}", file.path), "the path leaves the slot"));
    }
    let failed = |e: std::io::Error| SetupError::new(format!("write {}", file.path), e);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    let mut out = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(file.mode)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(path)
        .map_err(failed)?;
    out.write_all(&file.contents).map_err(failed)?;
    fchmod(&out, Mode::from_bits_truncate(file.mode)).map_err(|e| failed(e.into()))
}

fn make_dir(path: &str) -> Setup {
    match mkdirat(nix::fcntl::AT_FDCWD, path, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(SetupError::new(format!("create directory {path}"), error)),
    }
}

fn make_file(path: &str) -> Setup {
    std::fs::File::create(path).map(drop).map_err(|e| SetupError::new(format!("create {path}"), e))
}

fn mount_flags(source: Option<&str>, target: &str, kind: Option<(&str, &str)>, flags: MsFlags) -> Setup {
    let (kind, data) = kind.unzip();
    let data = data.filter(|d| !d.is_empty()).or(NO_DATA);
    mount(source, target, kind, flags, data)
        .map_err(|e| SetupError::new(format!("mount {} on {target}", source.unwrap_or("nothing")), e))
}

fn bind_unmasked(source: &str, target: &str) -> Setup {
    mount_flags(Some(source), target, None, MsFlags::MS_BIND)
}

fn bind_read_only(source: &str, target: &str, directory: bool) -> Setup {
    if directory {
        make_dir(target)?;
    } else {
        make_file(target)?;
    }
    mount_flags(Some(source), target, None, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    let path = CString::new(target).map_err(|e| SetupError::new(format!("name {target}"), e))?;
    sys::make_read_only(&path).map_err(|e| SetupError::new(format!("make {target} read-only"), e))
}
