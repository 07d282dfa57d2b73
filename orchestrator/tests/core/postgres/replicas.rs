//! Equal replicas that write at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kiln_orchestrator::amnesty::Amnesty;
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::decide::{SECOND, TTL};
use kiln_orchestrator::schedule::Limits;
use kiln_orchestrator::store::{Outage, StoreError};
use kiln_protocol::id::ClaimId;
use kiln_protocol::message::{AttemptEnd, ClaimAnswer, CommitAnswer, Lane, Snapshot};
use kiln_protocol::{BuildId, BuildSpec, State, topology};
use kiln_transport::memory::MemoryBroker;
use kiln_transport::topology::Binding;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::suite::harness::{FakeAgent, World, settings, spec};

const TAG: &str = "r.example/app:1";
/// Nothing here takes a tenth of this on an idle machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// The first one of the world, and others like it.
async fn replicas(world: &World, settings: &Settings, count: usize) -> Vec<Arc<Orchestrator>> {
    let mut replicas = vec![Arc::clone(&world.orchestrator)];
    while replicas.len() < count {
        replicas.push(world.second(settings.clone()).await);
    }
    replicas
}

fn agents(world: &World, replicas: &[Arc<Orchestrator>], count: usize) -> Vec<FakeAgent> {
    let on = |i: usize| FakeAgent {
        orchestrator: Arc::clone(&replicas[i % replicas.len()]),
        ..world.agent(&format!("agent-{i}"))
    };
    (0..count).map(on).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_at_once_keep_every_limit() {
    let settings = Settings { limits: Limits { per_namespace: 5 }, ..settings() };
    let world = World::with(settings.clone()).await;
    let replicas = replicas(&world, &settings, 3).await;
    let mut groups = BTreeSet::new();
    for i in 0..60 {
        let namespace = ["red", "green", "blue"][i % 3].parse().unwrap();
        let group = (i % 2 == 0).then(|| format!("group-{}", i % 4).parse().unwrap());
        groups.extend(group.clone());
        // Half of them in a pool of their own: limits and groups reach over pools.
        let pool = ["default", "other"][i / 30].parse().unwrap();
        world
            .submit_spec(BuildSpec { namespace, group, pool, ..spec(&[&format!("r.example/app:{i}")]) })
            .await;
    }
    let mut tasks = JoinSet::new();
    for (i, mut agent) in agents(&world, &replicas, 12).into_iter().enumerate() {
        agent.pools = [["default", "other"][i / 6].to_owned()].into();
        tasks.spawn(async move {
            let mut mine = Vec::new();
            while let Some(grant) = agent.claim().await {
                mine.push(grant);
            }
            mine
        });
    }
    let grants: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
    let ids: BTreeSet<BuildId> = grants.iter().map(|grant| grant.lease.build).collect();
    assert_eq!(ids.len(), grants.len(), "a build was given twice");
    for namespace in ["red", "green", "blue"] {
        let running = grants.iter().filter(|g| g.spec.namespace.as_str() == namespace).count();
        assert!((1..=5).contains(&running), "{namespace} runs {running}");
    }
    for group in &groups {
        let running = grants.iter().filter(|g| g.spec.group.as_ref() == Some(group)).count();
        assert!(running <= 1, "{group} runs {running}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wish_at_two_replicas_gets_one_lease() {
    let world = World::new().await;
    let replicas = replicas(&world, &settings(), 2).await;
    for i in 0..20 {
        world.submit(&[&format!("r.example/app:{i}")]).await;
    }
    let one = world.agent("a");
    let two = FakeAgent { orchestrator: Arc::clone(&replicas[1]), ..one.clone() };
    for _ in 0..10 {
        let claim = ClaimId::generate();
        let (first, second) =
            tokio::join!(one.claim_as(Lane::Build, claim), two.claim_as(Lane::Build, claim));
        assert!(matches!(first, ClaimAnswer::Build(_)));
        assert_eq!(first, second);
    }
}

/// Whoever commits second must see the first one as head, or the writer that was overtaken is forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_commits_to_one_tag_at_two_replicas() {
    let mut world = World::new().await;
    let replicas = replicas(&world, &settings(), 2).await;
    let (a, b) = (world.agent("a"), FakeAgent { orchestrator: Arc::clone(&replicas[1]), ..world.agent("b") });
    let mut overtaken_later = Vec::new();
    for round in 0..20 {
        let tag = format!("r.example/app:{round}");
        let (older, newer) = (world.submit(&[&tag]).await, world.submit(&[&tag]).await);
        let (old, new) = (a.take(older).await, b.take(newer).await);
        let (first, second) = tokio::join!(a.commit(old, 1), b.commit(new, 2));
        assert!(matches!(second, CommitAnswer::Granted { .. }), "{second:?}");
        let mut tx = world.orchestrator.store().read().await.unwrap();
        assert_eq!(tx.head(&tag.parse().unwrap()).await.unwrap().unwrap().build, newer);
        match first {
            CommitAnswer::Granted { .. } => overtaken_later.push(tag),
            CommitAnswer::Refused { .. } => assert_eq!(world.state(older).await, State::Cancelled),
        }
    }
    world.pass(61);
    let mut checked = BTreeSet::new();
    while let Some(check) = b.claim_check().await {
        checked.insert(check.target.to_string());
    }
    assert_eq!(checked, overtaken_later.into_iter().collect(), "every unconfirmed writer is looked after");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_share_the_outbox() {
    let world = World::new().await;
    let replicas = replicas(&world, &settings(), 3).await;
    for i in 0..250 {
        world.submit(&[&format!("r.example/app:{i}")]).await;
    }
    let (mut one, mut two) =
        (replicas[0].store().write().await.unwrap(), replicas[1].store().write().await.unwrap());
    let first: BTreeSet<i64> =
        one.take_outgoing(world.now(), 100).await.unwrap().iter().map(|message| message.id).collect();
    let second = two.take_outgoing(world.now(), 100).await.unwrap();
    assert_eq!((first.len(), second.len()), (100, 100), "neither waits for the other");
    assert!(second.iter().all(|message| !first.contains(&message.id)));
    drop((one, two));
    let broker = MemoryBroker::new(1);
    let bus = broker.connect("orchestrator");
    let mut declared = kiln_orchestrator::topology::shared(&[]);
    declared.bindings.push(Binding {
        exchange: topology::EVENTS.to_owned(),
        queue: topology::DEAD_COMMANDS.to_owned(),
        key: "event.#".to_owned(),
    });
    bus.declare(&declared).await.unwrap();
    let mut tasks = JoinSet::new();
    for replica in replicas {
        let bus = broker.connect("orchestrator");
        tasks.spawn(async move {
            let mut sent = 0;
            loop {
                match replica.relay(&bus).await.unwrap() {
                    0 => return sent,
                    some => sent += some,
                }
            }
        });
    }
    assert_eq!(tasks.join_all().await.into_iter().sum::<usize>(), 250);
    assert_eq!(bus.queue_depth(topology::DEAD_COMMANDS).await.unwrap(), 250, "each exactly once");
    assert_eq!(world.orchestrator.store().read().await.unwrap().outbox_backlog().await.unwrap().0, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sweeps_at_once_end_each_lease_once() {
    let mut world = World::new().await;
    let replicas = replicas(&world, &settings(), 3).await;
    let agent = world.agent("a");
    let mut ids = Vec::new();
    for i in 0..30 {
        let id = world.submit(&[&format!("r.example/app:{i}")]).await;
        agent.take(id).await;
        ids.push(id);
    }
    world.pass(TTL / SECOND + 1);
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for replica in replicas {
        let now = world.now();
        tasks.spawn(async move {
            let mut amnesty = Amnesty::default();
            for second in (0..=TTL / SECOND + 4).rev().step_by(2) {
                let ago = Duration::from_secs(second.unsigned_abs());
                amnesty.tick(now - second * SECOND, start + DEADLINE + DEADLINE - ago);
            }
            replica.sweep(&mut amnesty, start + DEADLINE + DEADLINE).await.unwrap().expired
        });
    }
    assert_eq!(tasks.join_all().await.into_iter().sum::<usize>(), 30);
    for id in ids {
        let build = world.show(id).await;
        assert_eq!((build.state, build.attempt.get()), (State::Pending, 2));
        assert_eq!(world.orchestrator.attempts(id).await.unwrap().len(), 1);
    }
}

/// Builds that share tags, whose holders go without an answer, while everybody sweeps: whatever waits for whatever, every
/// question gets its answer, and the newest committed build is the head.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_all_this_at_once_fails() {
    let world = World::new().await;
    let replicas = replicas(&world, &settings(), 3).await;
    let tags: Vec<String> = (0..4).map(|i| format!("r.example/app:{i}")).collect();
    for i in 0..60 {
        // In either order.
        world.submit(&[&tags[i % 4], &tags[(i * 3 + 1) % 4]]).await;
    }
    let mut tasks = JoinSet::new();
    for agent in agents(&world, &replicas, 6) {
        tasks.spawn(async move {
            let mut committed = Vec::new();
            while let Some(grant) = agent.claim().await {
                let lease = grant.lease;
                if let CommitAnswer::Granted { .. } = agent.commit(lease, 1).await {
                    committed.push(grant);
                }
                agent.renew(&[lease]).await;
                let gone = Snapshot { end: Some(AttemptEnd::Answered), ..Snapshot::default() };
                agent.report(lease, 1, gone).await;
            }
            committed
        });
    }
    let mut sweeping = JoinSet::new();
    for replica in replicas {
        sweeping.spawn(async move {
            let mut amnesty = Amnesty::default();
            loop {
                replica.sweep(&mut amnesty, Instant::now()).await.unwrap();
            }
        });
    }
    let committed: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
    assert!(sweeping.try_join_next().is_none(), "a sweep failed");
    let mut tx = world.orchestrator.store().read().await.unwrap();
    for tag in tags {
        let tag = tag.parse().unwrap();
        let of_tag = committed.iter().filter(|grant| grant.spec.targets().any(|target| *target == tag));
        let newest = of_tag.max_by_key(|grant| grant.submit_seq).unwrap();
        assert_eq!(tx.head(&tag).await.unwrap().unwrap().build, newest.lease.build, "{tag}");
    }
}

#[tokio::test]
async fn who_waits_for_each_other_is_told_so_and_nothing_is_changed() {
    let world = World::new().await;
    let (a, b) = (world.submit(&[TAG]).await, world.submit(&["r.example/app:2"]).await);
    let store = world.orchestrator.store();
    let (mut one, mut two) = (store.write().await.unwrap(), store.write().await.unwrap());
    one.load(a).await.unwrap();
    two.load(b).await.unwrap();
    // Whoever fails lets the other one go on.
    let one = async move { one.load(b).await.map(|_| ()) };
    let two = async move { two.load(a).await.map(|_| ()) };
    let results = tokio::join!(one, two);
    let failed: Vec<StoreError> = [results.0, results.1].into_iter().filter_map(Result::err).collect();
    assert!(matches!(failed.as_slice(), [error] if error.is_contended()), "{failed:?}");
}

#[tokio::test]
async fn a_change_at_one_replica_wakes_the_others() {
    let world = World::new().await;
    let other = world.second(settings()).await;
    let woken = async {
        loop {
            // What happens before the other one listens is not heard.
            let changed = other.store().next_change();
            world.submit(&[TAG]).await;
            if tokio::time::timeout(Duration::from_secs(1), changed).await.is_ok() {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, woken).await.unwrap();
    let quiet = other.store().next_change();
    let again = tokio::time::timeout(DEADLINE, async {
        world.submit(&[TAG]).await;
        quiet.await;
    });
    again.await.unwrap();
}

/// A process that stands still in the middle of a change must not keep an agent from renewing for a lease time.
#[tokio::test]
async fn locks_are_waited_for_and_held_for_less_than_a_lease() {
    let world = World::new().await;
    let id = world.submit(&[TAG]).await;
    let agent = world.agent("a");
    let lease = agent.take(id).await;
    let mut stopped = world.second(settings()).await.store().write().await.unwrap();
    stopped.load(id).await.unwrap();
    let begun = Instant::now();
    let refused =
        world.orchestrator.cancel(id, kiln_protocol::Reason::Cancelled, "somebody").await.unwrap_err();
    let text = kiln_orchestrator::error::chain(&refused);
    assert!(text.contains("locked by somebody else"), "{text}");
    loop {
        let request = kiln_protocol::message::CommitRequest {
            lease,
            committed: super::suite::harness::image_of(1),
            verdicts: Vec::new(),
        };
        match world.orchestrator.commit(&agent.id, &request).await {
            Ok(answer) => break assert!(matches!(answer, CommitAnswer::Granted { .. })),
            Err(_) => assert!(begun.elapsed() < Duration::from_micros(TTL.unsigned_abs()), "still locked"),
        }
    }
    let lost = stopped.load(id).await.unwrap_err();
    assert!(matches!(lost, StoreError::Unavailable { why: Outage::Slow | Outage::Away, .. }), "{lost:?}");
}
