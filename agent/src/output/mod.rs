//! Writes what the user asked for from sealed bytes (shell).
//!
//! Every output appears by one rename at its end; until then, and after any failure, the destination is as it
//! was before. A file is replaced. A directory is replaced if it is empty or, for an image, if it is the
//! layout of a single image; anything else is refused, because replacing it would delete files that Kiln
//! did not write.

mod archive;
mod copy;
mod error;
mod existing;
mod layout;
mod metadata;
mod reference;
mod spec;
mod staging;
mod tree;

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;

use kiln_protocol::{Digest, Reason};

use crate::blobs::BlobStore;
use crate::seal::Sealed;
use archive::{Archive, Sink};
use copy::From;
pub use error::OutputError;
use existing::Kind;
use layout::Entry;
pub use metadata::{image_id, metadata};
pub use spec::{ACCEPTED, Destination, FilesOutput, ImageOutput, OutputSpec, SpecError};
use staging::Staged;

/// Why a root filesystem cannot be unpacked.
#[derive(Debug)]
pub struct UnpackFailure {
    /// The class of the failure.
    pub reason: Reason,
    /// What failed.
    pub source: Box<dyn Error + Send + Sync>,
}

/// Unpacks a plain tar archive into an empty directory.
pub type Unpack<'a> = dyn FnMut(File, BorrowedFd<'_>) -> Result<(), UnpackFailure> + 'a;

/// Where outputs take their bytes from, and whether to go on.
#[derive(Clone, Copy)]
pub struct Writer<'a> {
    /// The store that holds the sealed blobs.
    pub blobs: &'a BlobStore,
    /// Asked between chunks; `true` ends the work with [`OutputError::Stopped`].
    pub should_stop: &'a (dyn Fn() -> bool + Sync),
}

impl Writer<'_> {
    /// Writes the image. `stdout` is used only where the destination says so.
    pub fn image(
        &self,
        output: &ImageOutput,
        sealed: &Sealed,
        stdout: &mut dyn Write,
    ) -> Result<(), OutputError> {
        match output {
            ImageOutput::DockerArchive { destination, reference } => {
                self.archive(destination, &layout::docker_archive(sealed, reference.as_deref()), stdout)
            }
            ImageOutput::OciArchive { destination, reference } => {
                self.archive(destination, &layout::oci(sealed, reference.as_deref()), stdout)
            }
            ImageOutput::OciDirectory { directory, reference } => {
                self.layout(directory, &layout::oci(sealed, reference.as_deref()))
            }
            ImageOutput::Directory { directory } => self.layout(directory, &layout::dir(sealed)),
        }
    }

    /// Writes the target's files, which are a plain tar archive in the store.
    pub fn files(
        &self,
        output: &FilesOutput,
        archive: (&Digest, u64),
        stdout: &mut dyn Write,
        unpack: &mut Unpack<'_>,
    ) -> Result<(), OutputError> {
        let (digest, size) = archive;
        match output {
            FilesOutput::Tar(Destination::Stdout) => {
                self.from().blob(digest, size, stdout, &OutputError::Stdout)?;
                stdout.flush().map_err(OutputError::Stdout)
            }
            FilesOutput::Tar(Destination::File(path)) => {
                let staged = Staged::new(path, Kind::File)?;
                self.from().blob(digest, size, &mut staged.handle(), &|e| staged.write_error(e))?;
                staged.publish()
            }
            FilesOutput::Directory(path) => {
                let staged = Staged::new(path, Kind::Files)?;
                let tar = self.from().open(digest)?;
                unpack(tar, staged.directory()).map_err(|failure| {
                    let UnpackFailure { reason, source } = failure;
                    OutputError::Unpack { path: path.clone(), reason, source }
                })?;
                staged.publish()
            }
        }
    }

    fn archive(
        &self,
        destination: &Destination,
        entries: &[Entry],
        stdout: &mut dyn Write,
    ) -> Result<(), OutputError> {
        let from = self.from();
        match destination {
            Destination::Stdout => {
                let (sink, write_error) = (Sink::Stream(stdout), &OutputError::Stdout);
                Archive { sink, from, write_error }.write(entries)
            }
            Destination::File(path) => {
                let staged = Staged::new(path, Kind::File)?;
                let (sink, write_error) = (Sink::File(staged.handle()), &|e| staged.write_error(e));
                Archive { sink, from, write_error }.write(entries)?;
                staged.publish()
            }
        }
    }

    fn layout(&self, directory: &Path, entries: &[Entry]) -> Result<(), OutputError> {
        let staged = Staged::new(directory, Kind::Layout)?;
        tree::write(&staged, entries, self.from())?;
        staged.publish()
    }

    fn from(&self) -> From<'_> {
        From { blobs: self.blobs, should_stop: self.should_stop }
    }
}

/// Checks before a build that its output can be written; changes nothing.
pub fn preflight(spec: &OutputSpec) -> Result<(), OutputError> {
    let (path, kind) = match spec {
        OutputSpec::Image(
            ImageOutput::DockerArchive { destination: Destination::File(path), .. }
            | ImageOutput::OciArchive { destination: Destination::File(path), .. },
        )
        | OutputSpec::Files(FilesOutput::Tar(Destination::File(path))) => (path, Kind::File),
        OutputSpec::Image(
            ImageOutput::OciDirectory { directory, .. } | ImageOutput::Directory { directory },
        ) => (directory, Kind::Layout),
        OutputSpec::Files(FilesOutput::Directory(directory)) => (directory, Kind::Files),
        OutputSpec::Image(_) | OutputSpec::Files(FilesOutput::Tar(Destination::Stdout)) => return Ok(()),
    };
    existing::preflight(path, kind)
}

/// Writes a small file as a whole: `--metadata-file`, `--iidfile`.
pub fn write_text(path: &Path, text: &str) -> Result<(), OutputError> {
    let staged = Staged::new(path, Kind::File)?;
    staged.handle().write_all(text.as_bytes()).map_err(|e: io::Error| staged.write_error(e))?;
    staged.publish()
}

#[cfg(test)]
mod tests;
