//! Which layer caches are deleted (shell).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::head::Head;
use super::{guard, head_in, lock_path, store_name};
use crate::state::{State, StateError, open_lock, try_lock};

/// A cache that no build used for this long is probably of something that nobody builds any more.
const MAX_AGE: Duration = Duration::from_hours(14 * 24);

/// What may stay.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes of all caches; the least recently used ones go first.
    pub(crate) bytes: u64,
    /// Seconds since 1970.
    pub(crate) now: u64,
}

/// A generation that no cache names and nobody uses.
#[derive(Debug)]
pub(crate) struct Unused {
    /// Its path below the store directory.
    pub(crate) path: String,
    lock_path: PathBuf,
    _lock: File,
}

impl Unused {
    /// Deletes its lock, once its files are deleted. A name is used once, so nobody waits for it.
    pub(crate) fn forget(self) {
        // The next sweep finds one that stays.
        let _ = std::fs::remove_file(&self.lock_path);
    }
}

/// Forgets caches beyond the limits, and lists generations that are to be deleted.
pub(crate) async fn unused(state: &State, limits: Limits) -> Result<Vec<Unused>, StateError> {
    let _guard = guard(state).await?;
    let kept = kept_heads(state, limits)?;
    let named: Vec<Uuid> = kept.iter().flat_map(Head::names).collect();
    let mut unused = Vec::new();
    for name in names(&state.path("store/layers"), "").filter(|name| !named.contains(name)) {
        let lock_path = lock_path(state, name);
        let lock = open_lock(&lock_path)?;
        if matches!(try_lock(&lock), Ok(Some(()))) {
            unused.push(Unused { path: store_name(name), lock_path, _lock: lock });
        }
    }
    stray_locks(state)?;
    Ok(unused)
}

/// Deletes heads that cannot be read, and those beyond the limits.
fn kept_heads(state: &State, limits: Limits) -> Result<Vec<Head>, StateError> {
    let mut heads = Vec::new();
    for path in files(&state.path("layers")) {
        let half_written = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".tmp"));
        let is_head = path.extension().is_some_and(|extension| extension == "json");
        match head_in(&path).filter(|_| is_head) {
            Some(head) => heads.push((path, head)),
            None if is_head || half_written => delete(&path)?,
            None => {}
        }
    }
    heads.sort_by_key(|(_, head)| std::cmp::Reverse(head.used));
    let mut total: u64 = 0;
    let mut kept = Vec::new();
    for (path, head) in heads {
        total = total.saturating_add(head.bytes());
        let old = limits.now.saturating_sub(head.used) > MAX_AGE.as_secs();
        if old || total > limits.bytes || head.chain.is_empty() {
            delete(&path)?;
        } else {
            kept.push(head);
        }
    }
    Ok(kept)
}

/// Locks of generations that are gone: whoever deleted them died before it deleted these.
fn stray_locks(state: &State) -> Result<(), StateError> {
    for name in names(&state.path("layers"), ".lock") {
        let path = lock_path(state, name);
        if !state.path(&format!("store/{}", store_name(name))).exists() {
            delete(&path)?;
        }
    }
    Ok(())
}

fn delete(path: &Path) -> Result<(), StateError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StateError::io("delete", path, error))
        }
        _ => Ok(()),
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Generations named by the entries of a directory.
fn names(dir: &Path, suffix: &str) -> impl Iterator<Item = Uuid> {
    let names = files(dir).into_iter().filter_map(|path| path.file_name()?.to_str().map(str::to_owned));
    names.filter_map(move |name| name.strip_suffix(suffix)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::super::head::Generation;
    use super::super::{LayerLease, Reuse, write_head};
    use super::*;

    const ALL: u64 = u64::MAX;

    struct Place {
        state: State,
        _temp: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            Self { state: State::open(temp.path()).unwrap(), _temp: temp }
        }

        /// A cache of one generation of 10 bytes.
        fn cache(&self, name: &str, number: u128) {
            let id = Uuid::from_u128(number);
            std::fs::create_dir(self.state.path(&format!("store/{}", store_name(id)))).unwrap();
            write_head(&self.state, name, vec![Generation { name: id, bytes: 10, needs: Vec::new() }])
                .unwrap();
        }

        fn used_at(&self, name: &str, used: u64) {
            let path = super::super::head_path(&self.state, name);
            let head = Head { used, ..head_in(&path).unwrap() };
            std::fs::write(path, serde_json::to_vec(&head).unwrap()).unwrap();
        }

        async fn doomed(&self, bytes: u64, now: u64) -> Vec<Unused> {
            let mut found = unused(&self.state, Limits { bytes, now }).await.unwrap();
            found.sort_by(|a, b| a.path.cmp(&b.path));
            found
        }
    }

    fn paths(doomed: &[Unused]) -> Vec<String> {
        doomed.iter().map(|u| u.path.clone()).collect()
    }

    fn path(number: u128) -> String {
        store_name(Uuid::from_u128(number))
    }

    #[tokio::test]
    async fn the_least_recently_used_go_first() {
        let place = Place::new();
        for (name, number) in [("a", 1), ("b", 2), ("c", 3)] {
            place.cache(name, number);
            place.used_at(name, 100 - u64::try_from(number).unwrap());
        }
        assert!(place.doomed(30, 100).await.is_empty());
        assert_eq!(paths(&place.doomed(29, 100).await), [path(3)]);
        assert_eq!(paths(&place.doomed(0, 100).await), [1, 2, 3].map(path));
    }

    #[tokio::test]
    async fn an_old_cache_goes() {
        let place = Place::new();
        place.cache("a", 1);
        place.used_at("a", 100);
        assert!(place.doomed(ALL, 100 + MAX_AGE.as_secs()).await.is_empty());
        assert_eq!(paths(&place.doomed(ALL, 101 + MAX_AGE.as_secs()).await), [path(1)]);
    }

    #[tokio::test]
    async fn what_is_in_use_stays_until_it_is_not() {
        let place = Place::new();
        place.cache("a", 1);
        let lease = LayerLease::acquire(&place.state, "a".to_owned(), Reuse::Cached).await.unwrap();
        assert!(place.doomed(0, 0).await.is_empty());
        drop(lease);
        assert_eq!(paths(&place.doomed(ALL, 0).await), [path(1)]);
    }

    /// A kiln may die between any two of these.
    #[tokio::test]
    async fn what_a_dead_process_left_goes() {
        let place = Place::new();
        place.cache("a", 1);
        let now = crate::time::now().as_secs();
        let state = &place.state;
        std::fs::create_dir(state.path(&format!("store/{}", path(2)))).unwrap();
        std::fs::write(state.path("layers/.tmpX"), "{").unwrap();
        std::fs::write(state.path("layers/half.json"), "{").unwrap();
        std::fs::write(state.path("layers/other-boot.json"), "{\"chain\":[],\"boot\":\"x\",\"used\":1}")
            .unwrap();
        std::fs::write(lock_path(state, Uuid::from_u128(9)), "").unwrap();
        let doomed = place.doomed(ALL, now).await;
        assert_eq!(paths(&doomed), [path(2)]);
        std::fs::remove_dir(state.path(&format!("store/{}", path(2)))).unwrap();
        doomed.into_iter().for_each(Unused::forget);
        let mut left: Vec<_> =
            files(&state.path("layers")).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        left.sort();
        assert_eq!(left, ["a.json", "lock"]);
    }
}
