//! Kept content of `RUN --mount=type=cache` (shell).
//!
//! A build sees a writable overlay over immutable generations. When it succeeds, what it wrote becomes the
//! newest generation by one rename, if nobody else's did meanwhile: a cache may forget, never mix.

use std::fs::File;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::slot::wire::{CacheMount, Command, Exit, Step};
use crate::slot::{Slot, SlotLost};
use crate::state::{State, StateError, boot_id, open_lock, try_lock, wait_for_lock};
use crate::stop::StopSignal;

/// Longer chains are copied into one generation: each is one more overlay layer, and the mount options
/// must fit into one page.
const MAX_GENERATIONS: usize = 8;
/// Where buildah keeps cache mounts inside a slot.
const CONTENT: &str = "/job/tmp/buildah-cache";

/// Which generations make up a cache, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    chain: Vec<Uuid>,
    /// The boot of the machine in which they were made: nothing is synced, so nothing outlives a crash.
    boot: String,
}

impl Head {
    fn of(chain: Vec<Uuid>) -> Self {
        Self { chain, boot: boot_id() }
    }
}

/// A cache in use. Its generations cannot be deleted while this lives.
#[derive(Debug)]
pub struct CacheLease {
    key: String,
    head: Head,
    _locks: Vec<File>,
}

impl CacheLease {
    /// Takes the newest content of a cache into use. If a part of it is gone, the cache starts empty.
    pub async fn acquire(state: &State, key: &str) -> Result<Self, StateError> {
        let _guard = lock_head(state, key).await?;
        let head = read_head(state, key);
        let locks: Option<Vec<File>> =
            head.chain.iter().map(|name| lock_generation(state, key, *name)).collect();
        let head = if locks.is_some() { head } else { Head::of(Vec::new()) };
        write_head(state, key, &head)?;
        Ok(Self { key: key.to_owned(), head, _locks: locks.unwrap_or_default() })
    }

    /// What the slot mounts.
    pub fn mount(&self) -> CacheMount {
        CacheMount { generations: self.head.chain.iter().map(|name| generation(&self.key, *name)).collect() }
    }

    /// Measures what the build wrote, and copies it out of a long chain, while it is still mounted. Content beyond
    /// `max_bytes` in all will not be kept.
    pub async fn gather(
        self,
        slot: &mut Slot,
        stop: &mut StopSignal,
        max_bytes: u64,
    ) -> Result<NewContent, PromoteError> {
        let used = content_size(slot, stop).await?;
        let flatten = self.head.chain.len() >= MAX_GENERATIONS;
        let from = if flatten && used <= max_bytes { copy_content(slot, stop).await? } else { "cache/upper" };
        Ok(NewContent { lease: self, used, max_bytes, from, flatten })
    }
}

/// What a build left in its cache mounts.
#[derive(Debug)]
pub struct NewContent {
    lease: CacheLease,
    used: u64,
    max_bytes: u64,
    /// Its directory below the job's.
    from: &'static str,
    /// It replaces the whole chain.
    flatten: bool,
}

impl NewContent {
    /// Keeps what a successful build wrote. Says why if it was not kept.
    pub async fn promote(self, state: &State, slot: &mut Slot) -> Result<Option<String>, PromoteError> {
        let Self { lease, used, max_bytes, from, flatten } = self;
        let _guard = lock_head(state, &lease.key).await?;
        let present = read_head(state, &lease.key).chain;
        if present != lease.head.chain && !present.is_empty() {
            return Ok(Some(
                "another build renewed the cache mounts meanwhile; its content is kept".to_owned(),
            ));
        }
        if used > max_bytes {
            write_head(state, &lease.key, &Head::of(Vec::new()))?;
            return Ok(Some(format!(
                "cache mounts hold {used} bytes, more than data.max_cache_bytes = {max_bytes}; they start empty next time"
            )));
        }
        let name = Uuid::now_v7();
        make_parent(state, &lease.key)?;
        let to = generation(&lease.key, name);
        slot.change_store(Command::Promote { from: from.to_owned(), to })
            .await?
            .map_err(PromoteError::Rename)?;
        let older = lease.head.chain.iter().copied().filter(|_| !flatten);
        let chain = std::iter::once(name).chain(older).collect();
        write_head(state, &lease.key, &Head::of(chain))?;
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

/// A generation that nobody can take into use.
#[derive(Debug)]
pub struct UnusedGeneration {
    /// Its path below the store directory.
    pub path: String,
    _lock: File,
}

/// Generations that no head names and nobody uses.
pub async fn unused_generations(state: &State) -> Result<Vec<UnusedGeneration>, StateError> {
    let root = state.path("store/cache");
    let mut unused = Vec::new();
    for key in names(&root) {
        let _guard = lock_head(state, &key).await?;
        let head = read_head(state, &key);
        let old = names(&root.join(&key)).into_iter().filter_map(|name| name.parse::<Uuid>().ok());
        for name in old.filter(|name| !head.chain.contains(name)) {
            let lock = open_lock(&lock_path(state, &key, name))?;
            if matches!(try_lock(&lock), Ok(Some(()))) {
                unused.push(UnusedGeneration { path: generation(&key, name), _lock: lock });
            }
        }
    }
    Ok(unused)
}

/// Forgets the content of every cache; the generations become unused.
pub async fn forget_all(state: &State) -> Result<(), StateError> {
    for key in names(&state.path("store/cache")) {
        let _guard = lock_head(state, &key).await?;
        write_head(state, &key, &Head::of(Vec::new()))?;
    }
    Ok(())
}

fn names(dir: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

fn generation(key: &str, name: Uuid) -> String {
    format!("cache/{key}/{name}")
}

fn lock_path(state: &State, key: &str, name: Uuid) -> std::path::PathBuf {
    state.path(&format!("caches/{key}-{name}.lock"))
}

/// The right to use a generation, if it is there and nobody deletes it.
fn lock_generation(state: &State, key: &str, name: Uuid) -> Option<File> {
    let lock = open_lock(&lock_path(state, key, name)).ok()?;
    lock.try_lock_shared().ok()?;
    state.path(&format!("store/{}", generation(key, name))).is_dir().then_some(lock)
}

/// Held for a few file operations only, so waiting for it is short.
async fn lock_head(state: &State, key: &str) -> Result<File, StateError> {
    wait_for_lock(&state.path(&format!("caches/{key}.lock")), File::try_lock).await
}

/// A missing or damaged head, or one of an earlier boot, is an empty cache.
fn read_head(state: &State, key: &str) -> Head {
    let bytes = std::fs::read(state.path(&format!("caches/{key}.json"))).unwrap_or_default();
    let head: Head = serde_json::from_slice(&bytes).unwrap_or_default();
    if head.boot == boot_id() { head } else { Head::of(Vec::new()) }
}

fn write_head(state: &State, key: &str, head: &Head) -> Result<(), StateError> {
    let path = state.path(&format!("caches/{key}.json"));
    let failed = |e: std::io::Error| StateError::io("write", &path, e);
    let mut file = tempfile::NamedTempFile::new_in(state.path("caches")).map_err(failed)?;
    serde_json::to_writer(&mut file, head).map_err(|e| failed(e.into()))?;
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
