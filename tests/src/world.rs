//! A network of its own for one test: a host that Kiln runs on, and machines beyond it (shell).
//!
//! Both are network namespaces without names, held by threads of the test: everything that such a thread
//! starts lives there, and the kernel forgets all of it with the last process. Nothing of the machine's own
//! network, mounts or files changes.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::kiln::{HARD_LIMIT, binary};
use crate::process::{Running, run};
use crate::resolver::Resolver;

/// The host's own address in the network that it shares with the servers.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 231, 0, 1);
/// The same for version 6.
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x231, 0, 0, 0, 0, 0, 1);
/// An address of the host on no interface but the loopback one.
pub const HOST_ALIAS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// An internal server.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 231, 0, 2);
/// The same for version 6.
pub const SERVER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x231, 0, 0, 0, 0, 0, 2);
/// The network of [`HOST`] and [`SERVER`].
pub const INTERNAL: &str = "10.231.0.0/24";
/// A server in another private network.
pub const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 9);
/// A server with a public address.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Where clouds hand out credentials.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Says under whom the test is to run once the namespaces are made: `UID:GID`.
const USER: &str = "KILN_TEST_USER";
const SETUP: Duration = Duration::from_secs(20);

type Job = Box<dyn FnOnce() + Send>;

/// What differs from a plain world.
#[derive(Debug, Default)]
pub struct Plan {
    /// Files that are seen instead of the machine's own: where, and which.
    pub covers: Vec<(PathBuf, PathBuf)>,
    /// The host's resolver, instead of the server's: an address of the host.
    pub resolver: Option<Ipv4Addr>,
}

/// The place; it ends with the test.
#[derive(Debug)]
pub struct World {
    beyond: Sender<Job>,
    /// The name server of the host.
    pub resolver: Resolver,
}

impl World {
    /// Runs `work` beyond the host: its sockets and threads stay there.
    pub fn beyond<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        ask(&self.beyond, work)
    }
}

fn ask<T: Send + 'static>(beyond: &Sender<Job>, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (answer, result) = channel();
    let job = move || {
        let _ = answer.send(work());
    };
    beyond.send(Box::new(job)).unwrap();
    result.recv().unwrap_or_else(|_| panic!("it panicked beyond the host"))
}

/// Runs a test in a world of its own. `name` is that of the test function: an ordinary user's test starts
/// itself again as root by `sudo -n`, which is needed to make namespaces in which that user runs.
pub fn within(name: &str, plan: &Plan, body: impl FnOnce(&World) + Send) {
    privileged(name, || body(&make(plan)));
}

/// Runs a test in a mount namespace of its own as root, by `sudo -n` if need be.
pub fn privileged(name: &str, body: impl FnOnce() + Send) {
    if !Uid::effective().is_root() {
        return again_as_root(name);
    }
    // A thread of its own: another test may get this one next.
    std::thread::scope(|scope| {
        let inner = move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
                .unwrap();
            body();
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, inner).unwrap();
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn again_as_root(name: &str) {
    let mut command = Command::new("sudo");
    let user = format!("{USER}={}:{}", Uid::current(), Gid::current());
    command.args(["-n", "env", &user]).arg(format!("KILN_BIN={}", binary().display()));
    command.arg(std::env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]);
    let needs = "this test makes namespaces: it needs root, or an ordinary user with `sudo -n`";
    let available = run(Command::new("/bin/sh").args(["-c", "command -v sudo && sudo -n true"]), SETUP);
    assert_eq!(available.code, 0, "{needs}: {}", available.output());
    // The last check is for a misspelt name, which would run no test and succeed.
    let _ = run(&mut command, HARD_LIMIT).expect_code(0).expect_text(&["1 passed"]);
}

/// Makes a file or directory of root's the property of the person who runs the tests, who has to delete it.
pub fn give(path: &Path) {
    if let Some((uid, gid)) = user() {
        nix::unistd::chown(path, Some(uid), Some(gid)).unwrap();
    }
}

fn user() -> Option<(Uid, Gid)> {
    let text = std::env::var(USER).ok()?;
    let (uid, gid) = text.split_once(':').unwrap();
    Some((Uid::from_raw(uid.parse().unwrap()), Gid::from_raw(gid.parse().unwrap())))
}

/// From here on the whole process is the person's who runs the tests.
fn become_user() {
    let Some((uid, gid)) = user() else { return };
    setgroups(&[gid]).unwrap();
    setresgid(gid, gid, gid).unwrap();
    setresuid(uid, uid, uid).unwrap();
    nix::sys::prctl::set_dumpable(true).unwrap();
}

fn make(plan: &Plan) -> World {
    // Under our own name the binary may lie where only we may go.
    let _ = binary();
    let (beyond, jobs) = channel();
    let (say, ready) = channel();
    let body = move || serve_beyond(&say, &jobs);
    let _ = std::thread::Builder::new().name("beyond".to_owned()).spawn(body).unwrap();
    let other = ready.recv().unwrap();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    connect(&beyond, other);
    let port = SocketAddr::new(plan.resolver.unwrap_or(SERVER).into(), 53);
    let listen = move || Resolver::start(port, SERVER);
    let resolver = if plan.resolver.is_some() { listen() } else { ask(&beyond, listen) };
    let names = write(&format!("nameserver {}\n", port.ip()));
    cover(Path::new("/etc/resolv.conf"), names.path());
    drop(names);
    for (place, file) in &plan.covers {
        cover(place, file);
    }
    become_user();
    World { beyond, resolver }
}

fn serve_beyond(ready: &Sender<nix::unistd::Pid>, jobs: &Receiver<Job>) {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ready.send(nix::unistd::gettid()).unwrap();
    for job in jobs {
        job();
    }
}

/// A file that is seen instead of another, also by everybody who gets no privileges.
fn cover(place: &Path, file: &Path) {
    mount(Some(file), place, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .unwrap_or_else(|e| panic!("mount {} over {}: {e}", file.display(), place.display()));
}

/// Kept by the mount after its name is gone.
fn write(text: &str) -> tempfile::NamedTempFile {
    use std::os::unix::fs::PermissionsExt as _;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
    file
}

/// Joins the present namespace, the host's, with that of a thread.
fn connect(beyond: &Sender<Job>, other: nix::unistd::Pid) {
    ip(&format!(
        "link set lo up\nlink add host0 type veth peer name net0 netns {other}\nlink set host0 up\n\
         addr add {HOST}/24 dev host0\naddr add {HOST6}/64 dev host0 nodad\naddr add {HOST_ALIAS}/32 dev lo\n"
    ));
    ask(beyond, || {
        ip(&format!(
            "link set lo up\nlink set net0 up\naddr add {SERVER}/24 dev net0\naddr add {SERVER6}/64 dev net0 nodad\n\
             addr add {ELSEWHERE}/32 dev lo\naddr add {PUBLIC}/32 dev lo\naddr add {METADATA}/32 dev lo\n"
        ));
    });
    ip(&format!("route add default via {SERVER}\n"));
}

/// iproute2, in the namespace of this thread.
fn ip(batch: &str) {
    use std::io::{Seek as _, Write as _};
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(batch.as_bytes()).unwrap();
    input.rewind().unwrap();
    let mut command = Command::new("ip");
    let _ = Running::start_with_input(command.args(["-batch", "-"]), input).wait(SETUP).expect_code(0);
}
