//! Pure: why an archive was refused, with the entry, the limit and the way out.

use std::fmt;
use std::io;

use rustix::io::Errno;

use super::limits::key;

/// Why an archive could not be read or unpacked. [`UnpackError::code`] is stable, the text is not.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The path of an entry is not one below the root, or is too long for a file system.
    #[error("unsafe path `{path}` in the archive: {fault}")]
    UnsafePath {
        /// The path as the archive has it.
        path: Name,
        /// What is wrong with it.
        fault: PathFault,
    },
    /// A link, or a path that passes through one, could reach something outside the root.
    #[error("unsafe link at `{path}` in the archive: {fault}")]
    UnsafeLink {
        /// The path of the refused entry.
        path: Name,
        /// What is wrong with it.
        fault: LinkFault,
    },
    /// The entry is neither a file nor a directory nor a link.
    #[error("`{path}` in the archive is {kind}; only files, directories and links are taken, {}", .kind.way_out())]
    ForbiddenType {
        /// The path of the refused entry.
        path: Name,
        /// What it is instead.
        kind: ForbiddenKind,
    },
    /// The archive breaks the tar format, or means different things to different programs.
    #[error("the archive is malformed at byte {offset} of its tar stream: {defect}; pack it again")]
    Malformed {
        /// Where in the unpacked stream.
        offset: u64,
        /// What is wrong there.
        defect: Defect,
    },
    /// The compressed stream is damaged or ends early.
    #[error("the {packing} data of the archive is damaged or cut off; upload it again")]
    Corrupt {
        /// `gzip` or `zstd`.
        packing: &'static str,
        /// The decompressor's complaint.
        #[source]
        source: io::Error,
    },
    /// More entries than allowed.
    #[error(
        "the archive has more than {limit} entries; leave out what the build does not need (.dockerignore) or \
         raise {}",
        key::ENTRIES
    )]
    TooManyEntries {
        /// The limit.
        limit: u64,
    },
    /// More bytes than allowed.
    #[error("the archive is too large: {0}")]
    TooLarge(Excess),
    /// These bytes are something else than a tar archive.
    #[error("not a tar archive but {found}; send a tar archive, plain or packed by gzip or zstd")]
    NotAnArchive {
        /// What it looks like.
        found: &'static str,
    },
    /// Reading the archive failed; its content is not to blame.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// Writing the tree failed; [`UnpackError::code`] tells a full disk from the rest.
    #[error("cannot {doing} `{path}`")]
    Disk {
        /// The failed step.
        doing: &'static str,
        /// The entry.
        path: Name,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
}

impl UnpackError {
    /// The stable name of this kind of error, for APIs, tests and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnsafePath { .. } => "tar_unsafe_path",
            Self::UnsafeLink { .. } => "tar_unsafe_link",
            Self::ForbiddenType { .. } => "tar_forbidden_type",
            Self::Malformed { .. } | Self::Corrupt { .. } => "tar_malformed",
            Self::TooManyEntries { .. } => "context_too_many_entries",
            Self::TooLarge(_) => "context_too_large",
            Self::NotAnArchive { .. } => "context_not_an_archive",
            Self::Disk { source, .. } if is_full(source) => "context_disk_full",
            Self::Read(_) | Self::Disk { .. } => "context_io",
        }
    }

    /// Whether what the archive holds is the cause, and not the disk that it is read from or written to.
    pub fn is_the_archives_fault(&self) -> bool {
        !matches!(self, Self::Read(_) | Self::Disk { .. })
    }
}

/// A quota that is used up is a full disk to whoever has to make room.
fn is_full(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOSPC | Errno::DQUOT))
}

/// Longest excerpt of a name in a message: a hostile archive must not fill a log with one error.
const NAME_CHARS: usize = 200;

/// A name from an archive, made harmless for terminals and logs: escaped and cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut text: String = bytes
            .iter()
            .copied()
            .flat_map(std::ascii::escape_default)
            .take(NAME_CHARS)
            .map(char::from)
            .collect();
        if text.len() == NAME_CHARS {
            text.push('…');
        }
        Self(text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is wrong with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathFault {
    /// It has no bytes.
    #[error("it is empty")]
    Empty,
    /// It starts at the root of the file system.
    #[error("it is absolute; paths are relative to the root of the archive")]
    Absolute,
    /// It has a `..` component, even one that would stay inside.
    #[error("it has a `..` component")]
    Parent,
    /// It holds a zero byte, behind which programs see different names.
    #[error("it holds a zero byte")]
    Zero,
    /// It names the root itself, which can only be a directory.
    #[error("only a directory can stand at the root of the archive")]
    Root,
    /// It is longer than the kernel takes.
    #[error("it has {bytes} bytes, at most {limit} are allowed ({})", key::PATH)]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// One component is longer than file systems take.
    #[error("a component has {bytes} bytes, at most {limit} are allowed ({})", key::COMPONENT)]
    ComponentTooLong {
        /// The component's length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Too many directories inside each other.
    #[error("it is more than {limit} components deep ({})", key::DEPTH)]
    TooDeep {
        /// The limit.
        limit: usize,
    },
}

/// What is wrong with a link or with a path that passes one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    /// A symbolic link stands where the path needs a directory.
    #[error("its path passes through the symbolic link `{link}`")]
    ThroughSymlink {
        /// The path of the symbolic link.
        link: Name,
    },
    /// Directory and symbolic link of the same name.
    #[error("the archive has a symbolic link and a directory of this name")]
    SymlinkAndDirectory,
    /// The target is no path for this purpose.
    #[error("target `{target}`: {fault}")]
    Target {
        /// The target as the archive has it.
        target: Name,
        /// What is wrong with it.
        fault: PathFault,
    },
    /// A hard link to something that is not a regular file of this archive.
    #[error("hard link to `{target}`, which is not a regular file earlier in this archive")]
    NoSuchFile {
        /// The target as the archive has it.
        target: Name,
    },
}

/// A type flag that is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForbiddenKind(pub(super) u8);

impl ForbiddenKind {
    fn way_out(self) -> &'static str {
        match self.0 {
            b'S' => "so pack it without --sparse",
            b'D' | b'M' | b'N' | b'V' => "so pack it without --incremental, --multi-volume and --label",
            _ => "so leave it out (.dockerignore)",
        }
    }
}

impl fmt::Display for ForbiddenKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            b'3' => "a character device",
            b'4' => "a block device",
            b'6' => "a FIFO",
            b'7' => "a contiguous file",
            b'S' => "a sparse file",
            b'D' => "a GNU directory dump",
            b'M' => "a part of a multi-volume archive",
            b'N' => "an old GNU name list",
            b'V' => "a volume label",
            other => return write!(f, "of the unknown type `{}`", other.escape_ascii()),
        })
    }
}

/// Which rule of the format is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// The stream ends inside an entry or before the two zero blocks that end an archive.
    #[error("it ends too early")]
    Truncated,
    /// One zero block alone.
    #[error("a lone zero block, where two end an archive")]
    LoneZeroBlock,
    /// Something follows the end of the archive.
    #[error("data after the end of the archive")]
    AfterEnd,
    /// The header's checksum is not that of its bytes.
    #[error("wrong header checksum")]
    Checksum,
    /// The header is neither POSIX nor GNU nor the old kind.
    #[error("unknown header format")]
    Magic,
    /// A header field is not a number in range.
    #[error("header field `{field}` is not a number in range")]
    Number {
        /// The field.
        field: &'static str,
    },
    /// A type that has no content declares some.
    #[error("{bytes} bytes of content declared for a {what}")]
    UnexpectedContent {
        /// `directory` or `link`.
        what: &'static str,
        /// The declared size.
        bytes: u64,
    },
    /// An extension header is empty or unreasonably long.
    #[error("extension header of {bytes} bytes, 1 to {limit} are allowed")]
    ExtensionSize {
        /// The declared size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Two extension headers of a kind for one entry, or extensions of two formats.
    #[error("extension headers contradict each other")]
    ConflictingExtensions,
    /// An extension header that belongs to no entry.
    #[error("an extension header without an entry after it")]
    DanglingExtension,
    /// A GNU long name or link target that does not say where it ends.
    #[error("a long name without the zero byte that ends it")]
    Unterminated,
    /// A link target given for something that is not a link.
    #[error("an extended link target for something that is not a link")]
    StrayLinkTarget,
    /// More global extension headers than anything needs.
    #[error("more than {limit} global extension headers")]
    TooManyGlobals {
        /// The limit.
        limit: u32,
    },
    /// A global header that would rename or resize every entry.
    #[error("a global extension header sets `{key}`")]
    GlobalKey {
        /// The key.
        key: &'static str,
    },
    /// A record is not `length key=value newline`.
    #[error("broken record in a PAX header")]
    PaxRecord,
    /// A key that identifies the entry twice in one header.
    #[error("PAX key `{key}` twice in one header")]
    PaxRepeated {
        /// The key.
        key: &'static str,
    },
    /// The value is not one for its key.
    #[error("PAX key `{key}` has an impossible value")]
    PaxValue {
        /// The key.
        key: &'static str,
    },
    /// An entry below a file, or file and directory of one name.
    #[error("`{path}` is both a file and a directory")]
    FileAndDirectory {
        /// The path that is both.
        path: Name,
    },
}

/// Which size limit was crossed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Excess {
    /// The archive itself.
    #[error("it has more than {limit} bytes; use .dockerignore or raise {}", key::PACKED)]
    Packed {
        /// The limit.
        limit: u64,
    },
    /// What comes out of it.
    #[error("it unpacks to more than {limit} bytes; use .dockerignore or raise {}", key::UNPACKED)]
    Unpacked {
        /// The limit.
        limit: u64,
    },
    /// One entry declares more than is left of the limit.
    #[error(
        "`{path}` declares {bytes} bytes, with which it unpacks to more than {limit}; use .dockerignore or raise \
         {}",
        key::UNPACKED
    )]
    Declared {
        /// The entry.
        path: Name,
        /// Its declared size.
        bytes: u64,
        /// The limit of the whole.
        limit: u64,
    },
    /// Bytes out per byte in.
    #[error(
        "it unpacks to more than {limit} times its size, like a bomb; send it less packed or raise {}",
        key::RATIO
    )]
    Ratio {
        /// The limit.
        limit: u64,
    },
    /// Memory that zstd would need.
    #[error(
        "its zstd window is larger than 2^{limit} bytes; pack it without --long or raise {}",
        key::ZSTD_WINDOW
    )]
    ZstdWindow {
        /// Base-2 logarithm of the limit.
        limit: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(errno: Errno) -> UnpackError {
        UnpackError::Disk { doing: "write", path: Name::of(b"a"), source: errno.into() }
    }

    #[test]
    fn a_full_disk_has_a_code_of_its_own() {
        assert_eq!(disk(Errno::NOSPC).code(), "context_disk_full");
        assert_eq!(disk(Errno::DQUOT).code(), "context_disk_full");
        assert_eq!(disk(Errno::IO).code(), "context_io");
    }

    #[test]
    fn names_are_escaped_and_cut() {
        assert_eq!(Name::of(b"a\x1b]0;\nb\xff").to_string(), r"a\x1b]0;\nb\xff");
        let long = Name::of(&[b'x'; 5000]).to_string();
        assert_eq!(long.chars().count(), NAME_CHARS + 1);
    }

    #[test]
    fn messages_name_entry_limit_and_way_out() {
        let text = UnpackError::TooManyEntries { limit: 7 }.to_string();
        assert!(text.contains('7') && text.contains("context.max_entries"), "{text}");
        let excess = Excess::Declared { path: Name::of(b"big"), bytes: 9, limit: 8 };
        let text = UnpackError::TooLarge(excess).to_string();
        assert!(text.contains("`big`") && text.contains("context.max_unpacked_bytes"), "{text}");
        let text = UnpackError::ForbiddenType { path: Name::of(b"p"), kind: ForbiddenKind(b'6') }.to_string();
        assert!(text.contains("`p`") && text.contains("FIFO") && text.contains(".dockerignore"), "{text}");
    }
}
