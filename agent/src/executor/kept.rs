//! What a build takes over from earlier ones and leaves to later ones: layers and cache mounts (shell).

use std::io::Read as _;

use kiln_protocol::result::Failure;
use kiln_protocol::{Digest, Reason};
use sha2::Digest as _;

use super::prepare::store_names;
use super::{Attempt, Named, Planned, Run};
use crate::caches::{CacheLease, NewContent};
use crate::dockerfile::Dockerfile;
use crate::error::chain;
use crate::layers::{self, Circumstances, LayerLease, MAX_LAYERS, Measured, Mounted, Promotion};
use crate::slot::Slot;

/// Enough to keep the disk busy.
const BUFFER_BYTES: usize = 64 * 1024;

impl Run {
    /// Every store that the slot mounts, bases first.
    pub(super) fn image_stores(&self, bases: &[Named]) -> Vec<String> {
        let mut stores = store_names(bases);
        stores.extend(self.layers.iter().flat_map(LayerLease::stores));
        stores
    }

    pub(super) async fn lease_layers(
        &self,
        planned: &Planned,
        bases: &[Named],
    ) -> Attempt<Option<LayerLease>> {
        let Some(cache) = &self.layer_cache else { return Ok(None) };
        let triggers: Vec<String> = bases.iter().flat_map(|n| n.base.record.triggers.clone()).collect();
        let of_bases = bases.iter().map(|n| n.base.record.layers.len()).max().unwrap_or(0);
        let most = planned.dockerfile.most_layers(of_bases + triggers.len());
        if most > MAX_LAYERS {
            self.note(format!(
                "the image may have {most} layers, more than {MAX_LAYERS}: it gets one for each stage, and none is cached"
            ))
            .await;
            return Ok(None);
        }
        let name = self.layer_cache_name(cache, planned, bases, &triggers).await?;
        let lease = LayerLease::acquire(&self.agent.state, name, cache.reuse).await;
        lease.map(Some).map_err(|e| self.fail(Reason::StoreCorrupt, chain(&e)))
    }

    async fn layer_cache_name(
        &self,
        cache: &layers::LayerCache,
        planned: &Planned,
        bases: &[Named],
        triggers: &[String],
    ) -> Attempt<String> {
        let Planned { dockerfile, forced_args, .. } = planned;
        let mounted = self.mounted(dockerfile, triggers).await?;
        let bases = bases.iter().map(|n| (n.name.as_str(), &n.base.record.config)).collect();
        let circumstances = Circumstances {
            bases,
            mounted,
            ..Circumstances::new(self.agent.buildah, &self.request, dockerfile, forced_args, triggers)
        };
        layers::name(&cache.key, &circumstances).map_err(|e| self.fail(Reason::Unknown, e.to_string()))
    }

    /// What RUN steps may see by mounts: everything, if they mount anything but caches and secrets.
    async fn mounted(&self, dockerfile: &Dockerfile, triggers: &[String]) -> Attempt<Option<Mounted<'_>>> {
        let mounts = dockerfile.uses_bind_mounts() || triggers.iter().any(|t| t.contains("--mount"));
        if !mounts {
            return Ok(None);
        }
        let failed = |e: std::io::Error| self.fail(Reason::ContextInvalid, format!("hash the context: {e}"));
        let archive = self.inputs.archive.try_clone().map_err(failed)?;
        let context = self.blocking(move || digest_of(archive)).await?.map_err(failed)?;
        let request = &self.request;
        Ok(Some(Mounted { context, dockerfile: &request.dockerfile, build_args: &request.build_args }))
    }

    pub(super) async fn gather_cache(&mut self, slot: &mut Slot, cache: CacheLease) -> Option<NewContent> {
        let limit = self.agent.config.data.max_cache_bytes;
        match cache.gather(slot, &mut self.stop, limit).await {
            Ok(content) => Some(content),
            Err(_) if self.stop.current().is_some() => None,
            Err(error) => {
                self.note(format!("the cache mounts are not kept: {}", chain(&error))).await;
                None
            }
        }
    }

    pub(super) async fn keep_cache(&mut self, slot: &mut Slot, content: NewContent) {
        // The image is made: a lost cache costs time, not the build.
        match content.promote(&self.agent.state, slot).await {
            Ok(None) => {}
            Ok(Some(note)) => self.note(note).await,
            Err(error) => self.note(format!("the cache mounts were not kept: {}", chain(&error))).await,
        }
    }

    /// What the build made that a later one can use; none if every step was cached.
    pub(super) async fn measure_layers(&mut self, slot: &mut Slot, bases: &[Named]) -> Option<Measured> {
        let lease = self.layers.as_ref()?;
        match lease.measure(slot, &mut self.stop, store_names(bases).len()).await {
            Ok(measured) => measured,
            // A stopped build keeps nothing, and says so by its end.
            Err(_) if self.stop.current().is_some() => None,
            Err(error) => {
                self.note(format!("the layers are not kept: {}", chain(&error))).await;
                None
            }
        }
    }

    /// Keeps the layers of a successful build. Nothing runs in the slot afterwards.
    pub(super) async fn keep_layers(&mut self, slot: &mut Slot, measured: &Measured) {
        let Some(lease) = &self.layers else { return };
        let limit = self.agent.config.data.max_layer_cache_bytes;
        // The image is made: lost layers cost time, not the build.
        match lease.promote(&self.agent.state, slot, measured, limit).await {
            Ok(Promotion::Kept) => {}
            Ok(Promotion::NotKept(why)) => self.note(why).await,
            Err(error) => self.note(format!("the layers were not kept: {}", chain(&error))).await,
        }
    }

    /// A store that a slot wrote may be damaged in ways that nobody foresees. After a failure that neither the
    /// Dockerfile nor a limit explains, the next build starts without it.
    pub(super) async fn doubt_layers(&self, failure: &Failure) {
        let Some(lease) = self.layers.as_ref().filter(|lease| !lease.is_empty()) else { return };
        let stopped = self.stop.current().map(|stop| stop.reason.reason());
        let reason = stopped.unwrap_or(failure.reason);
        if !is_doubtful(reason, failure.run_exit_code) {
            return;
        }
        match lease.forget(&self.agent.state).await {
            Ok(()) => self.note("the cached layers are not used again".to_owned()).await,
            Err(error) => self.note(format!("cannot forget the cached layers: {}", chain(&error))).await,
        }
    }
}

/// Whether a damaged store may be the cause of a failure. A command that failed by itself ran on layers that
/// could be mounted.
fn is_doubtful(reason: Reason, run_exit_code: Option<i32>) -> bool {
    match reason {
        Reason::BuildFailed => run_exit_code.is_none(),
        Reason::Unknown
        | Reason::StoreCorrupt
        | Reason::CandidateCorrupt
        | Reason::NodeUnfit
        | Reason::Timeout => true,
        _ => false,
    }
}

fn digest_of(mut file: std::fs::File) -> std::io::Result<Digest> {
    std::io::Seek::rewind(&mut file)?;
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Digest::from_sha256(hash.finalize().into())),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_that_nothing_else_explains_cost_the_cache() {
        for (reason, code, doubtful) in [
            (Reason::BuildFailed, Some(1), false),
            (Reason::BuildFailed, None, true),
            (Reason::StoreCorrupt, None, true),
            (Reason::Timeout, None, true),
            (Reason::NotFound, None, false),
            (Reason::Cancelled, None, false),
            (Reason::LimitExceeded, None, false),
        ] {
            assert_eq!(is_doubtful(reason, code), doubtful, "{reason} {code:?}");
        }
    }
}
