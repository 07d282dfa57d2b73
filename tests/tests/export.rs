//! What leaves a slot is what buildah made, bit for bit, and it leaves through namespaces that no step was ever in.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_tests::kiln::Build;
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::{assert_dead, assert_none, assert_none_live, files};
use kiln_tests::process::{depth, eventually, run, with_argument};
use kiln_tests::tools::compile;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// From the end of RUN to the export; the debug binary on a busy machine.
const SOON: Duration = Duration::from_secs(30);
/// The shim deletes the job of a dead agent after the last process is gone.
const SHIM_CLEANS: Duration = Duration::from_secs(5);

/// Files of every kind that an archive stores in a way of its own.
const HARD_CONTENT: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

static void need(int result, const char *what) { if (result < 0) { perror(what); _exit(1); } }

static void make(const char *name, const char *content, size_t length) {
    int file = open(name, O_CREAT | O_WRONLY | O_TRUNC, 0644);
    need(file, name);
    need(write(file, content, length), name);
    close(file);
}

static void at(const char *name, time_t seconds, long nanoseconds) {
    struct timespec times[2] = {{seconds, nanoseconds}, {seconds, nanoseconds}};
    need(utimensat(AT_FDCWD, name, times, AT_SYMLINK_NOFOLLOW), name);
}

int main(void) {
    char block[513], name[256];
    memset(block, 'b', sizeof block);
    need(mkdir("/h", 0755), "mkdir");
    need(chdir("/h"), "chdir");
    make("empty", "", 0);
    make("one-block", block, 512);
    make("one-more", block, 513);
    int sparse = open("sparse", O_CREAT | O_WRONLY, 0600);
    need(pwrite(sparse, "end", 3, 5000000), "pwrite");
    need(ftruncate(sparse, 9000000), "ftruncate");
    need(link("one-block", "zz-hard"), "link");
    need(link("one-block", "aa-hard"), "link");
    need(symlink("/nowhere/at/all", "dangling"), "symlink");
    need(symlink(".", "circle"), "symlink");
    need(mkfifo("pipe", 0640), "mkfifo");
    make("closed", "secret", 6);
    need(chmod("closed", 0), "chmod");
    make("setuid", "x", 1);
    need(chown("setuid", 65534, 33), "chown");
    need(chmod("setuid", 06755), "chmod");
    need(mkdir("sticky", 0), "mkdir");
    need(chmod("sticky", 01777), "chmod");
    make("new\nline", "n", 1);
    make("<&>\"\\ '\t", "q", 1);
    make("\xff\xfe raw", "r", 1);
    make("\xc3\xa9\xe2\x82\xac", "u", 1);
    make("trailing.", "t", 1);
    make(".wh-not", "w", 1);
    memset(name, 'n', 255);
    name[255] = 0;
    make(name, "long", 4);
    for (int deep = 0; deep < 6; deep++) { name[120] = 0; need(mkdir(name, 0755), "deep"); need(chdir(name), "deep"); }
    make("bottom", "deep", 4);
    need(chdir("/h"), "chdir");
    make("attributes", "x", 1);
    need(setxattr("attributes", "user.name", "va\0lue", 6, 0), "user.name");
    unsigned char capability[20] = {1, 0, 0, 2, 0, 4};
    need(setxattr("attributes", "security.capability", capability, 20, 0), "security.capability");
    make("old", "x", 1);
    at("old", 1, 999999999);
    make("future", "x", 1);
    at("future", 9999999999, 5);
    make("ancient", "x", 1);
    at("ancient", -1000000, 0);
    return 0;
}
"#;

fn hard_content() -> Lab {
    let lab = Lab::new();
    lab.context.file_mode("hard", compile(HARD_CONTENT), 0o755);
    lab.dockerfile(
        "FROM busybox:1 AS below\n\
         RUN mkdir -p /d/e /r /s && echo 1 > /d/e/f && echo 2 > /d/g && echo 3 > /r/h && echo 4 > /s/t\n\
         COPY hard /hard\n\
         RUN /hard\n\
         FROM below\n\
         RUN rm -rf /d && mkdir /d && echo new > /d/new && rm -r /r && echo file > /r && rm /s/t && mv /h/empty /moved && \
         echo appended >> /h/one-more && rm /hard && chmod 700 /h/sticky\n",
    );
    lab
}

/// Sealing compares every layer with the diff id that buildah wrote into the config, so an image that is sealed is
/// buildah's to the bit.
#[test]
fn content_that_archives_find_hard_is_exported_to_the_bit() {
    for format in ["docker", "oci"] {
        let image = hard_content().image(&[&format!("--format={format}")]);
        assert!(image.entry("h/aa-hard").is_some_and(|e| !e.link.is_empty() || !e.content.is_empty()));
        for path in
            ["h/pipe", "h/sparse", "h/new\nline", "h/closed", "d/.wh..wh..opq", "s/.wh.t", "moved", "r"]
        {
            assert!(image.entry(path).is_some(), "{path:?}: {:?}", image.layers.last());
        }
    }
}

/// Leaves behind what outlives a program or hides from its parent.
const LEAVER: &str = r#"
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static void told(const char *what, long result) {
    if (result < 0) printf("denied: %s: %m\n", what); else printf("left: %s\n", what);
}

int main(int count, char **argv) {
    told("memory", shmget(0x4b494c4e, 4096, IPC_CREAT | 0666));
    told("queue", msgget(0x4b494c4e, IPC_CREAT | 0666));
    told("mount", mount("left", "/mnt", "tmpfs", 0, 0));
    told("name", sethostname("left", 4));
    told("key", syscall(SYS_add_key, "user", "kiln-left", "x", 1L, -3L));
    told("user's key", syscall(SYS_add_key, "user", "kiln-left", "x", 1L, -4L));
    struct sockaddr_un address = {AF_UNIX, "\0kiln-left"};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    told("socket", bind(listener, (void *)&address, sizeof(sa_family_t) + 10) | listen(listener, 1));
    fflush(stdout);
    if (fork()) { sleep(1); return 0; }
    setsid();
    execl("/bin/sleep", "sleep", argv[count - 1], (char *)0);
    return 1;
}
"#;

/// How often a build is started to be caught in its export.
const ATTEMPTS: usize = 5;

/// The kinds of namespaces that a slot has of its own.
const KINDS: [&str; 6] = ["user", "pid", "mnt", "ipc", "uts", "net"];

/// A build whose export stands still: PID 1 of its step is stopped.
struct Exporting {
    lab: Lab,
    /// Argument of the process that RUN leaves.
    mark: String,
    build: Build,
    /// PID 1 of the slot and of the step, in the build and in the export.
    before: [u32; 2],
    now: [u32; 2],
    /// Namespaces of the build's two PID 1.
    namespaces: BTreeSet<String>,
    _held: Vec<File>,
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

fn namespaces(pid: u32) -> BTreeSet<String> {
    let link = |kind| std::fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    KINDS.iter().filter_map(|kind| Some(link(kind).ok()?.display().to_string())).collect()
}

/// The kernel gives the number of a namespace that is gone to the next one, and an open one is not gone.
fn hold(pid: u32) -> Vec<File> {
    KINDS.iter().filter_map(|kind| File::open(format!("/proc/{pid}/ns/{kind}")).ok()).collect()
}

/// The first child of `parent` that has this depth and is none of `known`; `None` if the parent is gone before. Looks
/// without a pause: it lives for milliseconds.
fn catch(parent: u32, deep: usize, known: &[u32]) -> Option<u32> {
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline && Path::new(&format!("/proc/{parent}")).exists() {
        let found = children(parent).into_iter().find(|pid| !known.contains(pid) && depth(*pid) == deep);
        if found.is_some() {
            return found;
        }
    }
    None
}

fn signal(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX)), signal);
}

struct Found {
    before: [u32; 2],
    now: [u32; 2],
    namespaces: BTreeSet<String>,
    held: Vec<File>,
}

fn stopped_in_export(build: &Build) -> Option<Found> {
    build.expect_output("under-way\n");
    let (shim, init) = (build.shim().pid, build.init().pid);
    let own = depth(build.running.pid());
    let outer = catch(shim, own + 1, &[])?;
    let before = [outer, init];
    let held = before.into_iter().flat_map(hold).collect();
    let namespaces = before.into_iter().flat_map(namespaces).collect();
    let next = catch(shim, own + 1, &[outer])?;
    let step = catch(next, own + 2, &[])?;
    signal(step, Signal::SIGSTOP);
    Some(Found { before, now: [next, step], namespaces, held })
}

impl Exporting {
    /// On a busy machine the export may be over before it is seen.
    fn new() -> Self {
        let lab = Lab::new();
        lab.context.file_mode("leave", compile(LEAVER), 0o755);
        let mark = format!("9{}.{}", lab.registry.address().port(), std::process::id());
        lab.dockerfile(&format!(
            "FROM busybox:1\nCOPY leave /leave\n\
             RUN dd if=/dev/zero of=/large bs=1M count=32; /leave {mark}; echo under-way; sleep 2\n"
        ));
        let found = (0..ATTEMPTS).find_map(|_| {
            // A cached RUN would leave nothing.
            let build = lab.build_archive().arg("--no-cache").start();
            stopped_in_export(&build).map(|found| (build, found))
        });
        let Some((build, found)) = found else { panic!("the export was never seen") };
        let Found { before, now, namespaces, held } = found;
        Self { lab, mark, build, before, now, namespaces, _held: held }
    }

    fn read(&self, path: &str) -> String {
        let path = format!("/proc/{}/{path}", self.now[1]);
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    fn assert_clean(&self) {
        assert_dead(&with_argument(&self.mark), CLEAN);
        assert_none_live(&self.lab.data(), CLEAN);
    }
}

#[test]
fn an_export_shares_no_namespace_with_the_build() {
    let export = Exporting::new();
    // Steps of the build share the network.
    assert_eq!(export.namespaces.len(), 2 * KINDS.len() - 1, "{:?}", export.namespaces);
    for pid in export.now {
        let own = namespaces(pid);
        assert_eq!(own.len(), KINDS.len());
        assert!(own.is_disjoint(&export.namespaces), "{own:?} {:?}", export.namespaces);
    }
    for pid in export.before {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} of the build lives");
    }
    signal(export.now[1], Signal::SIGCONT);
    let _ = export.build.wait().expect_code(0);
}

/// It was all there in the build's namespaces, or the build was not allowed to leave it.
#[test]
fn nothing_but_files_survives_into_the_export() {
    let export = Exporting::new();
    let said = export.build.running.stdout.text() + &export.build.running.stderr.text();
    for text in
        ["left: memory", "left: queue", "left: socket", "denied: mount", "denied: name", "denied: key"]
    {
        assert!(said.contains(text), "{text}: {said}");
    }
    assert_eq!(with_argument(&export.mark), []);
    let sockets = export.read("net/unix");
    assert!(!sockets.contains("kiln-left"), "{sockets}");
    let interfaces: Vec<_> = export.read("net/dev").lines().skip(2).map(str::to_owned).collect();
    assert!(interfaces.len() == 1 && interfaces[0].trim_start().starts_with("lo:"), "{interfaces:?}");
    for kind in ["shm", "msg"] {
        let mut look = Command::new("nsenter");
        look.arg(format!("--ipc=/proc/{}/ns/ipc", export.now[1]))
            .arg("cat")
            .arg(format!("/proc/sysvipc/{kind}"));
        let listed = run(&mut look, CLEAN).expect_code(0).stdout;
        assert_eq!(listed.lines().count(), 1, "{listed}");
    }
    let keys = std::fs::read_to_string("/proc/keys").unwrap_or_default();
    assert!(!keys.contains("kiln-left"), "{keys}");
    signal(export.now[1], Signal::SIGCONT);
    let Exporting { lab, build, .. } = export;
    let _ = build.wait().expect_code(0);
    assert_none(&lab.data(), CLEAN);
}

/// No system directories, no secrets, no Dockerfile: nothing but the stores, read-only, and a place to write to.
#[test]
fn an_export_sees_the_stores_and_nothing_else() {
    let export = Exporting::new();
    let mounts: Vec<(String, bool)> = export.read("mountinfo").lines().map(mount).collect();
    let writable: Vec<_> = mounts.iter().filter(|(_, writable)| *writable).map(|(path, _)| &**path).collect();
    assert!(writable.iter().all(|path| ["/out", "/proc"].contains(path)), "{mounts:?}");
    let paths: BTreeSet<_> = mounts.iter().map(|(path, _)| &**path).collect();
    assert_eq!(paths, BTreeSet::from(["/", "/b/0", "/job", "/out", "/proc", "/sys"]));
    signal(export.now[1], Signal::SIGCONT);
    let _ = export.build.wait().expect_code(0);
}

/// Mount point, and whether it is writable, of a line of mountinfo (proc(5)).
fn mount(line: &str) -> (String, bool) {
    let fields: Vec<&str> = line.split(' ').collect();
    (fields[4].to_owned(), fields[5].split(',').any(|option| option == "rw"))
}

#[test]
fn a_cancel_during_the_export_leaves_nothing() {
    let export = Exporting::new();
    signal(export.now[1], Signal::SIGCONT);
    let Exporting { lab, build, mark, .. } = export;
    let outcome = build.stop(Signal::SIGTERM);
    // It may have been done already.
    assert!([0, 130].contains(&outcome.code), "{}", outcome.output());
    assert_dead(&with_argument(&mark), CLEAN);
    assert_none(&lab.data(), CLEAN);
}

#[test]
fn an_agent_that_dies_during_the_export_leaves_nothing() {
    let export = Exporting::new();
    export.build.signal(Signal::SIGKILL);
    export.assert_clean();
    let store = export.lab.data().join("store");
    assert!(eventually(SHIM_CLEANS, || files(&store).is_empty()), "the shim left {:?}", files(&store));
}

#[test]
fn a_slot_that_dies_during_the_export_fails_the_build_and_leaves_nothing() {
    let export = Exporting::new();
    signal(export.now[0], Signal::SIGKILL);
    export.assert_clean();
    let Exporting { lab, build, .. } = export;
    let _ = build.wait().expect_code(5);
    assert_none(&lab.data(), CLEAN);
}

#[test]
fn a_shim_that_dies_during_the_export_takes_everything_along() {
    let export = Exporting::new();
    export.build.shim().signal(Signal::SIGKILL);
    export.assert_clean();
    let Exporting { lab, build, .. } = export;
    let _ = build.wait().expect_code(5);
    assert_none_live(&lab.data(), CLEAN);
}
