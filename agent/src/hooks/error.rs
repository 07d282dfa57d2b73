//! Why a plugin does not load (pure).

use std::io;
use std::path::PathBuf;

use kiln_protocol::Digest;
use kiln_protocol::message::Hook;
use kiln_protocol::verdict::Violation;

use super::bindings::API_VERSION;
use super::cache::CacheError;

/// A plugin that does not load; while there is one, no build may run.
#[derive(Debug, thiserror::Error)]
#[error("plugin {name}")]
pub struct LoadError {
    /// Its name in the configuration.
    pub name: String,
    /// Why.
    #[source]
    pub cause: LoadCause,
}

/// Why a plugin does not load.
#[derive(Debug, thiserror::Error)]
pub enum LoadCause {
    /// The configuration is outside its rules.
    #[error("{0}")]
    Config(String),
    /// Another plugin has the same name.
    #[error("two plugins have this name; verdicts and metrics could not tell them apart")]
    DuplicateName,
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is larger than any plugin.
    #[error("{} has more than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes that are taken.
        limit: u64,
    },
    /// `plugins.require_digest` is set and the plugin has no digest.
    #[error("it has no digest, and plugins.require_digest is set; this file is {actual}")]
    DigestRequired {
        /// Of the file.
        actual: Digest,
    },
    /// The file is another one.
    #[error("the file is {actual}, and the configuration wants {expected}")]
    Digest {
        /// From the configuration.
        expected: Digest,
        /// Of the file.
        actual: Digest,
    },
    /// The bytes are no WebAssembly.
    #[error("{} is no WebAssembly; build the plugin for the target wasm32-wasip2", path.display())]
    NotWasm {
        /// The file.
        path: PathBuf,
    },
    /// A module and not a component.
    #[error("{} is a core module and not a component; build it for the target wasm32-wasip2", path.display())]
    CoreModule {
        /// The file.
        path: PathBuf,
    },
    /// The component is damaged or uses what this host does not have.
    #[error("{} is no valid component: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What the compiler says.
        reason: String,
    },
    /// The engine cannot be started.
    #[error("the WebAssembly engine does not start: {0}")]
    Engine(String),
    /// The cache of compiled plugins cannot be used.
    #[error("the cache of compiled plugins")]
    Cache(#[source] CacheError),
    /// It was built for another version of the contract.
    #[error("it wants {interface} {wanted}, and this Kiln offers {API_VERSION}; {fix}")]
    Version {
        /// `kiln:plugin/…`.
        interface: String,
        /// Its version.
        wanted: String,
        /// What to do.
        fix: &'static str,
    },
    /// A draft of the contract, and drafts are not allowed.
    #[error(
        "it is built for the draft {API_VERSION} of the contract, which may still change; set plugins.allow_unstable = true to load it"
    )]
    Unstable,
    /// It needs what no plugin gets.
    #[error(
        "it imports {interface}, which this Kiln does not offer; build it for a world of kiln:plugin {API_VERSION}"
    )]
    Import {
        /// What it imports.
        interface: String,
    },
    /// An interface has our name and version and another shape.
    #[error(
        "its {interface} is not that of kiln:plugin {API_VERSION}: {reason}; build it from the published wit/v1"
    )]
    Shape {
        /// Which.
        interface: String,
        /// What the linker says.
        reason: String,
    },
    /// It does not export what every plugin has.
    #[error("it does not export kiln:plugin/setup {API_VERSION}, which every plugin has")]
    NoSetup,
    /// It exports no hook.
    #[error("it exports no hook of kiln:plugin {API_VERSION}; there are pre-build and post-push")]
    NoHooks,
    /// The configuration names a hook that it does not export.
    #[error("it does not export the hook {}, which its configuration names", hook.label())]
    MissingHook {
        /// Which.
        hook: Hook,
    },
    /// It refuses its settings.
    #[error("it refuses its settings: {}", problems.iter().map(|p| p.message.as_str()).collect::<Vec<_>>().join("; "))]
    Settings {
        /// What it says.
        problems: Vec<Violation>,
    },
    /// It failed when it was asked about its settings.
    #[error("it failed while it checked its settings ({outcome}): {detail}")]
    SettingsFailed {
        /// How the call ended.
        outcome: kiln_protocol::verdict::Outcome,
        /// Why.
        detail: String,
    },
}
