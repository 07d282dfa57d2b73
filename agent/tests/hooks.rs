//! Real guests in the real host. `make plugins` builds them; `KILN_PLUGINS` says where they are.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_agent::blobs::{BlobStore, digest_of};
use kiln_agent::dockerfile::Dockerfile;
use kiln_agent::hooks::config::{Mode, OnFailure, PluginConfig, PluginsConfig};
use kiln_agent::hooks::view::{
    BuildArg, BuildView, ContextView, ImageView, TagView, instructions,
};
use kiln_agent::hooks::{Glob, HookHost, LoadCause, LoadError};
use kiln_agent::stop::{self, StopReason, StopSignal};
use kiln_agent::unpack;
use kiln_protocol::message::Hook;
use kiln_protocol::verdict::{Outcome, Verdict, Waiver, decide};
use kiln_protocol::{BuildId, Reason};
use serde_json::{Value, json};
use tempfile::TempDir;

const DOCKERFILE: &str = "ARG V=1\nFROM base:$V AS app\nRUN echo hello\nCOPY --from=tool / /\n";

fn plugin(name: &str) -> PathBuf {
    let target = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/plugins");
    let folder = std::env::var_os("KILN_PLUGINS").map_or_else(target, PathBuf::from);
    let path = folder.join(format!("{name}.wasm"));
    assert!(path.exists(), "{} is missing; run `make plugins`", path.display());
    path
}

fn config(path: &Path, settings: Value) -> PluginConfig {
    let mut config = PluginConfig::from_option(&path.display().to_string()).unwrap();
    let Value::Object(settings) = settings else { panic!("settings are an object") };
    config.settings = settings;
    config
}

fn hostile(mode: &str) -> PluginConfig {
    config(&plugin("hostile"), json!({ "mode": mode }))
}

fn drafts() -> PluginsConfig {
    PluginsConfig { allow_unstable: true, ..PluginsConfig::default() }
}

struct World {
    cache: TempDir,
}

impl World {
    fn new() -> Self {
        Self { cache: tempfile::tempdir().unwrap() }
    }

    fn cache(&self) -> PathBuf {
        self.cache.path().join("compiled")
    }

    async fn load(&self, configs: Vec<PluginConfig>) -> Result<HookHost, LoadError> {
        HookHost::load(&drafts(), configs, &self.cache()).await
    }

    async fn one(&self, config: PluginConfig) -> HookHost {
        self.load(vec![config]).await.unwrap()
    }
}

/// The compiled guests are shared by all tests of this file: they are equal and compiling is slow.
async fn host(config: PluginConfig) -> HookHost {
    let shared = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("compiled");
    HookHost::load(&drafts(), vec![config], &shared).await.unwrap()
}

fn never() -> StopSignal {
    stop::channel().1
}

fn build(tags: &[(&str, Option<&[u8]>)]) -> BuildView {
    let dockerfile = Dockerfile::parse(DOCKERFILE).unwrap();
    let tag = |(name, content): &(&str, Option<&[u8]>)| TagView {
        name: (*name).to_owned(),
        digest: content.map(digest_of),
    };
    BuildView {
        input_digest: digest_of(b"input"),
        build_id: BuildId::generate(),
        attempt: 1,
        requester: "somebody".to_owned(),
        repository: "registry.example.com/team-a/app".to_owned(),
        tags: tags.iter().map(tag).collect(),
        labels: vec![("team".to_owned(), "a".to_owned())],
        build_args: vec![
            BuildArg::Plain { key: "V".to_owned(), value: "2".to_owned() },
            BuildArg::Secret { key: "TOKEN".to_owned() },
        ],
        platforms: vec!["linux/amd64".to_owned()],
        target: None,
        dockerfile_path: "Dockerfile".to_owned(),
        dockerfile: DOCKERFILE.into(),
        instructions: instructions(&dockerfile),
        base_images: Arc::new([]),
        context: Arc::new(context()),
    }
}

fn context() -> ContextView {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in [("app/package.json", "{\"name\":1}"), ("secret.txt", "hidden"), ("x.json", "{}")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let readable = [Glob::new("**/package.json").unwrap()];
    ContextView::read(&archive[..], &unpack::Limits::default(), &readable).unwrap()
}

async fn ask(host: &HookHost) -> Verdict {
    let mut verdicts = host.pre_build(Arc::new(build(&[("1.0.0", None)])), &never()).await;
    assert_eq!(verdicts.len(), 1, "{verdicts:?}");
    verdicts.remove(0)
}

#[tokio::test]
async fn a_guest_sees_the_build_and_allows() {
    let host = host(hostile("allow")).await;
    let verdict = ask(&host).await;
    assert_eq!((verdict.outcome, verdict.detail.as_deref()), (Outcome::Allow, None), "{verdict:?}");
    assert_eq!(verdict.subject, digest_of(b"input"));
    assert!(verdict.memory_peak > 0 && verdict.duration_us > 0, "{verdict:?}");
    assert_eq!(decide(&[verdict]), Ok(()));
}

#[tokio::test]
async fn every_call_has_an_instance_of_its_own() {
    let host = host(hostile("allow")).await;
    for _ in 0..3 {
        let verdict = ask(&host).await;
        assert_eq!((verdict.notes[0].key.as_str(), verdict.notes[0].value.as_str()), ("calls", "1"));
    }
}

/// Each mode ends in its own way, within a bound, and the next call of the same host is fine.
#[tokio::test]
async fn whatever_a_guest_does_has_a_name_and_harms_nobody() {
    let table = [
        ("deny", Outcome::Deny),
        ("fault", Outcome::Fault),
        ("spin", Outcome::Timeout),
        ("sleep", Outcome::Timeout),
        ("memory", Outcome::Oom),
        ("trap", Outcome::Trap),
        ("recursion", Outcome::Trap),
        ("exit", Outcome::Trap),
        ("huge-output", Outcome::OutputLimit),
        ("long-message", Outcome::OutputLimit),
        ("many-violations", Outcome::OutputLimit),
        ("warn-flood", Outcome::OutputLimit),
        ("note-flood", Outcome::OutputLimit),
        ("endless-host-calls", Outcome::HostCallLimit),
        ("keep-handles", Outcome::HostCallLimit),
        ("log-flood", Outcome::Allow),
        ("print-flood", Outcome::Allow),
        ("escape", Outcome::Allow),
        ("escape-codes", Outcome::Deny),
        ("defer-forever", Outcome::Timeout),
        ("read-ungranted", Outcome::CapabilityDenied),
    ];
    let world = World::new();
    let mut configs = vec![PluginConfig { name: "good".to_owned(), ..hostile("allow") }];
    for (mode, _) in table {
        let mut config = PluginConfig { name: mode.to_owned(), ..hostile(mode) };
        // Debug builds of the host are slow; only what never ends should meet its deadline.
        config.limits.deadline_ms = if matches!(mode, "spin" | "sleep") { 100 } else { 60_000 };
        config.limits.defer_ms = 100;
        configs.push(config);
    }
    let host = world.load(configs).await.unwrap();
    assert_eq!(host.compiled(), 1, "one file is compiled once");
    let verdicts = host.pre_build(Arc::new(build(&[])), &never()).await;
    let found = |name: &str| verdicts.iter().find(|verdict| verdict.plugin == name).unwrap();
    for (mode, expected) in table {
        let verdict = found(mode);
        assert_eq!(verdict.outcome, expected, "{mode}: {verdict:?}");
        let answered = matches!(expected, Outcome::Allow | Outcome::Deny);
        assert_eq!(verdict.detail.is_none(), answered, "{verdict:?}");
        assert!(answered || verdict.notes.is_empty(), "{verdict:?}");
    }
    assert_eq!(found("good").outcome, Outcome::Allow);
    assert!(found("memory").memory_peak <= 128 << 20);
    assert!(!found("escape-codes").violations[0].message.contains('\u{1b}'));
    let again = host.pre_build(Arc::new(build(&[])), &never()).await;
    assert_eq!(again.iter().find(|v| v.plugin == "good").unwrap().outcome, Outcome::Allow);
}
