//! Shell: from a file to a plugin that can be called: read, compile, look at, link.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use kiln_protocol::Digest;
use kiln_protocol::message::{Hook, PolicyKey};
use wasmtime::component::{Component, InstancePre};

use super::bindings::{API_VERSION, PACKAGE, post_push, pre_build, setup};
use super::cache::Cache;
use super::config::{Mode, OnFailure, PluginConfig, PluginsConfig};
use super::engine::Machine;
use super::error::LoadCause;
use super::state::{CallState, Terms};
use crate::blobs::digest_of;
use kiln_protocol::glob::Glob;

/// Larger than an interpreter with its library.
const MAX_WASM_BYTES: u64 = 64 << 20;
/// What our exports are called.
const EXPORTS: [&str; 3] = ["setup", "pre-build", "post-push"];

/// A plugin that is ready to be called.
pub(super) struct Plugin {
    pub(super) key: PolicyKey,
    pub(super) priority: i32,
    pub(super) repository: Option<Glob>,
    pub(super) mode: Mode,
    pub(super) on_failure: OnFailure,
    pub(super) terms: Arc<Terms>,
    pub(super) instance: InstancePre<CallState>,
    pub(super) setup: setup::GuestIndices,
    pub(super) pre_build: Option<pre_build::GuestIndices>,
    pub(super) post_push: Option<post_push::GuestIndices>,
}

impl Plugin {
    /// Loads everything but the opinion of the plugin on its settings.
    pub(super) fn load(
        machine: &Machine,
        cache: &Cache,
        plugins: &PluginsConfig,
        config: &PluginConfig,
    ) -> Result<Self, LoadCause> {
        if let Some(problem) = config.problem() {
            return Err(LoadCause::Config(problem.to_string()));
        }
        let path = config.path(plugins);
        let wasm = read(&path)?;
        let digest = digest_of(&wasm);
        check_digest(plugins, config, &digest)?;
        check_kind(&path, &wasm)?;
        let compiled = cache.component(&machine.engine, &digest, &wasm).map_err(LoadCause::Cache)?;
        let component = compiled.map_err(|error| {
            let reason = super::answer::shortened(&format!("{error:#}"));
            LoadCause::Invalid { path, reason }
        })?;
        check_names(machine, &component, plugins.allow_unstable)?;
        Self::link(machine, &component, config, digest)
    }

    fn link(
        machine: &Machine,
        component: &Component,
        config: &PluginConfig,
        digest: Digest,
    ) -> Result<Self, LoadCause> {
        let shape = |interface: &str, error: &wasmtime::Error| LoadCause::Shape {
            interface: interface.to_owned(),
            reason: super::answer::shortened(&format!("{error:#}")),
        };
        let instance = machine.linker.instantiate_pre(component).map_err(|e| shape("import", &e))?;
        let exported = |hook: Hook| has_export(machine, component, hook.label());
        let hooks = wanted_hooks(config, exported)?;
        let setup = setup::GuestIndices::new(&instance).map_err(|e| shape("setup", &e))?;
        let (mut pre_build, mut post_push) = (None, None);
        for hook in hooks {
            match hook {
                Hook::PreBuild => pre_build = Some(pre_build::GuestIndices::new(&instance)),
                Hook::PostPush => post_push = Some(post_push::GuestIndices::new(&instance)),
            }
        }
        let settings = config.settings_json();
        Ok(Self {
            key: PolicyKey { plugin: digest, settings: digest_of(settings.as_bytes()) },
            priority: config.priority,
            repository: config.matches.repository.clone(),
            mode: config.mode,
            on_failure: config.on_failure,
            terms: Arc::new(Terms {
                name: config.name.clone(),
                limits: config.limits.clone(),
                context_read: config.grant.context_read.clone(),
                settings,
            }),
            instance,
            setup,
            pre_build: pre_build.transpose().map_err(|e| shape("pre-build", &e))?,
            post_push: post_push.transpose().map_err(|e| shape("post-push", &e))?,
        })
    }

    /// The hooks that are called.
    pub(super) fn hooks(&self) -> Vec<Hook> {
        let pre_build = self.pre_build.as_ref().map(|_| Hook::PreBuild);
        let post_push = self.post_push.as_ref().map(|_| Hook::PostPush);
        pre_build.into_iter().chain(post_push).collect()
    }

    /// Whether the plugin judges builds for this repository.
    pub(super) fn judges(&self, repository: &str) -> bool {
        self.repository.as_ref().is_none_or(|glob| glob.matches_repository(repository))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LoadCause> {
    let mut wasm = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_WASM_BYTES + 1).read_to_end(&mut wasm));
    read.map_err(|source| LoadCause::Read { path: path.to_owned(), source })?;
    if wasm.len() as u64 > MAX_WASM_BYTES {
        return Err(LoadCause::TooLarge { path: path.to_owned(), limit: MAX_WASM_BYTES });
    }
    Ok(wasm)
}

fn check_digest(plugins: &PluginsConfig, config: &PluginConfig, actual: &Digest) -> Result<(), LoadCause> {
    match &config.digest {
        Some(expected) if expected != actual => {
            Err(LoadCause::Digest { expected: expected.clone(), actual: actual.clone() })
        }
        None if plugins.require_digest => Err(LoadCause::DigestRequired { actual: actual.clone() }),
        _ => Ok(()),
    }
}

/// Only the binary form is taken: magic, then version and layer.
fn check_kind(path: &Path, wasm: &[u8]) -> Result<(), LoadCause> {
    let path = || path.to_owned();
    if !wasm.starts_with(b"\0asm") {
        return Err(LoadCause::NotWasm { path: path() });
    }
    if wasm.get(4..8) == Some(&[1, 0, 0, 0]) {
        return Err(LoadCause::CoreModule { path: path() });
    }
    Ok(())
}

/// Everything whose name can be judged without the linker, which would only say that something is missing.
fn check_names(machine: &Machine, component: &Component, allow_unstable: bool) -> Result<(), LoadCause> {
    let engine = &machine.engine;
    let component_type = component.component_type();
    for (name, _) in component_type.imports(engine) {
        match name.strip_prefix(PACKAGE) {
            Some(ours) => check_version(ours, &["types", "input", "effects", "host"])?,
            None if name.starts_with("wasi:") => {}
            None => return Err(LoadCause::Import { interface: name.to_owned() }),
        }
    }
    for (name, _) in component_type.exports(engine) {
        if let Some(ours) = name.strip_prefix(PACKAGE) {
            check_version(ours, &EXPORTS)?;
        }
    }
    if !has_export(machine, component, "setup") {
        return Err(LoadCause::NoSetup);
    }
    if API_VERSION.contains('-') && !allow_unstable { Err(LoadCause::Unstable) } else { Ok(()) }
}

fn check_version(name: &str, known: &[&str]) -> Result<(), LoadCause> {
    let (interface, wanted) = name.split_once('@').unwrap_or((name, "without a version"));
    if wanted == API_VERSION && known.contains(&interface) {
        return Ok(());
    }
    if wanted == API_VERSION {
        return Err(LoadCause::Import { interface: format!("{PACKAGE}{name}") });
    }
    let newer = wanted > API_VERSION;
    let fix = if newer {
        "update Kiln, or build the plugin from its wit/v1"
    } else {
        "build the plugin from its wit/v1"
    };
    Err(LoadCause::Version { interface: format!("{PACKAGE}{interface}"), wanted: wanted.to_owned(), fix })
}

fn has_export(machine: &Machine, component: &Component, interface: &str) -> bool {
    let wanted = format!("{PACKAGE}{interface}@{API_VERSION}");
    component.component_type().exports(&machine.engine).any(|(name, _)| name == wanted)
}

fn wanted_hooks(config: &PluginConfig, exported: impl Fn(Hook) -> bool) -> Result<Vec<Hook>, LoadCause> {
    let all = [Hook::PreBuild, Hook::PostPush];
    if !all.into_iter().any(&exported) {
        return Err(LoadCause::NoHooks);
    }
    match &config.hooks {
        None => Ok(all.into_iter().filter(|hook| exported(*hook)).collect()),
        Some(hooks) if hooks.is_empty() => {
            Err(LoadCause::Config("hooks: an empty list calls nothing".to_owned()))
        }
        Some(hooks) => match hooks.iter().find(|hook| !exported(**hook)) {
            Some(hook) => Err(LoadCause::MissingHook { hook: *hook }),
            None => Ok(hooks.clone()),
        },
    }
}
