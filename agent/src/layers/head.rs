//! Which generations make up a layer cache, and which are kept when one more comes (pure).

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Every attached store costs each call of buildah 10 to 30 ms, and one more look for each step.
pub(super) const MAX_GENERATIONS: usize = 6;

/// The store of one successful build: its new layers, and nothing of what they stand on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Generation {
    /// Its directory.
    pub(super) name: Uuid,
    /// What it takes on disk.
    pub(super) bytes: u64,
    /// Every generation that holds a layer below one of its own. Without them buildah fails on it.
    pub(super) needs: Vec<Uuid>,
}

/// What the next build attaches, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) chain: Vec<Generation>,
    /// The boot of the machine in which they were made: nothing is synced, so nothing outlives a crash.
    pub(super) boot: String,
    /// When a build last used it, in seconds since 1970.
    pub(super) used: u64,
}

/// What becomes of a new generation.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Admission {
    /// It is the newest of this chain.
    Kept(Vec<Generation>),
    /// What it stands on was dropped while it was made.
    Orphaned,
    /// It stands on too many others. The cache starts afresh, so that the next one stands on nothing.
    TooDeep,
    /// It and what it stands on take this many bytes, more than a cache may.
    TooLarge(u64),
}

impl Head {
    pub(super) fn bytes(&self) -> u64 {
        bytes(&self.chain)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = Uuid> {
        self.chain.iter().map(|generation| generation.name)
    }

    fn get(&self, name: Uuid) -> Option<&Generation> {
        self.chain.iter().find(|generation| generation.name == name)
    }

    /// Adds a generation that stands on the `direct` ones. What it needs stays for certain, of the others those
    /// that fit, the most recently needed first.
    pub(super) fn admit(&self, name: Uuid, own_bytes: u64, direct: &[Uuid], max_bytes: u64) -> Admission {
        let Some(needs) = self.closure(direct) else { return Admission::Orphaned };
        if needs.len() >= MAX_GENERATIONS {
            return Admission::TooDeep;
        }
        let (needed, others): (Vec<_>, Vec<_>) =
            self.chain.iter().cloned().partition(|generation| needs.contains(&generation.name));
        let mut kept = vec![Generation { name, bytes: own_bytes, needs }];
        kept.extend(needed);
        if bytes(&kept) > max_bytes {
            return Admission::TooLarge(bytes(&kept));
        }
        // An older one comes behind those that need it, so it may be here already.
        for other in others {
            self.keep_if_it_fits(&mut kept, &other, max_bytes);
        }
        Admission::Kept(kept)
    }

    /// Only together with what it needs.
    fn keep_if_it_fits(&self, kept: &mut Vec<Generation>, other: &Generation, max_bytes: u64) {
        let wanted = std::iter::once(other.name).chain(other.needs.iter().copied());
        let missing = wanted.filter(|name| kept.iter().all(|generation| generation.name != *name));
        let missing: Option<Vec<_>> = missing.map(|name| self.get(name).cloned()).collect();
        let Some(missing) = missing else { return };
        let fits = kept.len() + missing.len() <= MAX_GENERATIONS;
        if fits && bytes(kept).saturating_add(bytes(&missing)) <= max_bytes {
            kept.extend(missing);
        }
    }

    /// The named ones and all that they need, or nothing if one is gone.
    fn closure(&self, direct: &[Uuid]) -> Option<Vec<Uuid>> {
        let mut all = Vec::new();
        for name in direct {
            all.push(*name);
            all.extend(self.get(*name)?.needs.iter().copied());
        }
        all.sort_unstable();
        all.dedup();
        all.iter().all(|name| self.get(*name).is_some()).then_some(all)
    }
}

fn bytes(chain: &[Generation]) -> u64 {
    chain.iter().fold(0, |sum, generation| sum.saturating_add(generation.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_BYTES: u64 = 1000;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn add(head: &Head, name: u128, direct: &[u128]) -> Admission {
        head.admit(id(name), 10, &direct.iter().map(|n| id(*n)).collect::<Vec<_>>(), MAX_BYTES)
    }

    /// Builds one after the other: each name with what it stands on directly.
    fn head(builds: &[(u128, &[u128])]) -> Head {
        builds.iter().fold(Head::default(), |head, (name, direct)| match add(&head, *name, direct) {
            Admission::Kept(chain) => Head { chain, ..head },
            other => panic!("{name}: {other:?}"),
        })
    }

    fn names(head: &Head) -> Vec<u128> {
        head.chain.iter().map(|generation| generation.name.as_u128()).collect()
    }

    #[test]
    fn what_every_build_stands_on_outlives_what_none_needs() {
        // The first build made the dependencies; each later one only what its own sources changed.
        let builds: Vec<(u128, &[u128])> = (2..20).map(|n| (n, &[1][..])).collect();
        let head = head(&[&[(1, &[][..])], builds.as_slice()].concat());
        assert_eq!(names(&head), [19, 1, 18, 17, 16, 15]);
    }

    #[test]
    fn needs_are_those_of_all_below() {
        let head = head(&[(1, &[]), (2, &[1]), (3, &[2])]);
        assert_eq!(head.chain[0].needs, [id(1), id(2)]);
    }

    #[test]
    fn nothing_stays_without_what_it_needs() {
        let mut head = head(&[(1, &[]), (2, &[1]), (3, &[2]), (4, &[3]), (10, &[]), (11, &[10])]);
        for name in 12..30 {
            match add(&head, name, &[11]) {
                Admission::Kept(chain) => head.chain = chain,
                other => panic!("{other:?}"),
            }
            let all = names(&head);
            assert!(all.len() <= MAX_GENERATIONS, "{all:?}");
            for generation in &head.chain {
                assert!(generation.needs.iter().all(|need| all.contains(&need.as_u128())), "{head:?}");
            }
        }
    }

    #[test]
    fn a_cache_that_grows_only_upwards_starts_afresh() {
        let head = head(&[(1, &[]), (2, &[1]), (3, &[2]), (4, &[3]), (5, &[4]), (6, &[5])]);
        assert_eq!(add(&head, 7, &[6]), Admission::TooDeep);
    }

    #[test]
    fn a_generation_on_something_that_is_gone_is_not_kept() {
        assert_eq!(add(&head(&[(1, &[])]), 3, &[2]), Admission::Orphaned);
    }

    #[test]
    fn bytes_are_bounded_and_old_ones_go_first() {
        let old = head(&[(1, &[]), (2, &[]), (3, &[])]);
        let Admission::Kept(chain) = old.admit(id(4), 985, &[], MAX_BYTES) else { panic!("not kept") };
        assert_eq!(chain.iter().map(|g| g.name).collect::<Vec<_>>(), [id(4), id(3)]);
        assert_eq!(old.admit(id(4), 995, &[id(1)], MAX_BYTES), Admission::TooLarge(1005));
    }
}
