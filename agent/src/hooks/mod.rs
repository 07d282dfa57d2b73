//! Shell: policy plugins: WebAssembly components that judge builds and images.
//!
//! A call gets an instance of its own, which is dropped with everything it has said that was not an answer. What a
//! plugin may use is bounded in time, memory, calls and words, and every way to end has a name
//! ([`kiln_protocol::verdict::Outcome`]). Guests run on threads of their own inside this process; until they run
//! in a process of their own, a plugin is trusted by the operator who configured it.

mod answer;
mod bindings;
mod cache;
mod call;
pub mod config;
mod engine;
mod error;
mod inputs;
mod outputs;
mod plugin;
mod state;
mod verdicts;
pub mod view;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use kiln_protocol::message::{Hook, PolicyKey, RequiredPolicy};
use kiln_protocol::verdict::Verdict;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

pub use bindings::API_VERSION;
pub use cache::CacheError;
pub use error::{LoadCause, LoadError};
pub use kiln_protocol::glob::{Glob, InvalidGlob};

use cache::Cache;
use call::Subject;
use config::{PluginConfig, PluginsConfig};
use engine::Machine;
use plugin::Plugin;
use view::{BuildView, ImageView};

use crate::stop::{self, StopSignal};

/// The loaded plugins, ready to be called.
pub struct HookHost {
    plugins: Vec<Arc<Plugin>>,
    permits: Arc<Semaphore>,
    cache: Arc<Cache>,
    machine: Arc<Machine>,
}

impl std::fmt::Debug for HookHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HookHost").field("plugins", &self.keys()).finish_non_exhaustive()
    }
}

impl HookHost {
    /// Loads every plugin, or says which one does not load and why. Compiles what is not in the cache; the first
    /// load of a plugin in a scripting language takes many seconds.
    pub async fn load(
        plugins: &PluginsConfig,
        configs: Vec<PluginConfig>,
        cache_dir: &Path,
    ) -> Result<Self, LoadError> {
        let all = |cause| LoadError { name: "(all)".to_owned(), cause };
        let machine = Arc::new(Machine::start().map_err(|reason| all(LoadCause::Engine(reason)))?);
        let cache = Arc::new(Cache::open(cache_dir).map_err(|error| all(LoadCause::Cache(error)))?);
        let mut host = Self {
            plugins: Vec::new(),
            permits: Arc::new(Semaphore::new(plugins.max_concurrent.clamp(1, Semaphore::MAX_PERMITS))),
            cache,
            machine,
        };
        for config in configs {
            let name = config.name.clone();
            let loaded = host.load_one(plugins, config).await;
            let loaded = loaded.map_err(|cause| LoadError { name, cause })?;
            host.plugins.push(Arc::new(loaded));
        }
        host.plugins.sort_by(|a, b| (a.priority, &a.terms.name).cmp(&(b.priority, &b.terms.name)));
        Ok(host)
    }

    async fn load_one(&self, plugins: &PluginsConfig, config: PluginConfig) -> Result<Plugin, LoadCause> {
        if self.plugins.iter().any(|other| other.terms.name == config.name) {
            return Err(LoadCause::DuplicateName);
        }
        let stopping = || LoadCause::Engine("it is being stopped".to_owned());
        let threads = self.machine.threads().ok_or_else(stopping)?;
        let (machine, cache, plugins) = (Arc::clone(&self.machine), Arc::clone(&self.cache), plugins.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn_blocking_on(move || Plugin::load(&machine, &cache, &plugins, &config), threads);
        let plugin = tasks.join_next().await.and_then(Result::ok).ok_or_else(stopping)??;
        let mut tasks = JoinSet::new();
        tasks.spawn_on(verdicts::validated(plugin), threads);
        tasks.join_next().await.and_then(Result::ok).ok_or_else(stopping)?
    }

    /// Every loaded policy with the repositories that it judges; none means all.
    pub fn policies(&self) -> impl Iterator<Item = (RequiredPolicy, Option<&Glob>)> {
        self.plugins.iter().map(|plugin| {
            let (name, key) = (plugin.terms.name.clone(), plugin.key.clone());
            let required = RequiredPolicy { name, key, hooks: plugin.hooks(), repositories: Vec::new() };
            (required, plugin.repository.as_ref())
        })
    }

    /// Every loaded policy.
    pub fn keys(&self) -> BTreeSet<PolicyKey> {
        self.plugins.iter().map(|plugin| plugin.key.clone()).collect()
    }

    /// Which files of a context some plugin may read; for [`view::ContextView::read`].
    pub fn readable(&self) -> Vec<Glob> {
        self.plugins.iter().flat_map(|plugin| plugin.terms.context_read.iter().cloned()).collect()
    }

    /// How many plugins had to be compiled since this was loaded.
    pub fn compiled(&self) -> usize {
        self.cache.compiled()
    }

    /// Asks every plugin about a build for one repository. One verdict per plugin that judges it.
    pub async fn pre_build(&self, build: Arc<BuildView>, stop: &StopSignal) -> Vec<Verdict> {
        self.ask(Hook::PreBuild, &Subject::Build(build), stop).await
    }

    /// Asks every plugin about an uploaded image in one repository. One verdict per plugin that judges it.
    pub async fn post_push(&self, image: Arc<ImageView>, stop: &StopSignal) -> Vec<Verdict> {
        self.ask(Hook::PostPush, &Subject::Image(image), stop).await
    }

    async fn ask(&self, hook: Hook, subject: &Subject, stop: &StopSignal) -> Vec<Verdict> {
        let Some(threads) = self.machine.threads() else { return Vec::new() };
        let judging =
            |plugin: &&Arc<Plugin>| plugin.judges(subject.repository()) && plugin.hooks().contains(&hook);
        let asked: Vec<_> = self.plugins.iter().filter(judging).collect();
        let mut answers: Vec<Verdict> = asked.iter().map(|p| verdicts::lost(p, hook, subject)).collect();
        let mut tasks = JoinSet::new();
        for (index, plugin) in asked.into_iter().enumerate() {
            let (plugin, subject, stop) = (Arc::clone(plugin), subject.clone(), stop.clone());
            let permits = Arc::clone(&self.permits);
            let verdict =
                async move { (index, verdicts::ask(&plugin, hook, &subject, &permits, &stop).await) };
            tasks.spawn_on(verdict, threads);
        }
        while let Some(joined) = tasks.join_next().await {
            match joined {
                Ok((index, verdict)) => answers[index] = verdict,
                Err(error) => tracing::error!("a hook's task was lost: {error}"),
            }
        }
        answers
    }
}

/// A signal that never comes: loading is not part of any build.
fn never() -> StopSignal {
    stop::channel().1
}
