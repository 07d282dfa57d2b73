//! Kept content of `RUN --mount=type=cache` (shell).
//!
//! A build sees a writable overlay over immutable generations. When it succeeds, what it wrote becomes the
//! newest generation by one rename, if nobody else's did meanwhile: a cache may forget, never mix.

use std::fs::File;

use serde::{Deserialize, Serialize};

use crate::slot::wire::{CacheMount, Command, Exit, Step};
use crate::slot::{Slot, SlotLost};
use crate::state::{State, StateError, open_lock, try_lock};
use crate::stop::StopSignal;

/// Longer chains are copied into one generation: each is one more overlay layer, and the mount options
/// must fit into one page.
const MAX_GENERATIONS: usize = 8;
/// Where buildah keeps cache mounts inside a slot.
const CONTENT: &str = "/job/tmp/buildah-cache";

/// Which generations make up a cache, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    chain: Vec<u64>,
    next: u64,
}

/// A cache in use. Its generations cannot be deleted while this lives.
#[derive(Debug)]
pub struct CacheLease {
    key: String,
    head: Head,
    _locks: Vec<File>,
}

impl CacheLease {
    /// Takes the newest content of a cache into use.
    pub fn acquire(state: &State, key: &str) -> Result<Self, StateError> {
        let guard = lock_head(state, key)?;
        let head = read_head(state, key);
        let locks = head.chain.iter().map(|n| lock_generation(state, key, *n)).collect::<Result<_, _>>()?;
        drop(guard);
        Ok(Self { key: key.to_owned(), head, _locks: locks })
    }

    /// What the slot mounts.
    pub fn mount(&self) -> CacheMount {
        CacheMount { generations: self.head.chain.iter().map(|n| generation(&self.key, *n)).collect() }
    }

    /// Keeps what a successful build wrote, up to `max_bytes` in all. Says why if it was not kept.
    pub async fn promote(
        self,
        state: &State,
        slot: &mut Slot,
        stop: &mut StopSignal,
        max_bytes: u64,
    ) -> Result<Option<String>, PromoteError> {
        let used = content_size(slot, stop).await?;
        if used > max_bytes {
            let guard = lock_head(state, &self.key)?;
            write_head(state, &self.key, &Head { chain: Vec::new(), next: self.head.next })?;
            drop(guard);
            return Ok(Some(format!(
                "cache mounts hold {used} bytes, more than data.max_cache_bytes = {max_bytes}; they start empty next time"
            )));
        }
        let flatten = self.head.chain.len() >= MAX_GENERATIONS;
        let from = if flatten { copy_content(slot, stop).await? } else { "cache/upper" };
        let _guard = lock_head(state, &self.key)?;
        if read_head(state, &self.key) != self.head {
            return Ok(Some(
                "another build renewed the cache mounts meanwhile; its content is kept".to_owned(),
            ));
        }
        let number = self.head.next;
        let to = generation(&self.key, number);
        make_parent(state, &self.key)?;
        slot.change_store(Command::Promote { from: from.to_owned(), to })
            .await?
            .map_err(PromoteError::Rename)?;
        let mut chain = vec![number];
        chain.extend(self.head.chain.iter().filter(|_| !flatten));
        write_head(state, &self.key, &Head { chain, next: number + 1 })?;
        Ok(None)
    }
}

/// The content was not kept.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    /// The data directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The slot.
    #[error(transparent)]
    Slot(#[from] SlotLost),
    /// The rename.
    #[error("publish the cache: {0}")]
    Rename(String),
    /// A step that measures or copies the content.
    #[error("measure or copy the cache: {0}")]
    Step(String),
}

/// Generations that no head names and nobody uses, as paths below the store directory.
pub fn unused_generations(state: &State) -> Result<Vec<String>, StateError> {
    let root = state.path("store/cache");
    let mut unused = Vec::new();
    for key in names(&root) {
        let _guard = lock_head(state, &key)?;
        let head = read_head(state, &key);
        let old = names(&root.join(&key)).into_iter().filter_map(|n| n.parse::<u64>().ok());
        for number in old.filter(|n| !head.chain.contains(n)) {
            let lock = open_lock(&lock_path(state, &key, number))?;
            if matches!(try_lock(&lock), Ok(Some(()))) {
                unused.push(generation(&key, number));
            }
        }
    }
    Ok(unused)
}

/// Forgets the content of every cache; the generations become unused.
pub fn forget_all(state: &State) -> Result<(), StateError> {
    for key in names(&state.path("store/cache")) {
        let _guard = lock_head(state, &key)?;
        let head = read_head(state, &key);
        write_head(state, &key, &Head { chain: Vec::new(), next: head.next })?;
    }
    Ok(())
}

fn names(dir: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

fn generation(key: &str, number: u64) -> String {
    format!("cache/{key}/{number}")
}

fn lock_path(state: &State, key: &str, number: u64) -> std::path::PathBuf {
    state.path(&format!("caches/{key}-{number}.lock"))
}

fn lock_generation(state: &State, key: &str, number: u64) -> Result<File, StateError> {
    let path = lock_path(state, key, number);
    let lock = open_lock(&path)?;
    // Deletion holds it exclusively, but only for generations that no head names.
    lock.try_lock_shared().map_err(|e| StateError::io("lock", &path, e.into()))?;
    Ok(lock)
}

/// Held for a few file operations only, so waiting for it is short.
fn lock_head(state: &State, key: &str) -> Result<File, StateError> {
    let path = state.path(&format!("caches/{key}.lock"));
    let lock = open_lock(&path)?;
    lock.lock().map_err(|e| StateError::io("lock", &path, e))?;
    Ok(lock)
}

fn read_head(state: &State, key: &str) -> Head {
    // A missing or damaged head is an empty cache.
    let bytes = std::fs::read(state.path(&format!("caches/{key}.json"))).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn write_head(state: &State, key: &str, head: &Head) -> Result<(), StateError> {
    let path = state.path(&format!("caches/{key}.json"));
    let failed = |e: std::io::Error| StateError::io("write", &path, e);
    let mut file = tempfile::NamedTempFile::new_in(state.path("caches")).map_err(failed)?;
    serde_json::to_writer(&mut file, head).map_err(|e| failed(e.into()))?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(&path).map_err(|e| failed(e.error)).map(drop)
}

fn make_parent(state: &State, key: &str) -> Result<(), StateError> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = state.path(&format!("store/cache/{key}"));
    let failed = |e| StateError::io("create", &path, e);
    std::fs::create_dir_all(&path).map_err(failed)?;
    // Written by slots under other uids, inside a directory that only the agent may enter.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).map_err(failed)
}

async fn content_size(slot: &mut Slot, stop: &mut StopSignal) -> Result<u64, PromoteError> {
    let script = format!("du -s --block-size=1 {CONTENT} >&2");
    let said = shell(slot, stop, script).await?;
    let size = said.split_whitespace().next().and_then(|n| n.parse().ok());
    size.ok_or_else(|| PromoteError::Step(said.trim().to_owned()))
}

async fn copy_content(slot: &mut Slot, stop: &mut StopSignal) -> Result<&'static str, PromoteError> {
    shell(slot, stop, format!("cp -a --reflink=auto {CONTENT}/. /flat/")).await?;
    Ok("cache/flat")
}

async fn shell(slot: &mut Slot, stop: &mut StopSignal, script: String) -> Result<String, PromoteError> {
    let argv = vec!["/bin/sh".to_owned(), "-c".to_owned(), script];
    let env = crate::plan::environment(&[]);
    let end = slot.run(Step::Exec { argv, env, network: false }, stop).await?;
    if end.exit == Exit::Code(0) { Ok(end.stderr) } else { Err(PromoteError::Step(end.stderr)) }
}
