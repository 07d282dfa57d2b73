//! Orchestrator and agent in this process (edge).
//!
//! Every process has a pool of its own, held by a file lock, and takes builds from nowhere else. When a process
//! dies its lock is free, and the next one ends its builds: what was not committed is cancelled, what was is
//! published here.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_agent::agent::Agent;
use kiln_agent::dispatch::{self, Station, Supplies, Wish};
use kiln_agent::error::chain;
use kiln_agent::hooks::HookHost;
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::policy::PolicyRule;
use kiln_orchestrator::run;
use kiln_orchestrator::schedule::Limits;
use kiln_orchestrator::store::{Clock, Store};
use kiln_protocol::glob::Glob;
use kiln_protocol::id::{AgentId, BootId, Pool};
use kiln_transport::MemoryBroker;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::app::Exit;

/// What the parts are called that speak over the bus inside this process.
const ORCHESTRATOR: &str = "kiln-orchestrator";
/// Nobody else's builds run in this process.
const NO_LIMIT: Limits = Limits { per_namespace: u32::MAX };
/// What still runs at the end is given back within this time, or its lease runs out.
const LAST_WORK: Duration = Duration::from_secs(20);

/// The pair, running.
#[derive(Debug)]
pub(crate) struct Embedded {
    pub(crate) orchestrator: Arc<Orchestrator>,
    pub(crate) pool: Pool,
    wish: watch::Sender<Wish>,
    agent: JoinSet<std::io::Result<()>>,
    loops: JoinSet<()>,
    lock: Lock,
}

/// The right to a pool: a locked file that goes with its owner.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

/// Opens the record below a data directory.
pub(crate) async fn open_store(data: &Path) -> Result<Store, Exit> {
    let failed = |e: std::io::Error| Exit::system(format!("create {}: {e}", data.join("record").display()));
    std::fs::create_dir_all(data.join("record")).map_err(failed)?;
    let opened = Store::open(&data.join("record/kiln.db"), Clock::System).await;
    opened
        .map_err(|e| Exit::system(chain(&e)).with_hint("check the disk and the rights of the data directory"))
}

/// Loads the policy plugins, if there are any.
pub(crate) async fn load_hooks(agent: &Agent) -> Result<Option<Arc<HookHost>>, Exit> {
    let config = &agent.config;
    if config.plugin.is_empty() {
        return Ok(None);
    }
    let cache = agent.state.path("plugins");
    let loaded = HookHost::load(&config.plugins, config.plugin.clone(), &cache).await;
    let refused = |e: kiln_agent::hooks::LoadError| {
        Exit::usage(chain(&e)).with_hint("a policy that does not load stops every build; mend or remove it")
    };
    Ok(Some(Arc::new(loaded.map_err(refused)?)))
}

impl Embedded {
    /// Starts both parts over one data directory.
    pub(crate) async fn start(
        agent: Arc<Agent>,
        hooks: Option<Arc<HookHost>>,
        supplies: Arc<dyn Supplies>,
        slots: u32,
    ) -> Result<Self, Exit> {
        let store = open_store(agent.state.root()).await?;
        let pools = agent.state.path("pools");
        let (pool, lock) = lock_pool(&pools).map_err(|e| locking(&pools, &e))?;
        let settings =
            Settings { limits: NO_LIMIT, policies: rules(hooks.as_deref()), only_pool: Some(pool.clone()) };
        let orchestrator = Arc::new(Orchestrator::new(store, settings, Entropy::System));
        bury_dead(&orchestrator, &pools, &pool).await?;
        let broker = MemoryBroker::new(0);
        let mut loops = JoinSet::new();
        let bus = broker.connect(ORCHESTRATOR);
        let started = run::start(&orchestrator, &bus, std::slice::from_ref(&pool), &mut loops).await;
        started.map_err(|e| Exit::system(chain(&e)))?;
        let id: AgentId = pool.as_str().parse().map_err(|e| Exit::system(chain(&e)))?;
        let bus = broker.connect(id.as_str());
        let station = Station { id, boot: BootId::generate(), pools: BTreeSet::from([pool.clone()]), slots };
        let (wish, wished) = watch::channel(Wish::Work);
        let mut running = JoinSet::new();
        running.spawn(dispatch::run(station, (agent, hooks), supplies, bus, wished));
        Ok(Self { orchestrator, pool, wish, agent: running, loops, lock })
    }

    /// Ends both parts. Builds that still run are given back.
    pub(crate) async fn end(mut self) {
        // The dispatcher may be gone already.
        let _ = self.wish.send(Wish::Stop);
        let _ = tokio::time::timeout(LAST_WORK, self.agent.join_next()).await;
        self.agent.shutdown().await;
        self.loops.shutdown().await;
        if let Ok(id) = self.pool.as_str().parse() {
            forget(&self.orchestrator, &id).await;
        }
        self.orchestrator.store().close().await;
        // A file that stays is taken for that of a dead process, which it is.
        let _ = std::fs::remove_file(&self.lock.path);
    }
}

pub(crate) fn rules(hooks: Option<&HookHost>) -> Vec<PolicyRule> {
    let Some(hooks) = hooks else { return Vec::new() };
    let rule = |(policy, glob): (kiln_protocol::message::RequiredPolicy, Option<&Glob>)| PolicyRule {
        name: policy.name,
        key: policy.key,
        hooks: policy.hooks,
        repositories: glob.cloned().unwrap_or_else(Glob::everything),
    };
    hooks.policies().map(rule).collect()
}

fn locking(pools: &Path, error: &std::io::Error) -> Exit {
    Exit::system(format!("lock a pool in {}: {error}", pools.display()))
}

/// A fresh pool. Its file appears locked.
fn lock_pool(pools: &Path) -> std::io::Result<(Pool, Lock)> {
    std::fs::create_dir_all(pools)?;
    let name = format!("p-{}", BootId::generate().as_uuid().simple());
    let pool = name.parse().map_err(std::io::Error::other)?;
    let file = tempfile::NamedTempFile::with_prefix_in("new-", pools)?;
    file.as_file().try_lock().map_err(std::io::Error::from)?;
    let path = pools.join(name);
    let file = file.persist(&path)?;
    Ok((pool, Lock { path, _file: file }))
}

/// Ends the builds of processes that are gone.
async fn bury_dead(orchestrator: &Orchestrator, pools: &Path, heir: &Pool) -> Result<(), Exit> {
    let entries = std::fs::read_dir(pools).map_err(|e| locking(pools, &e))?;
    for entry in entries {
        let entry = entry.map_err(|e| locking(pools, &e))?;
        let Some(pool) = entry.file_name().to_str().and_then(|name| name.parse::<Pool>().ok()) else {
            continue;
        };
        if pool == *heir {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(e)) => return Err(locking(pools, &e)),
        }
        let buried = orchestrator.bury(&pool, heir).await;
        buried
            .map_err(|e| Exit::system(format!("end the builds of a process that is gone: {}", chain(&e))))?;
        if let Ok(id) = pool.as_str().parse() {
            forget(orchestrator, &id).await;
        }
        // Under its lock, so nobody else can be at it; another process may have been faster.
        let _ = std::fs::remove_file(entry.path());
    }
    Ok(())
}

/// An agent that will not come back need not be remembered. If this fails, it is only a row.
async fn forget(orchestrator: &Orchestrator, id: &AgentId) {
    if let Ok(mut tx) = orchestrator.store().write().await
        && tx.forget_agent(id).await.is_ok()
    {
        let _ = tx.commit().await;
    }
}
