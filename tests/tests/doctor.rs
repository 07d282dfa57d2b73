//! `kiln doctor` tells what is there and what is missing, and its script mends it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_tests::kiln::{Kiln, binary};
use kiln_tests::lab::CLEAN;
use kiln_tests::leftovers::assert_none;
use kiln_tests::process::{Outcome, Running, run};
use kiln_tests::tree::Tree;
use kiln_tests::world::{Plan, privileged, within};
use nix::mount::{MsFlags, mount};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_mins(1);
/// Every requirement, once and in this order.
const REQUIREMENTS: [&str; 12] = [
    "newuidmap",
    "newgidmap",
    "subordinate ids",
    "buildah",
    "data directory",
    "sealed slot",
    "isolated network",
    "limit on processes",
    "limit on disk",
    "limit on file size",
    "limit on open files",
    "limit on memory and CPU",
];

fn place() -> TempDir {
    let dir = tempfile::Builder::new().prefix("kiln-doctor-").tempdir().unwrap();
    for name in ["home", "data"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    std::fs::write(dir.path().join("kiln.toml"), "").unwrap();
    dir
}

fn kiln(place: &Path, subcommand: &str) -> Kiln {
    Kiln::new(subcommand, &place.join("data"), &place.join("kiln.toml"), &place.join("home"))
}

/// `kiln SUBCOMMAND` under another identity and behind other files, in namespaces of its own.
fn elsewhere(place: &Path, identity: &[&str], covers: &[(&str, &str)], subcommand: &[&str]) -> Outcome {
    let mut script = String::new();
    for (number, (path, contents)) in covers.iter().enumerate() {
        let file = place.join(format!("cover-{number}"));
        std::fs::write(&file, contents).unwrap();
        write!(script, "mount --bind '{}' '{path}' && ", file.display()).unwrap();
    }
    let mut command = Command::new("unshare");
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", place.join("home"));
    command.args(["--user", "--mount", "--keep-caps"]).args(identity);
    command.args(["sh", "-c", &format!("{script} exec \"$@\""), "sh"]).arg(binary()).args(subcommand);
    command.arg("--data").arg(place.join("data")).arg("--config").arg(place.join("kiln.toml"));
    run(&mut command, LIMIT)
}

/// Standing and name of every line but the last.
fn findings(outcome: &Outcome) -> Vec<(String, String)> {
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    let (verdict, lines) = lines.split_last().unwrap();
    assert!(verdict.starts_with("this machine "), "{verdict}");
    let parts = lines.iter().map(|line| {
        let (standing, rest) = line.split_once(' ').unwrap();
        (standing.to_owned(), rest.trim_start().split(':').next().unwrap().to_owned())
    });
    parts.collect()
}

#[test]
fn this_machine_is_fit_and_every_requirement_has_one_line() {
    let place = place();
    let outcome =
        kiln(place.path(), "doctor").run().expect_code(0).expect_text(&["this machine runs sealed builds"]);
    let findings = findings(&outcome);
    let names: Vec<&str> = findings.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, REQUIREMENTS, "{}", outcome.stdout);
    assert!(findings.iter().all(|(standing, _)| standing != "missing"), "{}", outcome.stdout);
    // What is not there comes with a way to get it.
    for line in outcome.stdout.lines().filter(|line| line.starts_with("limited")) {
        assert!(line.contains(" -> "), "{line}");
    }
    assert_none(&place.path().join("data"), CLEAN);
}

#[test]
fn a_user_without_subordinate_ids_is_told() {
    let place = place();
    let nobody = ["--map-user=65534", "--map-group=65534"];
    let said = [
        "missing  subordinate ids: /etc/subuid has no range of 65536 ids for user `nobody`",
        "--print-setup",
    ];
    let outcome = elsewhere(place.path(), &nobody, &[("/etc/subuid", "")], &["doctor"]);
    let _ = outcome.expect_code(5).expect_text(&said).expect_text(&["cannot run sealed builds yet"]);
    let short = [("/etc/subuid", "nobody:300000:60000\n")];
    let _ = elsewhere(place.path(), &nobody, &short, &["doctor"]).expect_code(5).expect_text(&said);
    let half = [("/etc/subuid", "nobody:300000:65536\n"), ("/etc/subgid", "")];
    let said = ["missing  subordinate ids: /etc/subgid has no range of 65536 ids"];
    let _ = elsewhere(place.path(), &nobody, &half, &["doctor"]).expect_code(5).expect_text(&said);
    let stranger = ["--map-user=54321", "--map-group=54321"];
    let said = ["missing  subordinate ids: user id 54321 has no entry in the user database"];
    let _ = elsewhere(place.path(), &stranger, &[], &["doctor"]).expect_code(5).expect_text(&said);
}

#[test]
fn root_without_the_system_user_is_told_and_nothing_is_made() {
    let place = place();
    let root = ["--map-root-user"];
    let users = [("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")];
    let said = ["running as root needs the system user `kiln`", "kiln doctor --print-setup"];
    let _ = elsewhere(place.path(), &root, &users, &["doctor"]).expect_code(5).expect_text(&said);
    let context = place.path().join("home");
    std::fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY Dockerfile /\n").unwrap();
    let build = elsewhere(place.path(), &root, &users, &["build", context.to_str().unwrap()]);
    let _ = build.expect_code(5).expect_text(&said);
    assert_eq!(std::fs::read_dir(place.path().join("data")).unwrap().count(), 0);
}

#[test]
fn a_missing_buildah_is_told() {
    let plan = Plan { covers: vec![("/usr/bin/buildah".into(), "/dev/null".into())], ..Plan::default() };
    within("a_missing_buildah_is_told", &plan, |_| {
        let place = place();
        let outcome = kiln(place.path(), "doctor").run().expect_code(5);
        let _ =
            outcome.expect_text(&["missing  buildah: cannot run /usr/bin/buildah", " -> install buildah"]);
    });
}

/// The text of `kiln doctor --print-setup`, which needs nothing of this machine.
fn setup_script() -> String {
    let place = place();
    let stranger = ["--map-user=54321", "--map-group=54321"];
    elsewhere(place.path(), &stranger, &[], &["doctor", "--print-setup"]).expect_code(0).stdout
}

#[test]
fn the_script_is_a_clean_script() {
    let place = place();
    let file = place.path().join("setup.sh");
    std::fs::write(&file, setup_script()).unwrap();
    let _ = run(Command::new("sh").arg("-n").arg(&file), LIMIT).expect_code(0);
    if run(Command::new("sh").args(["-c", "command -v shellcheck"]), LIMIT).code == 0 {
        let _ = run(Command::new("shellcheck").arg(&file), LIMIT).expect_code(0);
    }
}

/// Copies of what the script changes, seen instead of the machine's own by this thread and its children.
struct Copies(TempDir);

impl Copies {
    /// As on a machine that nobody prepared.
    fn unprepared() -> Self {
        let copies = Self(tempfile::Builder::new().prefix("kiln-setup-").tempdir().unwrap());
        copies.shell(
            "mkdir net run log; cp -a /etc etc; rm -rf etc/systemd/system/user@.service.d\n\
             for file in passwd group shadow gshadow; do sed -i '/^kiln:/d' etc/$file; done\n\
             printf 'other:100000:65536\\nlast:165536:1000\\n' > etc/subuid\n\
             printf 'other:100000:65536\\n' > etc/subgid\n\
             mknod -m 600 net/tun c 10 200; echo 1 > knob",
        );
        for (name, place) in [("etc", "/etc"), ("net", "/dev/net"), ("run", "/run"), ("log", "/var/log")] {
            copies.show(name, Path::new(place));
        }
        let knob = Path::new("/proc/sys/kernel/unprivileged_userns_clone");
        if knob.exists() {
            copies.show("knob", knob);
        }
        copies
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn shell(&self, script: &str) {
        let mut command = Command::new("sh");
        let _ = run(command.args(["-e", "-c", script]).current_dir(self.0.path()), LIMIT).expect_code(0);
    }

    fn show(&self, name: &str, place: &Path) {
        let source = self.path(name);
        mount(Some(&source), place, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    }

    fn ranges(&self, user: &str) -> Vec<String> {
        let files =
            ["etc/subuid", "etc/subgid"].map(|name| std::fs::read_to_string(self.path(name)).unwrap());
        let own =
            files.iter().flat_map(|text| text.lines().filter(|line| line.starts_with(&format!("{user}:"))));
        own.map(str::to_owned).collect()
    }
}

/// Runs the script in front of the copies, and returns the lines that say what it did.
fn set_up(arguments: &[&str]) -> Vec<String> {
    use std::io::{Seek as _, Write as _};
    let mut script = tempfile::tempfile().unwrap();
    script.write_all(setup_script().as_bytes()).unwrap();
    script.rewind().unwrap();
    let mut command = Command::new("sh");
    // As `su` leaves it.
    command.args(["-s", "--"]).args(arguments).env_clear().env("PATH", "/usr/bin:/bin");
    let said = Running::start_with_input(&mut command, script).wait(LIMIT).expect_code(0).stdout;
    said.lines().filter(|line| !line.starts_with("done:")).map(str::to_owned).collect()
}

#[test]
fn the_script_prepares_a_machine_and_changes_nothing_twice() {
    privileged("the_script_prepares_a_machine_and_changes_nothing_twice", || {
        let copies = Copies::unprepared();
        let place = place();
        let _ = kiln(place.path(), "doctor").run().expect_code(5).expect_text(&["system user `kiln`"]);
        let did = set_up(&[]);
        assert_eq!(did.len(), 3, "{did:#?}");
        // Behind all ranges of both files.
        assert_eq!(copies.ranges("kiln"), ["kiln:166536:65536"; 2]);
        assert_eq!(copies.ranges("other"), ["other:100000:65536"; 2]);
        let (etc, net) = (Tree::of(&copies.path("etc")), Tree::of(&copies.path("net")));
        assert_eq!(set_up(&[]), [""; 0]);
        etc.assert_same(&Tree::of(&copies.path("etc")));
        net.assert_same(&Tree::of(&copies.path("net")));
        let doctor = kiln(place.path(), "doctor").run().expect_code(0);
        let _ = doctor.expect_text(&["65536 from 166536 of user id", "ok       isolated network"]);
    });
}

/// A range in one of the files only, and a number instead of a name.
#[test]
fn the_script_completes_what_a_user_has() {
    privileged("the_script_completes_what_a_user_has", || {
        let copies = Copies::unprepared();
        copies.shell(
            "echo 'kiln-test:x:4321:4321::/:/bin/sh' >> etc/passwd; echo 'kiln-test:x:4321:' >> etc/group\n\
             echo 'kiln-test:300000:65536' >> etc/subuid; echo 'other:100000:65536' > etc/subgid",
        );
        assert_eq!(set_up(&["kiln-test"]).len(), 2, "ids and the device");
        let ranges = copies.ranges("kiln-test");
        assert_eq!(ranges.len(), 2, "{ranges:?}");
        assert_eq!(ranges[0], "kiln-test:300000:65536");
        assert!(!std::fs::read_to_string(copies.path("etc/passwd")).unwrap().contains("kiln:"));
        assert_eq!(set_up(&["kiln-test"]), [""; 0]);
        copies.shell("echo '4321:500000:65536' | tee etc/subuid > etc/subgid");
        assert_eq!(set_up(&["kiln-test"]), [""; 0], "a range by number is one that kiln accepts");
    });
}
