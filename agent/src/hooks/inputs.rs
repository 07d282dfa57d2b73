//! Shell: the contract's `input` interface over the host's views.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use wasmtime::component::{Resource, ResourceTableError};

use super::bindings::types::{Descriptor, Entry, Fault, FileEntry, Page};
use super::bindings::{
    BaseImageHandle, BlobHandle, BuildHandle, ImageHandle, InstructionHandle, input, types,
};
use super::state::{CallState, Ended};
use super::view::{BuildArg, BuildView, ImageView, InstructionView};
use kiln_protocol::glob::Glob;

/// Entries of one page of a list.
const MAX_PAGE: u32 = 1000;
/// Bytes of one read.
const MAX_READ_BYTES: u32 = 1 << 20;

type Answer<T> = wasmtime::Result<T>;

impl types::Host for CallState {}
impl input::Host for CallState {}

impl CallState {
    pub(super) fn push<T: Send + 'static>(&mut self, value: T) -> Answer<Resource<T>> {
        self.table.push(value).map_err(|error| match error {
            ResourceTableError::Full => wasmtime::Error::new(Ended::Handles),
            other => wasmtime::Error::new(other),
        })
    }

    fn build(&mut self, handle: &Resource<BuildHandle>) -> Answer<Arc<BuildView>> {
        self.count_call()?;
        Ok(Arc::clone(&self.table.get(handle)?.0))
    }

    fn image(&mut self, handle: &Resource<ImageHandle>) -> Answer<Arc<ImageView>> {
        self.count_call()?;
        Ok(Arc::clone(&self.table.get(handle)?.0))
    }

    fn instruction(&mut self, handle: &Resource<InstructionHandle>) -> Answer<&InstructionView> {
        self.count_call()?;
        let InstructionHandle(build, index) = self.table.get(handle)?;
        build.instructions.get(*index).ok_or_else(|| wasmtime::Error::new(ResourceTableError::NotPresent))
    }

    fn base_image(&mut self, handle: &Resource<BaseImageHandle>) -> Answer<&super::view::BaseImageView> {
        self.count_call()?;
        let BaseImageHandle(build, index) = self.table.get(handle)?;
        build.base_images.get(*index).ok_or_else(|| wasmtime::Error::new(ResourceTableError::NotPresent))
    }
}

fn entries(pairs: &[(String, String)]) -> Vec<Entry> {
    pairs.iter().map(|(key, value)| Entry { key: key.clone(), value: value.clone() }).collect()
}

impl input::HostInstruction for CallState {
    fn keyword(&mut self, this: Resource<InstructionHandle>) -> Answer<String> {
        Ok(self.instruction(&this)?.keyword.to_owned())
    }

    fn raw(&mut self, this: Resource<InstructionHandle>) -> Answer<String> {
        Ok(self.instruction(&this)?.raw.clone())
    }

    fn arguments(&mut self, this: Resource<InstructionHandle>) -> Answer<Vec<String>> {
        Ok(self.instruction(&this)?.arguments.clone())
    }

    fn options(&mut self, this: Resource<InstructionHandle>) -> Answer<Vec<Entry>> {
        Ok(entries(&self.instruction(&this)?.options))
    }

    fn stage(&mut self, this: Resource<InstructionHandle>) -> Answer<Option<u32>> {
        Ok(self.instruction(&this)?.stage)
    }

    fn start_line(&mut self, this: Resource<InstructionHandle>) -> Answer<u32> {
        Ok(self.instruction(&this)?.start_line)
    }

    fn end_line(&mut self, this: Resource<InstructionHandle>) -> Answer<u32> {
        Ok(self.instruction(&this)?.end_line)
    }

    fn drop(&mut self, this: Resource<InstructionHandle>) -> Answer<()> {
        Ok(self.table.delete(this).map(drop)?)
    }
}

impl input::HostBaseImage for CallState {
    fn reference(&mut self, this: Resource<BaseImageHandle>) -> Answer<String> {
        Ok(self.base_image(&this)?.reference.clone())
    }

    fn digest(&mut self, this: Resource<BaseImageHandle>) -> Answer<Option<String>> {
        Ok(self.base_image(&this)?.digest.as_ref().map(ToString::to_string))
    }

    fn line(&mut self, this: Resource<BaseImageHandle>) -> Answer<u32> {
        Ok(self.base_image(&this)?.line)
    }

    fn drop(&mut self, this: Resource<BaseImageHandle>) -> Answer<()> {
        Ok(self.table.delete(this).map(drop)?)
    }
}

impl input::HostBuild for CallState {
    fn build_id(&mut self, this: Resource<BuildHandle>) -> Answer<String> {
        Ok(self.build(&this)?.build_id.to_string())
    }

    fn attempt(&mut self, this: Resource<BuildHandle>) -> Answer<u32> {
        Ok(self.build(&this)?.attempt)
    }

    fn requester(&mut self, this: Resource<BuildHandle>) -> Answer<String> {
        Ok(self.build(&this)?.requester.clone())
    }

    fn repository(&mut self, this: Resource<BuildHandle>) -> Answer<String> {
        Ok(self.build(&this)?.repository.clone())
    }

    fn tags(&mut self, this: Resource<BuildHandle>) -> Answer<Vec<String>> {
        Ok(tag_names(&*self.build(&this)?))
    }

    fn labels(&mut self, this: Resource<BuildHandle>) -> Answer<Vec<Entry>> {
        Ok(entries(&self.build(&this)?.labels))
    }

    fn build_args(&mut self, this: Resource<BuildHandle>) -> Answer<Vec<Entry>> {
        let entry = |arg: &BuildArg| match arg {
            BuildArg::Plain { key, value } => Entry { key: key.clone(), value: value.clone() },
            BuildArg::Secret { key } => Entry { key: key.clone(), value: String::new() },
        };
        Ok(self.build(&this)?.build_args.iter().map(entry).collect())
    }

    fn build_arg_is_secret(&mut self, this: Resource<BuildHandle>, wanted: String) -> Answer<bool> {
        let secret = |arg: &BuildArg| matches!(arg, BuildArg::Secret { key } if *key == wanted);
        Ok(self.build(&this)?.build_args.iter().any(secret))
    }

    fn platforms(&mut self, this: Resource<BuildHandle>) -> Answer<Vec<String>> {
        Ok(self.build(&this)?.platforms.clone())
    }

    fn tag_digest(&mut self, this: Resource<BuildHandle>, tag: String) -> Answer<Option<String>> {
        let build = self.build(&this)?;
        let found = build.tags.iter().find(|known| known.name == tag);
        Ok(found.and_then(|found| found.digest.as_ref()).map(ToString::to_string))
    }

    fn target_stage(&mut self, this: Resource<BuildHandle>) -> Answer<Option<String>> {
        Ok(self.build(&this)?.target.clone())
    }

    fn dockerfile_path(&mut self, this: Resource<BuildHandle>) -> Answer<String> {
        Ok(self.build(&this)?.dockerfile_path.clone())
    }

    fn dockerfile(&mut self, this: Resource<BuildHandle>) -> Answer<String> {
        Ok(self.build(&this)?.dockerfile.to_string())
    }

    fn instructions(&mut self, this: Resource<BuildHandle>) -> Answer<Vec<Resource<InstructionHandle>>> {
        let build = self.build(&this)?;
        let all = 0..build.instructions.len();
        all.map(|index| self.push(InstructionHandle(Arc::clone(&build), index))).collect()
    }

    fn base_images(&mut self, this: Resource<BuildHandle>) -> Answer<Vec<Resource<BaseImageHandle>>> {
        let build = self.build(&this)?;
        let all = 0..build.base_images.len();
        all.map(|index| self.push(BaseImageHandle(Arc::clone(&build), index))).collect()
    }

    fn context_file_count(&mut self, this: Resource<BuildHandle>) -> Answer<u32> {
        Ok(u32::try_from(self.build(&this)?.context.files().len()).unwrap_or(u32::MAX))
    }

    fn context_files(
        &mut self,
        this: Resource<BuildHandle>,
        glob: String,
        page: Page,
    ) -> Answer<Vec<FileEntry>> {
        let build = self.build(&this)?;
        // The contract has no fault here; what is no glob matches nothing.
        let Ok(glob) = Glob::new(&glob) else { return Ok(Vec::new()) };
        let matching = build.context.files().iter().filter(|file| glob.matches(&file.path));
        let page = matching.skip(page.offset as usize).take(page.limit.min(MAX_PAGE) as usize);
        let entry = |file: &super::view::ContextFile| FileEntry {
            path: file.path.clone(),
            size: file.size,
            mode: file.mode,
        };
        Ok(page.map(entry).collect())
    }

    fn read_context_file(
        &mut self,
        this: Resource<BuildHandle>,
        path: String,
        max: u32,
    ) -> Answer<Result<Vec<u8>, Fault>> {
        let build = self.build(&this)?;
        if !self.terms.context_read.iter().any(|glob| glob.matches(&path)) {
            let message = format!("no glob of grant.context_read matches {path}");
            return Ok(Err(Fault::CapabilityDenied(message)));
        }
        Ok(read_file(&build, &path, max).map_err(Fault::Other))
    }

    fn drop(&mut self, this: Resource<BuildHandle>) -> Answer<()> {
        Ok(self.table.delete(this).map(drop)?)
    }
}

fn tag_names(build: &BuildView) -> Vec<String> {
    build.tags.iter().map(|tag| tag.name.clone()).collect()
}

fn read_file(build: &BuildView, path: &str, max: u32) -> Result<Vec<u8>, String> {
    let file = build.context.file(path).ok_or_else(|| format!("the context has no file {path}"))?;
    let content = file.content.as_ref().ok_or("the granted files of this context are too large together")?;
    let wanted = u64::from(max.min(MAX_READ_BYTES)).min(file.size);
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    content.get(..wanted).map(<[u8]>::to_vec).ok_or_else(|| format!("{path} is too large to be read so far"))
}

impl input::HostBlob for CallState {
    fn size(&mut self, this: Resource<BlobHandle>) -> Answer<u64> {
        self.count_call()?;
        Ok(self.table.get(&this)?.size)
    }

    fn read(&mut self, this: Resource<BlobHandle>, offset: u64, len: u32) -> Answer<Result<Vec<u8>, Fault>> {
        self.count_call()?;
        let blob = self.table.get(&this)?;
        let left = blob.size.saturating_sub(offset);
        let wanted = u64::from(len.min(MAX_READ_BYTES)).min(left);
        let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(0)];
        let read = blob.file.read_exact_at(&mut bytes, offset);
        Ok(read.map(|()| bytes).map_err(|error| Fault::Other(format!("cannot read the blob: {error}"))))
    }

    fn drop(&mut self, this: Resource<BlobHandle>) -> Answer<()> {
        Ok(self.table.delete(this).map(drop)?)
    }
}

impl input::HostImage for CallState {
    fn build(&mut self, this: Resource<ImageHandle>) -> Answer<Resource<BuildHandle>> {
        let build = Arc::clone(&self.image(&this)?.build);
        self.push(BuildHandle(build))
    }

    fn platform(&mut self, this: Resource<ImageHandle>) -> Answer<String> {
        Ok(self.image(&this)?.platform.clone())
    }

    fn repository(&mut self, this: Resource<ImageHandle>) -> Answer<String> {
        Ok(self.image(&this)?.build.repository.clone())
    }

    fn digest(&mut self, this: Resource<ImageHandle>) -> Answer<String> {
        Ok(self.image(&this)?.digest.to_string())
    }

    fn tags(&mut self, this: Resource<ImageHandle>) -> Answer<Vec<String>> {
        Ok(tag_names(&self.image(&this)?.build))
    }

    fn manifest(&mut self, this: Resource<ImageHandle>) -> Answer<Vec<u8>> {
        Ok(self.image(&this)?.manifest.to_vec())
    }

    fn config(&mut self, this: Resource<ImageHandle>) -> Answer<Vec<u8>> {
        Ok(self.image(&this)?.config.to_vec())
    }

    fn layers(&mut self, this: Resource<ImageHandle>) -> Answer<Vec<Descriptor>> {
        let descriptor = |layer: &super::view::LayerView| Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.to_string(),
            size: layer.size,
        };
        Ok(self.image(&this)?.layers.iter().map(descriptor).collect())
    }

    fn open_layer(
        &mut self,
        this: Resource<ImageHandle>,
        digest: String,
    ) -> Answer<Result<Resource<BlobHandle>, Fault>> {
        match self.image(&this)?.open(&digest) {
            None => Ok(Err(Fault::Other("the image has no such layer".to_owned()))),
            Some(Err(error)) => Ok(Err(Fault::Other(crate::error::chain(&error)))),
            Some(Ok((file, size))) => self.push(BlobHandle { file, size }).map(Ok),
        }
    }

    fn drop(&mut self, this: Resource<ImageHandle>) -> Answer<()> {
        Ok(self.table.delete(this).map(drop)?)
    }
}
