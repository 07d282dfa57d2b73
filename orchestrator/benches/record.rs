//! What the record costs on SQLite and on PostgreSQL: submit, claim, commit, the whole of a job whose build does nothing,
//! and the looks at a long queue.
//!
//! Everything that lasts is synced to disk, so the disk decides over most figures. PostgreSQL is the one that
//! `scripts/test-postgres.sh start durable` starts; without it only SQLite is measured.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark fails by panicking and reports by printing"
)]
#![allow(dead_code, reason = "tests use more of the harness")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_orchestrator::build::Build;
use kiln_orchestrator::core::Orchestrator;
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::run;
use kiln_orchestrator::store::Clock;
use kiln_orchestrator::submit::Submission;
use kiln_protocol::envelope::{self, Message as _};
use kiln_protocol::id::{ClaimId, MessageId, Pool};
use kiln_protocol::message::{
    Answer, AttemptEnd, ClaimAnswer, CommitRequest, Lane, Outcome, Report, Request, Snapshot,
};
use kiln_protocol::{BuildId, BuildSpec, State, topology};
use kiln_transport::memory::MemoryBroker;
use kiln_transport::{Bus, Message, Published};
use tokio::task::JoinSet;

#[path = "../tests/core/database.rs"]
mod database;
#[path = "../tests/core/harness.rs"]
mod harness;

use database::{Database, Kind};
use harness::{FakeAgent, World, image_of, settings, spec};

/// What the harness takes unless it is told.
const KIND: Kind = Kind::Sqlite;
const JOBS: usize = 500;
/// Jobs under way at once, as many as one agent with four slots has.
const AT_ONCE: usize = 4;
/// As many as show what waits for what.
const MORE_AT_ONCE: usize = 16;
const WAITING: usize = 100_000;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for kind in [Kind::Sqlite, Kind::Postgres] {
        if kind == Kind::Postgres && std::env::var_os("KILN_TEST_POSTGRES").is_none() {
            println!("PostgreSQL: not measured, because there is none");
            continue;
        }
        println!("{kind:?}");
        runtime.block_on(async {
            steps(kind).await;
            jobs(kind, AT_ONCE).await;
            jobs(kind, MORE_AT_ONCE).await;
            long_queue(kind).await;
        });
    }
}

fn print(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1000.0;
    println!("{name:24} p50 {:8.2} ms  p99 {:8.2} ms", at(50), at(99));
}

/// Each step by itself, called directly.
async fn steps(kind: Kind) {
    let world = World::on(kind, settings()).await;
    let agent = world.agent("a");
    let (mut submit, mut claim, mut commit) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..JOBS {
        let begun = Instant::now();
        world.submit(&[&format!("r.example/app:{i}")]).await;
        submit.push(begun.elapsed());
    }
    for _ in 0..JOBS {
        let begun = Instant::now();
        let lease = agent.claim().await.unwrap().lease;
        claim.push(begun.elapsed());
        let begun = Instant::now();
        agent.commit(lease, 1).await;
        commit.push(begun.elapsed());
    }
    print("submit", submit);
    print("claim", claim);
    print("commit", commit);
}

/// Submit to SUCCESS over the bus in memory, with everything of the orchestrator running and a build that does nothing.
async fn jobs(kind: Kind, at_once: usize) {
    let database = Database::new(kind).await;
    let store = database.open(Clock::System).await.unwrap();
    let orchestrator = Arc::new(Orchestrator::new(store, settings(), Entropy::System));
    let broker = MemoryBroker::new(1);
    let mut loops = JoinSet::new();
    let pool: Pool = "default".parse().unwrap();
    let bus = broker.connect("orchestrator");
    run::start(&orchestrator, &bus, &[pool], &mut loops).await.unwrap();
    let bus = broker.connect("a");
    let agent = FakeAgent {
        orchestrator: Arc::clone(&orchestrator),
        id: "a".parse().unwrap(),
        boot: kiln_protocol::id::BootId::generate(),
        pools: std::iter::once("default".to_owned()).collect(),
        policies: std::collections::BTreeSet::new(),
    };
    let begun = Instant::now();
    let mut lines = JoinSet::new();
    for _ in 0..at_once {
        lines.spawn(line(Arc::clone(&orchestrator), bus.clone(), agent.clone(), JOBS / at_once));
    }
    let (mut claimed, mut done) = (Vec::new(), Vec::new());
    while let Some(times) = lines.join_next().await {
        for (to_claim, to_end) in times.unwrap() {
            claimed.push(to_claim);
            done.push(to_end);
        }
    }
    let rate = f64::from(u32::try_from(JOBS / at_once * at_once).unwrap()) / begun.elapsed().as_secs_f64();
    print("submit to claim", claimed);
    print("submit to SUCCESS", done);
    println!("jobs per second          {rate:.0}   ({at_once} at once)");
    loops.shutdown().await;
    orchestrator.store().close().await;
}

/// One job after the other: how long until the claim was answered, and until the record says SUCCESS.
async fn line(
    orchestrator: Arc<Orchestrator>,
    bus: Bus,
    agent: FakeAgent,
    count: usize,
) -> Vec<(Duration, Duration)> {
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        // A newer build of the same tag would cancel an older one.
        let target = format!("r.example/app:{}", BuildId::generate());
        let submission = Submission { spec: spec(&[&target]), key: None, retry_of: None };
        orchestrator.submit(submission).await.unwrap();
        let claim = Request::Claim(agent.request(Lane::Build, ClaimId::generate()));
        let Answer::Claim(ClaimAnswer::Build(grant)) = ask(&bus, &claim).await else {
            panic!("nothing to do")
        };
        let to_claim = begun.elapsed();
        let lease = grant.lease;
        let commit = CommitRequest { lease, committed: image_of(1), verdicts: Vec::new() };
        let Answer::Commit(_) = ask(&bus, &Request::Commit(commit)).await else { panic!("no commit") };
        let snapshot = Snapshot {
            end: Some(AttemptEnd::Answered),
            outcomes: grant.spec.targets().map(|target| (target.to_string(), Outcome::Moved)).collect(),
            ..Snapshot::default()
        };
        let report = Report { lease, seq: 1, snapshot };
        let message =
            Message::new(MessageId::generate().as_uuid(), Report::TYPE, envelope::encode(&report).unwrap());
        let sent =
            bus.publish(topology::REPORTS, &topology::reports(&agent.id), message, true).await.unwrap();
        assert_eq!(sent, Published::Confirmed);
        until_over(&orchestrator, lease.build).await;
        times.push((to_claim, begun.elapsed()));
    }
    times
}

async fn ask(bus: &Bus, request: &Request) -> Answer {
    let body = envelope::encode(request).unwrap();
    let message = Message::new(MessageId::generate().as_uuid(), Request::TYPE, body);
    let limit = Duration::from_secs(10);
    let reply = bus.call(topology::RPC, topology::LEASE, message, limit).await.unwrap();
    envelope::decode(&reply.body).unwrap()
}

async fn until_over(orchestrator: &Orchestrator, id: BuildId) {
    loop {
        let changed = orchestrator.store().next_change();
        let state = orchestrator.show(id).await.unwrap().build.state;
        if state.is_over() {
            assert_eq!(state, State::Success);
            return;
        }
        changed.await;
    }
}

/// What happens all the time, when very many builds wait.
async fn long_queue(kind: Kind) {
    let mut world = World::on(kind, settings()).await;
    fill(&world, WAITING).await;
    let agent = world.agent("a");
    let bus = MemoryBroker::new(1).connect("orchestrator");
    bus.declare(&kiln_orchestrator::topology::shared(&["default".parse().unwrap()])).await.unwrap();
    let (mut sweep, mut claim, mut hint, mut queue) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..20 {
        let begun = Instant::now();
        world.sweep().await;
        sweep.push(begun.elapsed());
        let begun = Instant::now();
        agent.claim().await.unwrap();
        claim.push(begun.elapsed());
        let begun = Instant::now();
        world.orchestrator.hint(&bus).await.unwrap();
        hint.push(begun.elapsed());
        let begun = Instant::now();
        world.orchestrator.queue().await.unwrap();
        queue.push(begun.elapsed());
    }
    println!("with {WAITING} builds waiting:");
    print("  sweep", sweep);
    print("  claim", claim);
    print("  hint", hint);
    print("  queue", queue);
}

/// Waiting builds of a hundred namespaces, in few transactions.
async fn fill(world: &World, builds: usize) {
    for portion in 0..builds.div_ceil(1000) {
        let mut tx = world.orchestrator.store().write().await.unwrap();
        for i in 0..1000 {
            let namespace = format!("team-{}", (portion + i) % 100).parse().unwrap();
            let spec = BuildSpec { namespace, ..spec(&[&format!("r.example/app-{}:x", i % 50)]) };
            let seq = tx.next_submit_seq().await.unwrap();
            let build = Build::submitted(BuildId::generate(), seq, &spec, None, tx.now());
            tx.insert(&build, &spec, None, "").await.unwrap();
        }
        tx.commit().await.unwrap();
    }
}
