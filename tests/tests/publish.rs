//! The publish process: what it does, what it knows, and that it never outlives its agent.
//!
//! This program serves as the publish process of its own tests, so it has no harness but the lines below.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests outside of test functions")]
#![expect(clippy::print_stdout, reason = "runners read the list of tests there")]

use std::io::Write as _;
use std::net::TcpListener;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use kiln_agent::blobs::{BlobStore, digest_of};
use kiln_agent::publish::{PUBLISH_ARGUMENT, PublishError, Publisher, Target, publish_main};
use kiln_agent::registry::push::{Blob, Candidate, DEFAULT_BUDGET, Kind, TagOutcome};
use kiln_agent::registry::{Credential, Credentials, ProxyConfig, Reference, RegistrySection};
use kiln_agent::stop::{self, StopReason};
use kiln_tests::process::{Process, Running, descendants, eventually};
use kiln_tests::registry::{Access, PASSWORD, Registry, USER};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
/// First argument of a copy of this program that asks a registry which never answers.
const WAITING_AGENT: &str = "waiting-agent";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// Three steps of progress.
const LAYER_BYTES: usize = 3 << 20;

const TESTS: [(&str, fn()); 6] = [
    ("an_image_is_published_by_processes_that_each_do_one_thing", published),
    ("a_credential_is_in_no_argument_environment_or_error", unseen),
    ("a_dropped_task_takes_its_process_along", dropped),
    ("sigterm_ends_the_process", terminated),
    ("a_killed_agent_takes_its_process_along", orphaned),
    ("an_order_that_is_not_understood_is_not_repeated", misunderstood),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(PUBLISH_ARGUMENT) => u8::try_from(publish_main()).unwrap_or(1).into(),
        Some(WAITING_AGENT) => {
            runtime().block_on(wait_for_ever(&arguments[1]));
            ExitCode::SUCCESS
        }
        _ => harness(&arguments),
    }
}

/// As much of the standard harness as its runners use.
fn harness(arguments: &[String]) -> ExitCode {
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    // `terse` is the value of `--format`.
    let filters = arguments.iter().filter(|argument| !argument.starts_with('-') && *argument != "terse");
    let filters: Vec<_> = filters.collect();
    for (name, test) in TESTS {
        let wanted = filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
        match (wanted && !has("--ignored"), has("--list")) {
            (true, true) => println!("{name}: test"),
            (true, false) => test(),
            (false, _) => {}
        }
    }
    ExitCode::SUCCESS
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn publisher(host: &str, password: &str) -> Publisher {
    let mut credentials = Credentials::default();
    let (username, password) = (USER.to_owned(), password.to_owned());
    credentials.insert(host, Credential::Password { username, password });
    let section = RegistrySection { prefix: host.to_owned(), insecure: true, ..RegistrySection::default() };
    Publisher::new(vec![section], credentials, ProxyConfig::default(), &[]).unwrap()
}

fn reference(host: &str) -> Reference {
    format!("{host}/team/app").parse().unwrap()
}

fn target(repository: &Reference) -> Target<'_> {
    Target { repository, budget: DEFAULT_BUDGET }
}

fn candidate(store: &BlobStore) -> Candidate {
    let put = |bytes: &[u8]| {
        let stored = store.put(bytes).unwrap();
        Blob { digest: stored.digest, size: stored.size }
    };
    let layer = put(&vec![7; LAYER_BYTES]);
    let config = json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]}});
    let config = put(config.to_string().as_bytes());
    let describe =
        |kind: &str, blob: &Blob| json!({"mediaType": kind, "digest": blob.digest, "size": blob.size});
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST_TYPE,
        "config": describe("application/vnd.oci.image.config.v1+json", &config),
        "layers": [describe("application/vnd.oci.image.layer.v1.tar", &layer)]});
    let manifest = manifest.to_string();
    let digest = digest_of(manifest.as_bytes());
    Candidate { digest, media_type: MANIFEST_TYPE.into(), manifest, blobs: vec![layer, config] }
}

fn published() {
    let registry = Registry::start(Access::Password);
    let host = registry.host();
    let (publisher, repository) = (publisher(&host, PASSWORD), reference(&host));
    let root = tempfile::tempdir().unwrap();
    let candidate = candidate(&BlobStore::open(root.path()).unwrap());
    let seen = Mutex::new(Vec::new());
    let progress = |blob: &Blob, sent: u64| seen.lock().unwrap().push((blob.clone(), sent));
    let (_stopper, mut stop) = stop::channel();
    runtime().block_on(async {
        let to = target(&repository);
        assert_eq!(publisher.probe(to, Some("1"), &mut stop).await.unwrap().existing, None);
        assert_eq!(publisher.verify(to, &candidate, &mut stop).await.unwrap().len(), 3);
        let from = (root.path(), &[][..]);
        let uploaded = publisher.upload(to, &candidate, from, &mut stop, &progress).await.unwrap();
        assert_eq!((uploaded.sent, uploaded.present), (2, 0));
        assert_eq!(publisher.verify(to, &candidate, &mut stop).await.unwrap(), []);
        assert_eq!(publisher.head_tag(to, "1", &mut stop).await.unwrap(), None);
        let tagged = publisher.put_tag(to, "1", &candidate, &mut stop).await.unwrap();
        assert_eq!(tagged, TagOutcome::Moved);
        let now = publisher.head_tag(to, "1", &mut stop).await.unwrap();
        assert_eq!(now.as_ref(), Some(&candidate.digest));
    });
    let layer = &candidate.blobs[0];
    let steps: Vec<_> = seen.into_inner().unwrap().into_iter().filter(|(blob, _)| blob == layer).collect();
    assert_eq!(steps.iter().map(|(_, sent)| sent >> 20).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(child_of_ours().is_none(), "every process was reaped");
}

/// The publish process that this test started.
fn child_of_ours() -> Option<Process> {
    publish_process(std::process::id())
}

fn publish_process(agent: u32) -> Option<Process> {
    descendants(agent).into_iter().find(|process| process.command.contains(PUBLISH_ARGUMENT))
}

/// Whether it is gone, also from the table of its parent.
fn gone(pid: u32) -> bool {
    eventually(LIMIT, || !std::path::Path::new(&format!("/proc/{pid}")).exists())
}

/// A port that takes connections and answers nothing.
fn mute() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    (listener, host)
}

async fn wait_for_ever(host: &str) {
    let (publisher, repository) = (publisher(host, PASSWORD), reference(host));
    let (_stopper, mut stop) = stop::channel();
    let ended = publisher.probe(target(&repository), None, &mut stop).await;
    panic!("a mute registry answered {ended:?}");
}

/// Calls `then` with the process while it waits for a registry.
fn while_waiting(then: impl FnOnce(u32, &stop::Stopper) + Send) -> Result<(), PublishError> {
    let (listener, host) = mute();
    let (publisher, repository) = (publisher(&host, PASSWORD), reference(&host));
    let (stopper, mut stop) = stop::channel();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            let _connection = listener.accept().unwrap();
            let process = child_of_ours().unwrap();
            then(process.pid, &stopper);
            assert!(gone(process.pid), "the process goes on");
        });
        let ended = runtime().block_on(publisher.probe(target(&repository), None, &mut stop));
        other.join().unwrap();
        ended.map(drop)
    })
}

fn unseen() {
    let ended = while_waiting(|pid, stopper| {
        let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}"));
        let command = String::from_utf8(read("cmdline").unwrap()).unwrap();
        assert_eq!(command.trim_end_matches('\0'), format!("kiln-publish\0{PUBLISH_ARGUMENT}"));
        // Only root may look: the process is not dumpable.
        if let Ok(environment) = read("environ") {
            let environment = String::from_utf8_lossy(&environment).into_owned();
            assert!(environment.split('\0').all(|entry| entry.is_empty() || entry.starts_with("SSL_CERT_")));
        }
        let status = String::from_utf8(read("status").unwrap()).unwrap();
        let stat = String::from_utf8(read("stat").unwrap()).unwrap();
        let group = stat.rsplit(") ").next().unwrap().split(' ').nth(2).unwrap();
        assert_eq!(group, pid.to_string(), "a process group of its own\n{status}");
        stopper.request(StopReason::Cancelled);
    });
    assert!(matches!(ended, Err(PublishError::Stopped(StopReason::Cancelled))), "{ended:?}");

    let registry = Registry::start(Access::Password);
    let host = registry.host();
    let wrong = "canary-wrong-31d7";
    let (publisher, repository) = (publisher(&host, wrong), reference(&host));
    let (_stopper, mut stop) = stop::channel();
    let error = runtime().block_on(publisher.probe(target(&repository), Some("1"), &mut stop)).unwrap_err();
    let PublishError::Push(push) = &error else { panic!("{error:?}") };
    assert_eq!((push.kind, push.status), (Kind::Unauthorized, Some(401)));
    let text = format!("{error} {error:?} {:?} {publisher:?}", error.hint());
    assert!(text.contains(&host) && text.contains("team/app") && !text.contains(wrong), "{text}");
}

fn dropped() {
    let (listener, host) = mute();
    let runtime = runtime();
    let task = runtime.spawn(async move { wait_for_ever(&host).await });
    let _connection = listener.accept().unwrap();
    let process = child_of_ours().unwrap();
    task.abort();
    // Its runtime takes it off the table when it next wakes up, and nothing wakes an idle one.
    assert!(eventually(LIMIT, || !process.is_alive()), "the process goes on");
}

fn terminated() {
    let ended = while_waiting(|pid, _| {
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGTERM).unwrap();
    });
    assert!(matches!(ended, Err(PublishError::Lost(_))), "{ended:?}");
}

fn orphaned() {
    let (listener, host) = mute();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let agent = Running::start(command.args([WAITING_AGENT, &host]));
    let _connection = listener.accept().unwrap();
    let process = publish_process(agent.pid()).unwrap();
    agent.signal(Signal::SIGKILL);
    assert!(gone(process.pid), "the process outlives its agent");
}

fn misunderstood() {
    for order in
        [format!("{{\"credentials\": \"{PASSWORD}\"}}\n"), format!("{{\"task\": \"{PASSWORD}"), String::new()]
    {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(order.as_bytes()).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        let outcome = Running::start_with_input(command.arg(PUBLISH_ARGUMENT), Stdio::from(file)).wait(LIMIT);
        let outcome = outcome.expect_code(1);
        assert!(!outcome.output().contains(PASSWORD), "{}", outcome.output());
        assert_eq!(outcome.stdout, "");
    }
}
