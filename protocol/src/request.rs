//! What a client asks for (pure).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Manifest and config format of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// Docker schema 2: keeps HEALTHCHECK, ONBUILD and SHELL.
    Docker,
    /// OCI image: has no place for those three.
    Oci,
}

/// What a RUN step may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// A network of its own: the outside and internal servers, not the host.
    Isolated,
    /// Loopback of the slot only.
    None,
    /// The host's network, with everything that listens on its loopback.
    UnsafeHost,
}

/// What a secret may be called: the id becomes a file name and a part of a flag.
pub const SECRET_ID_RULE: &str =
    "an id is 1 to 128 letters, digits, _ . - and begins with none of the last two";

/// Whether [`SECRET_ID_RULE`] holds.
pub fn is_secret_id(id: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    (1..=128).contains(&id.len()) && !id.starts_with(['.', '-']) && id.chars().all(plain)
}

/// One build, as the client describes it. Files travel beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildRequest {
    /// Text of the Dockerfile.
    pub dockerfile: String,
    /// The name that the user gave the Dockerfile, for messages only.
    pub dockerfile_name: String,
    /// `--build-arg`, always with a value.
    pub build_args: BTreeMap<String, String>,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// `--target`.
    pub target: Option<String>,
    /// Image format.
    pub format: ImageFormat,
    /// Seconds since the epoch for every time in the image.
    pub timestamp: Option<i64>,
    /// What RUN may reach.
    pub network: NetworkMode,
    /// The build ends as `timeout` after this long.
    pub timeout: Duration,
    /// The target's files are wanted (`type=local`, `type=tar`), not only the image.
    pub root_filesystem: bool,
    /// No layer of an earlier build is taken over.
    #[serde(default)]
    pub no_cache: bool,
}
