//! Seals one plain file, such as the target's root filesystem (shell).

use std::io::Read as _;
use std::os::fd::BorrowedFd;

use kiln_protocol::Digest;

use super::{SealError, SealOptions, export, store};
use crate::blobs::BlobStore;

const CHUNK_BYTES: usize = 256 * 1024;

/// Copies `name` of an untrusted directory into the store. Returns its digest and size in bytes.
pub fn seal_file(
    directory: BorrowedFd<'_>,
    name: &str,
    blobs: &BlobStore,
    options: &SealOptions<'_>,
) -> Result<(Digest, u64), SealError> {
    let file = export::open(directory, name)?.at_most(options.limits.total_bytes, "total_bytes")?;
    let mut writer = store::writer(blobs, name)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = file.size;
    // A file that grows meanwhile is cut at the size that was checked.
    while left > 0 {
        if (options.should_stop)() {
            return Err(SealError::Stopped);
        }
        let wanted = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let count = (&file.file).read(&mut chunk[..wanted]).map_err(|e| file.read_error(e))?;
        if count == 0 {
            break;
        }
        writer.append(&chunk[..count]).map_err(|e| store::store_error(e, name))?;
        left -= count as u64;
    }
    let stored = store::commit(writer, None, name)?;
    Ok((stored.digest, stored.size))
}
