//! The context extractor against hostile archives, and against GNU tar on those that it accepts.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests outside of test functions")]

#[path = "hostile_archives/arena.rs"]
mod arena;
#[path = "hostile_archives/corpus.rs"]
mod corpus;
#[path = "hostile_archives/forge.rs"]
mod forge;
#[path = "hostile_archives/gnu.rs"]
mod gnu;
#[path = "hostile_archives/limits.rs"]
mod limits;
#[path = "hostile_archives/oracle.rs"]
mod oracle;
#[path = "hostile_archives/random.rs"]
mod random;
#[path = "hostile_archives/tree.rs"]
mod tree;

use arena::Arena;
use corpus::Case;
use kiln_agent::unpack::Limits;
use oracle::{difference, listed};

/// Every case must be refused with this code, by unpacking and by listing, and leave the canary alone.
fn assert_refused(code: &str, arena: &Arena, cases: Vec<Case>) {
    let limits = Limits::default();
    for (what, archive) in cases {
        let unpacked = arena.unpack(&archive[..], &limits).map_err(|error| error.code());
        assert_eq!(unpacked.err(), Some(code), "{what}, unpacked");
        let listed = listed(&archive, &limits).map_err(|error| error.code());
        assert_eq!(listed.err(), Some(code), "{what}, listed");
        arena.assert_untouched(what);
        arena.clear();
    }
}

#[test]
fn unsafe_paths_are_refused() {
    let arena = Arena::new();
    assert_refused("tar_unsafe_path", &arena, corpus::unsafe_paths(&arena.canary()));
}

#[test]
fn unsafe_links_are_refused() {
    let arena = Arena::new();
    assert_refused("tar_unsafe_link", &arena, corpus::unsafe_links(&arena.canary()));
}

#[test]
fn special_files_are_refused() {
    assert_refused("tar_forbidden_type", &Arena::new(), corpus::forbidden_types());
}

#[test]
fn malformed_archives_are_refused() {
    assert_refused("tar_malformed", &Arena::new(), corpus::malformed());
}

#[test]
fn what_is_no_archive_is_named() {
    assert_refused("context_not_an_archive", &Arena::new(), corpus::strangers());
}

#[test]
fn accepted_archives_mean_the_same_to_gnu_tar() {
    let limits = Limits::default();
    let arena = Arena::new();
    for (what, archive) in corpus::accepted() {
        let ours = listed(&archive, &limits).unwrap_or_else(|error| panic!("{what}: {error}"));
        let different = difference(&archive, &ours);
        assert_eq!(different, None, "{what}: {}", different.as_deref().unwrap_or_default());
        let summary = arena.unpack(&archive[..], &limits).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(summary.entries, ours.len() as u64, "{what}");
        arena.assert_untouched(what);
        arena.clear();
    }
}
