//! `kill -9` between any two durable effects of a server: nothing is lost, nothing is done twice, nothing stays.
//!
//! Every point of [`CrashPoint::ALL`] is a test. The server kills itself there, which a file proves; the next one
//! goes on; and at the end everything that anybody can see has to fit together.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests outside of test functions")]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use kiln_tests::kiln::{Build, Kiln};
use kiln_tests::lab::Lab;
use kiln_tests::leftovers;
use kiln_tests::process::{Outcome, eventually};
use kiln_tests::server::Server;
use kiln_transport::crash::{AT, CrashPoint, MARKER};
use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// The longest pause before a retry is 15 s.
const SOON: Duration = Duration::from_mins(2);
const KILLED: i32 = 128 + 9;
const TAGS: [&str; 2] = ["one", "two"];
/// No disk has this much room, so no build starts.
const FULL: &str = "[data]\nmin_free = \"1000000TiB\"\n";

fn main() -> ExitCode {
    let trials = CrashPoint::ALL.iter().flat_map(|point| trials(*point)).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trials(point: CrashPoint) -> Vec<Trial> {
    let plan = plan(point);
    let trial = |&count: &u32| {
        let at = format!("{}:{count}", point.label());
        Trial::test(at.clone(), move || {
            Crash::new(plan, at).run();
            Ok(())
        })
    };
    plan.counts.iter().map(trial).collect()
}

/// How a point is reached.
#[derive(Clone, Copy)]
struct Plan {
    way: Way,
    /// Which of the visits to it.
    counts: &'static [u32],
    /// The point is one of the run that follows a death here.
    after: Option<CrashPoint>,
}

/// What people do.
#[derive(Clone, Copy)]
enum Way {
    /// They build two tags.
    Publish,
    /// They build while there is no room, which passes.
    Retry,
    /// They build while there is no room, and do not want to wait.
    GiveUp,
    /// They replay that later.
    Replay,
    /// They discard it.
    Discard,
    /// They cancel while it runs.
    Cancel,
    /// They build while the only slot is taken, and do not want to wait.
    Wait,
}

fn plan(point: CrashPoint) -> Plan {
    use CrashPoint as P;
    let publish = Plan { way: Way::Publish, counts: &[1], after: None };
    let by = |way| Plan { way, ..publish };
    let after = |first| Plan { after: Some(first), ..publish };
    match point {
        P::Uploaded | P::TagPut | P::TagKept => Plan { counts: &[1, 2], ..publish },
        P::RetryRecorded => by(Way::Retry),
        P::DeadLetterRecorded => by(Way::GiveUp),
        P::ReplayRecorded => by(Way::Replay),
        P::DiscardRecorded => by(Way::Discard),
        P::CancelRecorded => by(Way::Cancel),
        P::SweepRecorded => by(Way::Wait),
        P::SlotsReclaimed => after(P::SlotStarted),
        P::EarlierConfirmed => after(P::EndKept),
        P::RunKnown => after(P::JobMade),
        P::PublishClaimed => after(P::CommitRecorded),
        P::ContextStored
        | P::SubmitRecorded
        | P::OutboxSent
        | P::HintSent
        | P::ClaimRecorded
        | P::ContextCopied
        | P::JobMade
        | P::Probed
        | P::SlotStarted
        | P::Sealed
        | P::LayersKept
        | P::SlotEnded
        | P::CandidateKept
        | P::VerdictsKept
        | P::CommitRecorded
        | P::CommitHeard
        | P::EndKept
        | P::ReportSent
        | P::ReportRecorded
        | P::EndRecorded
        | P::EndConfirmed
        | P::JobDeleted => publish,
    }
}

/// One test.
struct Crash {
    plan: Plan,
    at: String,
    server: Server,
}

impl Crash {
    fn new(plan: Plan, at: String) -> Self {
        let lab = Lab::new();
        lab.context.file("file", at.as_bytes());
        lab.dockerfile(match plan.way {
            Way::Cancel => "FROM busybox:1\nRUN echo begun; sleep 600\n",
            // Longer than the pause between two looks at what is due.
            Way::Wait => "FROM busybox:1\nRUN echo begun; sleep 5\n",
            _ => "FROM scratch\nCOPY file /file\n",
        });
        if matches!(plan.way, Way::Retry | Way::GiveUp | Way::Replay | Way::Discard) {
            lab.configure(&lab.registry.host(), FULL);
        }
        Self { plan, at, server: Server::idle(lab) }
    }

    fn run(mut self) {
        match self.plan.after {
            Some(first) => self.arm(first.label()),
            None => self.arm(&self.at.clone()),
        }
        let client = self.act();
        self.expect_death();
        if self.plan.after.is_some() {
            self.arm(&self.at.clone());
            self.expect_death();
        }
        self.server.lab.configure(&self.server.lab.registry.host(), "");
        self.server.up();
        let builds = self.finish(client);
        self.check(&builds);
    }

    fn marker(&self) -> std::path::PathBuf {
        self.server.lab.path("crashed")
    }

    fn arm(&mut self, at: &str) {
        let marker = self.marker();
        let _ = std::fs::remove_file(&marker);
        self.server.launch(&[(AT, at), (MARKER, marker.to_str().unwrap())]);
    }

    fn expect_death(&mut self) {
        let died = self.server.wait().expect_code(KILLED);
        assert!(self.marker().exists(), "it died elsewhere:\n{}", died.output());
    }

    /// Does what leads to the point. The client goes on: it has to bear the death of its server.
    fn act(&self) -> Option<Build> {
        assert!(eventually(SOON, || self.server.ask("ls").run().code == 0), "the server does not answer");
        let build = TAGS.iter().fold(self.server.build(), |build, tag| build.args(["-t", &self.target(tag)]));
        match self.plan.way {
            Way::Publish | Way::Retry => Some(build.start()),
            Way::GiveUp => Some(build.arg("--attempts=1").start()),
            Way::Replay => self.die_by_hand(build.arg("--attempts=1"), "replay"),
            Way::Discard => self.die_by_hand(build.arg("--attempts=1"), "discard"),
            Way::Cancel => {
                let client = build.start();
                client.expect_output("begun");
                let _ = self.server.ask("cancel").arg(self.only_build()).run();
                Some(client)
            }
            Way::Wait => {
                let client = build.start();
                client.expect_output("begun");
                self.submit_impatiently();
                Some(client)
            }
        }
    }

    /// The command gets no answer; whether the change counts, the next server says.
    fn die_by_hand(&self, build: Kiln, action: &str) -> Option<Build> {
        let _ = build.run().expect_code(5).expect_text(&["disk_full"]);
        let _ = self.server.ask(&format!("dead {action}")).arg(self.only_build()).run();
        None
    }

    fn target(&self, tag: &str) -> String {
        format!("{}/{tag}:1", self.server.lab.registry.host())
    }

    fn builds(&self) -> Vec<Value> {
        let listed = self.server.ask("ls").arg("--json").run().expect_code(0);
        listed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn only_build(&self) -> String {
        let builds = self.builds();
        assert_eq!(builds.len(), 1, "{builds:?}");
        builds[0]["id"].as_str().unwrap().to_owned()
    }

    /// The same build again, which waits for a moment only.
    fn submit_impatiently(&self) {
        let shown = self.server.ask("show").arg("--json").arg(self.only_build()).run().expect_code(0);
        let mut spec: Value = serde_json::from_str::<Value>(&shown.stdout).unwrap()["spec"].take();
        spec["queue_timeout"] = json!({"secs": 0, "nanos": 1});
        let answer = self.server.request("POST", "/builds", spec.to_string().as_bytes());
        assert_eq!(answer.status, 202, "{}", String::from_utf8_lossy(&answer.body));
    }

    /// Waits for every end.
    fn finish(&self, client: Option<Build>) -> Vec<Value> {
        let outcome = client.map(Build::wait);
        if let Some(Outcome { code, .. }) = outcome
            && self.builds().is_empty()
        {
            // Nobody told its client that it was accepted.
            assert_ne!(code, 0);
            let again = TAGS.iter().fold(self.server.build(), |b, tag| b.args(["-t", &self.target(tag)]));
            let _ = again.run().expect_code(0);
        }
        let over =
            |build: &Value| !["PENDING", "BUILDING", "PUSHING"].contains(&build["state"].as_str().unwrap());
        let ended = eventually(SOON, || self.builds().iter().all(over));
        assert!(ended, "not over after {SOON:?}: {:#?}", self.builds());
        self.builds()
    }

    fn check(mut self, builds: &[Value]) {
        let states: Vec<_> = builds.iter().map(|build| build["state"].as_str().unwrap()).collect();
        let expected: &[&str] = match self.plan.way {
            Way::Publish | Way::Retry | Way::Replay => &["SUCCESS"],
            Way::GiveUp => &["DEAD_LETTER"],
            Way::Discard => &["FAILED"],
            Way::Cancel => &["CANCELLED"],
            Way::Wait => &["FAILED", "SUCCESS"],
        };
        assert_eq!(states, expected, "{builds:#?}");
        for build in builds {
            self.check_life(build);
        }
        self.check_tags(builds);
        let _ = self.server.stop(Signal::SIGTERM).expect_code(0);
        self.check_files();
    }

    /// Everybody who watched saw one end, and nothing after it.
    fn check_life(&self, build: &Value) {
        let path = format!("/builds/{}/events", build["id"].as_str().unwrap());
        let told = String::from_utf8(self.server.request("GET", &path, b"").body).unwrap();
        let mut versions = BTreeMap::new();
        for data in told.lines().filter_map(|line| line.strip_prefix("data: ")) {
            let event: Value = serde_json::from_str(data).unwrap();
            if let Some(version) = event["version"].as_u64() {
                let before = versions.insert(version, event["state"].as_str().unwrap().to_owned());
                assert_eq!(before, None, "a version came twice:\n{told}");
            }
        }
        let states: Vec<&str> = versions.values().map(String::as_str).collect();
        let finals = states.iter().filter(|state| ["SUCCESS", "FAILED", "CANCELLED"].contains(state)).count();
        assert_eq!(states.last(), build["state"].as_str().as_ref(), "{told}");
        assert!(finals <= 1, "{states:?}");
    }

    /// A tag shows what its head says: the digest of the build that published last.
    fn check_tags(&self, builds: &[Value]) {
        let head = builds.iter().find(|build| build["state"] == "SUCCESS");
        let head = head.map(|build| build["digest"].as_str().unwrap().to_owned());
        for tag in TAGS {
            assert_eq!(self.server.lab.registry.tag(tag, "1"), head, "{tag}");
        }
    }

    fn check_files(&self) {
        let data = self.server.lab.data();
        leftovers::assert_none(&data, kiln_tests::lab::CLEAN);
        let entries = |dir: &str| std::fs::read_dir(data.join(dir)).into_iter().flatten().flatten();
        let names = |dir: &str| entries(dir).map(|e| e.file_name().into_string().unwrap());
        assert_eq!(names("reports/local").collect::<Vec<_>>(), <[String; 0]>::default(), "reports");
        let unfinished = |name: &String| name.starts_with(".tmp") || name.starts_with("context-");
        let copies: Vec<_> = names("").chain(names("contexts/sha256")).filter(unfinished).collect();
        assert_eq!(copies, <[String; 0]>::default(), "copies of contexts");
    }
}
