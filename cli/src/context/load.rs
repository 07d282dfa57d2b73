//! Finds and reads the ignore file of a build (shell).

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::ignore::{Ignore, IgnoreError};

const EXTENSION: &str = ".dockerignore";
/// Far above any list that people or tools write, far below what would hurt.
const MAX_BYTES: u64 = 1 << 20;

/// The ignore rules for a build: `<Dockerfile>.dockerignore` beside the Dockerfile if there is one, else
/// `.dockerignore` in the context, else none. `dockerfile` is `None` if it does not come from a file.
pub(crate) fn load(context: &Path, dockerfile: Option<&Path>) -> Result<Ignore, IgnoreError> {
    let own = dockerfile.map(|path| {
        let mut name = OsString::from(path);
        name.push(EXTENSION);
        PathBuf::from(name)
    });
    for file in own.into_iter().chain([context.join(EXTENSION)]) {
        if let Some(text) = read(&file)? {
            return Ignore::parse(&file, &text);
        }
    }
    Ok(Ignore::default())
}

/// `None` if there is no such file; an empty file is one, and ends the search.
fn read(file: &Path) -> Result<Option<Vec<u8>>, IgnoreError> {
    let refused = |source| IgnoreError::Read { file: file.to_owned(), source };
    // A FIFO must be refused, not waited for.
    let flags = OFlags::NONBLOCK.union(OFlags::NOCTTY).bits().cast_signed();
    let opened = match OpenOptions::new().read(true).custom_flags(flags).open(file) {
        // A context that is no directory gets its own message from the one who opens it.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        opened => opened.map_err(refused)?,
    };
    if !opened.metadata().map_err(refused)?.is_file() {
        return Err(IgnoreError::NotAFile { file: file.to_owned() });
    }
    let text = read_limited(opened).map_err(refused)?;
    text.map(Some).ok_or_else(|| IgnoreError::TooLarge { file: file.to_owned(), limit: MAX_BYTES })
}

fn read_limited(file: File) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    let length = file.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    Ok((length as u64 <= MAX_BYTES).then_some(text))
}

#[cfg(test)]
mod tests {
    use super::super::ignore::Verdict;
    use super::*;

    /// Which of the names `a`, `b` and `c` the loaded file ignores.
    fn ignored(context: &Path, dockerfile: Option<&Path>) -> String {
        let ignore = load(context, dockerfile).unwrap();
        let is_ignored = |name: &&str| ignore.verdict(&ignore.root(), name.as_bytes()) != Verdict::Kept;
        ["a", "b", "c"].into_iter().filter(is_ignored).collect()
    }

    #[test]
    fn the_file_of_the_dockerfile_wins() {
        let context = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let dockerfile = elsewhere.path().join("My.Dockerfile");
        assert_eq!(ignored(context.path(), Some(&dockerfile)), "");
        std::fs::write(context.path().join(".dockerignore"), "a\n").unwrap();
        assert_eq!(ignored(context.path(), Some(&dockerfile)), "a");
        assert_eq!(ignored(context.path(), None), "a");
        std::fs::write(elsewhere.path().join("My.Dockerfile.dockerignore"), "b\n").unwrap();
        assert_eq!(ignored(context.path(), Some(&dockerfile)), "b");
        assert_eq!(ignored(context.path(), None), "a");
        std::fs::write(elsewhere.path().join("My.Dockerfile.dockerignore"), "").unwrap();
        assert_eq!(ignored(context.path(), Some(&dockerfile)), "");
    }

    #[test]
    fn odd_ignore_files_are_refused_by_name() {
        let context = tempfile::tempdir().unwrap();
        let file = context.path().join(".dockerignore");
        let refusal = || load(context.path(), None).unwrap_err().to_string();

        std::fs::create_dir(&file).unwrap();
        assert!(refusal().ends_with(
            ".dockerignore\" is not a regular file; rename it or replace it with a list of patterns"
        ));
        std::fs::remove_dir(&file).unwrap();

        rustix::fs::mkfifoat(rustix::fs::CWD, &file, rustix::fs::Mode::RUSR).unwrap();
        assert!(refusal().contains("not a regular file"));
        std::fs::remove_file(&file).unwrap();

        let exactly = usize::try_from(MAX_BYTES).unwrap();
        std::fs::write(&file, "#".repeat(exactly)).unwrap();
        assert_eq!(ignored(context.path(), None), "");
        std::fs::write(&file, "#".repeat(exactly + 1)).unwrap();
        assert!(refusal().contains("is larger than 1048576 bytes"));

        std::fs::write(&file, "ok\n\n# [\n/x[\n").unwrap();
        assert!(
            refusal().ends_with(".dockerignore\", line 4: cannot use the pattern \"x[\""),
            "{}",
            refusal()
        );
    }

    #[test]
    fn a_linked_ignore_file_is_followed_and_a_dangling_one_is_none() {
        let context = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("patterns", context.path().join(".dockerignore")).unwrap();
        assert_eq!(ignored(context.path(), None), "");
        std::fs::write(context.path().join("patterns"), "c").unwrap();
        assert_eq!(ignored(context.path(), None), "c");
        assert_eq!(ignored(&context.path().join("patterns"), None), "");
    }
}
