//! A fetched image as buildah reads it from a directory (shell).

use std::path::PathBuf;

use super::BaseError;
use crate::registry::ResolvedImage;
use crate::state::{State, StateError, set_mode};

/// A `dir:` layout of hard links to blobs, seen by the importing slot. Dropping it deletes it.
pub(super) struct Layout {
    dir: PathBuf,
    /// Its place below the store directory.
    pub(super) relative: String,
}

impl Layout {
    pub(super) fn create(state: &State, image: &ResolvedImage, name: &str) -> Result<Self, BaseError> {
        let relative = format!("in/{name}");
        let dir = state.path(&format!("store/{relative}"));
        let layout = Self { dir, relative };
        let failed = |e| StateError::io("write the layout", &layout.dir, e);
        std::fs::create_dir(&layout.dir).map_err(failed)?;
        // Another user reads it, whatever our umask is.
        set_mode(&layout.dir, 0o755)?;
        layout.write("version", b"Directory Transport Version: 1.1\n")?;
        layout.write("manifest.json", &image.manifest)?;
        for digest in std::iter::once(&image.config.digest).chain(image.layers.iter().map(|l| &l.digest)) {
            let link = layout.dir.join(digest.hex());
            if !link.exists() {
                std::fs::hard_link(state.blobs().path(digest), link).map_err(failed)?;
            }
        }
        Ok(layout)
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<(), StateError> {
        let path = self.dir.join(name);
        std::fs::write(&path, content).map_err(|e| StateError::io("write", &path, e))?;
        set_mode(&path, 0o644)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot delete an import layout");
        }
    }
}
