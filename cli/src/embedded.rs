//! The pair of one `kiln build` (edge).
//!
//! Every process has a pool of its own, held by a file lock, and takes builds from nowhere else. When a process
//! dies its lock is free, and the next one ends its builds: what was not committed is cancelled, what was is
//! published here.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_agent::dispatch::{Station, Supplies};
use kiln_agent::error::chain;
use kiln_orchestrator::config::OrchestratorConfig;
use kiln_orchestrator::core::Orchestrator;
use kiln_orchestrator::store::Retention;
use kiln_protocol::id::{AgentId, BootId, Pool};

use crate::app::Exit;
use crate::pair::{self, Equipped, Pair};

/// The pair of one command, running.
#[derive(Debug)]
pub(crate) struct Embedded {
    pub(crate) pool: Pool,
    data: PathBuf,
    pair: Pair,
    lock: Lock,
}

/// The right to a pool: a locked file that goes with its owner.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Embedded {
    /// Starts both parts over the data directory of the agent.
    pub(crate) async fn start(
        equipped: Equipped,
        supplies: Arc<dyn Supplies>,
        retention: Retention,
    ) -> Result<Self, Exit> {
        let data = equipped.0.state.root().to_owned();
        let pools = data.join("pools");
        let (pool, lock) = lock_pool(&pools).map_err(|e| locking(&pools, &e))?;
        // What one person does on one machine is never unfair to anybody.
        let rules = OrchestratorConfig { per_namespace: None, retention };
        let orchestrator = pair::orchestrator(&equipped, pool.clone(), &rules).await?;
        bury_dead(&orchestrator, &data, &pool).await?;
        let id: AgentId = pool.as_str().parse().map_err(|e| Exit::system(chain(&e)))?;
        let station =
            Station { id, boot: BootId::generate(), pools: BTreeSet::from([pool.clone()]), slots: 1 };
        let pair = Pair::start(orchestrator, station, equipped, supplies).await?;
        Ok(Self { pool, data, pair, lock })
    }

    pub(crate) fn orchestrator(&self) -> &Orchestrator {
        &self.pair.orchestrator
    }

    /// Ends both parts. A build that still runs is given back.
    pub(crate) async fn end(self) {
        let orchestrator = Arc::clone(&self.pair.orchestrator);
        self.pair.end().await;
        forget(&orchestrator, &self.data, &self.pool).await;
        orchestrator.store().close().await;
        // A file that stays is taken for that of a dead process, which it is.
        let _ = std::fs::remove_file(&self.lock.path);
    }
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
async fn bury_dead(orchestrator: &Orchestrator, data: &Path, heir: &Pool) -> Result<(), Exit> {
    let pools = data.join("pools");
    let entries = std::fs::read_dir(&pools).map_err(|e| locking(&pools, &e))?;
    for entry in entries {
        let entry = entry.map_err(|e| locking(&pools, &e))?;
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
            Err(TryLockError::Error(e)) => return Err(locking(&pools, &e)),
        }
        let buried = orchestrator.bury(&pool, heir).await;
        buried
            .map_err(|e| Exit::system(format!("end the builds of a process that is gone: {}", chain(&e))))?;
        forget(orchestrator, data, &pool).await;
        // Under its lock, so nobody else can be at it; another process may have been faster.
        let _ = std::fs::remove_file(entry.path());
    }
    Ok(())
}

/// An agent that will not come back need not be remembered, nor what it still had to say: its builds are over. If this
/// fails, it is only a row and a directory.
async fn forget(orchestrator: &Orchestrator, data: &Path, pool: &Pool) {
    let Ok(id) = pool.as_str().parse::<AgentId>() else { return };
    let _ = std::fs::remove_dir_all(data.join("reports").join(id.as_str()));
    if let Ok(mut tx) = orchestrator.store().write().await
        && tx.forget_agent(&id).await.is_ok()
    {
        let _ = tx.commit().await;
    }
}
