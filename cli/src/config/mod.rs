//! The configuration file (edge): one for both parts, from raw text to checked values.

mod command;
mod locate;
mod mask;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use kiln_agent::config::{self as agent, BuildConfig, DataConfig, LogConfig, NetworkConfig};
use kiln_agent::hooks::config::{PluginConfig, PluginsConfig};
use kiln_agent::registry::RegistrySection;
use kiln_agent::unpack;
use kiln_orchestrator::config::OrchestratorConfig;
use kiln_protocol::setting::InvalidSetting;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use command::{ConfigCommand, run};
use locate::Document;

/// What the file says, sorted by who needs it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Config {
    pub(crate) agent: agent::Config,
    pub(crate) orchestrator: OrchestratorConfig,
}

/// The file as it is written. Unknown keys are refused.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "Configuration of Kiln")]
struct File {
    /// How builds run.
    build: BuildConfig,
    /// What an isolated network reaches.
    network: NetworkConfig,
    /// What a context may be.
    context: unpack::Limits,
    /// The data directory.
    data: DataConfig,
    /// Build logs.
    logs: LogConfig,
    /// What a server records and schedules.
    orchestrator: OrchestratorConfig,
    /// Policy plugins, all of them.
    plugins: PluginsConfig,
    /// Registries: mirrors, certificates, blocks.
    registry: Vec<RegistrySection>,
    /// Policy plugins, one each.
    plugin: Vec<PluginConfig>,
}

impl From<File> for Config {
    fn from(file: File) -> Self {
        let agent = agent::Config {
            build: file.build,
            network: file.network,
            context: file.context,
            data: file.data,
            logs: file.logs,
            registry: file.registry,
            plugins: file.plugins,
            plugin: file.plugin,
        };
        Self { agent, orchestrator: file.orchestrator }
    }
}

impl Config {
    fn check(&self) -> Result<(), InvalidSetting> {
        self.agent.check()?;
        self.orchestrator.check()
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The text is no TOML.
    #[error("{}:{line}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A key or its value is refused.
    #[error("{}:{line}: {key}: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// The key with its sections.
        key: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

/// Reads and checks a configuration file.
pub(crate) fn load(path: &Path) -> Result<Config, ConfigError> {
    Ok(read(path)?.1.into())
}

/// The text, and what it says.
fn read(path: &Path) -> Result<(String, File), ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let file = parse(path, &text)?;
    Config::from(file.clone()).check().map_err(|invalid| refused(path, &text, invalid))?;
    Ok((text, file))
}

/// Reads without a look at ranges.
fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let (path, offset) = (path.to_owned(), error.span().map_or(0, |span| span.start));
        let (line, reason) = (locate::line(text, offset), locate::reason(error.message()));
        match Document::new(text).and_then(|document| document.key_at(offset)) {
            Some(key) => ConfigError::Invalid { path, line, key, reason },
            None => ConfigError::Syntax { path, line, reason },
        }
    })
}

/// The same with the line of the key, or of the nearest section that the file has.
fn refused(path: &Path, text: &str, invalid: InvalidSetting) -> ConfigError {
    let offset = Document::new(text).map_or(0, |document| document.offset_of(&invalid.key));
    let InvalidSetting { key, reason } = invalid;
    ConfigError::Invalid { path: path.to_owned(), line: locate::line(text, offset), key, reason }
}

/// The JSON Schema of the file, as editors read it.
fn schema() -> schemars::Schema {
    schemars::generate::SchemaSettings::draft07().into_generator().into_root_schema_for::<File>()
}
