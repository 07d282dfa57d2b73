//! Pure: what an archive may cost, and why each figure is what it is.

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// What reading one archive may cost. The defaults suit a build context.
///
/// Every field can be set in the configuration; [`key`] names them for error messages.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of the archive as it arrives. Default 4 GiB: an archive that is not compressed is as long packed
    /// as unpacked, so a smaller figure would make the unpacked limit unreachable.
    pub max_packed_bytes: u64,
    /// Bytes of the tar stream after decompression, with its headers and padding, which bounds memory and time
    /// as well as disk. Default 4 GiB: contexts beyond it are nearly always a forgotten `.dockerignore`.
    pub max_unpacked_bytes: u64,
    /// Entries, and the directories that their paths imply. Default 200,000: a large JavaScript tree has about
    /// half of it, and each one costs an inode and up to 400 bytes of memory while unpacking.
    pub max_entries: u64,
    /// How many bytes may come out of one compressed byte, once `ratio_floor_bytes` have come out. Default 200:
    /// text and logs stay under 50, a bomb reaches 1,000 with gzip and far more with zstd.
    pub max_ratio: u64,
    /// Bytes that may come out before the ratio counts. Default 64 MiB: a small archive of zeros harms nobody.
    pub ratio_floor_bytes: u64,
    /// Bytes of one path or link target. Default 4,095: the kernel's `PATH_MAX` without its terminating zero.
    pub max_path_bytes: usize,
    /// Bytes of one component of a path. Default 255: `NAME_MAX` of every usual file system.
    pub max_component_bytes: usize,
    /// Components of one path. Default 128: four times what package managers nest, and little enough for tools
    /// that walk a tree by recursion.
    pub max_depth: usize,
    /// Base-2 logarithm of the zstd window, which is the memory that decompressing takes. Default 27 (128 MiB):
    /// the largest that `zstd` itself makes and reads without `--long`.
    pub zstd_window_log_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_packed_bytes: 4 * GIB,
            max_unpacked_bytes: 4 * GIB,
            max_entries: 200_000,
            max_ratio: 200,
            ratio_floor_bytes: 64 * MIB,
            max_path_bytes: 4095,
            max_component_bytes: 255,
            max_depth: 128,
            zstd_window_log_max: 27,
        }
    }
}

/// The configuration keys of [`Limits`], as error messages name them.
pub mod key {
    /// Key of [`Limits::max_packed_bytes`](super::Limits::max_packed_bytes).
    pub const PACKED: &str = "context.max_packed_bytes";
    /// Key of [`Limits::max_unpacked_bytes`](super::Limits::max_unpacked_bytes).
    pub const UNPACKED: &str = "context.max_unpacked_bytes";
    /// Key of [`Limits::max_entries`](super::Limits::max_entries).
    pub const ENTRIES: &str = "context.max_entries";
    /// Key of [`Limits::max_ratio`](super::Limits::max_ratio).
    pub const RATIO: &str = "context.max_ratio";
    /// Key of [`Limits::max_path_bytes`](super::Limits::max_path_bytes).
    pub const PATH: &str = "context.max_path_bytes";
    /// Key of [`Limits::max_component_bytes`](super::Limits::max_component_bytes).
    pub const COMPONENT: &str = "context.max_component_bytes";
    /// Key of [`Limits::max_depth`](super::Limits::max_depth).
    pub const DEPTH: &str = "context.max_depth";
    /// Key of [`Limits::zstd_window_log_max`](super::Limits::zstd_window_log_max).
    pub const ZSTD_WINDOW: &str = "context.zstd_window_log_max";
}
