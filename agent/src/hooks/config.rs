//! Edge: `[plugins]` and `[[plugin]]` of the agent's configuration.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_protocol::Digest;
use kiln_protocol::glob::Glob;
use kiln_protocol::message::Hook;
use kiln_protocol::setting::InvalidSetting;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Longest settings as JSON; they are copied into every instance.
const MAX_SETTINGS_BYTES: usize = 1 << 20;
/// What TOML's reader calls a date when another format asks for it.
const TOML_DATE: &str = "$__toml_private_datetime";
/// A name is a metric label and a part of messages.
const MAX_NAME_BYTES: usize = 64;

/// `[plugins]`: what all plugins share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PluginsConfig {
    /// Where relative sources lie.
    pub directory: PathBuf,
    /// Hooks that run at once; more wait.
    pub max_concurrent: usize,
    /// Whether a plugin without a `digest` is refused.
    pub require_digest: bool,
    /// Whether plugins for a draft of the contract load.
    pub allow_unstable: bool,
}

impl Default for PluginsConfig {
    fn default() -> Self {
        let directory = PathBuf::from("/var/lib/kiln/plugins");
        Self { directory, max_concurrent: 32, require_digest: false, allow_unstable: false }
    }
}

/// `[[plugin]]`: one plugin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginConfig {
    /// What people and metrics call it.
    #[schemars(regex(pattern = r"^[A-Za-z0-9._-]{1,64}$"))]
    pub name: String,
    /// `file:` and a path.
    pub source: Source,
    /// What the file must be.
    pub digest: Option<Digest>,
    /// Which of the hooks that it exports are called; all of them if this is left out.
    pub hooks: Option<Vec<Hook>>,
    /// Verdicts are listed in this order, lowest first.
    #[serde(default = "default_priority")]
    pub priority: i32,
    /// What it judges; everything if this is left out.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// Whether its verdict counts.
    pub mode: Mode,
    /// What its failure means.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// What one call may use.
    #[serde(default)]
    pub limits: Limits,
    /// What it may see.
    #[serde(default)]
    pub grant: Grant,
    /// The plugin's own settings.
    #[serde(default)]
    pub settings: Map<String, Value>,
}

const fn default_priority() -> i32 {
    100
}

/// Where a component comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Source(PathBuf);

impl JsonSchema for Source {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Source".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^file:." })
    }
}

impl TryFrom<String> for Source {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(Self(path.into())),
            _ => Err(format!("`{text}` is no source; write file: and a path, as in file:tag-policy.wasm")),
        }
    }
}

impl From<Source> for String {
    fn from(source: Source) -> Self {
        format!("file:{}", source.0.display())
    }
}

/// `match`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// The repository, with the registry's host or without it.
    pub repository: Option<Glob>,
}

/// Whether a verdict counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It does.
    Enforce,
    /// It is written down and does nothing.
    Audit,
}

/// What a failure means for the build. A denial is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It ends.
    #[default]
    Closed,
    /// It goes on.
    Open,
}

/// `[plugin.limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// From the first instruction to the answer, in milliseconds.
    #[schemars(range(min = 1, max = 600_000))]
    pub deadline_ms: u64,
    /// All memories and tables together, in MiB.
    #[schemars(range(min = 1, max = 4096))]
    pub memory_mib: usize,
    /// Calls of the host.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub host_calls: u64,
    /// Lines for the log, in KiB.
    #[schemars(range(min = 0, max = 16384))]
    pub log_kib: usize,
    /// How long answers of `defer` are followed, in milliseconds.
    #[schemars(range(min = 0, max = 3_600_000))]
    pub defer_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { deadline_ms: 1000, memory_mib: 128, host_calls: 10_000, log_kib: 64, defer_ms: 60_000 }
    }
}

impl Limits {
    pub(super) const fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }

    pub(super) const fn defer(&self) -> Duration {
        Duration::from_millis(self.defer_ms)
    }

    fn problem(&self) -> Option<InvalidSetting> {
        // Above these a mistyped number would take the node down before anybody sees it.
        let ranges = [
            ("deadline_ms", self.deadline_ms, 1, 600_000),
            ("memory_mib", self.memory_mib as u64, 1, 4096),
            ("host_calls", self.host_calls, 1, 100_000_000),
            ("log_kib", self.log_kib as u64, 0, 16 * 1024),
            ("defer_ms", self.defer_ms, 0, 3_600_000),
        ];
        let wrong = ranges.into_iter().find(|(_, is, least, most)| is < least || is > most);
        wrong.map(|(key, is, least, most)| {
            let reason = format!("{is} is not within {least} and {most}");
            InvalidSetting::new(format!("limits.{key}"), reason)
        })
    }
}

/// `[plugin.grant]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Grant {
    /// Files of the context whose content it may read.
    pub context_read: Vec<Glob>,
}

/// An option of the command line that names a plugin cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PluginOptionError {
    /// Not `FILE[,settings=FILE]`.
    #[error("`{0}` is no plugin; write FILE or FILE,settings=FILE")]
    Form(String),
    /// The settings cannot be read.
    #[error("cannot read the settings {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The settings are neither TOML nor, in a `.json` file, JSON.
    #[error("{}: {reason}", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl PluginConfig {
    /// What `--plugin FILE[,settings=FILE]` means: every repository, enforced, failures closed.
    pub fn from_option(text: &str) -> Result<Self, PluginOptionError> {
        let form = || PluginOptionError::Form(text.to_owned());
        let (file, settings) = match text.split_once(",settings=") {
            Some((file, settings)) => (file, Some(Path::new(settings))),
            None => (text, None),
        };
        let stem = Path::new(file).file_stem().and_then(|stem| stem.to_str()).ok_or_else(form)?;
        if settings.is_some_and(|path| path.as_os_str().is_empty()) || file.contains(',') {
            return Err(form());
        }
        let file = std::path::absolute(file).map_err(|_| form())?;
        Ok(Self {
            name: stem.to_owned(),
            source: Source(file),
            digest: None,
            hooks: None,
            priority: default_priority(),
            matches: Match::default(),
            mode: Mode::Enforce,
            on_failure: OnFailure::Closed,
            limits: Limits::default(),
            grant: Grant::default(),
            settings: settings.map(read_settings).transpose()?.unwrap_or_default(),
        })
    }

    /// Where the file is.
    pub fn path(&self, plugins: &PluginsConfig) -> PathBuf {
        plugins.directory.join(&self.source.0)
    }

    /// What is wrong beyond the form.
    pub fn problem(&self) -> Option<InvalidSetting> {
        let invalid = |key: &str, reason: String| Some(InvalidSetting::new(key, reason));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.is_empty() || self.name.len() > MAX_NAME_BYTES || !self.name.chars().all(plain) {
            return invalid("name", format!("1 to {MAX_NAME_BYTES} letters, digits, - _ ."));
        }
        if self.settings_json().len() > MAX_SETTINGS_BYTES {
            return invalid("settings", format!("more than {MAX_SETTINGS_BYTES} bytes"));
        }
        if has_date(self.settings.values()) {
            return invalid("settings", "dates have no JSON form; write them as strings".to_owned());
        }
        self.limits.problem()
    }

    /// The settings as JSON with sorted keys: what the plugin gets and what their digest is of.
    pub fn settings_json(&self) -> String {
        Value::Object(self.settings.clone()).to_string()
    }
}

fn has_date<'a>(mut values: impl Iterator<Item = &'a Value>) -> bool {
    values.any(|value| match value {
        Value::Object(map) => map.contains_key(TOML_DATE) || has_date(map.values()),
        Value::Array(list) => has_date(list.iter()),
        _ => false,
    })
}

fn read_settings(path: &Path) -> Result<Map<String, Value>, PluginOptionError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| PluginOptionError::Read { path: path.to_owned(), source })?;
    let read = if path.extension().is_some_and(|extension| extension == "json") {
        serde_json::from_str(&text).map_err(|error| error.to_string())
    } else {
        toml::from_str(&text).map_err(|error| error.message().to_owned())
    };
    read.map_err(|reason| PluginOptionError::Settings { path: path.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct File {
        #[serde(default)]
        plugins: PluginsConfig,
        plugin: Vec<PluginConfig>,
    }

    fn parse(text: &str) -> Result<File, toml::de::Error> {
        toml::from_str(text)
    }

    const FULL: &str = r#"
        [plugins]
        directory = "/plugins"
        max_concurrent = 8
        require_digest = true
        allow_unstable = true
        [[plugin]]
        name = "tag-policy"
        source = "file:tag-policy.wasm"
        digest = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
        hooks = ["pre-build", "post-push"]
        priority = 5
        match = { repository = "team-a/**" }
        mode = "audit"
        on_failure = "open"
        [plugin.limits]
        deadline_ms = 10
        memory_mib = 16
        host_calls = 100
        log_kib = 1
        defer_ms = 0
        [plugin.grant]
        context_read = ["**/package.json"]
        [plugin.settings]
        deny = ["latest"]
        nested = { n = 1, f = 1.5, b = true }
    "#;

    #[test]
    fn every_key_is_read() {
        let file = parse(FULL).unwrap();
        let plugin = &file.plugin[0];
        assert_eq!(plugin.path(&file.plugins), Path::new("/plugins/tag-policy.wasm"));
        assert_eq!((plugin.mode, plugin.on_failure, plugin.priority), (Mode::Audit, OnFailure::Open, 5));
        assert_eq!(plugin.hooks.as_deref(), Some(&[Hook::PreBuild, Hook::PostPush][..]));
        assert_eq!(plugin.limits.deadline(), Duration::from_millis(10));
        assert_eq!(plugin.settings_json(), r#"{"deny":["latest"],"nested":{"b":true,"f":1.5,"n":1}}"#);
        assert_eq!(plugin.problem(), None);
    }

    #[test]
    fn what_is_not_built_yet_is_refused_like_a_mistyped_key() {
        let with =
            |line: &str| format!("[[plugin]]\nname=\"a\"\nsource=\"file:a\"\nmode=\"enforce\"\n{line}\n");
        assert!(parse(&with("")).is_ok());
        for (line, wanted) in [
            ("may_mutate = [\"tags\"]", "unknown field `may_mutate`"),
            ("exception = []", "unknown field `exception`"),
            ("[plugin.grant]\nhttp = [\"https://x\"]", "unknown field `http`"),
            ("[plugin.limits]\nfuel = 1", "unknown field `fuel`"),
            ("match = { repo = \"x\" }", "unknown field `repo`"),
            ("match = { repository = \"\" }", "an empty pattern"),
            ("on_failure = \"retry\"", "unknown variant `retry`"),
            ("hooks = [\"pre-push\"]", "unknown variant `pre-push`"),
        ] {
            let message = parse(&with(line)).unwrap_err().to_string();
            assert!(message.contains(wanted), "{line}: {message}");
        }
        let message = parse("[[plugin]]\nname=\"a\"\nsource=\"file:a\"\n").unwrap_err().to_string();
        assert!(message.contains("missing field `mode`"), "{message}");
        let message = parse(&with("").replace("file:a", "oci://a")).unwrap_err().to_string();
        assert!(message.contains("write file: and a path"), "{message}");
    }

    #[test]
    fn values_have_ranges() {
        let base = || PluginConfig::from_option("a.wasm").unwrap();
        let limits = Limits { deadline_ms: 0, ..Limits::default() };
        let wrong = [
            PluginConfig { limits, ..base() },
            PluginConfig { name: "a b".to_owned(), ..base() },
            PluginConfig { name: String::new(), ..base() },
            PluginConfig { settings: toml::from_str("a = [{ b = 2020-01-01 }]").unwrap(), ..base() },
        ];
        for config in wrong {
            assert!(config.problem().is_some(), "{config:?}");
        }
        assert_eq!(base().problem(), None);
    }

    #[test]
    fn an_option_is_a_file_with_settings() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
            folder.path().join(name).display().to_string()
        };
        let (toml, json) = (path("s.toml", "a = 1\n"), path("s.json", "{\"a\":1}"));
        for settings in [toml, json] {
            let config =
                PluginConfig::from_option(&format!("/p/tag-policy.wasm,settings={settings}")).unwrap();
            assert_eq!((config.name.as_str(), config.mode), ("tag-policy", Mode::Enforce));
            assert_eq!(config.settings_json(), r#"{"a":1}"#);
        }
        for wrong in ["", "a.wasm,settings=", "a.wasm,digest=x", "/p.wasm,settings=/nowhere.toml"] {
            assert!(PluginConfig::from_option(wrong).is_err(), "{wrong}");
        }
        let broken = path("x.json", "a = 1");
        let error = PluginConfig::from_option(&format!("a.wasm,settings={broken}")).unwrap_err();
        assert!(matches!(error, PluginOptionError::Settings { .. }));
    }
}
