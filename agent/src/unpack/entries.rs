//! Shell: from blocks to entries: end of archive, extension headers, and which types are taken.

use std::io::Read;

use super::error::{Defect, ForbiddenKind, LinkFault, Name, PathFault, UnpackError};
use super::header::{BLOCK, Header};
use super::limits::Limits;
use super::packed::recognise;
use super::path;
use super::pax::Records;
use super::stream::{Body, TarStream};

/// Bytes of one extension header. Kernels keep 64 KiB per extended attribute; some of them, a path and a link
/// target fit many times.
const MAX_EXTENSION: u64 = 1024 * 1024;

/// Global headers of one archive. `git archive` writes one, joining archives a few more.
const MAX_GLOBALS: u32 = 16;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Bytes of content.
        size: u64,
    },
    /// A directory.
    Directory,
    /// A symbolic link. The target is stored as it is and never followed: contexts may well hold
    /// `etc/localtime -> /usr/share/…`, which means a file of the image.
    Symlink {
        /// The target as the archive has it.
        target: Vec<u8>,
    },
    /// A hard link to a regular file earlier in the archive.
    HardLink {
        /// The normalised path of that file.
        target: Vec<u8>,
    },
}

/// One entry of an archive, checked. Owners are not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path below the root without `.` components and needless slashes; `.` is the root itself. Not always UTF-8.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// Modification time in whole seconds since 1970.
    pub mtime: i64,
    /// Where the content starts in the unpacked stream.
    pub data_offset: u64,
}

impl Entry {
    /// Bytes of content; only files have some.
    pub fn size(&self) -> u64 {
        match self.kind {
            Kind::File { size } => size,
            _ => 0,
        }
    }
}

/// Extension headers that wait for their entry.
#[derive(Default)]
struct Pending {
    pax: Option<Records>,
    gnu_name: Option<Vec<u8>>,
    gnu_link: Option<Vec<u8>>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && !self.has_gnu()
    }

    fn has_gnu(&self) -> bool {
        self.gnu_name.is_some() || self.gnu_link.is_some()
    }
}

/// Reads the entries of an archive one after the other.
pub(super) struct Entries<'r> {
    stream: TarStream<'r>,
    limits: Limits,
    global_mtime: Option<i64>,
    globals: u32,
}

impl<'r> Entries<'r> {
    pub(super) fn open(archive: &'r mut dyn Read, limits: &Limits) -> Result<Self, UnpackError> {
        let stream = TarStream::open(archive, limits)?;
        Ok(Self { stream, limits: limits.clone(), global_mtime: None, globals: 0 })
    }

    pub(super) fn stream(&self) -> &TarStream<'r> {
        &self.stream
    }

    /// The content of the entry that was answered last.
    pub(super) fn body(&mut self, entry: &Entry) -> Body<'_, 'r> {
        Body::new(&mut self.stream, entry.size())
    }

    /// Reads over the content that nobody read, and the padding behind it.
    pub(super) fn finish_body(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        let end = entry.data_offset.saturating_add(padded(entry.size()));
        self.stream.skip(end.saturating_sub(self.stream.position()))
    }

    /// The next entry. At the end the rest of the stream is read too, because only the end of a compressed stream
    /// tells whether it is whole.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, UnpackError> {
        let mut pending = Pending::default();
        loop {
            let Some(header) = self.header()? else {
                return if pending.is_empty() {
                    Ok(None)
                } else {
                    Err(self.malformed(Defect::DanglingExtension))
                };
            };
            match header.type_flag() {
                b'x' => self.take_pax(&header, &mut pending)?,
                b'L' => self.take_gnu(&header, &mut pending, |pending| &mut pending.gnu_name)?,
                b'K' => self.take_gnu(&header, &mut pending, |pending| &mut pending.gnu_link)?,
                b'g' => self.take_global(&header, &pending)?,
                _ => return self.entry(&header, pending).map(Some),
            }
        }
    }

    /// The next header, or [`None`] after the proper end of the archive.
    fn header(&mut self) -> Result<Option<Header>, UnpackError> {
        let is_first = self.stream.position() == 0;
        let block = self.stream.block()?;
        if block.is_zero() {
            return self.end().map(|()| None);
        }
        let parsed = block.whole().ok_or(Defect::Truncated).and_then(Header::parse);
        parsed.map(Some).map_err(|defect| match recognise(block.bytes()) {
            Some(found) if is_first => UnpackError::NotAnArchive { found },
            _ => self.malformed(defect),
        })
    }

    /// Two zero blocks end an archive, and only zero blocks may follow: other programs can be told to read on, and
    /// would find entries that nobody checked.
    fn end(&mut self) -> Result<(), UnpackError> {
        let second = self.stream.block()?;
        if !second.is_zero() {
            let defect = second.whole().map_or(Defect::Truncated, |_| Defect::LoneZeroBlock);
            return Err(self.malformed(defect));
        }
        loop {
            let block = self.stream.block()?;
            match block.whole() {
                Some(_) if block.is_zero() => {}
                None if block.bytes().is_empty() => return Ok(()),
                None => return Err(self.malformed(Defect::Truncated)),
                Some(_) => return Err(self.malformed(Defect::AfterEnd)),
            }
        }
    }

    fn take_pax(&mut self, header: &Header, pending: &mut Pending) -> Result<(), UnpackError> {
        if !pending.is_empty() {
            return Err(self.malformed(Defect::ConflictingExtensions));
        }
        let data = self.extension(header)?;
        pending.pax = Some(Records::parse(&data).map_err(|defect| self.malformed(defect))?);
        Ok(())
    }

    /// One entry is described by PAX or by GNU extensions, each at most once: which of them wins differs between
    /// programs.
    fn take_gnu(
        &mut self,
        header: &Header,
        pending: &mut Pending,
        slot: impl Fn(&mut Pending) -> &mut Option<Vec<u8>>,
    ) -> Result<(), UnpackError> {
        if pending.pax.is_some() || slot(pending).is_some() {
            return Err(self.malformed(Defect::ConflictingExtensions));
        }
        let mut text = self.extension(header)?;
        // GNU tar reads on behind the declared size until it finds one.
        if text.last() != Some(&0) {
            return Err(self.malformed(Defect::Unterminated));
        }
        let end = text.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        text.truncate(end);
        *slot(pending) = Some(text);
        Ok(())
    }

    fn take_global(&mut self, header: &Header, pending: &Pending) -> Result<(), UnpackError> {
        if !pending.is_empty() {
            return Err(self.malformed(Defect::ConflictingExtensions));
        }
        self.globals += 1;
        if self.globals > MAX_GLOBALS {
            return Err(self.malformed(Defect::TooManyGlobals { limit: MAX_GLOBALS }));
        }
        let data = self.extension(header)?;
        let records = Records::parse_global(&data).map_err(|defect| self.malformed(defect))?;
        self.global_mtime = records.mtime.or(self.global_mtime);
        Ok(())
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, UnpackError> {
        let bytes = header.size().map_err(|defect| self.malformed(defect))?;
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        if bytes == 0 || bytes > MAX_EXTENSION {
            return Err(self.malformed(Defect::ExtensionSize { bytes, limit: MAX_EXTENSION }));
        }
        let data = self.stream.exactly(length)?;
        self.stream.skip(padded(bytes) - bytes)?;
        Ok(data)
    }

    fn entry(&self, header: &Header, pending: Pending) -> Result<Entry, UnpackError> {
        let malformed = |defect| self.malformed(defect);
        let Pending { pax, gnu_name, gnu_link } = pending;
        let pax = pax.unwrap_or_default();
        let (raw, path) = self.path(pax.path.or(gnu_name).map_or_else(|| header.name(), Ok))?;
        let size = pax.size.map_or_else(|| header.size(), Ok).map_err(malformed)?;
        let link = pax.link.or(gnu_link);
        let flag = if pax.sparse { b'S' } else { header.type_flag() };
        let kind = match flag {
            b'1' | b'2' => self.link(flag, &path, link.map_or_else(|| header.link(), Ok))?,
            _ if link.is_some() => return Err(malformed(Defect::StrayLinkTarget)),
            _ => plain_kind(flag, raw.ends_with(b"/"), size, &path)?,
        };
        self.check_kind(&path, &kind, size)?;
        let mtime = pax.mtime.or(self.global_mtime).map_or_else(|| header.mtime(), Ok).map_err(malformed)?;
        let mode = header.mode().map_err(malformed)?;
        Ok(Entry { path, kind, mode, mtime, data_offset: self.stream.position() })
    }

    /// The path as the archive has it and normalised.
    fn path(&self, raw: Result<Vec<u8>, PathFault>) -> Result<(Vec<u8>, Vec<u8>), UnpackError> {
        let raw = raw.map_err(|fault| unsafe_path(b"", fault))?;
        let path = path::normalise(&raw, &self.limits).map_err(|fault| unsafe_path(&raw, fault))?;
        Ok((raw, path))
    }

    fn link(&self, flag: u8, path: &[u8], target: Result<Vec<u8>, PathFault>) -> Result<Kind, UnpackError> {
        let target = target.map_err(|fault| unsafe_target(path, b"", fault))?;
        let checked = match flag {
            b'1' => path::normalise(&target, &self.limits).map(|target| Kind::HardLink { target }),
            _ => path::check_symlink_target(&target, &self.limits)
                .map(|()| Kind::Symlink { target: target.clone() }),
        };
        checked.map_err(|fault| unsafe_target(path, &target, fault))
    }

    /// A size where no content belongs is refused: programs disagree on whether content follows it, and so on where
    /// the next header is.
    fn check_kind(&self, path: &[u8], kind: &Kind, size: u64) -> Result<(), UnpackError> {
        if path == path::ROOT && *kind != Kind::Directory {
            return Err(unsafe_path(path, PathFault::Root));
        }
        let what = match kind {
            Kind::File { .. } => return self.stream.expect(path, size),
            Kind::Directory => "directory",
            Kind::Symlink { .. } | Kind::HardLink { .. } => "link",
        };
        if size == 0 { Ok(()) } else { Err(self.malformed(Defect::UnexpectedContent { what, bytes: size })) }
    }

    fn malformed(&self, defect: Defect) -> UnpackError {
        UnpackError::Malformed { offset: self.stream.position(), defect }
    }
}

/// What is no link. Before POSIX a directory was a file whose name ends in a slash, and GNU tar still reads it so.
fn plain_kind(flag: u8, ends_in_slash: bool, size: u64, path: &[u8]) -> Result<Kind, UnpackError> {
    match flag {
        b'5' => Ok(Kind::Directory),
        b'0' | 0 if ends_in_slash => Ok(Kind::Directory),
        b'0' | 0 => Ok(Kind::File { size }),
        other => Err(UnpackError::ForbiddenType { path: Name::of(path), kind: ForbiddenKind(other) }),
    }
}

fn unsafe_path(path: &[u8], fault: PathFault) -> UnpackError {
    UnpackError::UnsafePath { path: Name::of(path), fault }
}

fn unsafe_target(path: &[u8], target: &[u8], fault: PathFault) -> UnpackError {
    let fault = LinkFault::Target { target: Name::of(target), fault };
    UnpackError::UnsafeLink { path: Name::of(path), fault }
}

/// The size with the padding to whole blocks. Sizes are checked against a limit before they come here.
fn padded(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64)
}
