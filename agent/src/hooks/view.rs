//! Shell: what hooks see, as the host's own model. The contract's versions are adapters onto it.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use kiln_protocol::{BuildId, Digest};

use crate::blobs::{BlobError, BlobStore};
use crate::dockerfile::Dockerfile;
use crate::seal::Sealed;
use crate::unpack::{self, Kind, UnpackError};
use kiln_protocol::glob::Glob;

/// Bytes kept of one file that a plugin may read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Bytes kept of all files that plugins may read.
const MAX_FILES_BYTES: u64 = 32 << 20;

/// A build before it runs.
#[derive(Debug, Clone)]
pub struct BuildView {
    /// Digest of all that goes into the build: what a verdict is about.
    pub input_digest: Digest,
    /// The build.
    pub build_id: BuildId,
    /// Which try, from 1.
    pub attempt: u32,
    /// Who asked for it.
    pub requester: String,
    /// Where its image goes, with the registry's host; empty if nowhere.
    pub repository: String,
    /// The tags that it will have there.
    pub tags: Vec<TagView>,
    /// Labels of the request.
    pub labels: Vec<(String, String)>,
    /// Build arguments.
    pub build_args: Vec<BuildArg>,
    /// As images name them, `linux/amd64`.
    pub platforms: Vec<String>,
    /// `--target`.
    pub target: Option<String>,
    /// The name that the user gave the Dockerfile.
    pub dockerfile_path: String,
    /// Its text.
    pub dockerfile: Arc<str>,
    /// Its instructions.
    pub instructions: Arc<[InstructionView]>,
    /// Images that it names.
    pub base_images: Arc<[BaseImageView]>,
    /// The files beside it.
    pub context: Arc<ContextView>,
}

/// A tag and what it points to now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagView {
    /// The tag.
    pub name: String,
    /// The manifest in the registry.
    pub digest: Option<Digest>,
}

/// A build argument. The value of a secret one does not exist on this side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildArg {
    /// Anybody may see it.
    Plain {
        /// Name.
        key: String,
        /// Value.
        value: String,
    },
    /// Only its name is told.
    Secret {
        /// Name.
        key: String,
    },
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstructionView {
    /// In upper case.
    pub keyword: &'static str,
    /// The whole instruction.
    pub raw: String,
    /// What follows keyword and options.
    pub arguments: Vec<String>,
    /// Options with their values.
    pub options: Vec<(String, String)>,
    /// Number of its stage.
    pub stage: Option<u32>,
    /// First line, from 1.
    pub start_line: u32,
    /// Last line.
    pub end_line: u32,
}

/// An image that the build names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseImageView {
    /// Its name, variables expanded.
    pub reference: String,
    /// What it stands for.
    pub digest: Option<Digest>,
    /// The line that names it.
    pub line: u32,
}

/// The instructions of a Dockerfile.
pub fn instructions(dockerfile: &Dockerfile) -> Arc<[InstructionView]> {
    let all = dockerfile.instructions().iter().enumerate();
    all.map(|(index, instruction)| InstructionView {
        keyword: instruction.keyword.as_str(),
        raw: instruction.text.clone(),
        arguments: dockerfile.arguments(instruction),
        options: instruction.options().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        stage: dockerfile.stage_of(index).map(saturate),
        start_line: saturate(instruction.start_line),
        end_line: saturate(instruction.end_line),
    })
    .collect()
}

fn saturate(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A file of the context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextFile {
    /// Below the root; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Its first bytes, if a plugin may read them.
    pub content: Option<Vec<u8>>,
}

/// The regular files of the context, sorted by path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContextView {
    files: Vec<ContextFile>,
}

impl ContextView {
    /// Lists a packed context and keeps the content of files that match `readable` (see
    /// [`super::HookHost::readable`]), within bounds.
    pub fn read(archive: impl Read, limits: &unpack::Limits, readable: &[Glob]) -> Result<Self, UnpackError> {
        let mut files = Vec::new();
        let mut budget = MAX_FILES_BYTES;
        unpack::visit(archive, limits, |entry, body| {
            let Kind::File { size } = entry.kind else { return Ok(()) };
            let path = String::from_utf8_lossy(&entry.path).into_owned();
            let keep = size.min(MAX_FILE_BYTES);
            let wanted = keep <= budget && readable.iter().any(|glob| glob.matches(&path));
            let content = if wanted { Some(head(body, keep)?) } else { None };
            budget -= if wanted { keep } else { 0 };
            files.push(ContextFile { path, size, mode: entry.mode, content });
            Ok::<_, UnpackError>(())
        })?;
        // A path may be in an archive twice: the later entry replaces the earlier.
        files.reverse();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.dedup_by(|later, first| later.path == first.path);
        Ok(Self { files })
    }

    /// Every file.
    pub fn files(&self) -> &[ContextFile] {
        &self.files
    }

    /// The file at `path`.
    pub fn file(&self, path: &str) -> Option<&ContextFile> {
        let index = self.files.binary_search_by(|file| file.path.as_str().cmp(path)).ok()?;
        self.files.get(index)
    }
}

fn head(body: &mut unpack::Body<'_, '_>, bytes: u64) -> Result<Vec<u8>, UnpackError> {
    let mut content = vec![0; usize::try_from(bytes).unwrap_or(0)];
    let mut filled = 0;
    while filled < content.len() {
        // A stream that ends early is an error, so this ends.
        filled += body.read(&mut content[filled..])?;
    }
    Ok(content)
}

/// An image that is sealed and uploaded and has no tag yet.
#[derive(Debug, Clone)]
pub struct ImageView {
    /// What it was built from, with the repository and tags of this image.
    pub build: Arc<BuildView>,
    /// As images name it, `linux/amd64`.
    pub platform: String,
    /// Of the manifest: what a verdict is about.
    pub digest: Digest,
    /// The manifest, byte for byte.
    pub manifest: Arc<[u8]>,
    /// The config, byte for byte.
    pub config: Arc<[u8]>,
    /// Lowest first.
    pub layers: Vec<LayerView>,
    /// Where the blobs of the layers lie.
    pub blobs: BlobStore,
}

/// A layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerView {
    /// What it is.
    pub media_type: String,
    /// Of the packed bytes.
    pub digest: Digest,
    /// Packed bytes.
    pub size: u64,
}

impl ImageView {
    /// The view of a sealed image whose blobs are in `blobs`.
    pub fn of_sealed(
        build: Arc<BuildView>,
        platform: String,
        sealed: &Sealed,
        blobs: &BlobStore,
    ) -> Result<Self, BlobError> {
        let mut config = Vec::new();
        let read = blobs.reader(&sealed.config.digest)?.take(sealed.config.size).read_to_end(&mut config);
        let path = blobs.path(&sealed.config.digest);
        read.map_err(|source| BlobError::Io { action: "read", path, source })?;
        let layers = sealed.layers.iter().map(|layer| &layer.descriptor);
        Ok(Self {
            build,
            platform,
            digest: sealed.image.manifest_digest.clone(),
            manifest: sealed.manifest.clone().into(),
            config: config.into(),
            layers: layers
                .map(|layer| LayerView {
                    media_type: layer.media_type.clone(),
                    digest: layer.digest.clone(),
                    size: layer.size,
                })
                .collect(),
            blobs: blobs.clone(),
        })
    }

    /// Opens a layer; nothing if the image has none of that digest.
    pub(super) fn open(&self, digest: &str) -> Option<Result<(File, u64), BlobError>> {
        let layer = self.layers.iter().find(|layer| layer.digest.as_str() == digest)?;
        Some(self.blobs.reader(&layer.digest).map(|file| (file, layer.size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_listed_and_granted_files_are_kept() {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in [("b/package.json", "old"), ("a.txt", "text"), ("b/package.json", "new!")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o640);
            archive.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
        let archive = archive.into_inner().unwrap();
        let readable = [Glob::new("**/package.json").unwrap()];
        let context = ContextView::read(&archive[..], &unpack::Limits::default(), &readable).unwrap();
        let paths: Vec<_> = context.files().iter().map(|file| (file.path.as_str(), file.size)).collect();
        assert_eq!(paths, [("a.txt", 4), ("b/package.json", 4)]);
        assert_eq!(context.file("b/package.json").unwrap().content.as_deref(), Some(&b"new!"[..]));
        assert_eq!(context.file("a.txt").unwrap().content, None);
        assert_eq!(context.file("a.txt").unwrap().mode, 0o640);
        assert!(context.file("b").is_none());
    }
}
