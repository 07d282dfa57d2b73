//! Runs one build from its request to sealed bytes (shell).
//!
//! The order is fixed: plan, fetch, slot, unpack, build, export, seal. Every decision on the way belongs to
//! a pure module; this one only does I/O in order and notes what it took.

mod failure;
mod image;
mod kept;
mod log;
mod policies;
mod prepare;

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use kiln_protocol::id::Attempt as Number;
use kiln_protocol::request::BuildRequest;
use kiln_protocol::result::{BuildResult, Failure, Location, LogSummary, Phase, PhaseDuration};
use kiln_protocol::verdict::Verdict;
use kiln_protocol::{BuildId, Digest, Reason};
use kiln_transport::crash::{self, CrashPoint};
use tokio::sync::mpsc;

use crate::agent::Agent;
use crate::bases::Base;
use crate::caches::CacheLease;
use crate::dockerfile::{BuildInput, Dockerfile};
use crate::error::chain;
use crate::hooks::view::BuildView;
use crate::housekeeping;
use crate::layers::{LayerCache, LayerLease};
use crate::registry::{Credentials, ResolvedImage};
use crate::seal::Sealed;
use crate::slot::Slot;
use crate::slot::wire::Step;
use crate::state::Job;
use crate::stop::{StopReason, StopSignal};

pub use log::LAST_LINES;
pub use policies::{Place, Policies};
pub(crate) use policies::{judged, verdict_lines};

/// A value that RUN steps may mount and nobody may see.
#[derive(Clone)]
pub struct Secret {
    /// Its name in the Dockerfile.
    pub id: String,
    /// Its bytes.
    pub value: Vec<u8>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({})", self.id)
    }
}

/// What travels beside a request.
#[derive(Debug)]
pub struct BuildInputs {
    /// The packed context.
    pub archive: File,
    /// Build secrets.
    pub secrets: Vec<Secret>,
    /// Registry credentials of this build.
    pub credentials: Credentials,
}

/// What happens during a build, for people who watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A phase began.
    Phase(Phase),
    /// A line of the log, redacted.
    Line(String),
    /// Something that the system says.
    Note(String),
}

/// The end of a build. The sealed bytes live as long as this.
#[derive(Debug)]
pub struct Finished {
    /// What the record keeps.
    pub result: BuildResult,
    /// The sealed image.
    pub image: Option<Sealed>,
    /// The sealed root filesystem, if it was asked for.
    pub root_filesystem: Option<(Digest, u64)>,
    /// Where the sealed bytes lie.
    pub blobs: crate::blobs::BlobStore,
    /// The end of the log.
    pub last_lines: Vec<String>,
    /// What policies said before the build.
    pub verdicts: Vec<Verdict>,
    /// What they saw, by repository: what they see of the image goes with it.
    pub views: Vec<Arc<BuildView>>,
    /// The private directory of the build; it goes with this.
    pub job: Job,
}

/// A build that can start.
#[derive(Debug)]
pub struct Order {
    /// Its id.
    pub build: BuildId,
    /// Which try this is.
    pub attempt: Number,
    /// Its private directory.
    pub job: Job,
    /// What the client asked for.
    pub request: BuildRequest,
    /// What travels beside the request.
    pub inputs: BuildInputs,
    /// Layers of earlier builds; without one, every instruction runs and leaves nothing to others.
    pub layers: Option<LayerCache>,
    /// Who must be asked before anything is built.
    pub policies: Option<Policies>,
}

/// Runs a build to its end. Never fails by itself: what goes wrong is in the result.
pub async fn run(
    agent: Arc<Agent>,
    order: Order,
    events: mpsc::Sender<Event>,
    stop: StopSignal,
) -> Result<Finished, crate::state::StateError> {
    Ok(Run::start(agent, order, events, stop)?.run_to_its_end().await)
}

/// A build in progress.
struct Run {
    agent: Arc<Agent>,
    build: BuildId,
    attempt: Number,
    job: Job,
    request: BuildRequest,
    inputs: BuildInputs,
    layer_cache: Option<LayerCache>,
    policies: Option<Policies>,
    verdicts: Vec<Verdict>,
    views: Vec<Arc<BuildView>>,
    /// The layer cache in use.
    layers: Option<LayerLease>,
    events: mpsc::Sender<Event>,
    stop: StopSignal,
    blobs: crate::blobs::BlobStore,
    phases: Vec<PhaseDuration>,
    phase: Phase,
    phase_began: Instant,
}

/// What the plan phase found out.
struct Planned {
    dockerfile: Dockerfile,
    /// Base images in the order of the file.
    references: Vec<crate::dockerfile::BaseReference>,
    /// The stage to build, as buildah names it.
    target: Option<String>,
    /// Build arguments that an older buildah must be told though they repeat defaults.
    forced_args: std::collections::BTreeMap<String, String>,
}

/// A base image under the name that the Dockerfile uses.
struct Named {
    name: String,
    /// Line of the first instruction that names it.
    line: usize,
    base: Arc<Base>,
}

/// What a successful build leaves to seal.
struct Built {
    image: Sealed,
    root_filesystem: Option<(Digest, u64)>,
}

type Attempt<T> = Result<T, Failure>;

impl Run {
    fn start(
        agent: Arc<Agent>,
        order: Order,
        events: mpsc::Sender<Event>,
        stop: StopSignal,
    ) -> Result<Self, crate::state::StateError> {
        let Order { build, attempt, job, request, inputs, layers, policies } = order;
        let blobs = crate::blobs::BlobStore::of_one_build(job.dir())?;
        let (phase, phase_began) = (Phase::Plan, Instant::now());
        Ok(Self {
            agent,
            build,
            attempt,
            job,
            request,
            inputs,
            layer_cache: layers,
            policies,
            verdicts: Vec::new(),
            views: Vec::new(),
            layers: None,
            events,
            stop,
            blobs,
            phases: Vec::new(),
            phase,
            phase_began,
        })
    }

    async fn run_to_its_end(mut self) -> Finished {
        let log = log::start(&self);
        let (outcome, log) = match log {
            Ok((log, writer)) => {
                let outcome = self.attempt(writer).await;
                (outcome, log.finish().await)
            }
            Err(failure) => (Err(failure), log::Ended::nothing()),
        };
        self.close_phase();
        let outcome = outcome.map_err(|failure| self.explain(failure, &log));
        self.finished(outcome, log)
    }

    fn finished(self, outcome: Attempt<Built>, log: log::Ended) -> Finished {
        let (outcome, image, root_filesystem) = match outcome {
            Ok(built) => (Ok(built.image.image.clone()), Some(built.image), built.root_filesystem),
            Err(failure) => (Err(failure), None, None),
        };
        let steps = self.layers.is_some().then_some(log.steps);
        let result =
            BuildResult { build_id: self.build, outcome, phases: self.phases, log: log.summary, steps };
        let last_lines = log.last_lines;
        Finished {
            result,
            image,
            root_filesystem,
            blobs: self.blobs,
            last_lines,
            verdicts: self.verdicts,
            views: self.views,
            job: self.job,
        }
    }

    /// What the user reads. Every failure quotes the Dockerfile, so every one is redacted.
    fn explain(&self, failure: Failure, log: &log::Ended) -> Failure {
        let location = failure.location.clone().or_else(|| self.announced(log));
        log.redact(match self.stop.current() {
            Some(stop) => self.stopped(stop.reason, Failure { location, ..failure }),
            None if failure.limit.is_none() => log.hint(failure),
            None => log.hint(Failure { location, ..failure }),
        })
    }

    /// A stop decides the reason, whatever the interrupted step said.
    fn stopped(&self, stop: StopReason, failure: Failure) -> Failure {
        let message = match stop {
            StopReason::Timeout => {
                format!("it took longer than {}", show_duration(self.request.timeout))
            }
            other => other.message().to_owned(),
        };
        let hint = (stop == StopReason::Timeout).then(|| "raise --timeout or build.timeout".to_owned());
        Failure { reason: stop.reason(), message, hint, limit: None, run_exit_code: None, ..failure }
    }

    /// The line of the instruction that was announced last.
    fn announced(&self, log: &log::Ended) -> Option<Location> {
        let step = log.last_step.as_deref()?;
        let dockerfile = Dockerfile::parse(&self.request.dockerfile).ok()?;
        Some(self.location(dockerfile.locate(step)?.start_line))
    }

    async fn attempt(&mut self, log: std::os::fd::OwnedFd) -> Attempt<Built> {
        let planned = self.plan()?;
        self.enter(Phase::Resolve).await;
        let _in_use = self.use_blobs().await?;
        let resolved = self.resolve_all(&planned).await?;
        self.enter(Phase::PreBuild).await;
        self.ask_policies(&planned, &resolved).await?;
        self.enter(Phase::Fetch).await;
        let bases = self.fetch(resolved).await?;
        self.check_triggers(&bases).await?;
        self.enter(Phase::Slot).await;
        let cache = self.cache(&planned, &bases).await?;
        self.layers = self.lease_layers(&planned, &bases).await?;
        let mut slot = match self.open_slot(&bases, cache.as_ref(), log).await {
            Ok(slot) => slot,
            Err(failure) => {
                self.sweep_after_loss().await;
                return Err(failure);
            }
        };
        crash::reach(CrashPoint::SlotStarted);
        let built = self.in_slot(&mut slot, &planned, &bases, cache).await;
        match &built {
            Ok(_) => self.enter(Phase::Clean).await,
            Err(failure) => self.doubt_layers(failure).await,
        }
        let finished = slot.finish().await;
        crash::reach(CrashPoint::SlotEnded);
        if finished.is_err() {
            self.sweep_after_loss().await;
        }
        let built = built?;
        finished.map_err(|e| self.lost(&e))?;
        Ok(built)
    }

    /// The shim did not live to delete the slot's files.
    async fn sweep_after_loss(&self) {
        let paths = vec![housekeeping::slot_directory(self.job.name())];
        if let Err(error) = housekeeping::remove(&self.agent, paths).await {
            self.note(format!("the slot's files stay until the next build: {}", chain(&error))).await;
        }
    }

    async fn in_slot(
        &mut self,
        slot: &mut Slot,
        planned: &Planned,
        bases: &[Named],
        cache: Option<CacheLease>,
    ) -> Attempt<Built> {
        self.enter(Phase::Unpack).await;
        self.unpack(slot).await?;
        self.enter(Phase::Build).await;
        self.build(slot, planned, bases).await?;
        let content = match cache {
            Some(cache) => self.gather_cache(slot, cache).await,
            None => None,
        };
        let measured = self.measure_layers(slot, bases).await;
        self.enter(Phase::Export).await;
        let image_id = self.export(slot, bases).await?;
        self.enter(Phase::Seal).await;
        let built = self.seal(image_id, bases).await?;
        crash::reach(CrashPoint::Sealed);
        if let Some(content) = content {
            self.keep_cache(slot, content).await;
        }
        if let Some(measured) = measured {
            self.keep_layers(slot, &measured).await;
        }
        crash::reach(CrashPoint::LayersKept);
        Ok(built)
    }

    async fn enter(&mut self, phase: Phase) {
        self.close_phase();
        self.phase = phase;
        self.phase_began = Instant::now();
        self.tell(Event::Phase(phase)).await;
    }

    async fn note(&self, text: String) {
        self.tell(Event::Note(text)).await;
    }

    /// A watcher that is gone, or that does not read when the build is to stop, holds nothing up.
    async fn tell(&self, event: Event) {
        let mut stop = self.stop.clone();
        tokio::select! {
            _ = self.events.send(event) => {}
            _ = stop.stopped() => {}
        }
    }

    fn close_phase(&mut self) {
        let milliseconds = crate::time::millis(self.phase_began.elapsed());
        self.phases.push(PhaseDuration { phase: self.phase, milliseconds });
    }

    async fn step(&mut self, slot: &mut Slot, step: Step) -> Attempt<crate::slot::wire::StepEnd> {
        let end = slot.run(step, &mut self.stop).await.map_err(|e| self.lost(&e))?;
        self.agent.metrics.killed(end.left);
        if end.leftovers > 0 {
            // The kernel does not allow it, so somebody has to look at this machine.
            self.note(format!("{} processes outlived their step; they end with the slot", end.leftovers))
                .await;
        }
        Ok(end)
    }

    /// A blocking part that cannot be interrupted but is bounded by the slot's disk limit.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Attempt<T> {
        tokio::task::spawn_blocking(work).await.map_err(|e| self.fail(Reason::Unknown, e.to_string()))
    }
}

fn show_duration(duration: std::time::Duration) -> String {
    jiff::SignedDuration::try_from(duration).map_or_else(|_| format!("{duration:?}"), |d| format!("{d:#}"))
}

/// The log of a build that printed nothing.
fn empty_log() -> LogSummary {
    use sha2::Digest as _;
    let sha256 = Digest::from_sha256(sha2::Sha256::digest(b"").into());
    LogSummary { lines: 0, bytes: 0, dropped_bytes: 0, sha256 }
}

/// What a name means in this build.
struct Resolved {
    name: String,
    line: usize,
    image: ResolvedImage,
}

/// What decides the meaning of a Dockerfile.
pub fn build_input(request: &BuildRequest, buildah: crate::version::Version) -> BuildInput<'_> {
    BuildInput {
        build_args: &request.build_args,
        target: request.target.as_deref(),
        buildah,
        architecture: architecture(),
    }
}

/// This machine's architecture as images name it.
pub const fn architecture() -> &'static str {
    // Names of GOARCH, which images use, where Rust has other ones.
    match std::env::consts::ARCH.as_bytes() {
        b"x86_64" => "amd64",
        b"aarch64" => "arm64",
        b"x86" => "386",
        b"powerpc64" => "ppc64le",
        _ => std::env::consts::ARCH,
    }
}
