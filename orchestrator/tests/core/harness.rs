//! An orchestrator on a database of its own with a clock that stands still, and agents that do what they are told.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use kiln_orchestrator::amnesty::Amnesty;
use kiln_orchestrator::build::{Build, Micros};
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::decide::{SECOND, TTL, Taken};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::policy::PolicyRule;
use kiln_orchestrator::schedule::Limits;
use kiln_orchestrator::store::{Clock, Retention};
use kiln_orchestrator::submit::Submission;
use kiln_orchestrator::sweep::Swept;
use kiln_protocol::id::{AgentId, BootId, ClaimId};
use kiln_protocol::message::{
    AttemptEnd, BuildGrant, ClaimAnswer, ClaimRequest, CommitAnswer, CommitRequest, Committed, HeadAnswer,
    HeadRequest, Lane, LeaseKey, Outcome, PolicyKey, PublishGrant, RenewRequest, Renewed, Report, Snapshot,
    TagAnswer, TagCheck, TagSeen,
};
use kiln_protocol::request::{BuildRequest, ImageFormat, NetworkMode};
use kiln_protocol::result::{Failure, Phase};
use kiln_protocol::spec::{ContextRef, Destination, SecretSource};
use kiln_protocol::{BuildId, BuildSpec, Digest, Reason, State, Target, spec as limits};
use tokio::time::Instant;

use crate::database::{Database, Kind};

/// Settings without a bound that a test would notice.
pub(crate) fn settings() -> Settings {
    Settings {
        limits: Limits { per_namespace: 1000 },
        policies: Vec::new(),
        retention: Retention::default(),
        only_pool: None,
    }
}

/// An orchestrator and the time that it sees.
pub(crate) struct World {
    pub(crate) orchestrator: Arc<Orchestrator>,
    pub(crate) clock: Arc<AtomicI64>,
    pub(crate) amnesty: Amnesty,
    monotonic: Instant,
    pub(crate) database: Database,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(settings()).await
    }

    pub(crate) async fn with(settings: Settings) -> Self {
        Self::on(super::KIND, settings).await
    }

    pub(crate) async fn on(kind: Kind, settings: Settings) -> Self {
        let database = Database::new(kind).await;
        let clock = Arc::new(AtomicI64::new(1_700_000_000 * SECOND));
        let store = database.open(Clock::Manual(Arc::clone(&clock))).await;
        let orchestrator = Orchestrator::new(store.unwrap(), settings, Entropy::seeded(7));
        let monotonic = Instant::now();
        let amnesty = Amnesty::default();
        let mut world = Self { orchestrator: Arc::new(orchestrator), clock, amnesty, monotonic, database };
        // Long enough that leases may expire.
        world.pass(TTL / SECOND + 4);
        world
    }

    /// Another process on the same database.
    pub(crate) async fn second(&self, settings: Settings) -> Arc<Orchestrator> {
        let store = self.database.open(Clock::Manual(Arc::clone(&self.clock))).await.unwrap();
        Arc::new(Orchestrator::new(store, settings, Entropy::seeded(8)))
    }

    pub(crate) fn now(&self) -> Micros {
        self.clock.load(Ordering::SeqCst)
    }

    /// Time passes, and the path to the database works all the while.
    pub(crate) fn pass(&mut self, seconds: i64) {
        let mut left = seconds;
        while left > 0 {
            let step = left.min(2);
            left -= step;
            self.clock.fetch_add(step * SECOND, Ordering::SeqCst);
            self.monotonic += Duration::from_secs(step.unsigned_abs());
            self.amnesty.tick(self.now(), self.monotonic);
        }
    }

    /// Time passes while this process stands still.
    pub(crate) fn sleep(&mut self, seconds: i64) {
        self.clock.fetch_add(seconds * SECOND, Ordering::SeqCst);
        self.monotonic += Duration::from_secs(seconds.unsigned_abs());
    }

    /// Somebody sets the clock of the database.
    pub(crate) fn set_clock(&self, seconds: i64) {
        self.clock.fetch_add(seconds * SECOND, Ordering::SeqCst);
    }

    pub(crate) async fn sweep(&mut self) -> Swept {
        self.orchestrator.sweep(&mut self.amnesty, self.monotonic).await.unwrap()
    }

    /// A sweep by the loop of a process on this bus.
    pub(crate) async fn probe_and_sweep(&mut self, bus: &kiln_transport::Bus) -> Swept {
        self.orchestrator.probe_and_sweep(bus, &mut self.amnesty, self.monotonic).await.unwrap()
    }

    pub(crate) async fn submit(&self, targets: &[&str]) -> BuildId {
        self.submit_spec(spec(targets)).await
    }

    pub(crate) async fn submit_spec(&self, spec: BuildSpec) -> BuildId {
        let submission = Submission { spec, key: None, retry_of: None };
        self.orchestrator.submit(submission).await.unwrap().id
    }

    pub(crate) async fn show(&self, id: BuildId) -> Build {
        self.orchestrator.show(id).await.unwrap().build
    }

    pub(crate) async fn state(&self, id: BuildId) -> State {
        self.show(id).await.state
    }

    pub(crate) fn agent(&self, name: &str) -> FakeAgent {
        FakeAgent {
            orchestrator: Arc::clone(&self.orchestrator),
            id: name.parse().unwrap(),
            boot: BootId::generate(),
            pools: BTreeSet::from(["default".to_owned()]),
            policies: BTreeSet::new(),
        }
    }
}

/// An agent that does what a test tells it.
#[derive(Clone)]
pub(crate) struct FakeAgent {
    pub(crate) orchestrator: Arc<Orchestrator>,
    pub(crate) id: AgentId,
    pub(crate) boot: BootId,
    pub(crate) pools: BTreeSet<String>,
    pub(crate) policies: BTreeSet<PolicyKey>,
}

impl FakeAgent {
    /// The same agent, started anew.
    pub(crate) fn restarted(&self) -> Self {
        Self { boot: BootId::generate(), ..self.clone() }
    }

    pub(crate) fn request(&self, lane: Lane, claim: ClaimId) -> ClaimRequest {
        ClaimRequest {
            agent: self.id.clone(),
            boot: self.boot,
            claim,
            lane,
            pools: self.pools.iter().map(|pool| pool.parse().unwrap()).collect(),
            policies: self.policies.clone(),
            slots: 4,
        }
    }

    pub(crate) async fn claim_as(&self, lane: Lane, claim: ClaimId) -> ClaimAnswer {
        self.orchestrator.claim(&self.request(lane, claim)).await.unwrap()
    }

    /// A build, if there is one for it.
    pub(crate) async fn claim(&self) -> Option<BuildGrant> {
        match self.claim_as(Lane::Build, ClaimId::generate()).await {
            ClaimAnswer::Build(grant) => Some(*grant),
            _ => None,
        }
    }

    /// The lease of the build, which must be the one that it gets.
    pub(crate) async fn take(&self, build: BuildId) -> LeaseKey {
        let grant = self.claim().await.unwrap();
        assert_eq!(grant.lease.build, build);
        grant.lease
    }

    pub(crate) async fn claim_publish(&self) -> Option<PublishGrant> {
        match self.claim_as(Lane::Publish, ClaimId::generate()).await {
            ClaimAnswer::Publish(grant) => Some(*grant),
            _ => None,
        }
    }

    pub(crate) async fn claim_check(&self) -> Option<TagCheck> {
        match self.claim_as(Lane::Publish, ClaimId::generate()).await {
            ClaimAnswer::Check(check) => Some(*check),
            _ => None,
        }
    }

    pub(crate) async fn renew(&self, leases: &[LeaseKey]) -> Vec<Renewed> {
        let request = RenewRequest {
            agent: self.id.clone(),
            boot: self.boot,
            pools: self.pools.iter().map(|pool| pool.parse().unwrap()).collect(),
            policies: self.policies.clone(),
            slots: 4,
            free: 4,
            leases: leases.to_vec(),
        };
        self.orchestrator.renew(&request).await.unwrap().leases
    }

    pub(crate) async fn report(&self, lease: LeaseKey, seq: u64, snapshot: Snapshot) -> Taken {
        self.orchestrator.take_report(&self.id, &Report { lease, seq, snapshot }).await.unwrap()
    }

    pub(crate) async fn commit(&self, lease: LeaseKey, image: u8) -> CommitAnswer {
        let request = CommitRequest { lease, committed: image_of(image), verdicts: Vec::new() };
        self.orchestrator.commit(&self.id, &request).await.unwrap()
    }

    pub(crate) async fn head(&self, lease: LeaseKey, target: &str) -> HeadAnswer {
        self.orchestrator
            .head(&self.id, &HeadRequest { lease, target: target.parse().unwrap() })
            .await
            .unwrap()
    }

    pub(crate) async fn saw(&self, check: &TagCheck, found: Option<Digest>) -> TagAnswer {
        let seen =
            TagSeen { agent: self.id.clone(), target: check.target.clone(), build: check.build, found };
        self.orchestrator.tag_seen(&seen).await.unwrap()
    }

    /// Commits, moves every tag that it may, and says so.
    pub(crate) async fn publish(&self, lease: LeaseKey, image: u8, registry: &mut Registry) {
        let granted = self.commit(lease, image).await;
        assert!(matches!(granted, CommitAnswer::Granted { .. }), "{granted:?}");
        let spec = self.orchestrator.show(lease.build).await.unwrap().spec;
        let targets: Vec<Target> = spec.targets().cloned().collect();
        self.roll_forward(lease, &digest(image), &targets, registry).await;
    }

    /// Moves these tags where this build is the newest, and says so.
    pub(crate) async fn roll_forward(
        &self,
        lease: LeaseKey,
        digest: &Digest,
        targets: &[Target],
        registry: &mut Registry,
    ) {
        let mut snapshot = Snapshot { end: Some(AttemptEnd::Answered), ..Snapshot::default() };
        for target in targets {
            let outcome = match self.head(lease, &target.to_string()).await {
                HeadAnswer::Head => {
                    registry.put(target, digest);
                    Outcome::Moved
                }
                HeadAnswer::Overtaken => Outcome::Overtaken,
                HeadAnswer::Revoked => panic!("{target}: the lease is gone"),
            };
            snapshot.outcomes.insert(target.to_string(), outcome);
        }
        assert!(matches!(self.report(lease, 1000, snapshot).await, Taken::Applied(_)));
    }
}

/// What the tags show.
#[derive(Debug, Default)]
pub(crate) struct Registry(std::collections::BTreeMap<String, Digest>);

impl Registry {
    pub(crate) fn put(&mut self, target: &Target, digest: &Digest) {
        self.0.insert(target.to_string(), digest.clone());
    }

    pub(crate) fn shows(&self, target: &str) -> Option<&Digest> {
        self.0.get(target)
    }
}

pub(crate) fn digest(byte: u8) -> Digest {
    Digest::from_sha256([byte; 32])
}

pub(crate) fn image_of(byte: u8) -> Committed {
    Committed {
        digest: digest(byte),
        media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
        manifest: "{}".to_owned(),
    }
}

pub(crate) fn failed(reason: Reason) -> Snapshot {
    let failure = Failure {
        reason,
        phase: Phase::Build,
        message: "it happened".to_owned(),
        location: None,
        hint: None,
        limit: None,
        run_exit_code: None,
    };
    Snapshot { end: Some(AttemptEnd::Failed(Box::new(failure))), ..Snapshot::default() }
}

pub(crate) fn policy_rule(name: &str, byte: u8, pattern: &str) -> PolicyRule {
    PolicyRule {
        name: name.to_owned(),
        key: PolicyKey { plugin: digest(byte), settings: digest(byte) },
        hooks: vec![kiln_protocol::message::Hook::PostPush],
        repositories: kiln_protocol::glob::Glob::new(pattern).unwrap(),
    }
}

pub(crate) fn spec(targets: &[&str]) -> BuildSpec {
    BuildSpec {
        namespace: "team-a".parse().unwrap(),
        pool: "default".parse().unwrap(),
        priority: limits::DEFAULT_PRIORITY,
        group: None,
        requester: "somebody".to_owned(),
        request: BuildRequest {
            dockerfile: "FROM scratch\n".to_owned(),
            dockerfile_name: "Dockerfile".to_owned(),
            build_args: std::collections::BTreeMap::new(),
            labels: std::collections::BTreeMap::new(),
            target: None,
            format: ImageFormat::Oci,
            timestamp: None,
            network: NetworkMode::Isolated,
            timeout: Duration::from_hours(1),
            root_filesystem: false,
            no_cache: false,
        },
        context: ContextRef { digest: digest(0), size: 1024 },
        destinations: targets.iter().map(|text| Destination::Image(text.parse().unwrap())).collect(),
        secrets: Vec::new(),
        credentials: SecretSource::Server("auth".to_owned()),
        max_attempts: limits::DEFAULT_ATTEMPTS,
        queue_timeout: limits::DEFAULT_QUEUE_TIMEOUT,
    }
}
