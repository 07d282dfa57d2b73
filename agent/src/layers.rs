//! Layers of successful builds, kept for the next build of the same thing (shell).
//!
//! A build works in a store of its own. When it succeeds, that store becomes an immutable generation by one
//! rename, and the next build attaches it as one more read-only image store, in which `buildah build --layers`
//! finds its cached steps. A slot wrote it, so it is never more than that: the agent does not open it, and only
//! slots of the same key see it.

mod head;
mod key;
mod sweep;

use std::fs::File;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::slot::wire::{Command, Exit, Step};
use crate::slot::{Slot, SlotLost};
use crate::state::{State, StateError, boot_id, open_lock, wait_for_lock};
use crate::stop::StopSignal;
use head::{Admission, Generation, Head};
pub use key::LayerKey;
pub(crate) use key::{Circumstances, Mounted, name};
pub(crate) use sweep::{Limits, Unused, unused};

/// buildah 1.28 gives up on a container with more layers than this, if any of them lies in another store than its
/// own: the kernel takes one page of mount options, and a layer takes 47 bytes of it.
pub(crate) const MAX_LAYERS: usize = 75;
/// Where a slot's buildah keeps what it makes.
const STORE: &str = "job/root";

/// What a build asks of the layer cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerCache {
    /// Who shares it.
    pub key: LayerKey,
    /// Whether cached layers are used.
    pub reuse: Reuse,
}

/// Whether a build takes over layers of earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// Every step that is the same.
    Cached,
    /// Nothing. What the build makes replaces what was kept.
    Nothing,
}

/// A layer cache in use. Its generations cannot be deleted while this lives.
#[derive(Debug)]
pub(crate) struct LayerLease {
    name: String,
    reuse: Reuse,
    generations: Vec<Generation>,
    _locks: Vec<File>,
}

/// What became of the layers of a build.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Promotion {
    /// The next build finds them.
    Kept,
    /// They are not kept, for this reason.
    NotKept(String),
}

/// The layers were not kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// The data directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The slot.
    #[error(transparent)]
    Slot(#[from] SlotLost),
    /// The rename.
    #[error("publish the layers: {0}")]
    Rename(String),
    /// The step that measures the store.
    #[error("measure the layers: {0}")]
    Step(String),
}

impl LayerLease {
    /// Takes the newest generations of a cache into use. If one of them is gone, the cache starts empty.
    pub(crate) async fn acquire(state: &State, name: String, reuse: Reuse) -> Result<Self, StateError> {
        let _guard = guard(state).await?;
        let head = read_head(state, &name);
        let wanted = if reuse == Reuse::Cached { head.chain } else { Vec::new() };
        let locks: Option<Vec<File>> = wanted.iter().map(|g| lock_generation(state, g.name)).collect();
        let generations = if locks.is_some() { wanted } else { Vec::new() };
        if reuse == Reuse::Cached {
            write_head(state, &name, generations.clone())?;
        }
        Ok(Self { name, reuse, generations, _locks: locks.unwrap_or_default() })
    }

    /// Stores that the slot mounts behind those of the bases.
    pub(crate) fn stores(&self) -> impl Iterator<Item = String> {
        self.generations.iter().map(|generation| store_name(generation.name))
    }

    /// What buildah does about layers.
    pub(crate) const fn plan(&self) -> crate::plan::Layers {
        match self.reuse {
            Reuse::Cached => crate::plan::Layers::Cached,
            Reuse::Nothing => crate::plan::Layers::New,
        }
    }

    /// Keeps the store of a successful build, which ends with this: nothing else can run in the slot afterwards.
    pub(crate) async fn promote(
        &self,
        state: &State,
        slot: &mut Slot,
        measured: &Measured,
        max_bytes: u64,
    ) -> Result<Promotion, LayerError> {
        let _guard = guard(state).await?;
        let present = match self.reuse {
            Reuse::Cached => read_head(state, &self.name),
            Reuse::Nothing => Head::default(),
        };
        let name = Uuid::now_v7();
        match present.admit(name, measured.bytes, &measured.needs, max_bytes) {
            Admission::Kept(chain) => {
                publish(slot, name).await?;
                write_head(state, &self.name, chain)?;
                Ok(Promotion::Kept)
            }
            Admission::Orphaned => {
                Ok(not_kept("the layer cache was emptied meanwhile; it starts afresh next time"))
            }
            Admission::TooDeep => {
                write_head(state, &self.name, Vec::new())?;
                Ok(not_kept("the layer cache grew by too many small steps; it starts afresh next time"))
            }
            Admission::TooLarge(bytes) => Ok(not_kept(&format!(
                "the layers of this build take {bytes} bytes, more than data.max_layer_cache_bytes = {max_bytes}; \
                 they are not kept"
            ))),
        }
    }

    /// Empties the cache, because something about it may be wrong.
    pub(crate) async fn forget(&self, state: &State) -> Result<(), StateError> {
        let _guard = guard(state).await?;
        write_head(state, &self.name, Vec::new())
    }

    /// Whether anything of earlier builds was used.
    pub(crate) fn is_empty(&self) -> bool {
        self.generations.is_empty()
    }

    /// What the build left that a later one can use, found out while the slot can still run programs. `first` is
    /// the number of the first of our stores among those of the slot.
    pub(crate) async fn measure(
        &self,
        slot: &mut Slot,
        stop: &mut StopSignal,
        first: usize,
    ) -> Result<Option<Measured>, LayerError> {
        let argv = vec!["/bin/sh".to_owned(), "-c".to_owned(), measuring(first, self.generations.len())];
        let env = crate::plan::environment(&[]);
        let end = slot.run(Step::Exec { argv, env, network: false }, stop).await?;
        if end.exit != Exit::Code(0) {
            return Err(LayerError::Step(end.stderr.trim().to_owned()));
        }
        let measured = Measured::read(&end.stderr, first, &self.generations);
        measured.ok_or_else(|| LayerError::Step(end.stderr.trim().to_owned()))
    }
}

fn not_kept(why: &str) -> Promotion {
    Promotion::NotKept(why.to_owned())
}

async fn publish(slot: &mut Slot, name: Uuid) -> Result<(), LayerError> {
    let command = Command::Promote { from: STORE.to_owned(), to: store_name(name) };
    slot.change_store(command).await?.map_err(LayerError::Rename)
}

/// What a step says about the store that was built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Measured {
    bytes: u64,
    /// Generations with a layer on which a new one stands.
    needs: Vec<Uuid>,
}

/// Prints whether there are images, their size, and the stores in which something below them lies. `lower` lists,
/// for each layer, all below it by their short names; an image without a layer of its own names its layer. The
/// history of an image has the short ids of those below it, without which buildah does not find it again.
///
/// What it prints can be forged by the build that it measures, and decides only about that build's own cache.
fn measuring(first: usize, count: usize) -> String {
    let stores: Vec<_> = (first..first + count).map(|index| index.to_string()).collect();
    let stores = stores.join(" ");
    format!(
        "r=/job/root; i=$r/overlay-images/images.json; t=$(mktemp) || exit 1\n\
         exec >&2\n\
         [ -f $i ] && grep -q '\"layer\":' $i || {{ echo nothing; exit 0; }}\n\
         {{ find $r/overlay -mindepth 2 -maxdepth 2 -name lower -type f -exec cat {{}} + | tr : '\\n' | sed s,^l/,,\n\
         echo; grep -o '\"layer\":\"[0-9a-f]*\"' $i | cut -d'\"' -f4\n\
         grep -rhos 'FROM [0-9a-f]\\{{12\\}}' $r/overlay-images | cut -c6-; }} | sort -u > $t\n\
         for n in {stores}; do\n\
         {{ ls /b/$n/overlay /b/$n/overlay/l; ls /b/$n/overlay-images | cut -c1-12; }} 2>/dev/null \
         | grep . | sort -u | comm -12 - $t | grep -q . && echo needs $n; done\n\
         echo bytes $(du -s --block-size=1 $r | cut -f1)\n"
    )
}

impl Measured {
    /// `Some(None)` if there is nothing to keep, `None` if the text says something else.
    #[expect(clippy::option_option, reason = "nothing new is an answer, nonsense is none")]
    fn read(text: &str, first: usize, generations: &[Generation]) -> Option<Option<Self>> {
        if text.trim() == "nothing" {
            return Some(None);
        }
        let (mut bytes, mut needs) = (None, Vec::new());
        for line in text.lines() {
            match line.split_once(' ')? {
                ("needs", index) => {
                    let index = index.parse::<usize>().ok()?.checked_sub(first)?;
                    needs.push(generations.get(index)?.name);
                }
                ("bytes", number) => bytes = Some(number.parse().ok()?),
                _ => return None,
            }
        }
        Some(Some(Self { bytes: bytes?, needs }))
    }
}

fn store_name(name: Uuid) -> String {
    format!("layers/{name}")
}

fn lock_path(state: &State, name: Uuid) -> PathBuf {
    state.path(&format!("layers/{name}.lock"))
}

fn head_path(state: &State, name: &str) -> PathBuf {
    state.path(&format!("layers/{name}.json"))
}

/// Held for a few file operations only: whoever holds it may read and change heads.
async fn guard(state: &State) -> Result<File, StateError> {
    wait_for_lock(&state.path("layers/lock"), File::try_lock).await
}

/// The right to use a generation, if it is there and nobody deletes it.
fn lock_generation(state: &State, name: Uuid) -> Option<File> {
    let lock = open_lock(&lock_path(state, name)).ok()?;
    lock.try_lock_shared().ok()?;
    state.path(&format!("store/{}", store_name(name))).is_dir().then_some(lock)
}

/// A missing or damaged head, or one of an earlier boot, is an empty cache.
fn read_head(state: &State, name: &str) -> Head {
    head_in(&head_path(state, name)).unwrap_or_default()
}

fn head_in(path: &Path) -> Option<Head> {
    let head: Head = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (head.boot == boot_id()).then_some(head)
}

fn write_head(state: &State, name: &str, chain: Vec<Generation>) -> Result<(), StateError> {
    let head = Head { chain, boot: boot_id(), used: crate::time::now().as_secs() };
    let path = head_path(state, name);
    let failed = |e: std::io::Error| StateError::io("write", &path, e);
    let mut file = tempfile::NamedTempFile::new_in(state.path("layers")).map_err(failed)?;
    serde_json::to_writer(&mut file, &head).map_err(|e| failed(e.into()))?;
    file.persist(&path).map_err(|e| failed(e.error)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generations() -> Vec<Generation> {
        let generation = |number| Generation { name: Uuid::from_u128(number), bytes: 1, needs: Vec::new() };
        [1, 2].map(generation).to_vec()
    }

    #[test]
    fn a_measurement_is_read_strictly() {
        let read = |text: &str| Measured::read(text, 3, &generations());
        let two = vec![Uuid::from_u128(1), Uuid::from_u128(2)];
        assert_eq!(read("nothing\n"), Some(None));
        assert_eq!(read("needs 3\nneeds 4\nbytes 17\n"), Some(Some(Measured { bytes: 17, needs: two })));
        assert_eq!(read("bytes 17\n"), Some(Some(Measured { bytes: 17, needs: Vec::new() })));
        for text in
            ["", "needs 2\nbytes 1", "needs 5\nbytes 1", "needs 3", "bytes x", "bytes -1", "x y\nbytes 1"]
        {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn a_cache_with_a_missing_generation_is_empty() {
        let temp = tempfile::tempdir().unwrap();
        let state = State::open(temp.path()).unwrap();
        write_head(&state, "k", generations()).unwrap();
        for generation in generations() {
            std::fs::create_dir(state.path(&format!("store/{}", store_name(generation.name)))).unwrap();
        }
        let acquire = || LayerLease::acquire(&state, "k".to_owned(), Reuse::Cached);
        assert_eq!(acquire().await.unwrap().generations, generations());
        assert!(LayerLease::acquire(&state, "k".to_owned(), Reuse::Nothing).await.unwrap().is_empty());
        assert_eq!(
            acquire().await.unwrap().generations,
            generations(),
            "--no-cache forgets nothing by itself"
        );
        std::fs::remove_dir(state.path(&format!("store/{}", store_name(Uuid::from_u128(2))))).unwrap();
        assert!(acquire().await.unwrap().is_empty());
    }
}
