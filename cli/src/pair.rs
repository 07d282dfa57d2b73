//! Orchestrator and agent in one process, joined by a bus in memory (edge).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_agent::agent::Agent;
use kiln_agent::dispatch::{self, Machine, Station, Supplies, Wish};
use kiln_agent::error::chain;
use kiln_agent::hooks::{HookHost, LoadError};
use kiln_orchestrator::config::OrchestratorConfig;
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::policy::PolicyRule;
use kiln_orchestrator::run;
use kiln_orchestrator::store::{Clock, Store};
use kiln_protocol::glob::Glob;
use kiln_protocol::id::Pool;
use kiln_protocol::message::RequiredPolicy;
use kiln_transport::MemoryBroker;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::app::Exit;

/// What the orchestrator is called on the bus.
const ORCHESTRATOR: &str = "kiln-orchestrator";
/// What still runs at the end is given back within this time, or its lease runs out.
const LAST_WORK: Duration = Duration::from_secs(20);

/// An agent with its policies, if it has any.
pub(crate) type Equipped = (Arc<Agent>, Option<Arc<HookHost>>);

/// Both parts, running.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) orchestrator: Arc<Orchestrator>,
    wish: watch::Sender<Wish>,
    agent: JoinSet<std::io::Result<()>>,
    loops: JoinSet<()>,
}

/// Opens the record below the data directory of an agent. The orchestrator answers for one pool only: others that
/// share the directory have theirs.
pub(crate) async fn orchestrator(
    (agent, hooks): &Equipped,
    only_pool: Pool,
    config: &OrchestratorConfig,
) -> Result<Arc<Orchestrator>, Exit> {
    let store = open_store(agent.state.root()).await?;
    let settings = Settings {
        limits: config.limits(),
        retention: config.retention,
        policies: hooks.as_deref().map(rules).unwrap_or_default(),
        only_pool: Some(only_pool),
    };
    Ok(Arc::new(Orchestrator::new(store, settings, Entropy::System)))
}

async fn open_store(data: &Path) -> Result<Store, Exit> {
    let failed = |e: std::io::Error| Exit::system(format!("create {}: {e}", data.join("record").display()));
    std::fs::create_dir_all(data.join("record")).map_err(failed)?;
    let opened = Store::open(&data.join("record/kiln.db"), Clock::System).await;
    opened
        .map_err(|e| Exit::system(chain(&e)).with_hint("check the disk and the rights of the data directory"))
}

fn rules(hooks: &HookHost) -> Vec<PolicyRule> {
    let rule = |(policy, glob): (RequiredPolicy, Option<&Glob>)| PolicyRule {
        name: policy.name,
        key: policy.key,
        hooks: policy.hooks,
        repositories: glob.cloned().unwrap_or_else(Glob::everything),
    };
    hooks.policies().map(rule).collect()
}

/// Loads the policy plugins, if there are any.
pub(crate) async fn equip(agent: Arc<Agent>) -> Result<Equipped, Exit> {
    let config = &agent.config;
    if config.plugin.is_empty() {
        return Ok((agent, None));
    }
    let cache = agent.state.path("plugins");
    let loaded = HookHost::load(&config.plugins, config.plugin.clone(), &cache).await;
    let refused = |e: LoadError| {
        Exit::usage(chain(&e)).with_hint("a policy that does not load stops every build; mend or remove it")
    };
    let hooks = Arc::new(loaded.map_err(refused)?);
    Ok((agent, Some(hooks)))
}

impl Pair {
    /// Starts both parts.
    pub(crate) async fn start(
        orchestrator: Arc<Orchestrator>,
        station: Station,
        equipped: Equipped,
        supplies: Arc<dyn Supplies>,
    ) -> Result<Self, Exit> {
        let broker = MemoryBroker::new(0);
        let mut loops = JoinSet::new();
        let bus = broker.connect(ORCHESTRATOR);
        let pools: Vec<Pool> = station.pools.iter().cloned().collect();
        let started = run::start(&orchestrator, &bus, &pools, &mut loops).await;
        started.map_err(|e| Exit::system(chain(&e)))?;
        let bus = broker.connect(station.id.as_str());
        let (wish, wished) = watch::channel(Wish::Work);
        let mut agent = JoinSet::new();
        agent.spawn(dispatch::run(station, equipped, (supplies, Arc::new(Machine)), bus, wished));
        Ok(Self { orchestrator, wish, agent, loops })
    }

    /// Ends both parts. Builds that still run are given back.
    pub(crate) async fn end(mut self) {
        // The dispatcher may be gone already.
        let _ = self.wish.send(Wish::Stop);
        let _ = tokio::time::timeout(LAST_WORK, self.agent.join_next()).await;
        self.agent.shutdown().await;
        self.loops.shutdown().await;
    }
}
