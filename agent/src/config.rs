//! Configuration of the agent in TOML (edge): raw text to checked values.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_protocol::request::NetworkMode;
use serde::Deserialize;

use crate::hooks::config::{PluginConfig, PluginsConfig};
pub use crate::registry::ProxyConfig;
use crate::registry::RegistrySection;
use crate::slot::wire::{Network, SlotLimits};

/// Everything that an operator can set. Unknown keys are refused.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How builds run.
    pub build: BuildConfig,
    /// What an isolated network reaches.
    pub network: NetworkConfig,
    /// What a context may be.
    pub context: crate::unpack::Limits,
    /// The data directory.
    pub data: DataConfig,
    /// Build logs.
    pub logs: LogConfig,
    /// Registries: mirrors, certificates, blocks. Unqualified names mean Docker Hub.
    pub registry: Vec<RegistrySection>,
    /// Policy plugins, all of them.
    pub plugins: PluginsConfig,
    /// Policy plugins, one each.
    pub plugin: Vec<PluginConfig>,
}

/// `[build]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BuildConfig {
    /// A build ends as `timeout` after this long.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    /// Tries at a build whose failure may pass, 1 to 20.
    pub attempts: u32,
    /// From SIGTERM to SIGKILL.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
    /// What RUN reaches unless the build asks for less.
    pub network: NetworkMode,
    /// PEM bundle that RUN and fetch trust besides what they trust anyway.
    pub ca: Option<PathBuf>,
    /// Proxy for fetch and RUN.
    pub proxy: ProxyConfig,
    /// What one slot may use.
    pub limits: LimitConfig,
}

/// `[build.limits]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitConfig {
    /// Processes and threads.
    pub pids: u64,
    /// Bytes that the build's stores, context and temporary files take on disk.
    #[serde(deserialize_with = "bytes")]
    pub disk: u64,
    /// Bytes of one file.
    #[serde(deserialize_with = "bytes")]
    pub file_size: u64,
    /// Open files of one process.
    pub open_files: u64,
    /// Bytes of memory, where cgroup v2 is delegated to the agent.
    #[serde(deserialize_with = "optional_bytes")]
    pub memory: Option<u64>,
    /// CPUs, where cgroup v2 is delegated to the agent; 1.5 is one and a half.
    pub cpus: Option<f64>,
}

/// `[network]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// If given, the only networks that an isolated RUN reaches, as `address/prefix`.
    #[serde(deserialize_with = "networks")]
    pub allow: Option<Vec<Network>>,
}

/// `[data]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// No build starts with less free space than this.
    #[serde(deserialize_with = "bytes")]
    pub min_free: u64,
    /// Base images and caches above this are deleted, least recently used first.
    #[serde(deserialize_with = "bytes")]
    pub max_bytes: u64,
    /// Content of cache mounts above this starts afresh.
    #[serde(deserialize_with = "bytes")]
    pub max_cache_bytes: u64,
    /// Layer caches above this are deleted, least recently used first.
    #[serde(deserialize_with = "bytes")]
    pub max_layer_cache_bytes: u64,
}

/// `[logs]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Bytes kept of one build: the first and the last half.
    #[serde(deserialize_with = "bytes")]
    pub max_bytes: u64,
    /// Logs kept of past builds.
    pub keep: usize,
}

const MIB: u64 = 1024 * 1024;
/// buildah copies its own program for every RUN: 20 MiB in Debian 12, twice that in current versions.
const MIN_FILE_SIZE: u64 = 64 * MIB;
/// buildah itself takes half of it.
const MIN_MEMORY: u64 = 64 * MIB;
/// A hundredth is the least that the kernel grants; no machine has more than the most.
const CPUS: std::ops::RangeInclusive<f64> = 0.01..=65_536.0;
const GIB: u64 = 1024 * MIB;

impl Default for BuildConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_hours(1),
            attempts: kiln_protocol::spec::DEFAULT_ATTEMPTS,
            grace: Duration::from_secs(10),
            network: NetworkMode::Isolated,
            ca: None,
            proxy: ProxyConfig::default(),
            limits: LimitConfig::default(),
        }
    }
}

impl Default for LimitConfig {
    fn default() -> Self {
        // A parallel compiler run takes hundreds of processes; a large image with its context 10 GiB.
        Self { pids: 4096, disk: 32 * GIB, file_size: 16 * GIB, open_files: 65_536, memory: None, cpus: None }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            min_free: 2 * GIB,
            max_bytes: 50 * GIB,
            max_cache_bytes: 10 * GIB,
            max_layer_cache_bytes: 20 * GIB,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { max_bytes: 64 * MIB, keep: 100 }
    }
}

impl LimitConfig {
    /// The limits that every slot enforces by itself.
    pub fn slot(&self) -> SlotLimits {
        // Nobody raises a limit above what this process itself may have.
        let ours = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        SlotLimits {
            pids: self.pids,
            disk_bytes: self.disk,
            file_bytes: self.file_size,
            open_files: ours.map_or(self.open_files, |ours| self.open_files.min(ours)),
            memory_bytes: self.memory,
            cpus: self.cpus,
        }
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The text is not what is expected.
    #[error("{}:{line}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// Key and reason.
        reason: String,
    },
    /// A value is outside its range.
    #[error("{}: {key}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

/// Reads and checks a configuration file.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let config = toml::from_str(&text).map_err(|error| parse_error(path, &text, &error))?;
    check(path, &config)?;
    Ok(config)
}

fn parse_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let offset = error.span().map_or(0, |span| span.start);
    let line = text.get(..offset).unwrap_or_default().matches('\n').count() + 1;
    ConfigError::Parse { path: path.to_owned(), line, reason: error.message().to_owned() }
}

fn check(path: &Path, config: &Config) -> Result<(), ConfigError> {
    let value = |key, reason: String| ConfigError::Value { path: path.to_owned(), key, reason };
    // buildah, its helpers and a shell take about twenty.
    let minimum = [
        ("build.limits.pids", config.build.limits.pids, 64),
        ("build.limits.open_files", config.build.limits.open_files, 256),
        ("build.limits.disk", config.build.limits.disk, 64 * MIB),
        ("build.limits.file_size", config.build.limits.file_size, MIN_FILE_SIZE),
        ("logs.max_bytes", config.logs.max_bytes, 64 * 1024),
    ];
    for (key, is, least) in minimum {
        if is < least {
            return Err(value(key, format!("{is} is too small; at least {least}")));
        }
    }
    crate::registry::RegistryConfig::new(config.registry.clone())
        .map_err(|e| value("registry", crate::error::chain(&e)))?;
    if let Some(bytes) = config.build.limits.memory.filter(|bytes| *bytes < MIN_MEMORY) {
        return Err(value("build.limits.memory", format!("{bytes} is too small; at least {MIN_MEMORY}")));
    }
    if let Some(cpus) = config.build.limits.cpus.filter(|cpus| !CPUS.contains(cpus)) {
        let reason = format!("{cpus} is not between {} and {}", CPUS.start(), CPUS.end());
        return Err(value("build.limits.cpus", reason));
    }
    if config.build.timeout.is_zero() {
        return Err(value("build.timeout", "must be longer than 0s".to_owned()));
    }
    Ok(())
}

fn duration<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    parse_duration(&text).map_err(serde::de::Error::custom)
}

/// Parses `90s`, `10m`, `1h 30m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration; write for example 90s, 10m or 1h30m");
    let span: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    Duration::try_from(span).map_err(|_| wrong())
}

fn bytes<'de, D: serde::Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Bytes {
        Number(u64),
        Text(String),
    }
    match Bytes::deserialize(input)? {
        Bytes::Number(number) => Ok(number),
        Bytes::Text(text) => parse_bytes(&text).map_err(serde::de::Error::custom),
    }
}

fn optional_bytes<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    bytes(input).map(Some)
}

/// Parses `1048576`, `512MiB`, `20GiB`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write for example 512MiB or 20GiB");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" => 1024,
        "MiB" => MIB,
        "GiB" => GIB,
        "TiB" => 1024 * GIB,
        _ => return Err(wrong()),
    };
    digits.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(wrong)
}

fn networks<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<Vec<Network>>, D::Error> {
    let texts = Vec::<String>::deserialize(input)?;
    let parsed: Result<Vec<_>, _> = texts.iter().map(|text| parse_network(text)).collect();
    parsed.map(Some).map_err(serde::de::Error::custom)
}

fn parse_network(text: &str) -> Result<Network, String> {
    let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
    let parsed = address.parse::<Ipv4Addr>().ok().zip(prefix.parse::<u8>().ok().filter(|p| *p <= 32));
    let (address, prefix) =
        parsed.ok_or_else(|| format!("`{text}` is not a network; write for example 10.0.0.0/8"))?;
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    let network = Network { address: Ipv4Addr::from(u32::from(address) & mask), prefix };
    if prefix > 0 && crate::slot::is_never_reached(network) {
        return Err(format!("`{text}` is loopback, link-local or no address: RUN never reaches it"));
    }
    Ok(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        load(file.path())
    }

    #[test]
    fn an_empty_file_is_the_default() {
        let config = parse("").unwrap();
        assert_eq!(config.build.timeout, Duration::from_hours(1));
        assert_eq!(config.build.network, NetworkMode::Isolated);
        assert_eq!(config.network.allow, None);
    }

    const EXAMPLE: &str = include_str!("../../docs/kiln.example.toml");

    /// Lines with `#` and no blank are keys without a default, so uncommenting them must give a valid file.
    fn example_with_every_key() -> String {
        let uncomment =
            |line: &str| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).map(str::to_owned);
        EXAMPLE.lines().map(|line| uncomment(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
    }

    #[test]
    fn the_example_file_holds_the_defaults_and_every_key() {
        assert_eq!(format!("{:?}", parse(EXAMPLE).unwrap()), format!("{:?}", Config::default()));
        let full = example_with_every_key();
        let _ = parse(&full).unwrap();
        let table: toml::Table = full.parse().unwrap();
        for (section, keys) in [
            ("build", &["timeout", "attempts", "grace", "network", "ca", "proxy", "limits"][..]),
            ("network", &["allow"]),
            ("data", &["min_free", "max_bytes", "max_cache_bytes", "max_layer_cache_bytes"]),
            ("logs", &["max_bytes", "keep"]),
            ("plugins", &["directory", "max_concurrent", "require_digest", "allow_unstable"]),
        ] {
            let found = table[section].as_table().unwrap();
            assert_eq!(found.len(), keys.len(), "{section}");
            assert!(keys.iter().all(|key| found.contains_key(*key)), "{section}");
        }
        let unpack = serde_json::to_value(crate::unpack::Limits::default()).unwrap();
        assert_eq!(table["context"].as_table().unwrap().len(), unpack.as_object().unwrap().len());
        assert_eq!(table["build"]["limits"].as_table().unwrap().len(), 6);
        assert_eq!(table["registry"][0].as_table().unwrap().len(), 6);
    }

    #[test]
    fn values_have_units() {
        let config = parse("[build]\ntimeout = \"1h30m\"\n[build.limits]\ndisk = \"20GiB\"\n").unwrap();
        assert_eq!(config.build.timeout, Duration::from_mins(90));
        assert_eq!(config.build.limits.disk, 20 * GIB);
        let config = parse("[network]\nallow = [\"10.1.2.3/8\", \"192.0.2.7\"]\n").unwrap();
        let allow = config.network.allow.unwrap();
        assert_eq!((allow[0].address, allow[0].prefix), (Ipv4Addr::new(10, 0, 0, 0), 8));
        assert_eq!(allow[1].prefix, 32);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (text, wanted) in [
            ("[build]\nmemory = 1\n", ":2: unknown field `memory`"),
            ("[build]\ntimeout = \"soon\"\n", "`soon` is not a duration"),
            ("[build.limits]\npids = 3\n", "build.limits.pids: 3 is too small; at least 64"),
            (
                "[build.limits]\nfile_size = \"63MiB\"\n",
                "build.limits.file_size: 66060288 is too small; at least 67108864",
            ),
            ("[build.limits]\nmemory = \"1MiB\"\n", "build.limits.memory: 1048576 is too small; at least"),
            ("[build.limits]\ncpus = 0.0\n", "build.limits.cpus: 0 is not between 0.01 and 65536"),
            ("[build.limits]\ncpus = nan\n", "build.limits.cpus: NaN is not between"),
            ("[build.limits]\npids = -1\n", ":2: invalid value"),
            ("[build.limits]\ndisk = \"20 parsecs\"\n", "is not a size"),
            ("[network]\nallow = [\"10.0.0.0/33\"]\n", "is not a network"),
            ("[network]\nallow = [\"169.254.169.254\"]\n", "RUN never reaches it"),
            ("[network]\nallow = [\"127.0.0.0/8\"]\n", "RUN never reaches it"),
            ("[build]\nnetwork = \"host\"\n", ":2: unknown variant `host`"),
            ("[build\n", ":1: "),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(wanted), "{text:?} gave {message}");
        }
    }
}
