//! Copies one exported layer into the blob store while its content is hashed (shell).

use std::io::{self, BufReader, Read, Write};

use flate2::GzBuilder;
use kiln_protocol::Digest;
use sha2::{Digest as _, Sha256};

use super::decoder::decoder;
use super::export::ExportedFile;
use super::manifest::{Compression, Descriptor};
use super::{SealError, SealOptions, store};
use crate::blobs::{BlobStore, BlobWriter, StoredBlob};

/// Bytes per step of a copy: large enough that system calls do not matter, small enough to stop soon.
const CHUNK: usize = 128 * 1024;
/// "Unknown" in a gzip header, so that the bytes do not tell where they were made.
const GZIP_UNKNOWN_SYSTEM: u8 = 255;
/// One layer on its way into the store.
pub(super) struct Job<'a> {
    pub(super) index: usize,
    pub(super) descriptor: &'a Descriptor,
    pub(super) diff_id: &'a Digest,
    pub(super) file: &'a ExportedFile,
    pub(super) blobs: &'a BlobStore,
    pub(super) options: &'a SealOptions<'a>,
    /// How many uncompressed bytes the image may still have.
    pub(super) unpacked_left: u64,
}

/// A layer in the store.
pub(super) struct Stored {
    pub(super) compression: Compression,
    pub(super) digest: Digest,
    pub(super) size: u64,
    /// Bytes of the plain tar archive.
    pub(super) unpacked: u64,
}

impl Job<'_> {
    /// Copies, and compresses what is not compressed.
    pub(super) fn run(&self) -> Result<Stored, SealError> {
        match Compression::of_media_type(&self.descriptor.media_type) {
            Some(Compression::Gzip) => self.keep(Compression::Gzip),
            Some(Compression::Zstd) => self.keep(Compression::Zstd),
            Some(Compression::None) | None => self.compress(),
        }
    }

    /// Exported without compression: the file is the content.
    fn compress(&self) -> Result<Stored, SealError> {
        self.check_content(&self.descriptor.digest)?;
        let mut encoder = GzBuilder::new()
            .mtime(0)
            .operating_system(GZIP_UNKNOWN_SYSTEM)
            .write(self.writer()?, flate2::Compression::new(self.options.gzip_level));
        let mut content = Content::new(self.unpacked_left);
        let mut reader = self.reader();
        loop {
            let chunk =
                content.next(&mut reader, self.options.should_stop).map_err(|e| self.content_error(e))?;
            if chunk.is_empty() {
                break;
            }
            encoder.write_all(chunk).map_err(|e| self.store_error(e))?;
        }
        self.check_size(content.bytes)?;
        let unpacked = content.bytes;
        self.check_content(&content.digest())?;
        let writer = encoder.finish().map_err(|e| self.store_error(e))?;
        let StoredBlob { digest, size } = store::commit(writer, None, &self.what())?;
        Ok(Stored { compression: Compression::Gzip, digest, size, unpacked })
    }

    /// Exported compressed: the file is kept as it is and decompressed only to be hashed.
    fn keep(&self, compression: Compression) -> Result<Stored, SealError> {
        let mut tee = Tee { reader: self.reader(), writer: self.writer()?, bytes: 0, failure: None };
        let outcome = self.decompress(compression, &mut tee);
        if let Some(error) = tee.failure {
            return Err(self.store_error(error));
        }
        let unpacked = outcome?;
        self.check_size(tee.bytes)?;
        let StoredBlob { digest, size } =
            store::commit(tee.writer, Some(&self.descriptor.digest), &self.what())?;
        Ok(Stored { compression, digest, size, unpacked })
    }

    fn decompress(&self, compression: Compression, tee: &mut Tee<impl Read>) -> Result<u64, SealError> {
        let mut content = Content::new(self.unpacked_left);
        let mut decoder = decoder(compression, BufReader::with_capacity(CHUNK, tee))
            .map_err(|source| SealError::Decompress { layer: self.index, source })?;
        while !content
            .next(&mut decoder, self.options.should_stop)
            .map_err(|e| self.decoder_error(e))?
            .is_empty()
        {}
        let unpacked = content.bytes;
        self.check_content(&content.digest())?;
        Ok(unpacked)
    }

    /// One byte more than promised, so that a file that grew is noticed.
    fn reader(&self) -> impl Read {
        (&self.file.file).take(self.descriptor.size.saturating_add(1))
    }

    fn writer(&self) -> Result<BlobWriter, SealError> {
        store::writer(self.blobs, &self.what())
    }

    fn what(&self) -> String {
        format!("layer {}", self.index)
    }

    fn check_size(&self, found: u64) -> Result<(), SealError> {
        let expected = self.descriptor.size;
        if found == expected { Ok(()) } else { Err(SealError::Size { what: self.what(), found, expected }) }
    }

    fn check_content(&self, found: &Digest) -> Result<(), SealError> {
        if found == self.diff_id {
            return Ok(());
        }
        let (what, expected) = (format!("content of layer {}", self.index), self.diff_id.clone());
        Err(SealError::DigestMismatch { what, found: found.clone(), expected })
    }

    fn store_error(&self, source: io::Error) -> SealError {
        SealError::Store { what: self.what(), source }
    }

    fn content_error(&self, error: ContentError) -> SealError {
        match error {
            ContentError::Read(source) => self.file.read_error(source),
            other => self.bound_error(&other),
        }
    }

    fn decoder_error(&self, error: ContentError) -> SealError {
        match error {
            ContentError::Read(source) => SealError::Decompress { layer: self.index, source },
            other => self.bound_error(&other),
        }
    }

    fn bound_error(&self, error: &ContentError) -> SealError {
        match error {
            ContentError::TooLarge(bytes) => {
                let (what, limit) =
                    (format!("content up to layer {}", self.index), self.options.limits.unpacked_bytes);
                let found = (limit - self.unpacked_left.min(limit)).saturating_add(*bytes);
                SealError::TooLarge { what, found, limit, key: "unpacked_bytes" }
            }
            ContentError::Read(_) | ContentError::Stopped => SealError::Stopped,
        }
    }
}

/// Copies everything that is read into the store.
struct Tee<R> {
    reader: R,
    writer: BlobWriter,
    bytes: u64,
    /// An error of the store; the decoder in between sees only that reading failed.
    failure: Option<io::Error>,
}

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        if let Err(error) = self.writer.write_all(&buffer[..read]) {
            self.failure = Some(error);
            return Err(io::ErrorKind::Other.into());
        }
        self.bytes += read as u64;
        Ok(read)
    }
}

/// The plain tar archive of a layer, as it passes by.
struct Content {
    hash: Sha256,
    bytes: u64,
    limit: u64,
    buffer: Vec<u8>,
}

enum ContentError {
    Read(io::Error),
    TooLarge(u64),
    Stopped,
}

impl Content {
    fn new(limit: u64) -> Self {
        Self { hash: Sha256::new(), bytes: 0, limit, buffer: vec![0; CHUNK] }
    }

    /// The next bytes; empty at the end.
    fn next(
        &mut self,
        reader: &mut impl Read,
        should_stop: &dyn Fn() -> bool,
    ) -> Result<&[u8], ContentError> {
        if should_stop() {
            return Err(ContentError::Stopped);
        }
        let read = read_some(reader, &mut self.buffer).map_err(ContentError::Read)?;
        self.bytes += read as u64;
        if self.bytes > self.limit {
            return Err(ContentError::TooLarge(self.bytes));
        }
        self.hash.update(&self.buffer[..read]);
        Ok(&self.buffer[..read])
    }

    fn digest(self) -> Digest {
        Digest::from_sha256(self.hash.finalize().into())
    }
}

fn read_some(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
