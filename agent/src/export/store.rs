//! Reads buildah's store, of which every file may be hostile (shell).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use flate2::read::MultiGzDecoder;
use kiln_protocol::Digest;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::ExportError;
use super::records::{self, Part};

/// Registries commonly refuse manifests over 4 MiB; the seal takes no larger document either.
const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// `layers.json` has half a kilobyte per layer, and a list of owners.
const MAX_INDEX_BYTES: u64 = 16 << 20;
/// A record holds at most the headers of one file, with names and attributes, in base64.
const MAX_RECORD_BYTES: u64 = 16 << 20;

/// A store of buildah with the overlay driver.
pub(super) struct Store<'a> {
    pub(super) directory: BorrowedFd<'a>,
}

/// The documents of an image.
pub(super) struct Image {
    pub(super) manifest: Vec<u8>,
    pub(super) config: Vec<u8>,
}

/// A layer whose parts are found.
pub(super) struct Layer {
    /// Name of its description, for messages.
    name: String,
    description: File,
    /// Where its files are.
    files: File,
}

impl Store<'_> {
    /// The image, if this store has it.
    pub(super) fn image(&self, id: &Digest) -> Result<Option<Image>, ExportError> {
        let directory = format!("overlay-images/{}", id.hex());
        let Some(manifest) = self.document(&format!("{directory}/manifest"), MAX_DOCUMENT_BYTES)? else {
            return Ok(None);
        };
        // A name that is not all small letters, digits and dots is stored in base64.
        let config = format!("{directory}/={}", BASE64.encode(id.to_string()));
        let config = self.document(&config, MAX_DOCUMENT_BYTES)?;
        Ok(config.map(|config| Image { manifest, config }))
    }

    /// The layer, if this store has it.
    pub(super) fn layer(&self, diff_id: &Digest) -> Result<Option<Layer>, ExportError> {
        let index = "overlay-layers/layers.json";
        let Some(layers) = self.document(index, MAX_INDEX_BYTES)? else { return Ok(None) };
        let name = records::layer_name(&layers, diff_id).map_err(|e| ExportError::malformed(index, e))?;
        let Some(id) = name else { return Ok(None) };
        let name = format!("overlay-layers/{id}.tar-split.gz");
        let description = self.open(&name, OFlags::empty())?;
        let files = self.open(&format!("overlay/{id}/diff"), OFlags::DIRECTORY)?;
        Ok(Some(Layer { name, description, files }))
    }

    fn open(&self, name: &str, flags: OFlags) -> Result<File, ExportError> {
        let failed = |source| ExportError::Read { name: name.to_owned(), source };
        open_below(self.directory, name.as_bytes(), flags).map_err(failed)
    }

    /// A whole file; `None` if there is none.
    fn document(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, ExportError> {
        let file = match self.open(name, OFlags::empty()) {
            Err(ExportError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let mut bytes = Vec::new();
        let read = file.take(limit + 1).read_to_end(&mut bytes);
        read.map_err(|source| ExportError::Read { name: name.to_owned(), source })?;
        if bytes.len() as u64 > limit {
            return Err(ExportError::TooLarge { name: name.to_owned(), limit });
        }
        Ok(Some(bytes))
    }
}

impl Layer {
    /// Writes the tar archive and returns its length.
    pub(super) fn assemble(&self, out: &mut impl Write) -> Result<u64, ExportError> {
        let mut lines = BufReader::new(MultiGzDecoder::new(BufReader::new(&self.description)));
        let mut size = 0;
        while let Some(record) = self.next_record(&mut lines)? {
            let part = records::part(&record).map_err(|e| ExportError::malformed(&self.name, e))?;
            size += match part {
                None => 0,
                Some(Part::Bytes(bytes)) => {
                    out.write_all(&bytes).map_err(ExportError::Write)?;
                    bytes.len() as u64
                }
                Some(Part::File { name, size }) => self.copy(&name, size, out)?,
            };
        }
        Ok(size)
    }

    fn next_record(&self, lines: &mut impl BufRead) -> Result<Option<Vec<u8>>, ExportError> {
        let mut line = Vec::new();
        let read = lines.take(MAX_RECORD_BYTES).read_until(b'\n', &mut line);
        read.map_err(|source| ExportError::Read { name: self.name.clone(), source })?;
        match line.last() {
            None => Ok(None),
            Some(b'\n') => Ok(Some(line)),
            Some(_) => Err(ExportError::malformed(&self.name, "a record is cut off or too long")),
        }
    }

    fn copy(&self, name: &[u8], size: u64, out: &mut impl Write) -> Result<u64, ExportError> {
        let shown = || String::from_utf8_lossy(name).into_owned();
        let failed = |source| ExportError::Read { name: shown(), source };
        // Archives of a base may have absolute names.
        let start = name.iter().position(|byte| *byte != b'/').unwrap_or(name.len());
        let file = open_below(self.files.as_fd(), &name[start..], OFlags::empty()).map_err(failed)?;
        let found = file.metadata().map_err(failed)?.len();
        if found != size {
            return Err(ExportError::malformed(&shown(), format!("{found} bytes, not {size} as described")));
        }
        let copied = io::copy(&mut file.take(size), out).map_err(ExportError::Write)?;
        if copied != size {
            return Err(ExportError::malformed(&shown(), format!("it shrank to {copied} bytes")));
        }
        Ok(size)
    }
}

/// Opens a plain file, or with the flag a directory: no link, no other file system, nothing that blocks.
fn open_below(directory: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> io::Result<File> {
    let flags =
        flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let file = File::from(openat2(directory, name, flags, Mode::empty(), resolve)?);
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_dir() && flags.contains(OFlags::DIRECTORY) {
        return Ok(file);
    }
    Err(io::Error::from(io::ErrorKind::InvalidInput))
}
