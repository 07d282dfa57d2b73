//! One cluster for one seed: what runs, and what happens to it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use fastrand::Rng;
use kiln_agent::agent::Agent;
use kiln_agent::config::Config;
use kiln_agent::dispatch::{self, Station, Wish};
use kiln_agent::metrics::Metrics;
use kiln_agent::slot::Identity;
use kiln_agent::slot::wire::IdRange;
use kiln_agent::state::State;
use kiln_agent::version::Version;
use kiln_orchestrator::control::ControlError;
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::schedule::Limits;
use kiln_orchestrator::store::{Clock, Retention, Store};
use kiln_orchestrator::submit::Submission;
use kiln_protocol::id::{AgentId, BootId};
use kiln_protocol::request::{BuildRequest, ImageFormat, NetworkMode};
use kiln_protocol::spec::{
    ContextRef, DEFAULT_ATTEMPTS, DEFAULT_PRIORITY, DEFAULT_QUEUE_TIMEOUT, Destination, SecretSource,
};
use kiln_protocol::{BuildId, BuildSpec, Digest, Reason};
use kiln_transport::{FaultRates, MemoryBroker};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::check;
use crate::outside::{FakeHands, FakeSupplies, Outside};
use crate::record::{Held, Record};

/// Things go wrong for this long.
const STORM: Duration = Duration::from_mins(1);
/// Builds are submitted within this time.
const SUBMITTING: u64 = 45;
/// After the storm every build ends within this time: the longest pause between two tries, and all lease times.
const PATIENCE: Duration = Duration::from_hours(1);
/// The first look at a tag that somebody may have moved back comes after a minute.
const QUIET: Duration = Duration::from_secs(75);
const ORCHESTRATOR: &str = "kiln-orchestrator";
const TAGS: [&str; 4] = ["r.example/app:1", "r.example/app:2", "r.example/web:1", "r.example/web:2"];

/// What became of a seed.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Every committed change of a build, then every move of a tag, each in its order.
    pub(crate) trace: Vec<String>,
    /// Invariants that do not hold.
    pub(crate) broken: Vec<String>,
    /// How often what happened.
    pub(crate) happened: BTreeMap<&'static str, u64>,
}

/// Runs one seed to its end.
pub(crate) fn run(seed: u64) -> Ran {
    // Whatever draws from the generator of this thread: pauses, above all.
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        // What other threads wake, the database's, runs when nothing else can: its place does not depend on how
        // fast they are.
        .global_queue_interval(u32::MAX)
        .event_interval(u32::MAX)
        .build()
        .unwrap();
    // In memory: nothing here survives a loss of power, and fsync is the dearest call.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let ran = runtime.block_on(async {
        let task = async move {
            let mut cluster = Cluster::new(seed, folder.path()).await;
            cluster.storm().await;
            let ended = cluster.calm().await;
            let mut ran = check::check(&cluster, ended).await;
            ran.happened.insert("seconds", cluster.began.elapsed().as_secs());
            cluster.end().await;
            ran
        };
        tokio::spawn(task).await.unwrap()
    });
    runtime.shutdown_background();
    ran
}

pub(crate) struct Cluster {
    pub(crate) orchestrator: Arc<Orchestrator>,
    pub(crate) outside: Arc<Outside>,
    /// Submitted builds.
    pub(crate) builds: Vec<BuildId>,
    /// Those whose cancel was answered with success.
    pub(crate) cancelled: BTreeSet<BuildId>,
    pub(crate) record: Arc<Record>,
    pub(crate) broker: MemoryBroker,
    random: Rng,
    clock: Arc<AtomicI64>,
    loops: JoinSet<()>,
    nodes: Vec<Node>,
    began: Instant,
}

/// A machine with an agent, if it runs.
struct Node {
    id: AgentId,
    slots: u32,
    agent: Arc<Agent>,
    running: JoinSet<std::io::Result<()>>,
    wish: watch::Sender<Wish>,
    /// When it starts again.
    back: Option<Instant>,
}

impl Cluster {
    async fn new(seed: u64, folder: &Path) -> Self {
        let mut random = Rng::with_seed(seed);
        let clock = Arc::new(AtomicI64::new(1_700_000_000_000_000));
        let trouble = Arc::new(Record::new(random.fork()));
        let still = Held::begin();
        let store =
            Store::open(&folder.join("kiln.db"), Clock::Runtime(Instant::now(), Arc::clone(&clock))).await;
        drop(still);
        let store = store.unwrap().with_trouble(Arc::clone(&trouble) as _);
        let settings = Settings {
            limits: Limits { per_namespace: 1000 },
            policies: Vec::new(),
            only_pool: None,
            retention: Retention::default(),
        };
        let orchestrator = Arc::new(Orchestrator::new(store, settings, Entropy::seeded(random.u64(..))));
        let outside = Arc::new(Outside::new(random.fork()));
        let broker = MemoryBroker::new(random.u64(..));
        let nodes = (1..=random.u32(2..=3)).map(|n| Node::new(n, random.u32(1..=2), folder)).collect();
        let mut cluster = Self {
            orchestrator,
            outside,
            builds: Vec::new(),
            cancelled: BTreeSet::new(),
            record: trouble,
            broker,
            random,
            clock,
            loops: JoinSet::new(),
            nodes,
            began: Instant::now(),
        };
        cluster.start_orchestrator().await;
        for n in 0..cluster.nodes.len() {
            cluster.boot(n);
        }
        cluster
    }

    async fn start_orchestrator(&mut self) {
        self.loops.shutdown().await;
        self.loops = JoinSet::new();
        let bus = self.broker.connect(ORCHESTRATOR);
        let pools = ["default".parse().unwrap()];
        // The bus may be down.
        while kiln_orchestrator::run::start(&self.orchestrator, &bus, &pools, &mut self.loops).await.is_err()
        {
            sleep(Duration::from_millis(200)).await;
        }
    }

    fn boot(&mut self, n: usize) {
        let boot = BootId::from_uuid(
            uuid::Builder::from_random_bytes(self.random.u128(..).to_be_bytes()).into_uuid(),
        );
        let node = &mut self.nodes[n];
        let pools = BTreeSet::from(["default".parse().unwrap()]);
        let station = Station { id: node.id.clone(), boot, pools, slots: node.slots };
        let outside = Arc::clone(&self.outside);
        let hands = Arc::new(FakeHands { outside, agent: node.id.clone(), slots: node.slots });
        let (wish, wished) = watch::channel(Wish::Work);
        let bus = self.broker.connect(node.id.as_str());
        let (agent, supplies) = ((Arc::clone(&node.agent), None), (Arc::new(FakeSupplies) as _, hands as _));
        node.wish = wish;
        node.back = None;
        node.running.spawn(dispatch::run(station, agent, supplies, bus, wished));
    }

    /// The time in which things go wrong.
    async fn storm(&mut self) {
        self.broker.faults().set_rates(rates(&mut self.random));
        let rate = self.random.f64() * 0.1;
        self.record.set_rate(rate);
        let mut submit: Vec<u64> =
            (0..self.random.usize(4..=9)).map(|_| self.random.u64(0..SUBMITTING)).collect();
        submit.sort_unstable_by(|a, b| b.cmp(a));
        let began = Instant::now();
        while began.elapsed() < STORM {
            while submit.last().is_some_and(|at| began.elapsed().as_secs() >= *at) {
                submit.pop();
                self.submit().await;
            }
            self.reboot(false);
            self.mishap().await;
            let pause = self.random.u64(200..4000);
            sleep(Duration::from_millis(pause)).await;
        }
        while submit.pop().is_some() {
            self.submit().await;
        }
    }

    async fn mishap(&mut self) {
        let outage = Duration::from_millis(self.random.u64(0..15_000));
        match self.random.u32(0..16) {
            0 | 1 => self.kill(outage).await,
            2 => {
                self.outside.count("agent stopped");
                let n = self.random.usize(0..self.nodes.len());
                let _ = self.nodes[n].wish.send(Wish::Stop);
            }
            3 => {
                self.outside.count("orchestrator killed");
                self.start_orchestrator().await;
            }
            4 => {
                self.outside.count("broker restarted");
                self.broker.faults().restart_broker(outage / 4);
            }
            5 => {
                let who = self.random.usize(0..self.nodes.len());
                self.broker.faults().disconnect(self.nodes[who].id.as_str(), outage * 2);
            }
            6 => {
                self.outside.count("clock set");
                self.clock.fetch_add(self.random.i64(-60_000_000..60_000_000), Ordering::SeqCst);
            }
            7..=9 => self.cancel().await,
            _ => {}
        }
    }

    async fn kill(&mut self, outage: Duration) {
        self.outside.count("agent killed");
        let n = self.random.usize(0..self.nodes.len());
        self.nodes[n].running.shutdown().await;
        self.nodes[n].back = Some(Instant::now() + outage);
    }

    /// Starts agents whose time has come, or all.
    fn reboot(&mut self, all: bool) {
        for n in 0..self.nodes.len() {
            let node = &mut self.nodes[n];
            while node.running.try_join_next().is_some() {}
            let due = node.back.is_none_or(|back| all || back <= Instant::now());
            if node.running.is_empty() && due {
                self.boot(n);
            }
        }
    }

    async fn submit(&mut self) {
        let mut tags = TAGS;
        self.random.shuffle(&mut tags);
        let spec = spec(&tags[..self.random.usize(1..=2)]);
        let key = Some(format!("key-{}", self.builds.len()));
        loop {
            let submission = Submission { spec: spec.clone(), key: key.clone(), retry_of: None };
            if let Ok(submitted) = self.orchestrator.submit(submission).await {
                self.builds.push(submitted.id);
                return;
            }
            sleep(Duration::from_millis(300)).await;
        }
    }

    async fn cancel(&mut self) {
        let Some(&build) = self.random.choice(&self.builds) else { return };
        for _ in 0..10 {
            match self.orchestrator.cancel(build, Reason::Cancelled, "somebody").await {
                Ok(_) => {
                    self.cancelled.insert(build);
                    return;
                }
                Err(ControlError::Core(_)) => sleep(Duration::from_millis(300)).await,
                Err(_) => return,
            }
        }
    }

    /// Everything works again. Waits until every build is over and tags had time to settle; whether they did.
    async fn calm(&mut self) -> bool {
        self.broker.faults().set_rates(FaultRates::default());
        self.record.set_rate(0.0);
        self.outside.calm();
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            self.reboot(true);
            if self.all_over().await {
                sleep(QUIET).await;
                return true;
            }
            sleep(Duration::from_secs(2)).await;
        }
        false
    }

    async fn all_over(&self) -> bool {
        for build in &self.builds {
            let found = self.orchestrator.show(*build).await.unwrap();
            if !found.build.state.is_over() || found.build.lease.is_some() {
                return false;
            }
        }
        true
    }

    async fn end(mut self) {
        for node in &mut self.nodes {
            node.running.shutdown().await;
        }
        self.loops.shutdown().await;
        let _held = Held::begin();
        self.orchestrator.store().close().await;
    }
}

impl Node {
    fn new(n: u32, slots: u32, folder: &Path) -> Self {
        let mut config = Config::default();
        config.data.min_free = 0;
        let identity = Identity {
            ids: IdRange { first_uid: 100_000, first_gid: 100_000, count: 65_536 },
            drop_to: None,
        };
        let state = State::open(&folder.join(format!("agent-{n}"))).unwrap();
        let buildah = Version { major: 1, minor: 40, patch: 0 };
        let agent = Agent { config, state, identity, buildah, metrics: Metrics::new().unwrap() };
        Self {
            id: format!("agent-{n}").parse().unwrap(),
            slots,
            agent: Arc::new(agent),
            running: JoinSet::new(),
            wish: watch::channel(Wish::Work).0,
            back: None,
        }
    }
}

fn rates(random: &mut Rng) -> FaultRates {
    let mut rate = || if random.bool() { random.f64() * 0.03 } else { 0.0 };
    FaultRates {
        lose: rate(),
        duplicate: rate(),
        delay: rate(),
        return_to_publisher: rate(),
        reject: rate(),
        lose_publish: rate(),
        lose_confirm: rate(),
        disconnect: rate(),
        cancel_consumers: rate(),
        lose_settlement: rate(),
        longest_delay: Duration::from_secs(20),
        longest_outage: Duration::from_secs(8),
    }
}

fn spec(targets: &[&str]) -> BuildSpec {
    BuildSpec {
        namespace: "team-a".parse().unwrap(),
        pool: "default".parse().unwrap(),
        priority: DEFAULT_PRIORITY,
        group: None,
        requester: "somebody".to_owned(),
        request: BuildRequest {
            dockerfile: "FROM scratch\n".to_owned(),
            dockerfile_name: "Dockerfile".to_owned(),
            build_args: BTreeMap::new(),
            labels: BTreeMap::new(),
            target: None,
            format: ImageFormat::Oci,
            timestamp: None,
            network: NetworkMode::Isolated,
            timeout: Duration::from_hours(1),
            root_filesystem: false,
            no_cache: false,
        },
        context: ContextRef { digest: Digest::from_sha256([0; 32]), size: 1024 },
        destinations: targets.iter().map(|text| Destination::Image(text.parse().unwrap())).collect(),
        secrets: Vec::new(),
        credentials: SecretSource::Server("auth".to_owned()),
        max_attempts: DEFAULT_ATTEMPTS,
        queue_timeout: DEFAULT_QUEUE_TIMEOUT,
    }
}

pub(crate) fn tags() -> impl Iterator<Item = &'static str> {
    TAGS.into_iter()
}
