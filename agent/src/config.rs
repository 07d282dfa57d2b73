//! Configuration of the agent (pure): sections of a TOML file, their defaults and what is refused.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use kiln_protocol::request::NetworkMode;
use kiln_protocol::setting::{self, BytesText, DurationText, InvalidSetting};
use kiln_protocol::spec::MAX_ATTEMPTS;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::hooks::config::{PluginConfig, PluginsConfig};
pub use crate::registry::ProxyConfig;
use crate::registry::{RegistryConfig, RegistrySection};
use crate::slot::wire::{Network, SlotLimits};

/// Everything that an operator can set.
#[derive(Debug, Clone, Default, PartialEq)]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BuildConfig {
    /// A build ends as `timeout` after this long.
    #[serde(with = "setting::duration")]
    #[schemars(with = "DurationText")]
    pub timeout: Duration,
    /// Tries at a build whose failure may pass, 1 to 20.
    #[schemars(range(min = 1, max = MAX_ATTEMPTS))]
    pub attempts: u32,
    /// From SIGTERM to SIGKILL.
    #[serde(with = "setting::duration")]
    #[schemars(with = "DurationText")]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitConfig {
    /// Processes and threads.
    #[schemars(range(min = MIN_PIDS))]
    pub pids: u64,
    /// Bytes that the build's stores, context and temporary files take on disk.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "BytesText")]
    pub disk: u64,
    /// Bytes of one file.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "BytesText")]
    pub file_size: u64,
    /// Open files of one process.
    #[schemars(range(min = MIN_OPEN_FILES))]
    pub open_files: u64,
    /// Bytes of memory, where cgroup v2 is delegated to the agent.
    #[serde(with = "setting::optional_bytes")]
    #[schemars(with = "Option<BytesText>")]
    pub memory: Option<u64>,
    /// CPUs, where cgroup v2 is delegated to the agent; 1.5 is one and a half.
    #[schemars(range(min = 0.01, max = 65_536.0))]
    pub cpus: Option<f64>,
}

/// `[network]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// If given, the only networks that an isolated RUN reaches, as `address/prefix`.
    #[serde(with = "networks")]
    #[schemars(with = "Option<Vec<String>>")]
    pub allow: Option<Vec<Network>>,
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// No build starts with less free space than this.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "BytesText")]
    pub min_free: u64,
    /// Base images and caches above this are deleted, least recently used first.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "BytesText")]
    pub max_bytes: u64,
    /// Content of cache mounts above this starts afresh.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "BytesText")]
    pub max_cache_bytes: u64,
    /// Layer caches above this are deleted, least recently used first.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "BytesText")]
    pub max_layer_cache_bytes: u64,
}

/// `[logs]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Bytes kept of one build: the first and the last half.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "BytesText")]
    pub max_bytes: u64,
    /// Logs kept of past builds.
    pub keep: usize,
}

const MIB: u64 = 1024 * 1024;
/// buildah copies its own program for every RUN: 20 MiB in Debian 12, twice that in current versions.
const MIN_FILE_SIZE: u64 = 64 * MIB;
/// buildah, its helpers and a shell take about twenty.
const MIN_PIDS: u64 = 64;
const MIN_OPEN_FILES: u64 = 256;
/// Both halves of a log need room for a few lines.
const MIN_LOG: u64 = 64 * 1024;
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
    fn check(&self) -> Result<(), InvalidSetting> {
        setting::at_least("pids", self.pids, MIN_PIDS)?;
        setting::at_least("open_files", self.open_files, MIN_OPEN_FILES)?;
        setting::at_least("disk", self.disk, 64 * MIB)?;
        setting::at_least("file_size", self.file_size, MIN_FILE_SIZE)?;
        setting::at_least("memory", self.memory.unwrap_or(MIN_MEMORY), MIN_MEMORY)?;
        match self.cpus.filter(|cpus| !CPUS.contains(cpus)) {
            Some(cpus) => {
                let reason = format!("{cpus} is not between {} and {}", CPUS.start(), CPUS.end());
                Err(InvalidSetting::new("cpus", reason))
            }
            None => Ok(()),
        }
    }

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

impl Config {
    /// What is refused although it is well formed.
    pub fn check(&self) -> Result<(), InvalidSetting> {
        let within = |section: &'static str| move |invalid: InvalidSetting| invalid.within(section);
        self.build.check().map_err(within("build"))?;
        setting::at_least("logs.max_bytes", self.logs.max_bytes, MIN_LOG)?;
        check_registries(&self.registry)?;
        check_plugins(&self.plugin)
    }
}

impl BuildConfig {
    fn check(&self) -> Result<(), InvalidSetting> {
        if self.timeout.is_zero() {
            return Err(InvalidSetting::new("timeout", "must be longer than 0s"));
        }
        if !(1..=MAX_ATTEMPTS).contains(&self.attempts) {
            let reason = format!("{} is not between 1 and {MAX_ATTEMPTS}", self.attempts);
            return Err(InvalidSetting::new("attempts", reason));
        }
        self.limits.check().map_err(|invalid| invalid.within("limits"))
    }
}

fn check_registries(sections: &[RegistrySection]) -> Result<(), InvalidSetting> {
    match RegistryConfig::problem(sections) {
        Some((index, error)) => {
            Err(InvalidSetting::new(format!("registry.{index}"), crate::error::chain(&error)))
        }
        None => Ok(()),
    }
}

fn check_plugins(plugins: &[PluginConfig]) -> Result<(), InvalidSetting> {
    for (index, plugin) in plugins.iter().enumerate() {
        let twin = plugins[..index].iter().any(|earlier| earlier.name == plugin.name);
        let twice = || InvalidSetting::new("name", format!("`{}` appears twice", plugin.name));
        if let Some(problem) = plugin.problem().or_else(|| twin.then(twice)) {
            return Err(problem.within(&format!("plugin.{index}")));
        }
    }
    Ok(())
}

/// Networks as texts.
mod networks {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de};

    use crate::slot::wire::Network;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Vec<Network>>, D::Error> {
        let texts = Vec::<String>::deserialize(input)?;
        let parsed: Result<Vec<_>, _> = texts.iter().map(|text| super::parse_network(text)).collect();
        parsed.map(Some).map_err(de::Error::custom)
    }

    #[expect(clippy::ref_option, reason = "serde calls it with a reference to the field")]
    pub(super) fn serialize<S: Serializer>(
        networks: &Option<Vec<Network>>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let text = |network: &Network| format!("{}/{}", network.address, network.prefix);
        networks.as_ref().map(|list| list.iter().map(text).collect::<Vec<_>>()).serialize(to)
    }
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

    fn build(text: &str) -> Result<BuildConfig, String> {
        let config: BuildConfig = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        config.check().map(|()| config).map_err(|invalid| invalid.to_string())
    }

    #[test]
    fn values_have_units() {
        let config = build("timeout = \"1h30m\"\n[limits]\ndisk = \"20GiB\"\n").unwrap();
        assert_eq!(config.timeout, Duration::from_mins(90));
        assert_eq!(config.limits.disk, 20 * GIB);
        let network: NetworkConfig = toml::from_str("allow = [\"10.1.2.3/8\", \"192.0.2.7\"]\n").unwrap();
        let allow = network.allow.unwrap();
        assert_eq!((allow[0].address, allow[0].prefix), (Ipv4Addr::new(10, 0, 0, 0), 8));
        assert_eq!(allow[1].prefix, 32);
    }

    #[test]
    fn values_have_ranges() {
        for (text, wanted) in [
            ("timeout = \"0s\"", "timeout: must be longer than 0s"),
            ("attempts = 0", "attempts: 0 is not between 1 and 20"),
            ("limits.pids = 3", "limits.pids: 3 is too small; at least 64"),
            ("limits.file_size = \"63MiB\"", "limits.file_size: 66060288 is too small; at least 67108864"),
            ("limits.memory = \"1MiB\"", "limits.memory: 1048576 is too small; at least"),
            ("limits.cpus = 0.0", "limits.cpus: 0 is not between 0.01 and 65536"),
            ("limits.cpus = nan", "limits.cpus: NaN is not between"),
        ] {
            let message = build(text).unwrap_err();
            assert!(message.starts_with(wanted), "{text:?} gave {message}");
        }
        assert_eq!(build("attempts = 20\nlimits.pids = 64").unwrap().attempts, 20);
    }

    #[test]
    fn an_entry_of_an_array_is_named_by_its_place() {
        let plugin = PluginConfig::from_option("a.wasm").unwrap();
        let registry =
            |prefix: &str| RegistrySection { prefix: prefix.to_owned(), ..RegistrySection::default() };
        let twins = Config { plugin: vec![plugin.clone(), plugin], ..Config::default() };
        assert_eq!(twins.check().unwrap_err().key, "plugin.1.name");
        let config = Config { registry: vec![registry("docker.io"), registry("A/b")], ..Config::default() };
        assert_eq!(config.check().unwrap_err().key, "registry.1");
        assert_eq!(Config::default().check(), Ok(()));
    }
}
