//! Reading the Dockerfile, in the client and with the client's rights (edge).

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use crate::app::Exit;

/// The parser refuses longer ones; reading more would only fill memory.
const MAX_BYTES: u64 = 1024 * 1024;
/// Names that are tried in a context, in this order, as buildah does.
const DEFAULT_NAMES: [&str; 2] = ["Dockerfile", "Containerfile"];

/// A Dockerfile as the client read it.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// Its text.
    pub(crate) text: String,
    /// What the user calls it.
    pub(crate) name: String,
    /// Where it lies, unless it came from standard input.
    pub(crate) path: Option<PathBuf>,
}

/// Reads `-f FILE`, `-f -`, or the default name in the context.
pub(crate) fn read(context: &Path, file: Option<&Path>) -> Result<Source, Exit> {
    check_context(context)?;
    match file {
        Some(path) if path == Path::new("-") => {
            let text = read_text(std::io::stdin().lock(), "standard input")?;
            Ok(Source { text, name: "-".to_owned(), path: None })
        }
        Some(path) => read_file(context, path),
        None => read_file(context, &default_path(context)?),
    }
}

/// Docker also takes an archive on standard input and addresses; a build that fetches its own context cannot
/// be sealed from the client's files.
fn check_context(context: &Path) -> Result<(), Exit> {
    let text = context.to_string_lossy();
    if text == "-" || text.contains("://") || text.starts_with("git@") {
        return Err(Exit::usage(format!("the context `{text}` is not a directory"))
            .with_hint("unpack or clone it first, then name the directory; `-f -` reads a Dockerfile from standard input"));
    }
    match context.metadata() {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(Exit::usage(format!("the context `{text}` is not a directory"))),
        Err(error) => Err(Exit::usage(format!("the context `{text}` cannot be read: {error}"))),
    }
}

fn default_path(context: &Path) -> Result<PathBuf, Exit> {
    let found = DEFAULT_NAMES.iter().map(|name| context.join(name)).find(|p| p.symlink_metadata().is_ok());
    found.ok_or_else(|| {
        let message = format!("there is no Dockerfile in {}", context.display());
        Exit { code: 1, message, hint: Some("name it with -f FILE; `-f -` reads standard input".to_owned()) }
    })
}

fn read_file(context: &Path, path: &Path) -> Result<Source, Exit> {
    let name = path.display().to_string();
    let file = open(context, path).map_err(|error| open_failed(&name, error))?;
    let file = File::from(file);
    let meta = file.metadata().map_err(|e| Exit::usage(format!("{name}: {e}")))?;
    if meta.is_dir() {
        return Err(Exit::usage(format!("{name} is a directory, not a Dockerfile")));
    }
    let text = read_text(file, &name)?;
    Ok(Source { text, name, path: Some(path.to_owned()) })
}

/// A context may come from strangers: a link in it must not make us read a file outside of it.
fn open(context: &Path, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    match path.strip_prefix(context) {
        Ok(inside) => {
            // The context itself: named as a directory further on.
            let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
            let dir = openat2(CWD, context, flags | OFlags::DIRECTORY, Mode::empty(), ResolveFlags::empty())?;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
            openat2(dir, inside, flags | OFlags::NONBLOCK, Mode::empty(), resolve)
        }
        Err(_) => openat2(CWD, path, flags, Mode::empty(), ResolveFlags::empty()),
    }
}

fn open_failed(name: &str, error: rustix::io::Errno) -> Exit {
    match error {
        rustix::io::Errno::XDEV => Exit::usage(format!("{name} is a link that leaves the context"))
            .with_hint("name the file that it points to with -f FILE"),
        rustix::io::Errno::NOENT => Exit { code: 1, message: format!("{name} does not exist"), hint: None },
        other => Exit { code: 1, message: format!("{name}: {}", std::io::Error::from(other)), hint: None },
    }
}

fn read_text(input: impl Read, name: &str) -> Result<String, Exit> {
    let mut bytes = Vec::new();
    input.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Exit::usage(format!("{name}: {e}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Exit::usage(format!(
            "{name} is longer than {MAX_BYTES} bytes, the limit for a Dockerfile"
        )));
    }
    String::from_utf8(bytes).map_err(|e| {
        Exit::usage(format!(
            "{name} is not UTF-8: the first bad byte is number {}",
            e.utf8_error().valid_up_to()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_out_of_the_context_is_refused_and_one_inside_followed() {
        let temp = tempfile::tempdir().unwrap();
        let context = temp.path().join("ctx");
        std::fs::create_dir(&context).unwrap();
        std::fs::write(temp.path().join("host"), "secret").unwrap();
        std::os::unix::fs::symlink("../host", context.join("Dockerfile")).unwrap();
        let error = read(&context, None).unwrap_err();
        assert!(error.message.contains("leaves the context"), "{error:?}");
        std::fs::write(context.join("real"), "FROM scratch\n").unwrap();
        std::os::unix::fs::symlink("real", context.join("link")).unwrap();
        let source = read(&context, Some(&context.join("link"))).unwrap();
        assert_eq!(source.text, "FROM scratch\n");
        let outside = read(&context, Some(&temp.path().join("host"))).unwrap();
        assert_eq!(outside.text, "secret");
    }

    #[test]
    fn missing_binary_and_long_files_are_named() {
        let temp = tempfile::tempdir().unwrap();
        assert!(read(temp.path(), None).unwrap_err().message.contains("no Dockerfile"));
        std::fs::write(temp.path().join("b"), [b'F', 0xff]).unwrap();
        assert!(read(temp.path(), Some(&temp.path().join("b"))).unwrap_err().message.contains("number 1"));
        std::fs::write(temp.path().join("l"), vec![b'#'; 1024 * 1024 + 1]).unwrap();
        assert!(read(temp.path(), Some(&temp.path().join("l"))).unwrap_err().message.contains("longer than"));
        assert!(read(temp.path(), Some(temp.path())).unwrap_err().message.contains("directory"));
    }
}
