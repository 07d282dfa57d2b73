//! Deleting what killed predecessors left, and what exceeds the disk mark (shell).
//!
//! Files of slots belong to subordinate uids, so a slot without steps deletes them.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::SystemTime;

use kiln_protocol::{BuildId, Digest};
use kiln_transport::crash::{self, CrashPoint};

use crate::agent::Agent;
use crate::bases::{self, BaseRecord, Bases};
use crate::caches;
use crate::layers;
use crate::logs::spool;
use crate::slot::wire::Command;
use crate::slot::{Slot, SlotFiles, SlotLost};
use crate::state::{StateError, open_lock, try_lock};

/// Something could not be deleted.
#[derive(Debug, thiserror::Error)]
pub enum HousekeepingError {
    /// The data directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The slot that deletes.
    #[error(transparent)]
    Slot(#[from] SlotLost),
    /// What the slot said.
    #[error("delete what slots left: {0}")]
    Remove(String),
    /// A blob.
    #[error(transparent)]
    Blob(#[from] crate::blobs::BlobError),
}

/// What was deleted.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Pruned {
    /// Base images.
    pub bases: usize,
    /// Generations of cache mounts.
    pub cache_generations: usize,
    /// Generations of layer caches.
    pub layer_generations: usize,
    /// Logs.
    pub logs: usize,
    /// Bytes of blobs.
    pub blob_bytes: u64,
}

/// Deletes the jobs of dead processes. Returns how many there were.
pub async fn reclaim(agent: &Agent) -> Result<usize, HousekeepingError> {
    // Before the abandoned ones: a job that ends meanwhile deletes its slot's directory first.
    let orphans = orphans(agent);
    let abandoned = agent.state.abandoned_jobs()?;
    if abandoned.is_empty() && orphans.is_empty() {
        return Ok(0);
    }
    let mut paths = orphans;
    paths.extend(abandoned.iter().map(|job| slot_directory(job.name())));
    let count = paths.len();
    remove(agent, paths).await?;
    crash::reach(CrashPoint::SlotsReclaimed);
    for job in &abandoned {
        // The log of a killed build is read as any other.
        let log = agent.state.path(&format!("logs/{}.log", job.name()));
        if let Err(error) = spool::recover(&log) {
            tracing::warn!(log = %log.display(), %error, "cannot put the log of a killed build together");
        }
        let layout = agent.state.path(&format!("store/in/{}", job.name()));
        if layout.exists() {
            std::fs::remove_dir_all(&layout).map_err(|e| StateError::io("delete", &layout, e))?;
        }
    }
    Ok(count)
}

/// Directories of slots whose agent is gone and whose shim was killed.
fn orphans(agent: &Agent) -> Vec<String> {
    let names = list(&agent.state.path("store/jobs"), "").into_iter();
    let names = names.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let orphaned = names.filter(|name| !agent.state.path(&format!("jobs/{name}")).exists());
    orphaned.map(|name| slot_directory(&name)).collect()
}

/// Where a slot keeps its files, below the store.
pub(crate) fn slot_directory(job: &str) -> String {
    format!("jobs/{job}")
}

/// Deletes directories below the store.
pub(crate) async fn remove(agent: &Agent, paths: Vec<String>) -> Result<(), HousekeepingError> {
    let job = agent.state.create_job(&BuildId::generate().to_string())?;
    let (_reader, writer) = bases::log_pipe(&job)?;
    let files = SlotFiles {
        store: agent.state.store()?,
        lock: job.lock().map_err(|e| StateError::io("lock", job.dir(), e))?,
        archive: None,
        log: writer,
    };
    let spec = agent.bare_slot(job.name());
    let mut slot = Slot::start(&spec, files).await?;
    let removed = slot.change_store(Command::Remove(paths)).await;
    slot.finish().await?;
    removed?.map_err(HousekeepingError::Remove)
}

/// Deletes old logs, unused generations of caches, and base images: all that nothing uses, or as many of the
/// least recently used ones as bring the data directory below `data.max_bytes`.
pub async fn prune(agent: &Agent, all: bool) -> Result<Pruned, HousekeepingError> {
    let mut pruned = Pruned { logs: old_logs(agent, all)?, ..Pruned::default() };
    if all {
        caches::forget_all(&agent.state).await?;
    }
    // The locks are held until the files are gone.
    let generations = caches::unused_generations(&agent.state).await?;
    pruned.cache_generations = generations.len();
    let layers = unused_layers(agent, all).await?;
    pruned.layer_generations = layers.len();
    let mut doomed = doomed_bases(agent, all)?;
    doomed.extend(stray_bases(agent)?);
    pruned.bases = doomed.len();
    let paths = generations.iter().map(|generation| generation.path.clone());
    let paths = paths.chain(layers.iter().map(|generation| generation.path.clone()));
    let paths: Vec<String> =
        paths.chain(doomed.iter().map(|base| bases::store_name(&base.manifest))).collect();
    if !paths.is_empty() {
        remove(agent, paths).await?;
    }
    layers.into_iter().for_each(layers::Unused::forget);
    drop((doomed, generations));
    pruned.blob_bytes = unreferenced_blobs(agent)?;
    Ok(pruned)
}

async fn unused_layers(agent: &Agent, all: bool) -> Result<Vec<layers::Unused>, StateError> {
    let bytes = if all { 0 } else { agent.config.data.max_layer_cache_bytes };
    layers::unused(&agent.state, layers::Limits { bytes, now: crate::time::now().as_secs() }).await
}

/// A base that nobody uses; the lock keeps it so.
struct Doomed {
    manifest: Digest,
    _lock: std::fs::File,
}

/// Stores without a record: their maker died between the two.
fn stray_bases(agent: &Agent) -> Result<Vec<Doomed>, HousekeepingError> {
    let store = Bases { state: &agent.state, config: &agent.config, identity: agent.identity };
    let mut stray = Vec::new();
    for path in list(&agent.state.path("store/base"), "") {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Ok(manifest) = format!("sha256:{name}").parse::<Digest>() else { continue };
        let lock = open_lock(&store.lock_path(&manifest))?;
        // Whoever imports it holds the lock.
        if matches!(try_lock(&lock), Ok(Some(()))) && !store.record_path(&manifest).exists() {
            stray.push(Doomed { manifest, _lock: lock });
        }
    }
    Ok(stray)
}

fn doomed_bases(agent: &Agent, all: bool) -> Result<Vec<Doomed>, HousekeepingError> {
    let store = Bases { state: &agent.state, config: &agent.config, identity: agent.identity };
    let mut records = records(agent);
    records.sort_by_key(|(used, _)| *used);
    // Compressed blobs and unpacked files: three times the blobs is what images take on average.
    let size = |r: &BaseRecord| r.layers.iter().map(|l| l.size).sum::<u64>() * 3;
    let mut total: u64 = records.iter().map(|(_, r)| size(r)).sum();
    let mut doomed = Vec::new();
    for (_, record) in records {
        if !all && total <= agent.config.data.max_bytes {
            break;
        }
        let lock = open_lock(&store.lock_path(&record.manifest))?;
        if !matches!(try_lock(&lock), Ok(Some(()))) {
            continue;
        }
        // Without its record a store does not count as published.
        let path = store.record_path(&record.manifest);
        std::fs::remove_file(&path).map_err(|e| StateError::io("delete", &path, e))?;
        total -= size(&record);
        doomed.push(Doomed { manifest: record.manifest, _lock: lock });
    }
    Ok(doomed)
}

fn records(agent: &Agent) -> Vec<(SystemTime, BaseRecord)> {
    let files = list(&agent.state.path("bases"), ".json");
    let read = files.into_iter().filter_map(|path| {
        let used = path.metadata().and_then(|m| m.modified()).ok()?;
        let record = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
        Some((used, record))
    });
    read.collect()
}

fn unreferenced_blobs(agent: &Agent) -> Result<u64, HousekeepingError> {
    // Blobs of a fetch that is going on have no record yet.
    let Some(_lock) = agent.state.sweep_blobs()? else { return Ok(0) };
    let mut kept: BTreeSet<Digest> = BTreeSet::new();
    for (_, record) in records(agent) {
        kept.extend([record.manifest, record.config]);
        kept.extend(record.layers.into_iter().map(|l| l.digest));
    }
    agent.state.blobs().sweep(SystemTime::UNIX_EPOCH + crate::time::now())?;
    Ok(agent.state.blobs().retain(|digest| kept.contains(digest))?)
}

fn old_logs(agent: &Agent, all: bool) -> Result<usize, HousekeepingError> {
    let mut logs = list(&agent.state.path("logs"), ".log");
    // Build ids sort by time.
    logs.sort();
    let keep = if all { 0 } else { agent.config.logs.keep };
    let old = logs.len().saturating_sub(keep);
    let running =
        |path: &Path| path.file_stem().is_some_and(|build| agent.state.path("jobs").join(build).exists());
    for path in logs.iter().take(old).filter(|path| !running(path)) {
        spool::remove(path).map_err(|e| StateError::io("delete", path, e))?;
    }
    Ok(old)
}

fn list(dir: &Path, suffix: &str) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.to_string_lossy().ends_with(suffix)).collect()
}
