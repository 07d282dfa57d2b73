//! What is fake: the steps of a build, the registry, and what a client provides.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fastrand::Rng;
use futures_util::future::{BoxFuture, FutureExt as _};
use kiln_agent::agent::{Agent, AgentError};
use kiln_agent::blobs::{BlobStore, digest_of};
use kiln_agent::dispatch::{Ended, Hands, Remote, Supplies};
use kiln_agent::executor::{BuildInputs, Event, Finished, Order};
use kiln_agent::publish::{PublishError, Target};
use kiln_agent::registry::Credentials;
use kiln_agent::registry::push::{Candidate, Kind, Mount, Probe, PushError, TagOutcome, TagRule, Uploaded};
use kiln_agent::seal::Sealed;
use kiln_agent::seal::manifest::Descriptor;
use kiln_agent::state::StateError;
use kiln_agent::stop::StopSignal;
use kiln_protocol::id::AgentId;
use kiln_protocol::message::{BuildGrant, Outcome};
use kiln_protocol::request::ImageFormat;
use kiln_protocol::result::{BuildResult, Failure, LogSummary, Phase, SealedImage};
use kiln_protocol::spec::SecretSource;
use kiln_protocol::{BuildId, Digest, Reason};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

/// A tag that was moved.
#[derive(Debug, Clone)]
pub(crate) struct Put {
    pub(crate) at: Duration,
    pub(crate) tag: String,
    pub(crate) digest: Digest,
}

/// Everything outside of Kiln.
#[derive(Debug)]
pub(crate) struct Outside {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    random: Rng,
    calm: bool,
    tags: BTreeMap<String, Digest>,
    stored: BTreeSet<(String, Digest)>,
    puts: Vec<Put>,
    images: BTreeMap<Digest, BuildId>,
    running: BTreeMap<AgentId, u32>,
    broken: Vec<String>,
    counts: BTreeMap<&'static str, u64>,
}

impl Outside {
    pub(crate) fn new(random: Rng) -> Self {
        let state = State {
            random,
            calm: false,
            tags: BTreeMap::new(),
            stored: BTreeSet::new(),
            puts: Vec::new(),
            images: BTreeMap::new(),
            running: BTreeMap::new(),
            broken: Vec::new(),
            counts: BTreeMap::new(),
        };
        Self { began: Instant::now(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// From here on nothing goes wrong.
    pub(crate) fn calm(&self) {
        self.state().calm = true;
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.state().counts.entry(what).or_default() += 1;
    }

    pub(crate) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.state().counts.clone()
    }

    pub(crate) fn shows(&self, tag: &str) -> Option<Digest> {
        self.state().tags.get(tag).cloned()
    }

    pub(crate) fn puts(&self) -> Vec<Put> {
        self.state().puts.clone()
    }

    /// Whose image it is.
    pub(crate) fn build_of(&self, digest: &Digest) -> Option<BuildId> {
        self.state().images.get(digest).copied()
    }

    pub(crate) fn broken(&self) -> Vec<String> {
        self.state().broken.clone()
    }

    /// Whether something that happens this often happens now.
    fn goes_wrong(&self, rate: f64) -> bool {
        let mut state = self.state();
        let drawn = state.random.f64();
        !state.calm && drawn < rate
    }

    async fn pass(&self, most: u64) {
        let millis = self.state().random.u64(0..=most);
        sleep(Duration::from_millis(millis)).await;
    }

    fn land(&self, tag: &str, digest: &Digest) {
        let mut state = self.state();
        state.tags.insert(tag.to_owned(), digest.clone());
        state.puts.push(Put { at: self.began.elapsed(), tag: tag.to_owned(), digest: digest.clone() });
    }
}

/// A virtual agent's hands.
#[derive(Debug, Clone)]
pub(crate) struct FakeHands {
    pub(crate) outside: Arc<Outside>,
    pub(crate) agent: AgentId,
    pub(crate) slots: u32,
}

/// A build that runs.
struct Slot<'a>(&'a FakeHands);

impl FakeHands {
    fn enter(&self) -> Slot<'_> {
        let mut state = self.outside.state();
        let running = state.running.entry(self.agent.clone()).or_default();
        *running += 1;
        if *running > self.slots {
            let broken = format!("I11: {} runs {running} builds in {} slots", self.agent, self.slots);
            state.broken.push(broken);
        }
        Slot(self)
    }

    async fn steps(&self, order: &Order, stop: &mut StopSignal) -> Result<Sealed, Failure> {
        let fail = |reason, why: &str| Failure::new(reason, Phase::Build, why.to_owned());
        tokio::select! {
            biased;
            stop = stop.stopped() => {
                self.outside.pass(3000).await;
                return Err(fail(stop.reason.reason(), stop.reason.message()));
            }
            () = self.outside.pass(20_000) => {}
        }
        if self.outside.goes_wrong(0.1) {
            let reasons = [Reason::BuildFailed, Reason::Network, Reason::DiskFull, Reason::OutOfMemory];
            let at = self.outside.state().random.usize(0..reasons.len());
            return Err(fail(reasons[at], "it happened"));
        }
        Ok(self.image(order))
    }

    /// Another image for each attempt: nothing that is built twice is the same.
    fn image(&self, order: &Order) -> Sealed {
        let mut state = self.outside.state();
        let text = format!("{{\"{} {}\":{}}}", order.build, order.attempt, state.random.u32(..));
        let manifest_digest = digest_of(text.as_bytes());
        state.images.insert(manifest_digest.clone(), order.build);
        let config_digest = digest_of(b"{}");
        let config = Descriptor { media_type: "config".to_owned(), size: 2, digest: config_digest.clone() };
        let image = SealedImage { manifest_digest, config_digest, format: ImageFormat::Oci, size: 2 };
        Sealed { image, manifest: text.into_bytes(), config, layers: Vec::new() }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if let Some(running) = self.0.outside.state().running.get_mut(&self.0.agent) {
            *running -= 1;
        }
    }
}

impl Hands for FakeHands {
    fn build(
        &self,
        _: Arc<Agent>,
        order: Order,
        events: mpsc::Sender<Event>,
        mut stop: StopSignal,
    ) -> BoxFuture<'static, Result<Finished, StateError>> {
        let hands = self.clone();
        async move {
            let _slot = hands.enter();
            let _ = events.send(Event::Phase(Phase::Build)).await;
            let sealed = hands.steps(&order, &mut stop).await;
            let outcome = sealed.as_ref().map(|sealed| sealed.image.clone()).map_err(Clone::clone);
            let log = LogSummary { lines: 0, bytes: 0, dropped_bytes: 0, sha256: digest_of(b"") };
            let phases = Vec::new();
            let result = BuildResult { build_id: order.build, outcome, phases, log, steps: None };
            Ok(Finished {
                result,
                image: sealed.ok(),
                root_filesystem: None,
                blobs: BlobStore::of_one_build(order.job.dir())?,
                last_lines: Vec::new(),
                verdicts: Vec::new(),
                views: Vec::new(),
                job: order.job,
            })
        }
        .boxed()
    }

    fn remote(&self, _: &Agent, _: Credentials) -> Result<Box<dyn Remote>, AgentError> {
        Ok(Box::new(FakeRegistry(Arc::clone(&self.outside))))
    }
}

/// Repositories that take everything, late or not at all.
struct FakeRegistry(Arc<Outside>);

fn unavailable(place: Target<'_>) -> PublishError {
    PublishError::Push(PushError {
        registry: "r.example".to_owned(),
        repository: place.repository.to_string(),
        tag: None,
        kind: Kind::Transient,
        reason: Reason::RegistryUnavailable,
        status: Some(503),
        code: None,
        answer: None,
        message: "it is down".to_owned(),
        hint: None,
    })
}

fn name(place: Target<'_>) -> String {
    let text = place.repository.to_string();
    text.rsplit_once(':').map_or(text.clone(), |(name, _)| name.to_owned())
}

impl FakeRegistry {
    async fn ask(&self, place: Target<'_>, stop: &mut StopSignal) -> Result<(), PublishError> {
        tokio::select! {
            biased;
            stop = stop.stopped() => return Err(PublishError::Stopped(stop.reason)),
            () = self.0.pass(1500) => {}
        }
        if self.0.goes_wrong(0.05) { Err(unavailable(place)) } else { Ok(()) }
    }

    /// A PUT is on its way whatever becomes of its sender.
    async fn put(&self, place: Target<'_>, tag: String, digest: Digest) -> Result<TagOutcome, PublishError> {
        if self.0.goes_wrong(0.1) {
            self.0.pass(1000).await;
            return Err(unavailable(place));
        }
        let late = self.0.goes_wrong(0.15);
        let outside = Arc::clone(&self.0);
        // Its sender waits no longer, and asks again.
        let abandoned = late && self.0.goes_wrong(0.5);
        let landing = tokio::spawn(async move {
            if late {
                outside.count("put late");
                outside.pass(20_000).await;
            } else {
                outside.pass(1000).await;
            }
            outside.land(&tag, &digest);
        });
        if abandoned {
            self.0.count("put abandoned");
            self.0.pass(1000).await;
            return Err(unavailable(place));
        }
        landing.await.unwrap();
        // It landed, and the answer may be lost.
        if self.0.goes_wrong(0.1) { Err(unavailable(place)) } else { Ok(TagOutcome::Moved) }
    }
}

impl Remote for FakeRegistry {
    fn probe<'a>(
        &'a self,
        place: Target<'a>,
        tag: Option<&'a str>,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Probe, PublishError>> {
        async move {
            self.ask(place, stop).await?;
            let existing = tag.and_then(|tag| self.0.shows(&format!("{}:{tag}", name(place))));
            Ok(Probe { existing, rule: TagRule::Mutable })
        }
        .boxed()
    }

    fn upload<'a>(
        &'a self,
        place: Target<'a>,
        candidate: &'a Candidate,
        _: (&'a Path, &'a [Mount]),
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Uploaded, PublishError>> {
        async move {
            self.ask(place, stop).await?;
            self.0.state().stored.insert((name(place), candidate.digest.clone()));
            Ok(Uploaded { present: 0, mounted: 0, sent: 1, bytes: 2 })
        }
        .boxed()
    }

    fn verify<'a>(
        &'a self,
        place: Target<'a>,
        candidate: &'a Candidate,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Vec<Digest>, PublishError>> {
        async move {
            self.ask(place, stop).await?;
            let key = (name(place), candidate.digest.clone());
            if self.0.goes_wrong(0.05) {
                // The registry collects its garbage.
                self.0.state().stored.remove(&key);
            }
            let there = self.0.state().stored.contains(&key);
            Ok(if there { Vec::new() } else { vec![candidate.digest.clone()] })
        }
        .boxed()
    }

    fn put_tag<'a>(
        &'a self,
        place: Target<'a>,
        tag: &'a str,
        candidate: &'a Candidate,
        _: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<TagOutcome, PublishError>> {
        self.put(place, format!("{}:{tag}", name(place)), candidate.digest.clone()).boxed()
    }

    fn head_tag<'a>(
        &'a self,
        place: Target<'a>,
        tag: &'a str,
        stop: &'a mut StopSignal,
    ) -> BoxFuture<'a, Result<Option<Digest>, PublishError>> {
        async move {
            self.ask(place, stop).await?;
            Ok(self.0.shows(&format!("{}:{tag}", name(place))))
        }
        .boxed()
    }
}

/// A client that has everything and waits for nothing.
#[derive(Debug)]
pub(crate) struct FakeSupplies;

impl Supplies for FakeSupplies {
    fn inputs<'a>(&'a self, _: &'a BuildGrant) -> BoxFuture<'a, Result<BuildInputs, Failure>> {
        async {
            let archive = File::open("/dev/null").unwrap();
            Ok(BuildInputs { archive, secrets: Vec::new(), credentials: Credentials::default() })
        }
        .boxed()
    }

    fn push_credentials<'a>(
        &'a self,
        _: BuildId,
        _: &'a SecretSource,
        _: Vec<String>,
    ) -> BoxFuture<'a, Result<Credentials, Failure>> {
        async { Ok(Credentials::default()) }.boxed()
    }

    fn watcher(&self, _: BuildId) -> mpsc::Sender<Event> {
        mpsc::channel(1).0
    }

    fn deliver<'a>(&'a self, _: &'a BuildGrant, _: &'a Finished) -> BoxFuture<'a, BTreeMap<String, Outcome>> {
        async { BTreeMap::new() }.boxed()
    }

    fn ended<'a>(&'a self, _: BuildId, _: Ended<'a>) -> BoxFuture<'a, ()> {
        async {}.boxed()
    }
}
