//! What is remembered of attempts, and what is forgotten.

use std::time::Duration;

use kiln_orchestrator::control::ControlError;
use kiln_orchestrator::store::Retention;
use kiln_protocol::message::{Lane, Snapshot};
use kiln_protocol::result::{Phase, PhaseDuration};
use kiln_protocol::{BuildId, Reason, State};

use super::harness::{Registry, World, digest, failed};

const TAG: &str = "r.example/app:1";
const DAY: i64 = 24 * 3600;

async fn exists(world: &World, id: BuildId) -> bool {
    match world.orchestrator.show(id).await {
        Ok(_) => true,
        Err(ControlError::Missing(_)) => false,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn every_attempt_is_remembered_with_its_agent_and_its_end() {
    let mut world = World::new().await;
    let (a, b) = (world.agent("a"), world.agent("b"));
    let id = world.submit(&[TAG]).await;
    let lease = a.take(id).await;
    let phases = vec![PhaseDuration { phase: Phase::Build, milliseconds: 7 }];
    a.report(lease, 1, Snapshot { phases: phases.clone(), ..failed(Reason::Network) }).await;
    world.pass(20);
    a.renew(&[]).await;
    let lease = a.take(id).await;
    a.commit(lease, 1).await;
    world.pass(32);
    world.sweep().await;
    let grant = b.claim_publish().await.unwrap();
    b.roll_forward(grant.lease, &digest(1), &grant.open, &mut Registry::default()).await;

    let attempts = world.orchestrator.attempts(id).await.unwrap();
    let found: Vec<_> =
        attempts.iter().map(|a| (a.attempt.get(), a.lane, a.agent.as_str(), a.reason)).collect();
    assert_eq!(
        found,
        [
            (1, Lane::Build, "a", Some(Reason::Network)),
            (2, Lane::Build, "a", Some(Reason::AgentLost)),
            (2, Lane::Publish, "b", None),
        ]
    );
    assert_eq!((&attempts[0].phases, attempts[0].boot), (&phases, a.boot));
    assert!(attempts.iter().all(|a| a.began_at <= a.ended_at));
}

#[tokio::test]
async fn what_is_over_is_forgotten_and_what_is_not_stays() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let over = world.submit(&[TAG]).await;
    let lease = agent.take(over).await;
    agent.publish(lease, 1, &mut Registry::default()).await;
    let dead = world.submit(&["r.example/app:2"]).await;
    let lease = agent.take(dead).await;
    agent.report(lease, 1, failed(Reason::HookFault)).await;
    let committed = world.submit(&["r.example/app:3"]).await;
    let lease = agent.take(committed).await;
    agent.commit(lease, 3).await;
    let pending = world.submit(&["r.example/app:4"]).await;
    world.sleep(31 * DAY);
    let late = world.submit(&["r.example/app:5"]).await;
    world.orchestrator.cancel(late, Reason::Cancelled, "somebody").await.unwrap();
    let retention = Retention::default();
    assert!(world.orchestrator.prune(&retention).await.unwrap() > 0);
    assert_eq!(world.orchestrator.prune(&retention).await.unwrap(), 0);
    assert!(!exists(&world, over).await);
    for id in [dead, committed, pending, late] {
        assert!(exists(&world, id).await);
    }
    assert_eq!(world.orchestrator.events(over, 0).await.unwrap(), []);
    assert_eq!(world.orchestrator.attempts(over).await.unwrap(), []);
    assert_eq!(world.orchestrator.events(dead, 0).await.unwrap().len(), 3);
    world.pass(2);
}

#[tokio::test]
async fn a_dead_letter_waits_longer_for_a_person_but_not_for_ever() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.report(lease, 1, failed(Reason::HookFault)).await;
    let retention = Retention::default();
    let dead = async |world: &World| {
        let mut tx = world.orchestrator.store().read().await.unwrap();
        let counts = tx.counts().await.unwrap();
        counts.iter().find(|(state, _)| *state == State::DeadLetter).map_or(0, |(_, count)| *count)
    };
    world.sleep(89 * DAY);
    world.orchestrator.prune(&retention).await.unwrap();
    assert!(exists(&world, id).await);
    assert_eq!(dead(&world).await, 1);
    world.sleep(2 * DAY);
    world.orchestrator.prune(&retention).await.unwrap();
    assert!(!exists(&world, id).await);
    assert_eq!(dead(&world).await, 0, "and the metrics know");
    assert_eq!(world.orchestrator.attempts(id).await.unwrap(), []);
}

#[tokio::test]
async fn of_too_many_the_oldest_go() {
    let mut world = World::new().await;
    let mut ids = Vec::new();
    for i in 0..6 {
        let id = world.submit(&[&format!("r.example/app:{i}")]).await;
        if i > 0 {
            world.orchestrator.cancel(id, Reason::Cancelled, "somebody").await.unwrap();
        }
        world.pass(1);
        ids.push(id);
    }
    let retention =
        Retention { builds: 2, audit: 3, outbox: 4, keep: Duration::from_hours(1), ..Retention::default() };
    world.orchestrator.prune(&retention).await.unwrap();
    let mut left = Vec::new();
    for id in &ids {
        left.push(exists(&world, *id).await);
    }
    assert_eq!(left, [true, false, false, false, true, true], "the first one still waits");
    let mut tx = world.orchestrator.store().read().await.unwrap();
    assert_eq!(tx.outbox_backlog().await.unwrap().0, 4);
}

#[tokio::test]
async fn a_head_stays_while_an_older_build_might_commit() {
    let world = World::new().await;
    let agent = world.agent("a");
    let older = world.submit(&[TAG]).await;
    let lease = agent.take(older).await;
    agent.report(lease, 1, failed(Reason::HookFault)).await;
    let newer = world.submit(&[TAG]).await;
    let lease = agent.take(newer).await;
    agent.publish(lease, 2, &mut Registry::default()).await;
    let mut world = world;
    world.sleep(31 * DAY);
    world.orchestrator.prune(&Retention::default()).await.unwrap();
    assert!(!exists(&world, newer).await);
    let refused = world.orchestrator.replay(older, false, "somebody").await;
    assert!(matches!(refused, Err(ControlError::Replay { .. })), "the head is remembered: {refused:?}");
    assert_eq!(world.state(older).await, State::DeadLetter);
}

#[tokio::test]
async fn a_build_whose_tag_is_watched_stays_to_repair_it() {
    let mut world = World::new().await;
    let (a, b) = (world.agent("a"), world.agent("b"));
    let (older, newer) = (world.submit(&[TAG]).await, world.submit(&[TAG]).await);
    let stopped = a.take(older).await;
    a.commit(stopped, 1).await;
    let lease = b.take(newer).await;
    b.publish(lease, 2, &mut Registry::default()).await;
    let retention = Retention { keep: Duration::from_mins(1), ..Retention::default() };
    world.sleep(3600);
    world.orchestrator.prune(&retention).await.unwrap();
    let check = b.claim_check().await.unwrap();
    assert_eq!(check.build, newer);
    assert_eq!(b.saw(&check, Some(digest(1))).await, kiln_protocol::message::TagAnswer::Repair);
}
