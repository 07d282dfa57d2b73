//! The token of the loopback listener (edge): drawn once, kept in a file that only its owner reads.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use uuid::Uuid;

/// What anybody but the owner may do with the file.
const OTHERS: u32 = 0o077;
/// No token is longer; a file that is was not written by Kiln.
const MAX_BYTES: u64 = 256;
/// A shorter one could be guessed.
const MIN_BYTES: usize = 32;

/// What a client of the loopback listener shows. Only its hash is kept.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    hash: [u8; 32],
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

/// There is no token to be had from that file.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file system refused.
    #[error("{doing} the token file {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else may have read it.
    #[error(
        "the token file {} has mode {mode:o}, so others may know it; delete it for a fresh one", path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is no token.
    #[error(
        "the token file {} does not hold one line of {MIN_BYTES} to {MAX_BYTES} bytes; delete it for a fresh one",
        path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
    },
}

impl Token {
    /// The token in this file, drawn and written there if there is none. It outlives the server, so that
    /// clients go on after a restart.
    pub fn open(path: &Path) -> Result<Self, TokenError> {
        let failed = |doing| move |source| TokenError::Io { doing, path: path.to_owned(), source };
        match File::open(path) {
            Ok(file) => read(path, &file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = draw();
                write(path, &text).map_err(failed("write"))?;
                Ok(Self::of(&text))
            }
            Err(error) => Err(failed("open")(error)),
        }
    }

    fn of(text: &str) -> Self {
        Self { hash: Sha256::digest(text).into() }
    }

    /// Whether this is the token. Takes the same time for every text of one length.
    pub(super) fn is(&self, shown: &str) -> bool {
        self.hash.ct_eq(&Self::of(shown).hash).into()
    }
}

/// 244 bits of the operating system's randomness.
fn draw() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

fn read(path: &Path, mut file: &File) -> Result<Token, TokenError> {
    let failed = |source| TokenError::Io { doing: "read", path: path.to_owned(), source };
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    if mode & OTHERS != 0 {
        return Err(TokenError::Open { path: path.to_owned(), mode: mode & 0o7777 });
    }
    let mut text = String::new();
    (&mut file).take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    let token = text.trim_end();
    let plain = token.len() >= MIN_BYTES && token.bytes().all(|byte| byte.is_ascii_graphic());
    if !plain || text.len() as u64 > MAX_BYTES {
        return Err(TokenError::Content { path: path.to_owned() });
    }
    Ok(Token::of(token))
}

/// Whole or not at all: a server that is killed meanwhile leaves no half token.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let unfinished = path.with_extension("new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    std::fs::rename(unfinished, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_drawn_once_and_only_its_owner_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = Token::open(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(token.is(text.trim_end()));
        assert!(!token.is(&text) && !token.is("") && !token.is(&text[1..]));
        assert_eq!(Token::open(&path).unwrap(), token);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(format!("{token:?}"), "Token");

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(Token::open(&path).unwrap_err().to_string().contains("mode 640"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for bad in ["", "short\n", &"x".repeat(300), &format!("{}\n{}", "x".repeat(40), "y".repeat(40))] {
            std::fs::write(&path, bad).unwrap();
            assert!(matches!(Token::open(&path), Err(TokenError::Content { .. })), "{bad:?}");
        }
    }
}
