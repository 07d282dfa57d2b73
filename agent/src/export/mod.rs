//! Shell: writes an image of buildah's store into a directory, without the layers that nobody needs again.
//!
//! The result is what `buildah push --disable-compression` writes into `dir:`, byte for byte, less the files of
//! the layers that the caller has. Those are most of an image, and buildah offers no way to leave them out.
//!
//! The store was written by untrusted code. Whatever it holds, the worst outcome is a wrong file, and the seal checks
//! each against a digest. Everything is synchronous and in one thread, so that it works in a process that was
//! forked and not replaced; memory is bounded by one document and one record.

mod error;
mod records;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::fd::BorrowedFd;

use kiln_protocol::Digest;
use rustix::fs::{Mode, OFlags, openat};
use serde::{Deserialize, Serialize};

pub use error::ExportError;
use store::Store;

/// What to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Digest of the image's config, by which buildah names it.
    pub image: Digest,
    /// Diff ids of layers whose files are not wanted.
    pub present: BTreeSet<Digest>,
}

/// Writes an image of one of the stores, the first that has it, into the empty directory `out`.
pub fn export(stores: &[BorrowedFd<'_>], out: BorrowedFd<'_>, order: &Order) -> Result<(), ExportError> {
    let stores: Vec<_> = stores.iter().map(|directory| Store { directory: *directory }).collect();
    let image = stores.iter().find_map(|store| store.image(&order.image).transpose());
    let image = image.ok_or_else(|| ExportError::NoImage { image: order.image.clone() })??;
    let mut manifest = records::Manifest::parse(&image.manifest)?;
    let diff_ids = records::diff_ids(&image.config)?;
    write_file(out, order.image.hex(), |file| file.write_all(&image.config).map_err(ExportError::Write))?;
    let mut sizes = manifest.sizes(diff_ids.len())?;
    // An image may stack the same layer twice.
    let mut written = BTreeMap::new();
    for (diff_id, size) in diff_ids.iter().zip(&mut sizes).filter(|(id, _)| !order.present.contains(id)) {
        *size = match written.get(diff_id) {
            Some(size) => *size,
            None => write_layer(&stores, out, diff_id)?,
        };
        written.insert(diff_id, *size);
    }
    manifest.set_layers(&diff_ids, &sizes);
    write_file(out, "manifest.json", |file| file.write_all(&manifest.to_bytes()?).map_err(ExportError::Write))
}

fn write_layer(stores: &[Store<'_>], out: BorrowedFd<'_>, diff_id: &Digest) -> Result<u64, ExportError> {
    let layer = stores.iter().find_map(|store| store.layer(diff_id).transpose());
    let layer = layer.ok_or_else(|| ExportError::NoLayer { diff_id: diff_id.clone() })??;
    let mut size = 0;
    write_file(out, diff_id.hex(), |file| {
        size = layer.assemble(file)?;
        Ok(())
    })?;
    Ok(size)
}

fn write_file(
    out: BorrowedFd<'_>,
    name: &str,
    content: impl FnOnce(&mut BufWriter<File>) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file =
        openat(out, name, flags, Mode::from_raw_mode(0o644)).map_err(|e| ExportError::Write(e.into()))?;
    let mut file = BufWriter::new(File::from(file));
    content(&mut file)?;
    file.flush().map_err(ExportError::Write)
}

#[cfg(test)]
mod tests;
