//! Writes the entries of a layout as files of a directory (shell).

use std::fs::{self, File};
use std::io::Write;

use super::OutputError;
use super::copy::From;
use super::layout::{Entry, Source};
use super::staging::Staged;

/// Fills the staged directory.
pub(super) fn write(staged: &Staged, entries: &[Entry], from: From<'_>) -> Result<(), OutputError> {
    entries.iter().try_for_each(|entry| write_entry(staged, entry, from))
}

fn write_entry(staged: &Staged, entry: &Entry, from: From<'_>) -> Result<(), OutputError> {
    let path = staged.path().join(&entry.name);
    let fail = |e| staged.write_error(e);
    if entry.source == Source::Directory {
        return fs::create_dir(path).map_err(fail);
    }
    let mut file = File::create_new(path).map_err(fail)?;
    match &entry.source {
        Source::Directory => Ok(()),
        Source::Bytes(bytes) => file.write_all(bytes).map_err(fail),
        Source::Blob { digest, size } => from.blob(digest, *size, &mut file, &fail),
        Source::PlainLayer(layer) => from.plain(layer, &mut file, &fail).map(drop),
    }
}
