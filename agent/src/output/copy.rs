//! Copies sealed bytes to their destination in steps between which the caller may stop (shell).

use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use kiln_protocol::Digest;
use sha2::{Digest as _, Sha256};

use super::OutputError;
use crate::blobs::BlobStore;
use crate::seal::manifest::Compression;
use crate::seal::{SealedLayer, blob_io_error};

/// Bytes per step: large enough that system calls do not matter, small enough to stop soon.
const CHUNK: usize = 128 * 1024;

/// The sealed bytes, and whether to go on.
#[derive(Clone, Copy)]
pub(super) struct From<'a> {
    pub(super) blobs: &'a BlobStore,
    pub(super) should_stop: &'a (dyn Fn() -> bool + Sync),
}

/// A failure of either side of a copy.
enum CopyError {
    Read(io::Error),
    Write(io::Error),
    Stopped,
}

impl From<'_> {
    pub(super) fn open(&self, digest: &Digest) -> Result<File, OutputError> {
        self.blobs.reader(digest).map_err(|error| blob_error(digest, blob_io_error(error)))
    }

    /// Writes a blob, whose length has to be `size`.
    pub(super) fn blob(
        &self,
        digest: &Digest,
        size: u64,
        to: &mut dyn Write,
        write_error: &dyn Fn(io::Error) -> OutputError,
    ) -> Result<(), OutputError> {
        let mut file = self.open(digest)?;
        let copied = self.copy(&mut file, |chunk| to.write_all(chunk));
        let bytes = copied.map_err(|e| split(e, digest, write_error))?;
        if bytes == size { Ok(()) } else { Err(length_error(digest, bytes, size)) }
    }

    /// Writes the plain content of a layer, which has to be what its diff id says. Returns its length.
    pub(super) fn plain(
        &self,
        layer: &SealedLayer,
        to: &mut dyn Write,
        write_error: &dyn Fn(io::Error) -> OutputError,
    ) -> Result<u64, OutputError> {
        let digest = &layer.descriptor.digest;
        let file = BufReader::with_capacity(CHUNK, self.open(digest)?);
        let compression =
            Compression::of_media_type(&layer.descriptor.media_type).unwrap_or(Compression::None);
        let mut decoder = crate::seal::decoder(compression, file).map_err(|e| blob_error(digest, e))?;
        let mut hash = Sha256::new();
        let copied = self.copy(&mut decoder, |chunk| {
            hash.update(chunk);
            to.write_all(chunk)
        });
        let bytes = copied.map_err(|e| split(e, digest, write_error))?;
        let found = Digest::from_sha256(hash.finalize().into());
        if found == layer.diff_id {
            return Ok(bytes);
        }
        let (found, expected) = (found.to_string(), layer.diff_id.to_string());
        Err(OutputError::Content { digest: digest.clone(), found, expected })
    }

    fn copy(
        &self,
        from: &mut dyn Read,
        mut to: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<u64, CopyError> {
        let (mut buffer, mut bytes) = (vec![0; CHUNK], 0);
        while !(self.should_stop)() {
            match from.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(read) => {
                    to(&buffer[..read]).map_err(CopyError::Write)?;
                    bytes += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CopyError::Read(error)),
            }
        }
        Err(CopyError::Stopped)
    }
}

fn split(error: CopyError, digest: &Digest, write_error: &dyn Fn(io::Error) -> OutputError) -> OutputError {
    match error {
        CopyError::Read(source) => blob_error(digest, source),
        CopyError::Write(source) => write_error(source),
        CopyError::Stopped => OutputError::Stopped,
    }
}

fn blob_error(digest: &Digest, source: io::Error) -> OutputError {
    OutputError::Blob { digest: digest.clone(), source }
}

pub(super) fn length_error(digest: &Digest, found: u64, expected: u64) -> OutputError {
    let (found, expected) = (format!("{found} bytes long"), format!("{expected} bytes"));
    OutputError::Content { digest: digest.clone(), found, expected }
}
