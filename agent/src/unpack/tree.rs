//! Pure: the tree that an archive makes, kept in memory, so that each path and link is judged without a disk.
//!
//! Listing and unpacking therefore come to the same verdicts, and a file system is never asked what a name means.

use std::collections::HashMap;
use std::rc::Rc;

use super::entries::{Entry, Kind};
use super::error::{Defect, LinkFault, Name, UnpackError};
use super::header::BLOCK;
use super::path::{self, components};

/// Mode of a directory that no entry describes.
const IMPLIED_MODE: u32 = 0o755;

/// What the disk has to do for an entry, besides creating it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Make the parents that lie deeper than `known` components, then the entry.
    Create { known: usize },
    /// Remove what has this name, then make the entry: the later one counts, as in GNU tar. Never done to
    /// directories.
    Replace,
    /// Nothing: the directory is there, its mode and time are set at the end; or a file is linked to itself.
    Keep,
}

/// Mode and modification time that a directory gets once nothing more is put into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Directory {
    pub(super) path: Vec<u8>,
    pub(super) mode: u32,
    pub(super) mtime: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NodeKind {
    /// Implied directories get the start of the epoch as their time, so that an archive always makes the same tree.
    Directory {
        mode: u32,
        mtime: i64,
    },
    File,
    Symlink,
}

struct Node {
    parent: usize,
    name: Rc<[u8]>,
    kind: NodeKind,
}

/// Index of the root in `nodes`.
const ROOT: usize = 0;

/// Every path of the archive so far.
pub(super) struct Tree {
    nodes: Vec<Node>,
    children: HashMap<(usize, Rc<[u8]>), usize>,
    entries: u64,
    max_entries: u64,
}

impl Tree {
    pub(super) fn new(max_entries: u64) -> Self {
        let kind = NodeKind::Directory { mode: IMPLIED_MODE, mtime: 0 };
        let root = Node { parent: ROOT, name: Rc::from(&b""[..]), kind };
        Self { nodes: vec![root], children: HashMap::new(), entries: 0, max_entries }
    }

    /// Judges the next entry and remembers it.
    pub(super) fn place(&mut self, entry: &Entry) -> Result<Step, UnpackError> {
        self.count_one()?;
        if entry.path == path::ROOT {
            return Ok(Step::Keep);
        }
        if let Kind::HardLink { target } = &entry.kind {
            self.check_hard_link(entry, target)?;
        }
        let (parent_path, name) = path::split_last(&entry.path);
        let (parent, known) = self.make_parents(entry, parent_path)?;
        let kind = node_kind(entry);
        let Some(&at) = self.children.get(&(parent, Rc::from(name))) else {
            self.insert(parent, name, kind);
            return Ok(Step::Create { known });
        };
        self.meet(entry, at, kind)
    }

    /// All directories but the root, each after everything inside it.
    pub(super) fn directories(&self) -> impl Iterator<Item = Directory> {
        // Parents are made before their children, so that the reverse order visits children first.
        (ROOT + 1..self.nodes.len()).rev().filter_map(|at| match self.nodes[at].kind {
            NodeKind::Directory { mode, mtime } => Some(Directory { path: self.path_of(at), mode, mtime }),
            _ => None,
        })
    }

    fn count_one(&mut self) -> Result<(), UnpackError> {
        self.entries += 1;
        if self.entries > self.max_entries {
            return Err(UnpackError::TooManyEntries { limit: self.max_entries });
        }
        Ok(())
    }

    fn insert(&mut self, parent: usize, name: &[u8], kind: NodeKind) -> usize {
        let name: Rc<[u8]> = Rc::from(name);
        let at = self.nodes.len();
        self.children.insert((parent, Rc::clone(&name)), at);
        self.nodes.push(Node { parent, name, kind });
        at
    }

    /// The node of the entry's parent, and how many components of its path were there already.
    fn make_parents(&mut self, entry: &Entry, parent_path: &[u8]) -> Result<(usize, usize), UnpackError> {
        let (mut at, mut known) = (ROOT, 0);
        for name in components(parent_path) {
            if let Some(&child) = self.children.get(&(at, Rc::from(name))) {
                self.check_passable(entry, child)?;
                known += 1;
                at = child;
            } else {
                self.count_one()?;
                at = self.insert(at, name, NodeKind::Directory { mode: IMPLIED_MODE, mtime: 0 });
            }
        }
        Ok((at, known))
    }

    fn check_passable(&self, entry: &Entry, at: usize) -> Result<(), UnpackError> {
        match self.nodes[at].kind {
            NodeKind::Directory { .. } => Ok(()),
            NodeKind::File => Err(self.both_kinds(entry, at)),
            NodeKind::Symlink => {
                Err(unsafe_link(entry, LinkFault::ThroughSymlink { link: Name::of(&self.path_of(at)) }))
            }
        }
    }

    /// Two entries of one name. A directory never replaces something else nor the other way round: nobody needs it,
    /// and here an attacker makes one program change the mode of what a link points to.
    fn meet(&mut self, entry: &Entry, at: usize, new: NodeKind) -> Result<Step, UnpackError> {
        let old = self.nodes[at].kind;
        let links_itself = matches!(&entry.kind, Kind::HardLink { target } if *target == entry.path);
        let step = match (old, new) {
            (NodeKind::Directory { .. }, NodeKind::Directory { .. }) => Step::Keep,
            (NodeKind::Directory { .. }, NodeKind::Symlink)
            | (NodeKind::Symlink, NodeKind::Directory { .. }) => {
                return Err(unsafe_link(entry, LinkFault::SymlinkAndDirectory));
            }
            (NodeKind::Directory { .. }, _) | (_, NodeKind::Directory { .. }) => {
                return Err(self.both_kinds(entry, at));
            }
            _ if links_itself => Step::Keep,
            _ => Step::Replace,
        };
        self.nodes[at].kind = new;
        Ok(step)
    }

    fn check_hard_link(&self, entry: &Entry, target: &[u8]) -> Result<(), UnpackError> {
        let mut at = ROOT;
        for name in components(target) {
            if self.nodes[at].kind == NodeKind::Symlink {
                return Err(unsafe_link(
                    entry,
                    LinkFault::ThroughSymlink { link: Name::of(&self.path_of(at)) },
                ));
            }
            match self.children.get(&(at, Rc::from(name))) {
                Some(&child) => at = child,
                None => return Err(unsafe_link(entry, LinkFault::NoSuchFile { target: Name::of(target) })),
            }
        }
        match self.nodes[at].kind {
            NodeKind::File => Ok(()),
            _ => Err(unsafe_link(entry, LinkFault::NoSuchFile { target: Name::of(target) })),
        }
    }

    fn both_kinds(&self, entry: &Entry, at: usize) -> UnpackError {
        let defect = Defect::FileAndDirectory { path: Name::of(&self.path_of(at)) };
        UnpackError::Malformed { offset: entry.data_offset.saturating_sub(BLOCK as u64), defect }
    }

    fn path_of(&self, mut at: usize) -> Vec<u8> {
        let mut names = Vec::new();
        while at != ROOT {
            names.push(&*self.nodes[at].name);
            at = self.nodes[at].parent;
        }
        names.reverse();
        names.join(&b'/')
    }
}

fn node_kind(entry: &Entry) -> NodeKind {
    match entry.kind {
        Kind::Directory => NodeKind::Directory { mode: entry.mode, mtime: entry.mtime },
        Kind::File { .. } | Kind::HardLink { .. } => NodeKind::File,
        Kind::Symlink { .. } => NodeKind::Symlink,
    }
}

fn unsafe_link(entry: &Entry, fault: LinkFault) -> UnpackError {
    UnpackError::UnsafeLink { path: Name::of(&entry.path), fault }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry { path: path.into(), kind, mode: 0o700, mtime: 9, data_offset: 512 }
    }

    fn file(path: &str) -> Entry {
        entry(path, Kind::File { size: 0 })
    }

    fn directory(path: &str) -> Entry {
        entry(path, Kind::Directory)
    }

    fn symlink(path: &str) -> Entry {
        entry(path, Kind::Symlink { target: b"/".to_vec() })
    }

    fn link(path: &str, target: &str) -> Entry {
        entry(path, Kind::HardLink { target: target.into() })
    }

    /// The last entry's step or error code; all before it must be accepted.
    fn last(entries: &[Entry]) -> Result<Step, &'static str> {
        let mut tree = Tree::new(100);
        let (last, before) = entries.split_last().unwrap();
        for entry in before {
            tree.place(entry).unwrap();
        }
        tree.place(last).map_err(|error| error.code())
    }

    #[test]
    fn parents_are_made_once() {
        assert_eq!(last(&[file("a/b/c")]), Ok(Step::Create { known: 0 }));
        assert_eq!(last(&[file("a/b/c"), file("a/d/e")]), Ok(Step::Create { known: 1 }));
        assert_eq!(last(&[file("a/b/c"), directory("a")]), Ok(Step::Keep));
        assert_eq!(last(&[directory(".")]), Ok(Step::Keep));
    }

    #[test]
    fn the_later_of_two_files_counts() {
        assert_eq!(last(&[file("a"), file("a")]), Ok(Step::Replace));
        assert_eq!(last(&[symlink("a"), file("a")]), Ok(Step::Replace));
        assert_eq!(last(&[file("a"), symlink("a")]), Ok(Step::Replace));
        assert_eq!(last(&[file("a"), file("b"), link("a", "b")]), Ok(Step::Replace));
        assert_eq!(last(&[file("a"), link("a", "a")]), Ok(Step::Keep));
    }

    #[test]
    fn directories_and_others_do_not_mix() {
        assert_eq!(last(&[symlink("a"), directory("a")]), Err("tar_unsafe_link"));
        assert_eq!(last(&[directory("a"), symlink("a")]), Err("tar_unsafe_link"));
        assert_eq!(last(&[file("a"), directory("a")]), Err("tar_malformed"));
        assert_eq!(last(&[directory("a"), file("a")]), Err("tar_malformed"));
        assert_eq!(last(&[file("a"), file("a/b")]), Err("tar_malformed"));
        assert_eq!(last(&[file("x/a"), file("x")]), Err("tar_malformed"));
    }

    #[test]
    fn no_path_passes_a_symlink() {
        assert_eq!(last(&[symlink("a"), file("a/b")]), Err("tar_unsafe_link"));
        assert_eq!(last(&[symlink("a"), directory("a/b/c")]), Err("tar_unsafe_link"));
        assert_eq!(last(&[file("a"), symlink("a"), file("a/b")]), Err("tar_unsafe_link"));
        assert_eq!(last(&[symlink("a"), file("a"), symlink("b")]), Ok(Step::Create { known: 0 }));
    }

    #[test]
    fn hard_links_need_an_earlier_file() {
        assert_eq!(last(&[file("d/a"), link("b", "d/a")]), Ok(Step::Create { known: 0 }));
        assert_eq!(last(&[file("a"), link("b", "a"), link("c", "b")]), Ok(Step::Create { known: 0 }));
        for refused in [
            &[link("b", "a")][..],
            &[link("a", "a")],
            &[directory("a"), link("b", "a")],
            &[symlink("a"), link("b", "a")],
            &[symlink("a"), link("b", "a/etc")],
            &[file("a"), link("b", "a/c")],
            &[file("a"), symlink("a"), link("b", "a")],
            &[file("a"), link("b", ".")],
        ] {
            assert_eq!(last(refused), Err("tar_unsafe_link"), "{refused:?}");
        }
    }

    #[test]
    fn implied_directories_count_as_entries() {
        let mut tree = Tree::new(3);
        assert!(tree.place(&file("a/b/c")).is_ok());
        assert_eq!(tree.place(&file("a/b/d")).map_err(|error| error.code()), Err("context_too_many_entries"));
        assert!(Tree::new(2).place(&file("a/b/c")).is_err());
    }

    #[test]
    fn directories_come_after_what_is_inside() {
        let mut tree = Tree::new(100);
        for entry in [file("a/b/c"), directory("a"), directory("d")] {
            tree.place(&entry).unwrap();
        }
        let told: Vec<_> = tree.directories().collect();
        let directory = |path: &str, mode, mtime| Directory { path: path.into(), mode, mtime };
        assert_eq!(told, [directory("d", 0o700, 9), directory("a/b", 0o755, 0), directory("a", 0o700, 9)]);
    }
}
