//! A RUN step that tries to leave its slot reaches nothing: not the agent, not the host, not a neighbour.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::Command;

use kiln_tests::base::BaseImage;
use kiln_tests::image::Image;
use kiln_tests::kiln::Build;
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::{assert_none, assert_none_live};
use kiln_tests::process::{Outcome, Process, Running, with_argument};
use kiln_tests::registry::{Access, PASSWORD, USER};
use kiln_tests::tools::compile;
use kiln_tests::tree::{Tree, containing};
use nix::sys::signal::Signal;

/// In a file of the host that everybody may read.
const HOST_CANARY: &str = "canary-host-file-c3a1";
/// A build secret.
const SECRET: &str = "canary-build-secret-91be";
/// What a build tries to write outside.
const MADE: &str = "canary-was-here-17d2";
/// base64 of `canary-user:canary-password-7f3a`: what a credential file holds.
const ENCODED_CREDENTIAL: &str = "Y2FuYXJ5LXVzZXI6Y2FuYXJ5LXBhc3N3b3JkLTdmM2E=";

/// Leaves a chroot if it may, then reads, writes and links what it was told.
const BREAKOUT: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static void show(const char *path) {
    char text[256];
    int file = open(path, O_RDONLY);
    ssize_t count = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (count < 0) { printf("denied: read %s: %m\n", path); return; }
    text[count] = 0;
    printf("read %s: %s\n", path, text);
}

int main(int count, char **argv) {
    mkdir("/hole", 0755);
    int here = open("/", O_RDONLY | O_DIRECTORY);
    if (chroot("/hole")) printf("denied: chroot: %m\n");
    if (fchdir(here)) printf("denied: fchdir: %m\n");
    for (int i = 0; i < 64; i++) if (chdir("..")) break;
    if (chroot(".")) printf("denied: chroot again: %m\n");
    for (int i = 1; i < count; i++) show(argv[i]);
    const char *layout = "/job/export/image";
    if (symlink("/etc", layout)) printf("denied: symlink: %m\n");
    if (mkfifo("/job/export/image.fifo", 0644)) printf("denied: mkfifo: %m\n");
    if (mknod("/disk", S_IFBLK | 0600, 0x0800)) printf("denied: mknod: %m\n");
    if (mount(0, "/", 0, MS_REMOUNT | MS_BIND, 0)) printf("denied: remount /: %m\n");
    if (mount(0, "/usr", 0, MS_REMOUNT | MS_BIND, 0)) printf("denied: remount /usr: %m\n");
    if (umount2("/proc", MNT_DETACH)) printf("denied: umount /proc: %m\n");
    open("/usr/kiln-was-here", O_CREAT | O_WRONLY, 0644);
    printf("breakout ended\n");
    return 0;
}
"#;

/// Takes what all processes of one user share: memory of pipes, as much of it as the kernel gives.
const HOARDER: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

int main(void) {
    for (int process = 0; process < 8; process++) {
        if (fork()) continue;
        int ends[2];
        while (!pipe(ends)) fcntl(ends[0], F_SETPIPE_SZ, 1 << 20);
        for (;;) pause();
    }
    sleep(2);
    printf("hoarding\n");
    fflush(stdout);
    sleep(100);
}
"#;

fn lab(dockerfile: &str) -> Lab {
    let lab = Lab::new();
    lab.dockerfile(dockerfile);
    lab
}

/// A file of the host, readable and writable for everybody, in a directory that everybody may enter.
fn canary(lab: &Lab) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let open = |path: PathBuf, mode| {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
            .unwrap_or_else(|e| panic!("{e}"));
        path
    };
    open(lab.path(""), 0o755);
    let file = lab.path("canary");
    std::fs::write(&file, HOST_CANARY).unwrap_or_else(|e| panic!("{e}"));
    open(file, 0o666)
}

#[track_caller]
fn assert_absent(text: &str, needles: &[&str]) {
    for needle in needles {
        assert!(!text.contains(needle), "`{needle}` was reached:\n{text}");
    }
}

#[test]
fn a_program_that_leaves_its_root_finds_nothing() {
    let lab = Lab::new();
    let canary = canary(&lab).display().to_string();
    lab.context.file_mode("breakout", compile(BREAKOUT), 0o755);
    lab.dockerfile(&format!(
        "FROM busybox:1\nCOPY breakout /breakout\nRUN /breakout {canary} /proc/1/root{canary} /proc/1/environ \
         /etc/shadow /job/export /secrets /etc/kiln/Dockerfile\n"
    ));
    let outcome = lab.build_archive().run().expect_code(0).expect_text(&["breakout ended", "denied: chroot"]);
    let shown: Vec<_> = outcome.stdout.lines().filter(|l| l.starts_with("read ")).collect();
    assert!(shown.is_empty(), "{shown:?}");
    // It may write what it takes for `/usr`, which is its image's.
    assert!(!std::path::Path::new("/usr/kiln-was-here").exists());
    assert_none(&lab.data(), CLEAN);
    Image::docker_archive(&lab.archive());
}

#[test]
fn roots_and_directories_of_other_processes_are_closed() {
    let lab = lab("FROM busybox:1\nARG CANARY\nRUN for p in /proc/[0-9]*; do for d in root cwd; do \
         cat $p/$d$CANARY $p/$d/job/* $p/$d/etc/kiln/Dockerfile 2>/dev/null; ls -d $p/$d/job $p/$d/secrets 2>/dev/null; \
         ln -s /etc $p/$d/job/export/image 2>/dev/null && echo LINKED; \
         mkfifo $p/$d/job/export/fifo 2>/dev/null && echo PIPED; done; done; echo looked\n");
    let canary = canary(&lab).display().to_string();
    let outcome = lab.build_archive().arg(format!("--build-arg=CANARY={canary}")).run();
    let outcome = outcome.expect_code(0).expect_text(&["looked"]);
    // The step's own text repeats its words.
    let said: Vec<_> = outcome.stdout.lines().filter(|line| !line.starts_with("STEP")).collect();
    assert_absent(&said.join("\n"), &[HOST_CANARY, "LINKED", "PIPED", "/job", "/secrets"]);
}

/// The source of a bind mount may be a symbolic link of an image. Inside a slot it leads to the slot's root,
/// in which nothing belongs to anybody but this build.
fn through_a_link(lab: &Lab, link: &str, commands: &str) -> Outcome {
    lab.dockerfile(&format!(
        "FROM busybox:1 AS evil\nRUN ln -s {link} /link\nFROM busybox:1\n\
         RUN --mount=type=bind,from=evil,source=/link,target=/m,rw {commands}; true\n"
    ));
    lab.build_archive().arg("--timeout=10s").run()
}

#[test]
fn a_symlinked_source_of_a_bind_mount_leads_nowhere() {
    for link in ["/", "../../../../../../..", "/proc/1/root", "/proc/self/root", "/b/0/../..", "/job"] {
        let lab = Lab::new();
        let canary = canary(&lab).display().to_string();
        let data = lab.data().display().to_string();
        let outcome = through_a_link(
            &lab,
            link,
            &format!(
                "cat /m{canary} /m/etc/shadow /m/etc/hostname; ls /m{data} /m/home /m/var/lib; \
                for place in {canary} /usr/owned /etc/owned /b/0/owned /n/owned; do echo {MADE} > /m$place; done"
            ),
        );
        let said: Vec<_> = outcome.stdout.lines().filter(|line| !line.starts_with("STEP")).collect();
        assert_absent(&said.join("\n"), &[HOST_CANARY, "context.tar", "dpkg", "root:"]);
        assert_eq!(std::fs::read_to_string(&canary).ok().as_deref(), Some(HOST_CANARY));
        for owned in ["/usr/owned", "/etc/owned"] {
            assert!(!std::path::Path::new(owned).exists(), "{link} was written through");
        }
        assert_eq!(containing(&lab.data().join("store/base"), &[MADE.to_owned()]), Vec::<PathBuf>::new());
        assert_none(&lab.data(), CLEAN);
    }
}

/// Through the link above, RUN reaches its slot's files: buildah's store, and where the root filesystem is written to.
#[test]
fn a_prepared_layout_is_not_trusted() {
    for prepare in [
        "ln -s CANARY image",
        "mkfifo image",
        "mkdir image; ln -s CANARY image/manifest.json; ln -s CANARY image/version",
        "mkdir image; mkfifo image/manifest.json; mkfifo image/version",
        "mkdir image; chmod 0 image",
        "mkdir -p image/manifest.json/x",
        "rm -rf ../export; ln -s /etc ../export",
        "mkdir ../layout; ln -s CANARY ../layout/manifest.json; ln -s ../job ../layout2",
        "rm -rf ../root/overlay-images; ln -s / ../root/overlay-images",
        "mv ../root ../moved; ln -s moved ../root",
        "ln -s CANARY ../run/image-id; mkfifo ../run/image-id",
    ] {
        let lab = Lab::new();
        let canary = canary(&lab).display().to_string();
        let commands = format!("cd /m/job/export && {{ {}; }}", prepare.replace("CANARY", &canary));
        let outcome = through_a_link(&lab, "/", &commands);
        assert!([0, 1, 5].contains(&outcome.code), "{prepare}: {}\n{}", outcome.code, outcome.output());
        assert_eq!(outcome.code == 0, lab.archive().exists());
        if outcome.code == 0 {
            assert!(Image::docker_archive(&lab.archive()).entry("bin/busybox").is_some());
        }
        assert_eq!(std::fs::read_to_string(&canary).ok().as_deref(), Some(HOST_CANARY), "{prepare}");
        assert_none(&lab.data(), CLEAN);
    }
}

#[test]
fn mounts_that_point_outside_are_refused() {
    for mount in [
        "type=cache,id=../../x,target=/m",
        "type=cache,id=/etc,target=/m",
        "type=cache,target=/m,from=x,source=../..",
        "type=bind,source=../../..,target=/m",
        "type=bind,source=/../etc,target=/m",
    ] {
        let lab = lab(&format!("FROM busybox:1\nRUN --mount={mount} ls /m\n"));
        let _ = lab.fails(&[], 2).expect_text(&["bad_request", "Dockerfile:2"]);
    }
}

#[test]
fn a_mount_stays_as_it_was_made() {
    let lab = lab("FROM busybox:1\nRUN --mount=type=bind,from=busybox:1,source=/,target=/m \
         mount -o remount,rw /m; mount -o remount,rw,bind /m; umount /m; echo x > /m/bin/owned; rm -f /m/bin/busybox; \
         mount -o remount,rw /; mount -t tmpfs none /mnt; mount -t proc none /proc; echo tried\n");
    let _ = lab.build().run();
    let store = || Tree::of(&lab.data().join("store/base"));
    let before = store();
    let _ = lab.build().run().expect_text(&["tried"]);
    before.assert_same(&store());
}

#[test]
fn a_device_cannot_be_made() {
    let lab = lab("FROM busybox:1\nRUN mknod /d b 8 0 || mknod /d c 1 1 || echo no device\n");
    let _ = lab.build().run().expect_code(0).expect_text(&["no device\n"]);
}

/// A daemon that survives its step must not: what is exported was written after its death.
#[test]
fn nobody_is_left_to_swap_a_blob() {
    let lab = lab(
        "FROM busybox:1\nRUN echo x > /x; setsid sh -c 'while :; do for f in /job/root/overlay-*/*/* \
         /proc/[0-9]*/root/job/root/overlay-*/*/*; do echo swapped > $f; done; done' >/dev/null 2>&1 </dev/null &\n",
    );
    let out = lab.path("out");
    let _ = lab.build().arg(format!("--output=dir:{}", out.display())).run().expect_code(0);
    // The reader verifies every digest.
    assert!(Image::dir(&out).entry("x").is_some());
    assert_none(&lab.data(), CLEAN);
}

/// Everything that `/proc` tells the host about a build's processes.
fn told_by_proc(processes: &[Process]) -> String {
    let read = |p: &Process, file: &str| std::fs::read(format!("/proc/{}/{file}", p.pid)).unwrap_or_default();
    let both = |p: &Process| [read(p, "cmdline"), read(p, "environ")].concat();
    processes.iter().map(|p| String::from_utf8_lossy(&both(p)).replace('\0', "\n")).collect()
}

const LISTS_PROCESSES: &str =
    "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'; ps; echo listed";

#[test]
fn processes_of_the_host_are_invisible() {
    let lab = lab(&format!("FROM busybox:1\nRUN {LISTS_PROCESSES}\n"));
    let mark = format!("9{}", lab.registry.address().port());
    let _sleeper = Running::start(Command::new("sleep").arg(&mark));
    let outcome =
        lab.build().env("CANARY", "canary-environment").run().expect_code(0).expect_text(&["listed"]);
    let data = lab.data().display().to_string();
    assert_absent(&outcome.stdout, &[&mark, "docker-registry", "canary-environment", &data, "kiln build"]);
}

#[test]
fn a_neighbour_is_invisible_and_out_of_reach() {
    let neighbour = lab("FROM busybox:1\nCOPY canary /canary\nRUN echo under-way; sleep 98765; echo x\n");
    neighbour.context.file("canary", HOST_CANARY);
    let beside = neighbour.build().start();
    beside.expect_output("under-way");
    let lab = lab(&format!(
        "FROM busybox:1\nRUN {LISTS_PROCESSES}; ls /job /b; find / -name 'canary*' -not -path '/proc/*' 2>/dev/null; \
         kill -9 -1; kill -TERM 1; killall -9 sleep; true\n"
    ));
    let outcome = lab.build().run();
    let said: Vec<_> = outcome.stdout.lines().filter(|line| !line.starts_with("STEP")).collect();
    assert_absent(&said.join("\n"), &["98765", HOST_CANARY, "/canary"]);
    assert!(with_argument("sleep 98765").iter().any(Process::is_alive), "the neighbour was reached");
    assert_eq!(beside.stop(Signal::SIGTERM).code, 130);
}

#[test]
fn signals_reach_nobody_outside() {
    let lab = lab(
        "FROM busybox:1\nRUN trap '' TERM HUP INT; for s in TERM HUP KILL STOP; do for n in $(seq 1 400); do \
         [ $n = $$ ] || kill -$s $n 2>/dev/null; done; done; kill -TERM -1; kill -KILL -1\n",
    );
    let mark = format!("9{}.5", lab.registry.address().port());
    let mut sleeper = Running::start(Command::new("sleep").arg(&mark));
    let outcome = lab.build().run();
    // It killed its own buildah: that is its own business, and the system's word for it.
    assert!([1, 5].contains(&outcome.code), "{}: {}", outcome.code, outcome.output());
    assert!(!sleeper.ended());
    assert_none(&lab.data(), CLEAN);
}

/// All slots of a node share one user, and the kernel counts pipe buffers per user.
#[test]
fn a_neighbour_that_takes_every_pipe_buffer_stops_nobody() {
    let hoarder = lab("FROM busybox:1\nCOPY hoard /hoard\nRUN /hoard\n");
    hoarder.context.file_mode("hoard", compile(HOARDER), 0o755);
    let beside = hoarder.build().start();
    beside.expect_output("hoarding\n");
    let _ = lab("FROM busybox:1\nRUN echo x > /x\n").build_archive().run().expect_code(0);
    assert_eq!(beside.stop(Signal::SIGTERM).code, 130);
}

/// Addresses of this machine besides loopback: connecting a datagram socket sends nothing.
fn own_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        std::net::IpAddr::V4(address) if !address.is_loopback() => Some(address),
        _ => None,
    }
}

#[test]
fn ports_of_the_host_are_closed() {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap_or_else(|e| panic!("{e}"));
    listener.set_nonblocking(true).unwrap_or_else(|e| panic!("{e}"));
    let port = listener.local_addr().map_or(0, |a| a.port());
    let lab = Lab::new();
    let registry = lab.registry.address().port();
    let own = own_address().map(|a| a.to_string()).unwrap_or_default();
    lab.dockerfile(&format!(
        "FROM busybox:1\nRUN for host in 127.0.0.1 localhost 0.0.0.0 10.0.2.2 10.0.2.3 169.254.169.254 {own}; do \
         for port in {port} {registry}; do timeout 2 nc $host $port </dev/null >/dev/null 2>&1 && echo OPEN $host; \
         done; done; echo knocked\n"
    ));
    let knock = |network: &str| {
        let outcome = lab.build().arg(network).run().expect_code(0).expect_text(&["knocked"]);
        let open = outcome.stdout.lines().filter(|line| line.starts_with("OPEN")).count();
        let accepted = std::iter::from_fn(|| listener.accept().ok()).count();
        (open, accepted)
    };
    assert_eq!(knock("--network=isolated"), (0, 0));
    assert_eq!(knock("--network=none"), (0, 0));
    let (open, accepted) = knock("--network=unsafe-host");
    assert!(open > 0 && accepted > 0, "the probe itself does not work");
}

#[test]
fn add_from_an_address_does_not_reach_the_host() {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap_or_else(|e| panic!("{e}"));
    listener.set_nonblocking(true).unwrap_or_else(|e| panic!("{e}"));
    let port = listener.local_addr().map_or(0, |a| a.port());
    let own = own_address().unwrap_or(Ipv4Addr::LOCALHOST);
    for host in ["127.0.0.1".to_owned(), "10.0.2.2".to_owned(), "[::1]".to_owned(), own.to_string()] {
        let lab = lab(&format!("FROM busybox:1\nADD http://{host}:{port}/x /x\n"));
        let outcome = lab.build_archive().run();
        assert_ne!(outcome.code, 0);
        assert!(listener.accept().is_err(), "{host} was reached:\n{}", outcome.output());
    }
}

/// A build that waits inside RUN with a secret and a credential, for others to look at.
fn waiting_with_secrets() -> (Lab, Build) {
    let lab = Lab::empty(Access::Password);
    lab.registry.push("library/busybox", "1", &BaseImage::busybox());
    let auth = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{ENCODED_CREDENTIAL}\"}}}}}}", lab.registry.host());
    for (name, content) in [("auth.json", auth.as_str()), ("secret", SECRET)] {
        std::fs::write(lab.path(name), content).unwrap_or_else(|e| panic!("{e}"));
    }
    lab.dockerfile(
        "FROM busybox:1\nRUN --mount=type=secret,id=key cat /run/secrets/key; echo; \
         grep -rl -e canary-pass -e Y2FuYXJ5LXVzZXI6 / --exclude-dir=sys --exclude-dir=dev 2>/dev/null | sed 's/^/FOUND /'; \
         cat /proc/[0-9]*/environ 2>/dev/null | grep -c canary-pass; \
         echo under-way; while [ ! -e /tmp/never ]; do sleep 0.2; done\n",
    );
    let build = lab.build_archive().arg("--authfile").arg(lab.path("auth.json"));
    let build = build.arg(format!("--secret=id=key,src={}", lab.path("secret").display())).start();
    build.expect_output("under-way\n");
    (lab, build)
}

#[test]
fn secrets_and_credentials_stay_where_they_belong() {
    let (lab, build) = waiting_with_secrets();
    let mut everybody = build.family();
    everybody.extend(kiln_tests::process::processes().into_iter().filter(|p| p.pid == build.running.pid()));
    assert!(everybody.len() > 4, "{everybody:#?}");
    let told = told_by_proc(&everybody);
    let needles = [SECRET, PASSWORD, ENCODED_CREDENTIAL];
    assert_absent(&told, &needles);
    let outcome = build.stop(Signal::SIGTERM).expect_code(130);
    let said: Vec<_> = outcome.stdout.lines().filter(|line| !line.starts_with("STEP")).collect();
    assert_absent(&outcome.output(), &needles);
    assert_absent(&said.join("\n"), &["FOUND"]);
    assert!(said.contains(&"***") || said.iter().any(|l| l.contains("***")), "no redaction in {said:?}");
    assert_none(&lab.data(), CLEAN);
    let needles = needles.map(str::to_owned);
    assert_eq!(containing(&lab.data(), &needles), Vec::<PathBuf>::new());
}

#[test]
fn secrets_and_credentials_are_in_no_image() {
    let lab = Lab::empty(Access::Password);
    lab.registry.push("library/busybox", "1", &BaseImage::busybox());
    let auth = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{ENCODED_CREDENTIAL}\"}}}}}}", lab.registry.host());
    for (name, content) in [("auth.json", auth.as_str()), ("secret", SECRET)] {
        std::fs::write(lab.path(name), content).unwrap_or_else(|e| panic!("{e}"));
    }
    lab.dockerfile("FROM busybox:1\nRUN --mount=type=secret,id=key wc -c < /run/secrets/key > /length\n");
    let out = lab.path("out");
    let build =
        lab.build().arg("--authfile").arg(lab.path("auth.json")).arg("--metadata-file").arg(lab.path("meta"));
    let build = build.arg(format!("--secret=id=key,src={}", lab.path("secret").display()));
    let outcome = build.arg(format!("--output=oci:{}", out.display())).run().expect_code(0);
    let needles = [SECRET, PASSWORD, ENCODED_CREDENTIAL, USER];
    assert_absent(&outcome.output(), &needles);
    let image = Image::oci(&out);
    assert_absent(&image.text(), &needles);
    let needles = needles.map(str::to_owned);
    assert_eq!(containing(&lab.data(), &needles), Vec::<PathBuf>::new());
    assert!(containing(&lab.path("meta"), &needles).is_empty());
    assert_eq!(containing(&out, &needles), Vec::<PathBuf>::new());
}

#[test]
fn a_failed_build_tells_no_secret() {
    let lab =
        lab("FROM busybox:1\nRUN --mount=type=secret,id=key echo \"bad $(cat /run/secrets/key)\" >&2; \
         base64 /run/secrets/key; sed 's/./& /g' /run/secrets/key >/dev/null; exit 3\n");
    std::fs::write(lab.path("secret"), SECRET).unwrap_or_else(|e| panic!("{e}"));
    let outcome = lab.fails(&[&format!("--secret=id=key,src={}", lab.path("secret").display())], 1);
    assert_absent(&outcome.output(), &[SECRET, "Y2FuYXJ5LWJ1aWxkLXNlY3JldC05MWJl"]);
    assert_none_live(&lab.data(), CLEAN);
    assert_eq!(containing(&lab.data(), &[SECRET.to_owned()]), Vec::<PathBuf>::new());
}
