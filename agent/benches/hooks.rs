//! What a hook costs: compile, load from the cache, and a call with a fresh instance. `make bench` runs it.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark fails by panicking and reports by printing"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_agent::blobs::digest_of;
use kiln_agent::dockerfile::Dockerfile;
use kiln_agent::hooks::HookHost;
use kiln_agent::hooks::config::{PluginConfig, PluginsConfig};
use kiln_agent::hooks::view::{BuildView, ContextView, TagView, instructions};
use kiln_agent::stop;
use kiln_protocol::BuildId;
use kiln_protocol::verdict::Outcome;

const CALLS: usize = 5000;
const LOADS: usize = 50;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(measure());
}

async fn measure() {
    let cache = tempfile::tempdir().unwrap();
    let compile = load(&cache.path().join("0")).await.0;
    println!("compile and load      {compile:>10.1?}");
    let cached = cache.path().join("0");
    let mut loads = Vec::new();
    for _ in 0..LOADS {
        loads.push(load(&cached).await.0);
    }
    report("load from the cache", &mut loads);
    let host = load(&cached).await.1;
    let view = Arc::new(view());
    let (_stopper, stop) = stop::channel();
    let (mut whole, mut guest) = (Vec::new(), Vec::new());
    let began = Instant::now();
    for _ in 0..CALLS {
        let call = Instant::now();
        let verdicts = host.pre_build(Arc::clone(&view), &stop).await;
        whole.push(call.elapsed());
        assert_eq!(verdicts[0].outcome, Outcome::Allow);
        guest.push(Duration::from_micros(verdicts[0].duration_us));
    }
    let rate = CALLS as u128 * 1_000_000 / began.elapsed().as_micros();
    report("instance, call, drop", &mut guest);
    report("ask for a verdict", &mut whole);
    println!("one after the other   {rate:>10} calls/s");
}

async fn load(cache: &std::path::Path) -> (Duration, HookHost) {
    let target = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/plugins");
    let folder = std::env::var_os("KILN_PLUGINS").map_or_else(target, PathBuf::from);
    let option = folder.join("tag-policy.wasm").display().to_string();
    let mut config = PluginConfig::from_option(&option).unwrap();
    config.settings = serde_json::from_str(r#"{"deny":["latest"],"semver":"release"}"#).unwrap();
    let plugins = PluginsConfig { allow_unstable: true, ..PluginsConfig::default() };
    let began = Instant::now();
    let host = HookHost::load(&plugins, vec![config], cache).await.unwrap();
    (began.elapsed(), host)
}

fn report(what: &str, times: &mut [Duration]) {
    times.sort();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    println!("{what:<21} p50 {:>9.1?}  p99 {:>9.1?}", at(50), at(99));
}

/// A Dockerfile of 200 lines, three tags.
fn view() -> BuildView {
    let text = format!("FROM base\n{}", "RUN echo hello\n".repeat(199));
    let tag = |name: &str| TagView { name: name.to_owned(), digest: None };
    BuildView {
        input_digest: digest_of(b"input"),
        build_id: BuildId::generate(),
        attempt: 1,
        requester: "bench".to_owned(),
        repository: "registry.example.com/team/app".to_owned(),
        tags: vec![tag("1.0.0"), tag("1.0.1"), tag("1.1.0")],
        labels: Vec::new(),
        build_args: Vec::new(),
        platforms: vec!["linux/amd64".to_owned()],
        target: None,
        dockerfile_path: "Dockerfile".to_owned(),
        instructions: instructions(&Dockerfile::parse(&text).unwrap()),
        dockerfile: text.into(),
        base_images: Arc::new([]),
        context: Arc::new(ContextView::default()),
    }
}
