//! Whatever RUN starts, however the build ends, whoever dies first: nothing survives.
//!
//! Every kind of process that outlives its parent meets every kind of end.

use std::time::{Duration, Instant};

use kiln_tests::kiln::Build;
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::{assert_dead, assert_none, assert_none_live, files};
use kiln_tests::process::{eventually, with_argument};
use nix::sys::signal::Signal;

/// From SIGTERM to SIGKILL in these tests.
const GRACE: &str = "[build]\ngrace = \"1s\"\n";
/// From a cancel to the end of `kiln`: the grace, and time to look on a busy machine.
const LADDER: Duration = Duration::from_secs(6);
/// The shim deletes the job of a dead agent after the last process is gone.
const SHIM_CLEANS: Duration = Duration::from_secs(5);

/// A place for one test, with a sleep that only this test starts.
struct Place {
    lab: Lab,
    mark: String,
}

impl Place {
    /// RUN starts `stray`, says so, and goes on with `then`.
    fn new(stray: &str, then: &str) -> Self {
        let lab = Lab::new();
        let mark = format!("sleep 9{}.{}", lab.registry.address().port(), std::process::id());
        let start = stray.replace("MARK", &mark);
        lab.context.file("step", format!("{start}\nsleep 0.2\necho under-way\n{then}\n"));
        lab.dockerfile("FROM busybox:1\nCOPY step /step\nRUN sh /step\n");
        lab.configure(&lab.registry.host(), GRACE);
        Self { lab, mark }
    }

    fn waiting(stray: &str) -> Self {
        Self::new(stray, "sleep 100; sleep 100")
    }

    /// Starts the build and waits until the stray runs.
    fn under_way(&self) -> Build {
        let build = self.lab.build_archive().start();
        build.expect_output("under-way");
        let running = eventually(Duration::from_secs(5), || !with_argument(&self.mark).is_empty());
        assert!(running, "the stray does not run, so the test shows nothing");
        build
    }

    fn assert_dead(&self) {
        assert_dead(&with_argument(&self.mark), CLEAN);
        assert_none_live(&self.lab.data(), CLEAN);
    }

    fn assert_clean(&self) {
        self.assert_dead();
        assert_none(&self.lab.data(), CLEAN);
    }

    /// What a dead agent could not delete, the next start deletes.
    fn assert_clean_after_next_start(&self) {
        self.lab.dockerfile("FROM busybox:1\n");
        let _ = self.lab.build().run().expect_code(0);
        self.assert_clean();
    }
}

fn successful(stray: &str) {
    let place = Place::new(stray, "sleep 1; exit 0");
    let _ = place.under_way().wait().expect_code(0);
    place.assert_clean();
    assert!(place.lab.archive().exists());
}

fn failed(stray: &str) {
    let place = Place::new(stray, "sleep 1; exit 7");
    let _ = place.under_way().wait().expect_code(1);
    place.assert_clean();
}

fn cancelled(stray: &str) {
    let place = Place::waiting(stray);
    let build = place.under_way();
    let family = build.family();
    let began = Instant::now();
    let _ = build.stop(Signal::SIGTERM).expect_code(130);
    assert!(began.elapsed() < LADDER, "the cancel took {:?}", began.elapsed());
    assert_dead(&family, CLEAN);
    place.assert_clean();
}

fn agent_killed(stray: &str) {
    let place = Place::waiting(stray);
    let build = place.under_way();
    let family: Vec<_> = build.family().into_iter().filter(|p| p.pid != build.shim().pid).collect();
    let _ = build.stop(Signal::SIGKILL);
    assert_dead(&family, CLEAN);
    let store = place.lab.data().join("store");
    assert!(eventually(SHIM_CLEANS, || files(&store).is_empty()), "the shim left {:?}", files(&store));
    place.assert_dead();
    place.assert_clean_after_next_start();
}

fn shim_killed(stray: &str) {
    let place = Place::waiting(stray);
    let build = place.under_way();
    let family = build.family();
    build.shim().signal(Signal::SIGKILL);
    assert_dead(&family, CLEAN);
    let _ = build.wait().expect_code(5);
    place.assert_dead();
    place.assert_clean_after_next_start();
}

fn init_stopped(stray: &str) {
    let place = Place::waiting(stray);
    let build = place.under_way();
    let family = build.family();
    build.init().signal(Signal::SIGSTOP);
    let _ = build.stop(Signal::SIGTERM).expect_code(130);
    assert_dead(&family, CLEAN);
    place.assert_clean();
}

macro_rules! strays {
    ($($(#[doc = $doc:literal])* $name:ident = $start:literal;)*) => {
        $($(#[doc = $doc])* mod $name {
            const START: &str = $start;
            strays!(@ends successful failed cancelled agent_killed shim_killed init_stopped);
        })*
    };
    (@ends $($end:ident)*) => {
        $(#[test] fn $end() { super::$end(START) })*
    };
}

strays! {
    setsid_daemon = "setsid MARK >/dev/null 2>&1 </dev/null &";
    double_fork = "(setsid sh -c 'MARK & MARK & exit' >/dev/null 2>&1 </dev/null &)";
    ignores_term = "sh -c \"trap '' TERM HUP INT; MARK; MARK\" >/dev/null 2>&1 </dev/null &";
    stopped = "sh -c 'kill -STOP $$; MARK' >/dev/null 2>&1 </dev/null &";
    fork_loop = "setsid sh -c ': MARK; while :; do sleep 0.01 & wait; done' >/dev/null 2>&1 </dev/null &";
    closed_output = "sh -c 'exec <&- >&- 2>&-; MARK' &";
    held_output = "setsid MARK &";
}

/// The last resort: a second signal ends `kiln` at once, and the kernel takes the rest.
#[test]
fn a_second_signal_leaves_at_once() {
    let place = Place::waiting("sh -c \"trap '' TERM; MARK; MARK\" &");
    place.lab.configure(&place.lab.registry.host(), "[build]\ngrace = \"60s\"\n");
    let build = place.under_way();
    build.signal(Signal::SIGINT).expect_output("cancelling");
    let began = Instant::now();
    let _ = build.stop(Signal::SIGHUP).expect_code(130);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_dead(&with_argument(&place.mark), CLEAN);
    place.assert_clean_after_next_start();
}

/// Two builds side by side: the end of one is not the end of the other.
#[test]
fn a_cancel_does_not_reach_the_neighbour() {
    let place = Place::waiting("MARK &");
    let neighbour = Place::new("MARK &", "sleep 3");
    let build = place.under_way();
    let beside = neighbour.under_way();
    let _ = build.stop(Signal::SIGTERM).expect_code(130);
    let _ = beside.wait().expect_code(0);
    neighbour.assert_clean();
}

/// A pager that does not scroll, a terminal on hold: nobody reads, and signals still count.
#[test]
fn a_kiln_that_nobody_reads_still_obeys() {
    use std::os::fd::OwnedFd;
    let lab = Lab::new();
    lab.dockerfile("FROM busybox:1\nRUN while :; do echo a line that nobody reads; done\n");
    lab.configure(&lab.registry.host(), "[build]\ngrace = \"1s\"\n");
    let (_unread, full) = std::io::pipe().unwrap_or_else(|e| panic!("{e}"));
    let mut command = std::process::Command::new(kiln_tests::kiln::binary());
    command
        .args(["build", "--timeout=4s", "--data"])
        .arg(lab.data())
        .arg("--config")
        .arg(lab.path("kiln.toml"));
    command.arg("--file").arg(lab.path("Dockerfile")).arg(lab.context.path());
    command.env("HOME", lab.path("home")).stdin(std::process::Stdio::null());
    command.stdout(OwnedFd::from(full)).stderr(std::process::Stdio::null());
    #[expect(clippy::disallowed_methods, reason = "the test owns the process and waits for it")]
    let mut kiln = command.spawn().unwrap_or_else(|e| panic!("{e}"));
    drop(command);
    let ended = eventually(Duration::from_mins(1), || kiln.try_wait().is_ok_and(|end| end.is_some()));
    if !ended {
        let _ = kiln.kill();
    }
    let code = kiln.wait().ok().and_then(|status| status.code());
    assert_eq!((ended, code), (true, Some(124)));
    assert_none(&lab.data(), CLEAN);
}
