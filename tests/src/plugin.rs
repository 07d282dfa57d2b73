//! Built plugins (edge).

use std::path::{Path, PathBuf};

/// The file of a plugin of this repository.
pub fn file(name: &str) -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/plugins");
    let folder = std::env::var_os("KILN_PLUGINS").map_or_else(built, PathBuf::from);
    let path = folder.join(format!("{name}.wasm"));
    assert!(path.exists(), "{} is missing; run `make plugins`", path.display());
    path
}
