//! Before the slot: plan, fetch, and what the slot is made of (shell).

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_protocol::Reason;
use kiln_protocol::request::{ImageFormat, NetworkMode, SECRET_ID_RULE, is_secret_id};
use kiln_protocol::result::Failure;

use super::{Attempt, Named, Planned, Resolved, Run};
use crate::bases::{self, BaseError, Bases};
use crate::caches::CacheLease;
use crate::dockerfile::{BaseReference, BuildInput, Dockerfile, Problem, Severity};
use crate::error::chain;
use crate::plan::path;
use crate::registry::{Platform, Registry, RegistryError};
use crate::slot::wire::{SlotFile, SlotSpec};
use crate::slot::{RESOLVER, Slot, SlotFiles, host_networks};

/// Until builds have repositories, all builds of one data directory share their cache mounts.
const CACHE_KEY: &str = "local";
/// System bundles of Debian's and Red Hat's families: what RUN trusts besides `build.ca`.
const SYSTEM_CA: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

impl Run {
    pub(super) fn plan(&self) -> Attempt<Planned> {
        let request = &self.request;
        let dockerfile = Dockerfile::parse(&request.dockerfile).map_err(|e| self.refused(&e))?;
        let input = super::build_input(request, self.agent.buildah);
        self.first_error(&dockerfile.check(&input, request.format))?;
        self.check_secrets(&dockerfile, &input)?;
        self.check_bind_sources(&dockerfile, &input)?;
        let references = dockerfile.references(&input).map_err(|e| self.refused(&e))?;
        let forced_args = dockerfile.forced_build_args(&input).map_err(|e| self.refused(&e))?;
        let target = match &request.target {
            Some(name) => Some(dockerfile.target(Some(name)).map_err(|e| self.refused(&e))?.buildah_name()),
            None => None,
        };
        Ok(Planned { dockerfile, references, target, forced_args })
    }

    fn first_error(&self, problems: &[Problem]) -> Attempt<()> {
        let Some(problem) = problems.iter().find(|p| p.severity == Severity::Error) else { return Ok(()) };
        let location = Some(self.location(problem.line));
        let hint = Some(problem.hint.clone());
        Err(Failure { location, hint, ..self.fail(Reason::BadRequest, problem.message.clone()) })
    }

    fn check_secrets(&self, dockerfile: &Dockerfile, input: &BuildInput<'_>) -> Attempt<()> {
        let given: BTreeSet<&str> = self.inputs.secrets.iter().map(|s| s.id.as_str()).collect();
        if let Some(bad) = given.iter().find(|id| !is_secret_id(id)) {
            return Err(self.fail(Reason::BadRequest, format!("`{bad}` is no secret id: {SECRET_ID_RULE}")));
        }
        let wanted = dockerfile.secret_ids(input).map_err(|e| self.refused(&e))?;
        let missing = wanted.into_iter().find(|s| s.required && !given.contains(s.id.as_str()));
        let Some(missing) = missing else { return Ok(()) };
        let message = format!("this step requires the secret `{}`, which was not given", missing.id);
        let hint = Some(format!("add --secret id={},src=FILE", missing.id));
        Err(Failure {
            location: Some(self.location(missing.line)),
            hint,
            ..self.fail(Reason::BadRequest, message)
        })
    }

    /// A bind mount whose source is a symlink of the context would be followed by older buildahs.
    fn check_bind_sources(&self, dockerfile: &Dockerfile, input: &BuildInput<'_>) -> Attempt<()> {
        let sources = dockerfile.bind_sources(input).map_err(|e| self.refused(&e))?;
        if sources.is_empty() {
            return Ok(());
        }
        let links = self.links_of_context()?;
        for source in sources {
            let prefix = prefixes(&source.path).find(|p| links.contains(p.as_bytes()));
            if let Some(link) = prefix {
                let message = format!(
                    "the source `{}` of a bind mount passes through the symlink `{link}`",
                    source.path
                );
                let hint = Some("name the directory or file that the link points to".to_owned());
                let location = Some(self.location(source.line));
                return Err(Failure { location, hint, ..self.fail(Reason::BadRequest, message) });
            }
        }
        Ok(())
    }

    fn links_of_context(&self) -> Attempt<BTreeSet<Vec<u8>>> {
        let failed = |e: std::io::Error| self.fail(Reason::ContextInvalid, chain(&e));
        let mut archive = self.inputs.archive.try_clone().map_err(failed)?;
        std::io::Seek::rewind(&mut archive).map_err(failed)?;
        let mut links = BTreeSet::new();
        let listed = crate::unpack::list(archive, &self.agent.config.context, |entry| {
            if matches!(entry.kind, crate::unpack::Kind::Symlink { .. }) {
                links.insert(entry.path.clone());
            }
        });
        listed.map_err(|e| self.fail(Reason::ContextInvalid, chain(&e)))?;
        Ok(links)
    }

    /// Ends `work` with a stop request. Only for work that leaves nothing behind when it is dropped.
    async fn or_stop<T>(&self, work: impl Future<Output = Attempt<T>>) -> Attempt<T> {
        let mut stop = self.stop.clone();
        tokio::select! {
            biased;
            _ = stop.stopped() => Err(self.fail(Reason::Cancelled, "stopped")),
            result = work => result,
        }
    }

    fn registry(&self) -> Attempt<Registry> {
        let registry = self.agent.registry(self.inputs.credentials.clone());
        registry.map_err(|e| self.fail(Reason::NodeUnfit, chain(&e)))
    }

    /// While this is held, nobody deletes blobs that nothing refers to yet.
    pub(super) async fn use_blobs(&self) -> Attempt<std::fs::File> {
        self.agent.state.use_blobs().await.map_err(|e| self.fail(Reason::StoreCorrupt, chain(&e)))
    }

    /// What every name stands for, at this moment and for these credentials.
    pub(super) async fn resolve_all(&self, planned: &Planned) -> Attempt<Vec<Resolved>> {
        if planned.references.is_empty() {
            return Ok(Vec::new());
        }
        let registry = self.registry()?;
        let mut resolved: Vec<Resolved> = Vec::new();
        for reference in &planned.references {
            if !resolved.iter().any(|known| known.name == reference.lookup) {
                resolved.push(self.or_stop(self.resolve(&registry, reference)).await?);
            }
        }
        Ok(resolved)
    }

    pub(super) async fn fetch(&self, resolved: Vec<Resolved>) -> Attempt<Vec<Named>> {
        if resolved.is_empty() {
            return Ok(Vec::new());
        }
        let registry = self.registry()?;
        let mut bases = Vec::with_capacity(resolved.len());
        for image in resolved {
            bases.push(self.make_available(&registry, image).await?);
        }
        Ok(bases)
    }

    async fn resolve(&self, registry: &Registry, base: &BaseReference) -> Attempt<Resolved> {
        let platform = self.platform(base)?;
        let resolved = registry.resolve(&base.reference, &platform, self.agent.state.blobs()).await;
        let image = resolved.map_err(|e| self.registry_failed(&e, Some(base.line)))?;
        self.note(format!("{} is {}", base.reference, image.manifest_digest)).await;
        Ok(Resolved { name: base.lookup.clone(), line: base.line, image })
    }

    /// Older buildahs keep the platform of one FROM for the stages behind it, and a slot runs only what the
    /// node's processor runs.
    fn platform(&self, base: &BaseReference) -> Attempt<Platform> {
        let host = Platform::host();
        let Some(text) = &base.platform else { return Ok(host) };
        let refused = |message: String| Failure {
            location: Some(self.location(base.line)),
            hint: Some("leave --platform out, or build on a node of that platform".to_owned()),
            ..self.fail(Reason::BadRequest, message)
        };
        let wanted: Platform =
            text.parse().map_err(|e: crate::registry::InvalidPlatform| refused(e.to_string()))?;
        if wanted.os != host.os || wanted.architecture != host.architecture {
            return Err(refused(format!("this node builds {host}, not {wanted}")));
        }
        Ok(wanted)
    }

    async fn make_available(&self, registry: &Registry, resolved: Resolved) -> Attempt<Named> {
        let Resolved { name, line, image } = resolved;
        let fetch = async {
            let fetched = registry.fetch(&image, self.agent.state.blobs(), &|_, _| {}).await;
            fetched.map_err(|e| self.registry_failed(&e, Some(line)))
        };
        self.or_stop(fetch).await?;
        let store =
            Bases { state: &self.agent.state, config: &self.agent.config, identity: self.agent.identity };
        let base =
            store.ensure(&image, &mut self.stop.clone()).await.map_err(|e| self.base_failed(&e, line))?;
        Ok(Named { name, line, base: Arc::new(base) })
    }

    fn registry_failed(&self, error: &RegistryError, line: Option<usize>) -> Failure {
        let location = line.map(|line| self.location(line));
        Failure { location, hint: error.hint(), ..self.fail(error.reason(), chain(error)) }
    }

    fn base_failed(&self, error: &BaseError, line: usize) -> Failure {
        let failure = match error {
            BaseError::Slot(lost) => self.lost(lost),
            BaseError::Import { end, .. } => self.step_failed(end, None),
            BaseError::Malformed { .. } => self.fail(Reason::BadRequest, chain(error)),
            BaseError::State(_) | BaseError::Blob(_) | BaseError::Publish { .. } => {
                self.fail(Reason::StoreCorrupt, chain(error))
            }
            BaseError::Stopped => self.fail(Reason::Cancelled, "stopped"),
        };
        Failure { location: Some(self.location(line)), ..failure }
    }

    /// ONBUILD triggers of a base run as part of this build and obey the same rules.
    pub(super) async fn check_triggers(&self, bases: &[Named]) -> Attempt<()> {
        let oci = self.request.format == ImageFormat::Oci;
        for named in bases.iter().filter(|n| oci && n.base.record.healthcheck) {
            self.note(format!(
                "{} has a HEALTHCHECK, which an OCI image cannot hold: it is dropped",
                named.name
            ))
            .await;
        }
        for named in bases.iter().filter(|n| !n.base.record.triggers.is_empty()) {
            let within = |failure: Failure| {
                let message = format!("ONBUILD of {}: {}", named.name, failure.message);
                Failure { message, location: None, ..failure }
            };
            let triggers = Dockerfile::parse_triggers(&named.base.record.triggers);
            let triggers = triggers.map_err(|e| within(self.refused(&e)))?;
            let input = super::build_input(&self.request, self.agent.buildah);
            let input = BuildInput { target: None, ..input };
            self.first_error(&triggers.check(&input, self.request.format)).map_err(within)?;
        }
        Ok(())
    }

    pub(super) async fn cache(&self, planned: &Planned, bases: &[Named]) -> Attempt<Option<CacheLease>> {
        let triggers = bases.iter().flat_map(|n| &n.base.record.triggers);
        let wanted =
            planned.dockerfile.uses_cache_mounts() || triggers.into_iter().any(|t| t.contains("type=cache"));
        if !wanted {
            return Ok(None);
        }
        let lease = CacheLease::acquire(&self.agent.state, CACHE_KEY).await;
        lease.map(Some).map_err(|e| self.fail(Reason::StoreCorrupt, chain(&e)))
    }

    pub(super) async fn open_slot(
        &self,
        bases: &[Named],
        cache: Option<&CacheLease>,
        log: std::os::fd::OwnedFd,
    ) -> Attempt<Slot> {
        let failed = |e: crate::state::StateError| self.fail(Reason::Unknown, chain(&e));
        let io = |e: std::io::Error| self.fail(Reason::Unknown, chain(&e));
        let spec = self.slot_spec(bases, cache)?;
        let files = SlotFiles {
            store: self.agent.state.store().map_err(failed)?,
            lock: self.job.lock().map_err(io)?,
            archive: Some(self.inputs.archive.try_clone().map_err(io)?),
            log,
        };
        Slot::start(&spec, files).await.map_err(|e| self.lost(&e))
    }

    fn slot_spec(&self, bases: &[Named], cache: Option<&CacheLease>) -> Attempt<SlotSpec> {
        let config = &self.agent.config;
        let blocked = host_networks().map_err(|e| self.fail(Reason::NodeUnfit, e.to_string()))?;
        Ok(SlotSpec {
            network: self.request.network,
            blocked,
            allowed: config.network.allow.clone(),
            stores: self.image_stores(bases),
            cache: cache.map(CacheLease::mount),
            files: self.slot_files(bases)?,
            ..self.agent.bare_slot(self.job.name())
        })
    }

    fn slot_files(&self, bases: &[Named]) -> Attempt<Vec<SlotFile>> {
        let mut files = bases::container_files();
        let names: Vec<_> = bases.iter().map(|n| (n.name.clone(), &n.base.record)).collect();
        files.extend(bases::names_index(&names));
        let file = |path: &str, contents: Vec<u8>| SlotFile { path: path.to_owned(), contents, mode: 0o644 };
        files.push(file(path::DOCKERFILE, self.request.dockerfile.clone().into_bytes()));
        files.push(file(path::NO_IGNORE, Vec::new()));
        files.push(file("/etc/resolv.conf", resolv_conf(self.request.network)));
        for secret in &self.inputs.secrets {
            let path = format!("{}/{}", path::SECRETS, secret.id);
            files.push(SlotFile { path, contents: secret.value.clone(), mode: 0o400 });
        }
        if self.agent.config.build.ca.is_some() {
            files.push(file(path::CA_BUNDLE, self.ca_bundle()?));
        }
        Ok(files)
    }

    fn ca_bundle(&self) -> Attempt<Vec<u8>> {
        let mut bundle = SYSTEM_CA.iter().find_map(|path| std::fs::read(path).ok()).unwrap_or_default();
        let own = self.agent.own_ca().map_err(|e| self.fail(Reason::NodeUnfit, chain(&e)))?;
        bundle.push(b'\n');
        bundle.extend(own.unwrap_or_default());
        Ok(bundle)
    }
}

/// Every store once, in the order of the base images.
pub(super) fn store_names(bases: &[Named]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let names = bases.iter().map(|n| bases::store_name(&n.base.record.manifest));
    names.filter(|name| seen.insert(name.clone())).collect()
}

/// `a/b/c` gives `a`, `a/b`, `a/b/c`.
fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    let path = path.trim_matches('/');
    path.match_indices('/').map(|(at, _)| &path[..at]).chain(std::iter::once(path))
}

fn resolv_conf(network: NetworkMode) -> Vec<u8> {
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    match network {
        NetworkMode::UnsafeHost => host.into_bytes(),
        NetworkMode::None => Vec::new(),
        NetworkMode::Isolated => {
            let kept = host.lines().filter(|l| l.starts_with("search") || l.starts_with("options"));
            let lines = kept.fold(format!("nameserver {RESOLVER}\n"), |text, line| text + line + "\n");
            lines.into_bytes()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end_with_the_path_itself() {
        assert_eq!(prefixes("/a/b/c").collect::<Vec<_>>(), ["a", "a/b", "a/b/c"]);
        assert_eq!(prefixes("a").collect::<Vec<_>>(), ["a"]);
    }
}
