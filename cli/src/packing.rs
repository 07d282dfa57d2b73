//! The context as a file, and what is said about it (edge).

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use kiln_agent::error::chain;
use kiln_protocol::spec::ContextRef;

use crate::app::Exit;
use crate::progress::Printer;
use crate::{context, dockerfile};

/// A context above this is worth a word: most are accidents.
const LARGE_CONTEXT_BYTES: u64 = 100 * 1024 * 1024;

/// A packed context.
#[derive(Debug)]
pub(crate) struct PackedContext {
    /// At its start.
    pub(crate) file: File,
    pub(crate) reference: ContextRef,
}

/// Packs a context into a file below a directory. The file has no name, so that a killed client leaves none. Blocks.
pub(crate) fn pack(
    directory: &Path,
    root: &Path,
    source: &dockerfile::Source,
    printer: Printer,
) -> Result<PackedContext, Exit> {
    let failed =
        |e: std::io::Error| Exit::system(format!("pack the context in {}: {e}", directory.display()));
    let ignore = context::load(root, source.path.as_deref()).map_err(|e| Exit::usage(chain(&e)))?;
    let file = tempfile::NamedTempFile::with_prefix_in("context-", directory).map_err(failed)?;
    let mut out = std::io::BufWriter::with_capacity(256 * 1024, file.as_file());
    let packed =
        context::pack(root, &ignore, &mut out).map_err(|e| Exit { code: 1, ..Exit::usage(chain(&e)) })?;
    out.flush().map_err(failed)?;
    drop(out);
    // Only a descriptor that cannot write is used from here on: it goes into a slot.
    let reopened = File::open(file.path()).map_err(failed)?;
    file.close().map_err(failed)?;
    say(&packed, printer);
    Ok(PackedContext { file: reopened, reference: ContextRef { digest: packed.digest, size: packed.bytes } })
}

fn say(packed: &context::Packed, printer: Printer) {
    printer.say(&format!("context {} ({} entries, {} bytes)", packed.digest, packed.entries, packed.bytes));
    for note in &packed.skipped {
        printer.say(&format!("skipped {note}"));
    }
    if packed.bytes > LARGE_CONTEXT_BYTES {
        printer.say("the context is large; a .dockerignore can leave files out. The largest:");
        for (path, bytes) in &packed.largest {
            printer.say(&format!("  {bytes:>12} {}", path.display()));
        }
    }
}
