//! Writes the entries of a layout as a tar archive that is the same every time (shell).

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

use super::OutputError;
use super::copy::{From, length_error};
use super::layout::{Entry, Source};
use crate::seal::SealedLayer;

/// Size of headers and unit of padding in a tar archive.
const BLOCK: u64 = 512;
/// The two empty blocks that end an archive.
const END: [u8; 1024] = [0; 1024];

/// Where the archive goes.
pub(super) enum Sink<'a> {
    /// A file, in which a header can be corrected later.
    File(&'a File),
    /// A stream, in which it cannot.
    Stream(&'a mut dyn Write),
}

/// An archive that is being written.
pub(super) struct Archive<'a> {
    pub(super) sink: Sink<'a>,
    pub(super) from: From<'a>,
    pub(super) write_error: &'a dyn Fn(io::Error) -> OutputError,
}

impl Archive<'_> {
    /// Writes every entry and the end of the archive.
    pub(super) fn write(mut self, entries: &[Entry]) -> Result<(), OutputError> {
        entries.iter().try_for_each(|entry| self.append(entry))?;
        self.put(&END)?;
        self.writer().flush().map_err(self.write_error)
    }

    fn append(&mut self, entry: &Entry) -> Result<(), OutputError> {
        match &entry.source {
            Source::Directory => self.header(&entry.name, tar::EntryType::Directory, 0),
            Source::Bytes(bytes) => {
                let size = bytes.len() as u64;
                self.header(&entry.name, tar::EntryType::Regular, size)?;
                self.put(bytes)?;
                self.pad(size)
            }
            Source::Blob { digest, size } => {
                self.header(&entry.name, tar::EntryType::Regular, *size)?;
                let (from, write_error) = (self.from, self.write_error);
                from.blob(digest, *size, self.writer(), write_error)?;
                self.pad(*size)
            }
            Source::PlainLayer(layer) => self.append_plain(&entry.name, layer),
        }
    }

    /// The length of a base layer's content is known only once it was read.
    fn append_plain(&mut self, name: &str, layer: &SealedLayer) -> Result<(), OutputError> {
        match (layer.unpacked, &self.sink) {
            (Some(size), _) => self.append_sized(name, layer, size),
            (None, Sink::File(file)) => {
                let mut file = *file;
                let at = file.stream_position().map_err(self.write_error)?;
                self.header(name, tar::EntryType::Regular, 0)?;
                let size = self.plain(layer)?;
                self.pad(size)?;
                file.seek(SeekFrom::Start(at)).map_err(self.write_error)?;
                self.header(name, tar::EntryType::Regular, size)?;
                file.seek(SeekFrom::End(0)).map(drop).map_err(self.write_error)
            }
            (None, Sink::Stream(_)) => {
                let size = self.from.plain(layer, &mut io::sink(), self.write_error)?;
                self.append_sized(name, layer, size)
            }
        }
    }

    fn append_sized(&mut self, name: &str, layer: &SealedLayer, size: u64) -> Result<(), OutputError> {
        self.header(name, tar::EntryType::Regular, size)?;
        let written = self.plain(layer)?;
        if written != size {
            return Err(length_error(&layer.descriptor.digest, written, size));
        }
        self.pad(size)
    }

    fn plain(&mut self, layer: &SealedLayer) -> Result<u64, OutputError> {
        let (from, write_error) = (self.from, self.write_error);
        from.plain(layer, self.writer(), write_error)
    }

    fn header(&mut self, name: &str, kind: tar::EntryType, size: u64) -> Result<(), OutputError> {
        let directory = kind == tar::EntryType::Directory;
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(if directory { 0o755 } else { 0o644 });
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(size);
        // Every name is at most a digest long and fits.
        header
            .set_path(if directory { format!("{name}/") } else { name.to_owned() })
            .map_err(self.write_error)?;
        header.set_cksum();
        self.put(header.as_bytes())
    }

    fn pad(&mut self, size: u64) -> Result<(), OutputError> {
        let missing = (BLOCK - size % BLOCK) % BLOCK;
        self.put(&END[..usize::try_from(missing).unwrap_or_default()])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        let write_error = self.write_error;
        self.writer().write_all(bytes).map_err(write_error)
    }

    fn writer(&mut self) -> &mut dyn Write {
        match &mut self.sink {
            Sink::File(file) => file,
            Sink::Stream(stream) => *stream,
        }
    }
}
