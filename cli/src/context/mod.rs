//! The build context: which files belong to it, and the archive that carries them to an agent (shell; the
//! ignore rules in `ignore`, `pattern` and `goregex` are pure).
//!
//! The Dockerfile travels beside the archive and needs no exception here: it and the ignore file are packed like
//! any other file unless a pattern ignores them.

mod archive;
mod error;
mod goregex;
mod ignore;
mod load;
mod pack;
mod pattern;
mod walk;

#[cfg(test)]
mod tests;

use std::path::Path;

pub(crate) use load::load;
pub(crate) use pack::{Packed, pack, scan};

/// A path for a message: in quotes, with control characters and undecodable bytes escaped, because file names
/// are not under our control and the message goes to a terminal.
#[expect(clippy::unnecessary_debug_formatting, reason = "the escaping is the purpose")]
fn quoted(path: &Path) -> String {
    format!("{:?}", path.as_os_str())
}
