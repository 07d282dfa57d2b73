//! What already lies at a destination, and whether it may be replaced (shell).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::OutputError;
use super::layout::DIR_VERSION_PREFIX;
use super::staging::{destination, parent};

/// Largest index that is read to see how many images a layout has.
const MAX_INDEX: u64 = 1 << 20;
/// How often a destination is looked at again that other processes exchange meanwhile.
const ATTEMPTS: usize = 8;
/// Length of a sha256 in a file name.
const HEX_LENGTH: usize = 64;

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file.
    File,
    /// A directory with an image.
    Layout,
    /// A directory with the target's files.
    Files,
}

/// What is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Existing {
    /// Nothing, or what a plain rename replaces: a file by a file, an empty directory by a directory.
    Nothing,
    /// A layout of one image, as an earlier build left it.
    Replaceable,
}

/// Follows links of the user, so that the file behind a link is replaced and not the link.
pub(super) fn resolve(target: &Path) -> Result<PathBuf, OutputError> {
    match fs::symlink_metadata(target) {
        Ok(_) => fs::canonicalize(target).map_err(|e| destination("follow", target, e)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(target.to_owned()),
        Err(error) => Err(destination("look at", target, error)),
    }
}

/// Says whether and how `target` may be replaced; changes nothing.
pub(super) fn inspect(target: &Path, kind: Kind) -> Result<Existing, OutputError> {
    for _ in 0..ATTEMPTS {
        let before = identity(target);
        let found = inspect_once(target, kind);
        // Else it was exchanged meanwhile, and what was seen may be half of a removed directory.
        if identity(target) == before {
            return found;
        }
    }
    Err(OutputError::Busy { path: target.to_owned() })
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn inspect_once(target: &Path, kind: Kind) -> Result<Existing, OutputError> {
    let path = || target.to_owned();
    if target.file_name().is_none() {
        return Err(OutputError::NoName { path: path() });
    }
    let metadata = match fs::symlink_metadata(target) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Existing::Nothing),
        Err(error) => return Err(destination("look at", target, error)),
    };
    match kind {
        Kind::File if metadata.is_file() => Ok(Existing::Nothing),
        Kind::File => Err(OutputError::NotAFile { path: path() }),
        Kind::Layout | Kind::Files if !metadata.is_dir() => Err(OutputError::NotADirectory { path: path() }),
        Kind::Layout => inspect_directory(target, true),
        Kind::Files => inspect_directory(target, false),
    }
}

/// Checks before a build that its output can be written; creates nothing.
pub(super) fn preflight(target: &Path, kind: Kind) -> Result<(), OutputError> {
    let target = resolve(target)?;
    inspect(&target, kind)?;
    let mut ancestor = parent(&target);
    while !ancestor.exists() && ancestor.parent().is_some() {
        ancestor = parent(ancestor);
    }
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(ancestor, access).map_err(|e| destination("write into", ancestor, e.into()))
}

fn inspect_directory(target: &Path, layouts: bool) -> Result<Existing, OutputError> {
    let refuse = |found: String| {
        let replaceable = if layouts { " or the layout of a single image" } else { "" };
        Err(OutputError::NotEmpty { path: target.to_owned(), found, replaceable })
    };
    let names = names(target)?;
    let Some(first) = names.first() else { return Ok(Existing::Nothing) };
    if !layouts {
        return refuse(format!("`{}`", first.escape_debug()));
    }
    let foreign = if names.iter().any(|name| name == "oci-layout") {
        foreign_in_oci(target, &names)?
    } else {
        foreign_in_dir(target, &names)
    };
    match foreign {
        None => Ok(Existing::Replaceable),
        Some(found) => refuse(found),
    }
}

fn names(directory: &Path) -> Result<Vec<String>, OutputError> {
    let fail = |e| destination("list", directory, e);
    let entries = fs::read_dir(directory).map_err(fail)?;
    let names = entries.map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()));
    names.collect::<io::Result<_>>().map_err(fail)
}

fn is_digest_name(name: &str) -> bool {
    name.len() == HEX_LENGTH && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn first_other(names: &[String], known: impl Fn(&str) -> bool) -> Option<String> {
    names.iter().find(|name| !known(name)).map(|name| format!("`{}`", name.escape_debug()))
}

/// What does not belong to an OCI layout with at most one image.
fn foreign_in_oci(target: &Path, names: &[String]) -> Result<Option<String>, OutputError> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<serde::de::IgnoredAny>,
    }
    if let Some(other) = first_other(names, |n| matches!(n, "oci-layout" | "index.json" | "blobs")) {
        return Ok(Some(other));
    }
    let index: Option<Index> =
        read_small(&target.join("index.json")).and_then(|b| serde_json::from_slice(&b).ok());
    match index {
        Some(index) if index.manifests.len() <= 1 => {}
        Some(index) => return Ok(Some(format!("a layout of {} images", index.manifests.len()))),
        None => return Ok(Some("an OCI layout without a readable index".to_owned())),
    }
    let blobs = target.join("blobs");
    if let Some(other) = first_other(&self::names(&blobs)?, |name| name == "sha256") {
        return Ok(Some(other));
    }
    Ok(first_other(&self::names(&blobs.join("sha256"))?, is_digest_name))
}

/// What does not belong to a `dir:` layout.
fn foreign_in_dir(target: &Path, names: &[String]) -> Option<String> {
    let version = read_small(&target.join("version")).unwrap_or_default();
    if !version.starts_with(DIR_VERSION_PREFIX.as_bytes()) {
        return first_other(names, |_| false);
    }
    let known = |name: &str| matches!(name, "version" | "manifest.json") || is_digest_name(name);
    first_other(names, known)
}

/// The content of a small plain file.
fn read_small(path: &Path) -> Option<Vec<u8>> {
    let metadata = fs::symlink_metadata(path).ok()?;
    let small = metadata.is_file() && metadata.len() <= MAX_INDEX;
    if small { fs::read(path).ok() } else { None }
}
