//! Real guests in the real host. `make plugins` builds them; `KILN_PLUGINS` says where they are.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_agent::blobs::{BlobStore, digest_of};
use kiln_agent::dockerfile::Dockerfile;
use kiln_agent::hooks::config::{Mode, OnFailure, PluginConfig, PluginsConfig};
use kiln_agent::hooks::view::{
    BuildArg, BuildView, ContextView, ImageView, LayerView, TagView, instructions,
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
    for (path, content) in [("app/package.json", "{\"name\":1}"), ("secret.txt", "hidden"), ("x.json", "{}")]
    {
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

async fn image(tags: &[(&str, Option<&[u8]>)], host: &HookHost) -> Vec<Verdict> {
    let folder = tempfile::tempdir().unwrap();
    let blobs = BlobStore::open(folder.path()).unwrap();
    let view = ImageView {
        build: Arc::new(build(tags)),
        platform: "linux/amd64".to_owned(),
        digest: digest_of(b"manifest"),
        manifest: b"manifest"[..].into(),
        config: b"config"[..].into(),
        layers: vec![LayerView {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            digest: blobs.put(b"layer").unwrap().digest,
            size: 5,
        }],
        blobs,
    };
    host.post_push(Arc::new(view), &never()).await
}

#[tokio::test]
async fn a_guest_reads_the_image_and_nothing_beside_it() {
    let verdict = image(&[("1.0.0", None)], &host(hostile("allow")).await).await.remove(0);
    assert_eq!(verdict.outcome, Outcome::Allow, "{verdict:?}");
    assert_eq!((verdict.hook, &verdict.subject), (Hook::PostPush, &digest_of(b"manifest")));
    let notes: Vec<_> = verdict.notes.iter().map(|note| note.value.as_str()).collect();
    // The first bytes of "layer", nothing behind its end.
    assert_eq!(notes, ["manifest", "config", "[108, 97, 121, 101] 0 1.0.0"]);
    let verdict = image(&[], &host(hostile("read-beside-layers")).await).await.remove(0);
    assert_eq!(
        (verdict.outcome, verdict.detail.as_deref()),
        (Outcome::Fault, Some("the image has no such layer"))
    );
}

#[tokio::test]
async fn granted_files_are_read_as_far_as_wanted() {
    let mut config = hostile("read-granted");
    config.grant.context_read = vec![Glob::new("**/package.json").unwrap()];
    let verdict = ask(&host(config).await).await;
    assert_eq!(verdict.violations[0].message, "app/package.json,x.json {\"nam", "{verdict:?}");
}

#[tokio::test]
async fn audit_watches_and_open_forgives_failures_only() {
    for (mode, on_failure, does, waived, end) in [
        (Mode::Audit, OnFailure::Closed, "deny", Some(Waiver::Audit), Ok(())),
        (Mode::Audit, OnFailure::Closed, "trap", Some(Waiver::Audit), Ok(())),
        (Mode::Enforce, OnFailure::Open, "trap", Some(Waiver::OnFailure), Ok(())),
        (Mode::Enforce, OnFailure::Open, "deny", None, Err(Reason::PolicyDenied)),
        (Mode::Enforce, OnFailure::Closed, "trap", None, Err(Reason::HookFault)),
    ] {
        let verdict = ask(&host(PluginConfig { mode, on_failure, ..hostile(does) }).await).await;
        assert_eq!(verdict.waived, waived, "{does}");
        assert_eq!(decide(&[verdict]), end, "{does}");
    }
}

/// One plugin more than there are threads spins; the others neither start late nor time out.
#[tokio::test]
async fn spinning_guests_end_near_their_deadline_and_starve_nobody() {
    const DEADLINE: Duration = Duration::from_millis(300);
    // The clock ticks every 5 ms; the rest is for machines that do other things as well.
    const SLACK: Duration = Duration::from_secs(5);
    let world = World::new();
    let mut configs = vec![PluginConfig { name: "good".to_owned(), ..hostile("allow") }];
    configs[0].limits.deadline_ms = 60_000;
    for name in ["a", "b", "c"] {
        let mut config = PluginConfig { name: name.to_owned(), ..hostile("spin") };
        config.limits.deadline_ms = 300;
        configs.push(config);
    }
    let host = world.load(configs).await.unwrap();
    let began = Instant::now();
    let verdicts = host.pre_build(Arc::new(build(&[])), &never()).await;
    let took = began.elapsed();
    let outcomes: Vec<_> = verdicts.iter().map(|v| (v.plugin.as_str(), v.outcome)).collect();
    let spun = Outcome::Timeout;
    assert_eq!(outcomes, [("a", spun), ("b", spun), ("c", spun), ("good", Outcome::Allow)]);
    assert!(took >= DEADLINE && took < DEADLINE + SLACK, "{took:?}");
}

#[tokio::test]
async fn a_request_to_stop_ends_every_kind_of_call() {
    for mode in ["spin", "sleep", "endless-host-calls", "defer-forever"] {
        let mut config = hostile(mode);
        (config.limits.deadline_ms, config.limits.host_calls) = (600_000, 100_000_000);
        let host = host(config).await;
        let (stopper, signal) = stop::channel();
        let call = host.pre_build(Arc::new(build(&[])), &signal);
        let (verdicts, ()) = tokio::join!(call, async { stopper.request(StopReason::Cancelled) });
        assert_eq!(verdicts[0].outcome, Outcome::Cancelled, "{mode}: {verdicts:?}");
        assert_eq!(decide(&verdicts), Err(Reason::Cancelled));
    }
}

#[tokio::test]
async fn required_policies_belong_to_repositories() {
    let mut team = PluginConfig { name: "team".to_owned(), ..hostile("allow") };
    team.matches.repository = Some(Glob::new("team-a/**").unwrap());
    team.hooks = Some(vec![Hook::PostPush]);
    let every = PluginConfig { name: "every".to_owned(), priority: 1, ..hostile("deny") };
    let host = World::new().load(vec![team, every]).await.unwrap();
    let policies: Vec<_> =
        host.policies().map(|(p, glob)| (p.name, p.hooks.len(), glob.map(ToString::to_string))).collect();
    let (every, team) = (("every".to_owned(), 2, None), ("team".to_owned(), 1, Some("team-a/**".to_owned())));
    assert_eq!(policies, [every, team]);
    assert_eq!(host.keys().len(), 2, "equal code with other settings is another policy");
    assert_eq!(host.pre_build(Arc::new(build(&[])), &never()).await.len(), 1);
    assert_eq!(image(&[], &host).await.len(), 2);
}

#[tokio::test]
async fn the_cache_is_used_and_not_trusted() {
    let world = World::new();
    assert_eq!(world.one(hostile("allow")).await.compiled(), 1);
    assert_eq!(world.one(hostile("deny")).await.compiled(), 0, "the settings are no part of the code");
    let entries = || std::fs::read_dir(world.cache()).unwrap().map(|entry| entry.unwrap().path());
    let entry = entries().find(|path| path.extension().is_some_and(|e| e == "cwasm")).unwrap();
    let whole = std::fs::read(&entry).unwrap();
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for damaged in [&flipped[..], &whole[..whole.len() - 1], &whole[32..], b""] {
        std::fs::write(&entry, damaged).unwrap();
        let host = world.one(hostile("allow")).await;
        assert_eq!(host.compiled(), 1, "{} bytes", damaged.len());
        assert_eq!(ask(&host).await.outcome, Outcome::Allow);
    }
    assert_eq!(world.one(hostile("allow")).await.compiled(), 0);
    // Authentic code of one plugin is not that of another.
    let policy = world.one(config(&plugin("tag-policy"), json!({}))).await;
    assert_eq!(policy.compiled(), 1);
    let other =
        entries().find(|path| path.extension().is_some_and(|e| e == "cwasm") && *path != entry).unwrap();
    std::fs::copy(&other, &entry).unwrap();
    assert_eq!(world.one(hostile("allow")).await.compiled(), 1);
}

#[tokio::test]
async fn a_cache_that_others_may_write_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let world = World::new();
    drop(world.one(hostile("allow")).await);
    std::fs::set_permissions(world.cache(), std::fs::Permissions::from_mode(0o770)).unwrap();
    let error = world.load(vec![hostile("allow")]).await.unwrap_err();
    assert!(matches!(error.cause, LoadCause::Cache(_)), "{error:?}");
}

fn chain(error: &LoadError) -> String {
    kiln_agent::error::chain(error)
}

#[tokio::test]
async fn what_does_not_load_says_why_and_what_to_do() {
    let world = World::new();
    let whole = std::fs::read(plugin("hostile")).unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = world.cache.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        config(&path, json!({}))
    };
    let version = |from: &[u8]| {
        let (wanted, other) = (&b"1.0.0-rc.1"[..], &b"1.0.0-rc.7"[..]);
        let mut bytes = from.to_vec();
        let places: Vec<usize> = (0..bytes.len() - 10).filter(|at| &bytes[*at..at + 10] == wanted).collect();
        for at in places {
            bytes[at..at + 10].copy_from_slice(other);
        }
        bytes
    };
    let empty_component = [0, b'a', b's', b'm', 0x0d, 0, 1, 0];
    let twice = vec![hostile("allow"), hostile("deny")];
    let missing = PluginConfig { digest: Some(digest_of(b"other")), ..hostile("allow") };
    for (configs, wanted) in [
        (vec![config(Path::new("/nowhere/p.wasm"), json!({}))], "plugin p: cannot read /nowhere/p.wasm"),
        (vec![file("text.wasm", b"(component)")], "is no WebAssembly; build the plugin"),
        (vec![file("module.wasm", b"\0asm\x01\0\0\0")], "is a core module and not a component"),
        (vec![file("cut.wasm", &whole[..whole.len() / 2])], "is no valid component"),
        (vec![file("short.wasm", &whole[..6])], "is no valid component"),
        (vec![file("empty.wasm", &empty_component)], "does not export kiln:plugin/setup 1.0.0-rc.1"),
        (
            vec![file("newer.wasm", &version(&whole))],
            "1.0.0-rc.7, and this Kiln offers 1.0.0-rc.1; update Kiln",
        ),
        (vec![missing], "and the configuration wants sha256:"),
        (vec![hostile("refuse-settings")], "refuses its settings: mode: this mode is refused"),
        (vec![hostile("trap-in-settings")], "while it checked its settings (trap)"),
        (vec![hostile("spin-in-settings")], "while it checked its settings (timeout)"),
        (twice, "two plugins have this name"),
        (vec![config(&plugin("tag-policy"), json!({"deny": "x"}))], "refuses its settings: invalid type"),
        (vec![config(&plugin("tag-policy"), json!({"alow": []}))], "unknown field `alow`, expected one of"),
    ] {
        let error = world.load(configs).await.unwrap_err();
        assert!(chain(&error).contains(wanted), "wanted {wanted:?}, got {:?}", chain(&error));
    }
}

#[tokio::test]
async fn drafts_and_files_without_a_digest_load_only_if_allowed() {
    let world = World::new();
    let load = |plugins: PluginsConfig| {
        let cache = world.cache();
        async move { HookHost::load(&plugins, vec![hostile("allow")], &cache).await }
    };
    let error = load(PluginsConfig::default()).await.unwrap_err();
    assert!(matches!(error.cause, LoadCause::Unstable), "{error:?}");
    let error = load(PluginsConfig { require_digest: true, ..drafts() }).await.unwrap_err();
    assert!(matches!(error.cause, LoadCause::DigestRequired { .. }), "{error:?}");
}

#[tokio::test]
async fn the_tag_policy_judges_builds_and_images() {
    let settings = json!({ "deny": ["latest"], "prefix": { "team-b/**": "b-" } });
    let host = host(config(&plugin("tag-policy"), settings)).await;
    let rules = |verdicts: &[Verdict]| {
        let all = verdicts.iter().flat_map(|verdict| &verdict.violations);
        all.map(|violation| violation.rule.clone()).collect::<Vec<_>>()
    };
    for (tags, before, after) in [
        (vec![("1.0.0", None)], vec![], vec![]),
        (vec![("latest", None)], vec!["deny"], vec!["deny"]),
        (vec![("1.0.0", Some(&b"other"[..]))], vec!["release"], vec!["release"]),
        // The same image again moves nothing.
        (vec![("1.0.0", Some(&b"manifest"[..]))], vec!["release"], vec![]),
        (vec![("main", Some(&b"other"[..]))], vec![], vec![]),
    ] {
        let verdicts = host.pre_build(Arc::new(build(&tags)), &never()).await;
        assert_eq!(rules(&verdicts), before, "{tags:?}");
        assert_eq!(rules(&image(&tags, &host).await), after, "{tags:?}");
    }
}
