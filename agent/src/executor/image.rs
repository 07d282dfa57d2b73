//! Inside the slot: unpack, build, export; and sealing what came out (shell).

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;

use kiln_protocol::result::Failure;
use kiln_protocol::{Digest, Reason};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::{Attempt, Built, Named, Planned, Run};
use crate::error::chain;
use crate::export::Order;
use crate::housekeeping;
use crate::layers::LayerLease;
use crate::plan::{self, Layers, PlanInput};
use crate::seal::{self, BaseLayer, SealLimits, SealOptions};
use crate::slot::wire::{Exit, Purpose, SlotSpec, Step};
use crate::slot::{REFUSED, Slot};

/// `sha256:` and 64 characters; more is not an image id.
const MAX_IMAGE_ID_BYTES: u64 = 128;

impl Run {
    pub(super) async fn unpack(&mut self, slot: &mut Slot) -> Attempt<()> {
        let end = self.step(slot, Step::Unpack(self.agent.config.context.clone())).await?;
        if end.exit == Exit::Code(0) {
            return Ok(());
        }
        if end.breach.is_some() || end.exit != Exit::Code(REFUSED) {
            return Err(self.step_failed(&end, None));
        }
        Err(self.fail(Reason::ContextInvalid, end.stderr.trim()))
    }

    pub(super) async fn build(&mut self, slot: &mut Slot, planned: &Planned, bases: &[Named]) -> Attempt<()> {
        let ids: Vec<String> = self.inputs.secrets.iter().map(|s| s.id.clone()).collect();
        let ca_targets = self.ca_targets(planned, bases).await;
        let input = PlanInput {
            request: &self.request,
            target: planned.target.as_deref(),
            forced_args: &planned.forced_args,
            open_files: self.agent.config.build.limits.slot().open_files,
            stores: self.image_stores(bases).len(),
            layers: self.layers.as_ref().map_or(Layers::One, LayerLease::plan),
            secret_ids: &ids,
            ca_targets: &ca_targets,
        };
        let env = plan::environment(&self.proxy());
        let end = self.step(slot, Step::Exec { argv: plan::build(&input), env, network: true }).await?;
        if end.exit == Exit::Code(0) {
            Ok(())
        } else {
            Err(self.step_failed(&end, Some(&planned.dockerfile)))
        }
    }

    /// Files that every image has in which a RUN runs: mounting over a missing one would leave a stub there.
    async fn ca_targets(&self, planned: &Planned, bases: &[Named]) -> Vec<String> {
        if self.agent.config.build.ca.is_none() {
            return Vec::new();
        }
        let running = planned.dockerfile.lines_of_running_bases();
        let runs = |named: &&Named| {
            let trigger = named
                .base
                .record
                .triggers
                .iter()
                .any(|t| t.trim_start().to_ascii_uppercase().starts_with("RUN"));
            trigger || running.contains(&named.line)
        };
        let runners: Vec<&Named> = bases.iter().filter(runs).collect();
        let mut targets: Vec<String> = runners.iter().flat_map(|n| n.base.record.ca_files.clone()).collect();
        targets.sort();
        targets.dedup();
        for target in std::mem::take(&mut targets) {
            match runners.iter().find(|n| !n.base.record.ca_files.contains(&target)) {
                None => targets.push(target),
                Some(lacking) => {
                    self.note(format!(
                        "RUN does not see build.ca in {target}, because {} has no such file",
                        lacking.name
                    ))
                    .await;
                }
            }
        }
        targets
    }

    /// buildah hands these to RUN and keeps them out of config and history.
    fn proxy(&self) -> Vec<(String, String)> {
        let proxy = &self.agent.config.build.proxy;
        let pairs =
            [("http_proxy", &proxy.http), ("https_proxy", &proxy.https), ("no_proxy", &proxy.no_proxy)];
        let set = pairs.into_iter().filter_map(|(name, value)| Some((name, value.clone()?)));
        set.flat_map(|(name, value)| [(name.to_owned(), value.clone()), (name.to_ascii_uppercase(), value)])
            .collect()
    }

    /// Writes the built image out of buildah's store, in namespaces that no step of the build was ever in.
    pub(super) async fn export(&mut self, slot: &mut Slot, bases: &[Named]) -> Attempt<Digest> {
        let image = self.read_image_id()?;
        let layers = bases.iter().flat_map(|n| n.base.record.layers.clone()).collect::<Vec<_>>();
        self.share_layers(&layers)?;
        let fresh = SlotSpec {
            purpose: Purpose::Export,
            stores: self.image_stores(bases),
            ..self.agent.bare_slot(self.job.name())
        };
        slot.renew(fresh).await.map_err(|e| self.lost(&e))?;
        let present = seal::taken_from_bases(&layers, &self.blobs, self.request.format);
        let end = self.step(slot, Step::Export(Order { image: image.clone(), present })).await?;
        match end.exit {
            Exit::Code(0) => Ok(image),
            Exit::Code(REFUSED) if end.breach.is_none() => {
                Err(self.fail(Reason::CandidateCorrupt, end.stderr.trim()))
            }
            _ => Err(self.step_failed(&end, None)),
        }
    }

    fn read_image_id(&self) -> Attempt<Digest> {
        let path = self.slot_path(plan::path::IMAGE_ID.trim_start_matches('/'));
        let store = self.store()?;
        let text = read_small(&store, &path).map_err(|e| {
            self.fail(Reason::CandidateCorrupt, format!("read the image id that buildah wrote: {e}"))
        })?;
        let parsed = text.trim().parse();
        parsed.map_err(|e: kiln_protocol::digest::InvalidDigest| {
            self.fail(Reason::CandidateCorrupt, e.to_string())
        })
    }

    fn slot_path(&self, below: &str) -> String {
        format!("{}/{below}", housekeeping::slot_directory(self.job.name()))
    }

    fn store(&self) -> Attempt<std::fs::File> {
        self.agent.state.store().map_err(|e| self.fail(Reason::Unknown, chain(&e)))
    }

    pub(super) async fn seal(&mut self, image_id: Digest, bases: &[Named]) -> Attempt<Built> {
        let store = self.store()?;
        let layers: Vec<_> = bases.iter().flat_map(|n| n.base.record.layers.clone()).collect();
        let (blobs, stop) = (self.blobs.clone(), self.stop.clone());
        let (layout, export) = (self.slot_path("layout"), self.slot_path("job/export"));
        let files = self.request.root_filesystem;
        let (format, disk) = (self.request.format, self.agent.config.build.limits.disk);
        let work = move || {
            let should_stop = || stop.current().is_some();
            let limits = SealLimits { total_bytes: disk, unpacked_bytes: disk, ..SealLimits::default() };
            let options = SealOptions {
                format,
                gzip_level: seal::DEFAULT_GZIP_LEVEL,
                limits,
                should_stop: &should_stop,
            };
            let layout = open_dir(&store, &layout)?;
            let image = seal::seal(layout.as_fd(), &layers, &blobs, &options)?;
            let root = files
                .then(|| seal::seal_file(open_dir(&store, &export)?.as_fd(), "rootfs.tar", &blobs, &options));
            Ok((image, root.transpose()?))
        };
        let sealed: Result<_, seal::SealError> = self.blocking(work).await?;
        let (image, root_filesystem) = sealed.map_err(|e| self.not_sealed(&e))?;
        if image.image.config_digest != image_id {
            return Err(
                self.fail(Reason::CandidateCorrupt, "the exported config is not the image that was built")
            );
        }
        Ok(Built { image, root_filesystem })
    }

    /// The job's own blobs vanish with it, also while another build uses the same base.
    fn share_layers(&self, layers: &[BaseLayer]) -> Attempt<()> {
        for layer in layers.iter().filter(|layer| !self.blobs.has(&layer.digest)) {
            let from = self.agent.state.blobs().path(&layer.digest);
            std::fs::hard_link(&from, self.blobs.path(&layer.digest)).map_err(|e| {
                self.fail(Reason::StoreCorrupt, format!("take over base layer {}: {e}", layer.digest))
            })?;
        }
        Ok(())
    }

    fn not_sealed(&self, error: &seal::SealError) -> Failure {
        self.fail(error.reason(), chain(error))
    }
}

/// Opens what a slot wrote below the store: no link is followed, and a FIFO cannot make us wait.
fn open_below(store: &File, path: &str, flags: OFlags) -> std::io::Result<File> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(File::from(openat2(store, path, flags, Mode::empty(), resolve)?))
}

fn open_dir(store: &File, path: &str) -> Result<File, seal::SealError> {
    open_below(store, path, OFlags::DIRECTORY)
        .map_err(|source| seal::SealError::Open { name: path.to_owned(), source })
}

fn read_small(store: &File, path: &str) -> std::io::Result<String> {
    let file = open_below(store, path, OFlags::empty())?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut text = String::new();
    file.take(MAX_IMAGE_ID_BYTES).read_to_string(&mut text)?;
    Ok(text)
}
