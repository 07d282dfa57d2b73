//! Where the logs of builds are read (edge: files).

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use kiln_protocol::BuildId;
use kiln_protocol::id::Attempt;

/// Most bytes of one read: little memory per reader, few calls per log.
pub const CHUNK: usize = 64 * 1024;

/// Where logs are.
#[derive(Debug, Clone)]
pub enum LogSource {
    /// In files of this machine, one per attempt, which grow while the attempt runs.
    Files(LogFiles),
}

/// Files with logs.
#[derive(Clone)]
pub struct LogFiles {
    path: Arc<PathOf>,
}

type PathOf = dyn Fn(BuildId, Attempt) -> PathBuf + Send + Sync;

impl fmt::Debug for LogFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogFiles").finish_non_exhaustive()
    }
}

/// A log cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("read the log {}", path.display())]
pub struct LogError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What is there of a log, from some byte on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogRead {
    /// The attempt has no log, or it was deleted.
    Missing,
    /// These bytes; none if the log ends here for now.
    Bytes(Bytes),
    /// The log ends at this byte already: what was there has been cut off.
    Shorter(u64),
}

impl LogSource {
    /// Logs in files, where `path` says.
    pub fn files(path: impl Fn(BuildId, Attempt) -> PathBuf + Send + Sync + 'static) -> Self {
        Self::Files(LogFiles { path: Arc::new(path) })
    }

    /// Reads what is there from `offset` on, at most [`CHUNK`] bytes.
    pub async fn read(&self, build: BuildId, attempt: Attempt, offset: u64) -> Result<LogRead, LogError> {
        let Self::Files(files) = self;
        let path = (files.path)(build, attempt);
        let failed = path.clone();
        let reading = tokio::task::spawn_blocking(move || read_at(&path, offset));
        let read = reading.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        read.map_err(|source| LogError { path: failed, source })
    }
}

fn read_at(path: &Path, offset: u64) -> io::Result<LogRead> {
    let file = match open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LogRead::Missing),
        other => other?,
    };
    let length = file.metadata()?.len();
    if length < offset {
        return Ok(LogRead::Shorter(length));
    }
    let mut bytes = vec![0; CHUNK.min(usize::try_from(length - offset).unwrap_or(CHUNK))];
    let read = file.read_at(&mut bytes, offset)?;
    bytes.truncate(read);
    Ok(LogRead::Bytes(bytes.into()))
}

/// Only a plain file: a link or a pipe is no log, and opening one might never end.
fn open(path: &Path) -> io::Result<File> {
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    let flags = i32::try_from(flags).map_err(io::Error::other)?;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no plain file")) }
}

/// The part of `bytes` to show now: whole lines, if there are any; the rest waits for its line feed unless the
/// log is `complete` or the line fills a whole read. Never cuts a character in two.
pub fn showable(bytes: &[u8], complete: bool) -> &[u8] {
    if let Some(end) = bytes.iter().rposition(|&byte| byte == b'\n') {
        return &bytes[..=end];
    }
    if complete || bytes.len() >= CHUNK { whole_characters(bytes, complete) } else { &[] }
}

fn whole_characters(bytes: &[u8], complete: bool) -> &[u8] {
    match bytes.utf8_chunks().last().map(|last| last.invalid()) {
        // It may be the begin of a character; what is longer is none, whatever follows.
        Some(rest) if !complete && !rest.is_empty() && rest.len() < 4 && rest.len() < bytes.len() => {
            &bytes[..bytes.len() - rest.len()]
        }
        _ => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_shown_and_the_rest_when_it_cannot_wait() {
        let show = |text: &'static str, complete| {
            std::str::from_utf8(showable(text.as_bytes(), complete)).unwrap().to_owned()
        };
        assert_eq!(show("a\nb\nrest", false), "a\nb\n");
        assert_eq!(show("rest", false), "");
        assert_eq!(show("rest", true), "rest");
        assert_eq!(show("a\nrest", true), "a\n", "the rest comes with the next read");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let mut long = "ä".repeat(CHUNK / 2).into_bytes();
        assert_eq!(showable(&long, false).len(), CHUNK);
        long.insert(0, b'x');
        long.truncate(CHUNK);
        assert_eq!(showable(&long, false).len(), CHUNK - 1);
        assert_eq!(showable(&vec![0xff; CHUNK], false).len(), CHUNK - 1, "bytes that are no text go on too");
    }

    #[tokio::test]
    async fn a_file_is_read_in_parts_and_tells_when_it_shrank() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let of = path.clone();
        let source = LogSource::files(move |_, _| of.clone());
        let read = async |offset| source.read(BuildId::generate(), Attempt::FIRST, offset).await;
        assert_eq!(read(0).await.unwrap(), LogRead::Missing);
        std::fs::write(&path, vec![b'x'; CHUNK + 3]).unwrap();
        let LogRead::Bytes(first) = read(0).await.unwrap() else { panic!() };
        assert_eq!(first.len(), CHUNK);
        assert_eq!(read(CHUNK as u64).await.unwrap(), LogRead::Bytes(Bytes::from_static(b"xxx")));
        assert_eq!(read(CHUNK as u64 + 3).await.unwrap(), LogRead::Bytes(Bytes::new()));
        assert_eq!(read(CHUNK as u64 + 4).await.unwrap(), LogRead::Shorter(CHUNK as u64 + 3));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(read(0).await.is_err(), "a link is not followed");
    }
}
