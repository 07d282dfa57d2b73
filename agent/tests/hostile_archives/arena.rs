//! A root to unpack into, beside a canary that nothing may touch.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use kiln_agent::unpack::{self, Limits, Modes, Summary, UnpackError};
use tempfile::TempDir;

/// `base/root`, made anew for each archive, and `base/canary`, which is watched.
pub(crate) struct Arena {
    base: TempDir,
    before: Vec<String>,
}

impl Arena {
    pub(crate) fn new() -> Self {
        let base = TempDir::with_prefix("kiln-unpack-").unwrap();
        let canary = base.path().join("canary");
        fs::create_dir_all(canary.join("sub")).unwrap();
        fs::write(canary.join("victim"), "untouched").unwrap();
        fs::set_permissions(canary.join("victim"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("victim", canary.join("link")).unwrap();
        let before = snapshot(&canary);
        let arena = Self { base, before };
        arena.clear();
        arena
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.base.path().join("root")
    }

    pub(crate) fn canary(&self) -> PathBuf {
        self.base.path().join("canary")
    }

    /// Empties the root.
    pub(crate) fn clear(&self) {
        if self.root().exists() {
            fs::remove_dir_all(self.root()).unwrap();
        }
        fs::create_dir(self.root()).unwrap();
    }

    pub(crate) fn unpack(&self, archive: impl Read, limits: &Limits) -> Result<Summary, UnpackError> {
        self.unpack_as(Modes::Owned, archive, limits)
    }

    pub(crate) fn unpack_as(
        &self,
        modes: Modes,
        archive: impl Read,
        limits: &Limits,
    ) -> Result<Summary, UnpackError> {
        let root = fs::File::open(self.root()).unwrap();
        unpack::unpack(archive, root.as_fd(), modes, limits)
    }

    /// Fails if anything outside the root has changed.
    pub(crate) fn assert_untouched(&self, what: &str) {
        assert_eq!(snapshot(&self.canary()), self.before, "{what}: the canary has changed");
        let mut names: Vec<_> =
            fs::read_dir(self.base.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["canary", "root"], "{what}: something new beside the root");
    }

    /// Bytes of all files below the root.
    pub(crate) fn bytes_on_disk(&self) -> u64 {
        walk(&self.root())
            .iter()
            .map(|path| fs::symlink_metadata(path).unwrap())
            .map(|meta| size_of(&meta))
            .sum()
    }
}

fn size_of(meta: &fs::Metadata) -> u64 {
    if meta.is_file() { meta.len() } else { 0 }
}

/// One line for each path below: type and mode, time, link count, content or target. Sorted.
pub(crate) fn snapshot(root: &Path) -> Vec<String> {
    walk(root).iter().map(|path| describe(root, path)).collect()
}

fn describe(root: &Path, path: &Path) -> String {
    let meta = fs::symlink_metadata(path).unwrap();
    let content = if meta.is_symlink() {
        fs::read_link(path).unwrap().as_os_str().as_bytes().escape_ascii().to_string()
    } else if meta.is_file() {
        fs::read(path).unwrap().escape_ascii().to_string()
    } else {
        String::new()
    };
    let links = if meta.is_dir() { 0 } else { meta.nlink() };
    let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii();
    format!("{name} {:o} {} {links} {content}", meta.mode(), meta.mtime())
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let mut waiting = vec![directory.to_path_buf()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                waiting.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort();
    paths
}
