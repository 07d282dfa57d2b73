//! `kiln up --metrics`: every number is there before it happens, and every number happens.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use kiln_protocol::Reason;
use kiln_tests::http;
use kiln_tests::kiln::{Build, Kiln};
use kiln_tests::lab::Lab;
use kiln_tests::process::{Running, eventually, run};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_mins(1);
const PROMTOOL: Duration = Duration::from_secs(30);
/// What this run cannot make happen without a fault of the machine, and why.
const NOT_HERE: &[(&str, &str)] = &[
    ("kiln_dead_lettered_total", "the orchestrator's own tests give builds up"),
    ("kiln_dead_letters", "the orchestrator's own tests give builds up"),
    ("kiln_log_dropped_bytes_total", "another test of this file fills a log"),
    ("kiln_outbox_oldest_timestamp_seconds", "the bus of one process takes a message at once"),
    ("kiln_outbox_pending", "the bus of one process takes a message at once"),
    ("kiln_retries_total", "another test of this file tries twice"),
];

/// One sample: its name with labels, and its value.
type Samples = BTreeMap<String, f64>;

struct Server {
    lab: Lab,
    process: Option<Build>,
    metrics: SocketAddr,
}

impl Server {
    fn start(configuration: &str) -> Self {
        let lab = Lab::new();
        lab.configure(&lab.registry.host(), configuration);
        let process = lab.kiln("up").args(["--metrics", "127.0.0.1:0", "--slots", "1"]).start();
        process.expect_output("/metrics\n");
        let said = format!("{}{}", process.running.stdout.text(), process.running.stderr.text());
        let (_, address) = said.split_once("metrics on http://").unwrap();
        let metrics = address.split('/').next().unwrap().parse().unwrap();
        Self { lab, process: Some(process), metrics }
    }

    fn build(&self, script: &str, tag: &str) -> Kiln {
        self.lab.dockerfile(&format!("FROM busybox:1\nRUN {script}\n"));
        let socket = format!("unix:{}", self.lab.data().join("api/kiln.sock").display());
        self.lab
            .kiln("build")
            .args(["--server", &socket, "--file"])
            .arg(self.lab.path("Dockerfile"))
            .args(["-t", &format!("{}/{tag}", self.lab.registry.host())])
            .arg(self.lab.context.path())
    }

    fn text(&self) -> String {
        let answer = http::request(self.metrics, "GET", "/metrics", "text/plain", b"");
        let text = String::from_utf8(answer.body).unwrap();
        assert_eq!(answer.status, 200, "{text}");
        text
    }

    fn samples(&self) -> Samples {
        samples(&self.text())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.stop(Signal::SIGTERM);
        }
    }
}

fn samples(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(s, v)| (s.to_owned(), v.parse().unwrap()))
        .collect()
}

/// Declared names.
fn families(text: &str) -> BTreeSet<&str> {
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect()
}

fn is_of(sample: &str, family: &str) -> bool {
    let name = sample.split('{').next().unwrap();
    // Buckets and sums say the same as the count.
    name == family || name.strip_suffix("_count") == Some(family)
}

/// What promtool says against a text.
fn promtool(text: &str) -> kiln_tests::process::Outcome {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let mut command = Command::new("promtool");
    Running::start_with_input(command.args(["check", "metrics"]), file).wait(PROMTOOL)
}

#[test]
fn everything_declared_happens() {
    let policy = kiln_tests::plugin::file("tag-policy");
    let policy = format!(
        "[plugins]\nallow_unstable = true\n[[plugin]]\nname = \"tags\"\nsource = \"file:{}\"\nmode = \"enforce\"\non_failure = \"closed\"\n[plugin.settings]\ndeny = [\"latest\"]\n",
        policy.display()
    );
    let server = Server::start(&policy);
    let idle = server.text();
    let before = samples(&idle);
    for reason in Reason::ALL {
        let finished = |s: &str| s.starts_with("kiln_builds_finished_total{") && s.contains(&label(*reason));
        assert!(before.iter().any(|(s, v)| finished(s) && *v == 0.0), "{reason}");
        for name in ["kiln_retries_total", "kiln_dead_lettered_total"] {
            assert_eq!(before.get(&format!("{name}{{{}}}", label(*reason))), Some(&0.0));
        }
    }
    let denied = "kiln_plugin_calls_total{hook=\"pre-build\",outcome=\"deny\",plugin=\"tags\"}";
    assert_eq!(before.get(denied), Some(&0.0));

    // A build that runs and one that waits, so that the gauges say something.
    let runs = server.build("echo begun; until test -e /nothing; do sleep 1; done", "app:a").start();
    runs.expect_output("begun");
    let waits = server.build("true", "app:b").start();
    let waiting = || server.samples().get("kiln_builds{state=\"PENDING\"}") == Some(&1.0);
    assert!(eventually(SOON, waiting), "{}", server.text());
    let busy = server.samples();
    let _ = waits.stop(Signal::SIGINT).expect_code(130);
    let _ = runs.stop(Signal::SIGINT).expect_code(130);

    let _ =
        server.build("echo hello; (sleep 300 >/dev/null 2>&1 </dev/null &)", "app:1").run().expect_code(0);
    let _ = server.build("exit 7", "app:2").run().expect_code(1);
    let _ = server.build("true", "app:latest").run().expect_code(3);
    let text = server.text();
    let after = samples(&text);

    let rare: BTreeSet<&str> = NOT_HERE.iter().map(|(name, _)| *name).collect();
    let declared = families(&text);
    assert!(rare.is_subset(&declared), "an exception names nothing: {rare:?}");
    let has_happened = |family: &str| {
        [&busy, &after].iter().any(|samples| samples.iter().any(|(s, v)| is_of(s, family) && *v > 0.0))
    };
    let silent: Vec<&str> = declared.iter().filter(|f| !has_happened(f)).copied().collect();
    assert_eq!(
        silent,
        rare.into_iter().collect::<Vec<_>>(),
        "never emitted, or an exception too many:\n{text}"
    );
    for (sample, value) in [
        ("kiln_builds_finished_total{reason=\"none\",result=\"success\"}", 1.0),
        ("kiln_builds_finished_total{reason=\"build_failed\",result=\"failed\"}", 1.0),
        ("kiln_builds_finished_total{reason=\"policy_denied\",result=\"failed\"}", 1.0),
        ("kiln_builds_started_total", 4.0),
        (denied, 1.0),
        ("kiln_state_transitions_total{from=\"PUSHING\",to=\"SUCCESS\"}", 1.0),
        ("kiln_state_transitions_total{from=\"PENDING\",to=\"CANCELLED\"}", 1.0),
        ("kiln_build_queue_duration_seconds_count", 4.0),
    ] {
        assert_eq!(after.get(sample), Some(&value), "{sample}");
    }
    for text in [idle, text] {
        let checked = promtool(&text).expect_code(0);
        assert_eq!(checked.output().trim(), "", "promtool has something to say");
    }
}

fn label(reason: Reason) -> String {
    format!("reason=\"{reason}\"")
}

#[test]
fn a_retry_and_what_a_log_loses_are_counted() {
    let server = Server::start("[logs]\nmax_bytes = \"64KiB\"\n");
    let _ = server.build("yes | head -c 1000000", "app:1").run().expect_code(0);
    let samples = server.samples();
    let lost = samples["kiln_log_dropped_bytes_total"];
    assert!(lost > 500_000.0 && lost < samples["kiln_log_bytes_total"], "{samples:#?}");
    // Nobody listens there.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nowhere = format!("FROM {port}/none:1\n");
    server.lab.dockerfile(&nowhere);
    let socket = format!("unix:{}", server.lab.data().join("api/kiln.sock").display());
    let build = server.lab.kiln("build").args(["--server", &socket, "--attempts=2", "--file"]);
    let build = build.arg(server.lab.path("Dockerfile")).arg(server.lab.context.path());
    let build = build.args(["-t", &format!("{}/app:2", server.lab.registry.host())]).start();
    let retried = || {
        let retries = |(s, v): (&String, &f64)| s.starts_with("kiln_retries_total{") && *v > 0.0;
        server.samples().iter().any(retries)
    };
    assert!(eventually(SOON, retried), "{}", server.text());
    let _ = build.stop(Signal::SIGINT);
}

#[test]
fn nobody_but_this_machine_reads_them() {
    let lab = Lab::new();
    let refused = lab.kiln("up").args(["--metrics", "0.0.0.0:0"]).run().expect_code(2);
    let _ = refused.expect_text(&["--metrics 0.0.0.0:0", "not a loopback address"]);
    let server = Server::start("");
    let url = format!("http://{}", server.metrics);
    let code = |path: &str, header: &str| {
        let mut curl = Command::new("curl");
        let asked = ["--silent", "--max-time", "20", "--output", "/dev/null", "--write-out", "%{http_code}"];
        let asked = curl.args(asked).args(["--noproxy", "*", "--header", header, &format!("{url}{path}")]);
        run(asked, SOON).expect_code(0).stdout
    };
    assert_eq!(code("/metrics", "Accept: */*"), "200");
    assert_eq!(code("/metrics", "Host: evil.example"), "403");
    assert_eq!(code("/metrics", "Origin: http://evil.example"), "403");
    assert_eq!(code("/api/v1/builds", "Accept: */*"), "404");
}
