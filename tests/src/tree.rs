//! A directory tree as data, to see whether anything in it changed (shell).

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::base::digest;

/// Every path below a directory with type, mode, owner, time and content.
#[derive(Debug, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, String>);

impl Tree {
    /// Reads a directory.
    pub fn of(dir: &Path) -> Self {
        let paths = paths(dir);
        Self(paths.into_iter().map(|path| (path.clone(), describe(&path))).collect())
    }

    /// Fails the test unless `after` is the same.
    pub fn assert_same(&self, after: &Self) {
        let differ = |a: &Self, b: &Self| -> Vec<PathBuf> {
            a.0.iter()
                .filter(|(path, line)| b.0.get(*path) != Some(line))
                .map(|(p, _)| p.clone())
                .take(5)
                .collect()
        };
        let (changed, new) = (differ(self, after), differ(after, self));
        assert!(
            changed.is_empty() && new.is_empty(),
            "changed or gone: {changed:#?}, changed or new: {new:#?}"
        );
    }
}

/// Every path below a directory.
pub fn paths(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && !path.is_symlink() {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}

/// The files below a directory whose name or content contains one of `needles`.
pub fn containing(dir: &Path, needles: &[String]) -> Vec<PathBuf> {
    let hit =
        |bytes: &[u8]| needles.iter().any(|n| bytes.windows(n.len()).any(|window| window == n.as_bytes()));
    let contains = |path: &PathBuf| {
        let regular = path.symlink_metadata().is_ok_and(|meta| meta.is_file());
        hit(path.to_string_lossy().as_bytes()) || (regular && hit(&std::fs::read(path).unwrap_or_default()))
    };
    paths(dir).into_iter().filter(contains).collect()
}

fn describe(path: &Path) -> String {
    let Ok(meta) = path.symlink_metadata() else { return "vanished".to_owned() };
    let content = match meta.file_type() {
        t if t.is_symlink() => path.read_link().unwrap_or_default().display().to_string(),
        t if t.is_file() => digest(&std::fs::read(path).unwrap_or_default()),
        _ => String::new(),
    };
    format!("{:o} {}:{} {} {content}", meta.permissions().mode(), meta.uid(), meta.gid(), meta.mtime())
}
