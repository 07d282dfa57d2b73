//! What all builds of one process share (shell).

use std::path::{Path, PathBuf};

use kiln_protocol::request::NetworkMode;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::plan;
use crate::registry::{Credentials, Registry, RegistryConfig, RegistryConfigError};
use crate::slot::wire::{Purpose, SlotSpec};
use crate::slot::{Identity, IdentityError};
use crate::state::{State, StateError};
use crate::version::Version;

/// The agent of one process.
#[derive(Debug)]
pub struct Agent {
    /// Settings.
    pub config: Config,
    /// The data directory.
    pub state: State,
    /// Ids of slots.
    pub identity: Identity,
    /// Version of the installed buildah.
    pub buildah: Version,
    /// What is counted.
    pub metrics: Metrics,
}

/// This machine cannot run builds.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No subordinate ids.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The data directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// buildah is missing.
    #[error("cannot run {}", plan::BUILDAH)]
    NoBuildah(#[source] std::io::Error),
    /// buildah says something unexpected.
    #[error("cannot tell the version of {}", plan::BUILDAH)]
    UnknownVersion(#[from] crate::version::VersionError),
    /// `build.ca` cannot be read.
    #[error("read build.ca = {}", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The registries of the configuration contradict each other.
    #[error(transparent)]
    Registries(#[from] RegistryConfigError),
    /// Two numbers have the same name.
    #[error("prepare the metrics")]
    Metrics(#[from] prometheus::Error),
    /// buildah is too old.
    #[error("buildah {0} is too old: Kiln needs {oldest} or newer, because older ones go on after SIGTERM", oldest = plan::OLDEST_BUILDAH)]
    OldBuildah(Version),
}

impl AgentError {
    /// What a person can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Identity(error) => error.hint().to_owned(),
            Self::State(StateError::NoSpace { .. }) => "run `kiln prune`, or lower data.min_free".to_owned(),
            Self::State(_) => {
                "check the permissions of the data directory, or choose another with --data".to_owned()
            }
            Self::Ca { .. } | Self::Registries(_) => "mend the configuration file".to_owned(),
            Self::Metrics(_) => "this is a fault of Kiln; please report it".to_owned(),
            Self::NoBuildah(_) | Self::UnknownVersion(_) | Self::OldBuildah(_) => {
                "install buildah, then run `kiln doctor`".to_owned()
            }
        }
    }
}

impl Agent {
    /// Opens the data directory and looks at this machine.
    pub fn open(config: Config, data: &Path) -> Result<Self, AgentError> {
        let identity = crate::slot::discover_identity()?;
        let buildah = buildah_version()?;
        let state = State::open(data)?;
        let agent = Self { config, state, identity, buildah, metrics: Metrics::new()? };
        // Now, and not when the first build needs it.
        agent.own_ca()?;
        Ok(agent)
    }

    /// A client for registries with the credentials of one build.
    pub fn registry(&self, credentials: Credentials) -> Result<Registry, AgentError> {
        let build = &self.config.build;
        let config = RegistryConfig::new(self.config.registry.clone())?;
        Ok(Registry::new(config, credentials, build.proxy.clone(), self.own_ca()?.into_iter().collect()))
    }

    /// A slot without network, stores and files, with the limits of every other.
    pub fn bare_slot(&self, job: &str) -> SlotSpec {
        bare_slot(job, self.identity, &self.config)
    }

    /// The operator's certificates, `build.ca`.
    pub fn own_ca(&self) -> Result<Option<Vec<u8>>, AgentError> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|source| AgentError::Ca { path: path.clone(), source })
        };
        self.config.build.ca.as_ref().map(read).transpose()
    }
}

/// See [`Agent::bare_slot`].
pub(crate) fn bare_slot(job: &str, identity: Identity, config: &Config) -> SlotSpec {
    SlotSpec {
        purpose: Purpose::Work,
        job: job.to_owned(),
        ids: identity.ids,
        drop_to: identity.drop_to,
        network: NetworkMode::None,
        blocked: Vec::new(),
        allowed: None,
        stores: Vec::new(),
        cache: None,
        input: None,
        files: Vec::new(),
        limits: config.build.limits.slot(),
        grace_ms: crate::time::millis(config.build.grace),
    }
}

/// Version of the installed buildah, if it is new enough.
pub fn buildah_version() -> Result<Version, AgentError> {
    // It makes directories for its user even to tell its version: not in places that stay.
    let home = tempfile::tempdir().map_err(AgentError::NoBuildah)?;
    let output = std::process::Command::new(plan::BUILDAH)
        .arg("--version")
        .env_clear()
        .env("HOME", home.path())
        .env("XDG_RUNTIME_DIR", home.path())
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(AgentError::NoBuildah)?;
    let version = Version::from_tool_output(&String::from_utf8_lossy(&output.stdout))?;
    if version < plan::OLDEST_BUILDAH {
        return Err(AgentError::OldBuildah(version));
    }
    Ok(version)
}
