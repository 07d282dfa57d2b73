//! Tries, their budgets, and what comes after the last one.

use kiln_orchestrator::control::ControlError;
use kiln_orchestrator::decide::ReplayRefused;
use kiln_protocol::message::{CommitAnswer, HeadAnswer, Lane, Outcome, Snapshot};
use kiln_protocol::{Reason, State};

use super::harness::{FakeAgent, Registry, World, digest, failed};

const TAG: &str = "r.example/app:1";

#[tokio::test]
async fn a_build_that_kills_its_agent_at_once_ends_after_three() {
    let mut world = World::new().await;
    let id = world.submit(&[TAG]).await;
    let mut agent = world.agent("a");
    for attempt in 1..=3 {
        assert_eq!(agent.take(id).await.attempt.get(), attempt);
        // It restarts before it renewed even once.
        agent = agent.restarted();
        agent.renew(&[]).await;
    }
    let after = world.show(id).await;
    assert_eq!((after.state, after.reason), (State::DeadLetter, Some(Reason::AgentLost)));
    world.pass(4);
    world.sweep().await;
    assert!(agent.claim().await.is_none());
}

#[tokio::test]
async fn a_refusal_that_counts_against_no_budget_ends_too() {
    let mut world = World::new().await;
    let id = world.submit(&[TAG]).await;
    let agent = world.agent("a");
    for _ in 0..11 {
        let lease = agent.take(id).await;
        agent.report(lease, 1, failed(Reason::NoCapacity)).await;
        world.pass(1);
    }
    assert_eq!(world.state(id).await, State::DeadLetter);
}

async fn dead(world: &World, agent: &FakeAgent) -> kiln_protocol::BuildId {
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.report(lease, 1, failed(Reason::HookFault)).await;
    assert_eq!(world.state(id).await, State::DeadLetter);
    id
}

#[tokio::test]
async fn a_replay_under_a_newer_head_is_refused_unless_it_becomes_the_newest() {
    let world = World::new().await;
    let agent = world.agent("a");
    let mut registry = Registry::default();
    let old = dead(&world, &agent).await;
    let newer = world.submit(&[TAG]).await;
    let lease = agent.take(newer).await;
    agent.publish(lease, 2, &mut registry).await;
    let refused = world.orchestrator.replay(old, false, "somebody").await;
    assert!(
        matches!(&refused, Err(ControlError::Replay { source: ReplayRefused::NewerHead(target), .. })
            if target.to_string() == TAG),
        "{refused:?}"
    );
    assert_eq!(world.state(old).await, State::DeadLetter);
    assert_eq!(world.orchestrator.replay(old, true, "somebody").await.unwrap(), State::Pending);
    assert!(world.orchestrator.replay(old, true, "somebody").await.is_err(), "a second click");
    let lease = agent.take(old).await;
    assert_eq!(lease.attempt.get(), 2);
    agent.publish(lease, 3, &mut registry).await;
    assert_eq!(registry.shows(TAG), Some(&digest(3)));
    assert_eq!(world.state(old).await, State::Success);
}

#[tokio::test]
async fn a_committed_dead_letter_takes_its_open_tags_from_a_newer_build_if_that_is_asked_for() {
    const OPEN: &str = "r.example/app:2";
    for take_head in [false, true] {
        let mut world = World::new().await;
        let agent = world.agent("a");
        let mut registry = Registry::default();
        let older = world.submit(&[TAG, OPEN]).await;
        let newer = world.submit(&[TAG, OPEN]).await;
        let lease = agent.take(older).await;
        agent.commit(lease, 1).await;
        let moved = [(TAG.to_owned(), Outcome::Moved)].into();
        agent.report(lease, 1, Snapshot { outcomes: moved, ..Snapshot::default() }).await;
        let lease = agent.take(newer).await;
        agent.publish(lease, 2, &mut registry).await;
        world.pass(40);
        world.sweep().await;
        world.sleep(24 * 3600);
        world.sweep().await;
        assert_eq!(world.state(older).await, State::DeadLetter);

        let state = world.orchestrator.replay(older, take_head, "somebody").await.unwrap();
        assert_eq!(state, State::Pushing, "nothing is built again");
        let grant = agent.claim_publish().await.unwrap();
        agent.roll_forward(grant.lease, &digest(1), &grant.open, &mut registry).await;
        assert_eq!(world.state(older).await, State::Success);
        assert_eq!(registry.shows(OPEN), Some(&digest(if take_head { 1 } else { 2 })));
        assert_eq!(registry.shows(TAG), Some(&digest(2)), "an answer is never taken back");
        if take_head {
            let latest = world.submit(&[OPEN]).await;
            let lease = agent.take(latest).await;
            agent.publish(lease, 3, &mut registry).await;
            assert_eq!(registry.shows(OPEN), Some(&digest(3)), "but a newer build is newer");
        }
    }
}

#[tokio::test]
async fn a_committed_dead_letter_is_replayed_without_a_rebuild() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.commit(lease, 1).await;
    world.pass(32);
    world.sweep().await;
    world.sleep(25 * 3600);
    world.sweep().await;
    assert_eq!(world.state(id).await, State::DeadLetter);
    assert_eq!(world.orchestrator.replay(id, false, "somebody").await.unwrap(), State::Pushing);
    assert!(agent.claim().await.is_none());
    let grant = agent.claim_publish().await.unwrap();
    let mut registry = Registry::default();
    agent.roll_forward(grant.lease, &digest(1), &grant.open, &mut registry).await;
    assert_eq!(world.state(id).await, State::Success);
}

#[tokio::test]
async fn a_new_run_of_an_agent_releases_the_leases_of_its_older_run() {
    let world = World::new().await;
    let (agent, other) = (world.agent("a"), world.agent("b"));
    let lost = world.submit(&[TAG]).await;
    let kept = world.submit(&["r.example/app:2"]).await;
    let committed = world.submit(&["r.example/app:3"]).await;
    let old = agent.take(lost).await;
    other.take(kept).await;
    let publishing = agent.take(committed).await;
    agent.commit(publishing, 3).await;
    let fresh = agent.restarted();
    fresh.renew(&[]).await;
    assert_eq!(world.state(lost).await, State::Pending, "at once, without waiting for the lease to end");
    assert_eq!(world.state(kept).await, State::Building);
    assert!(matches!(agent.commit(old, 1).await, CommitAnswer::Refused { .. }));
    assert_eq!(agent.head(publishing, "r.example/app:3").await, HeadAnswer::Revoked);
    assert_eq!(other.claim_publish().await.unwrap().lease.build, committed);
    // A question of the older run arrives late.
    let second = fresh.take(lost).await;
    agent.renew(&[old]).await;
    agent.claim_as(Lane::Build, kiln_protocol::id::ClaimId::generate()).await;
    assert_eq!(world.show(lost).await.lease_key(), Some(second), "the older run does not come back");
}

#[tokio::test]
async fn a_one_shot_pool_is_buried() {
    let world = World::new().await;
    let mut shot = world.agent("shot");
    shot.pools = ["one-shot".to_owned()].into();
    let heir = world.agent("heir");
    let in_pool = |tag: &str| {
        let mut spec = super::harness::spec(&[tag]);
        spec.pool = "one-shot".parse().unwrap();
        spec
    };
    let building = world.submit_spec(in_pool(TAG)).await;
    shot.take(building).await;
    let committed = world.submit_spec(in_pool("r.example/app:2")).await;
    let lease = shot.take(committed).await;
    shot.commit(lease, 2).await;
    let pending = world.submit_spec(in_pool("r.example/app:3")).await;
    let stranger = world.submit(&["r.example/app:4"]).await;
    let buried =
        world.orchestrator.bury(&"one-shot".parse().unwrap(), &"default".parse().unwrap()).await.unwrap();
    assert_eq!(buried, 3);
    for id in [building, pending] {
        let after = world.show(id).await;
        assert_eq!((after.state, after.reason), (State::Cancelled, Some(Reason::ClientGone)));
    }
    assert_eq!(world.state(stranger).await, State::Pending);
    let grant = heir.claim_publish().await.unwrap();
    assert_eq!(grant.lease.build, committed);
    heir.roll_forward(grant.lease, &digest(2), &grant.open, &mut Registry::default()).await;
    assert_eq!(world.state(committed).await, State::Success);
    let again = world.orchestrator.bury(&"one-shot".parse().unwrap(), &"default".parse().unwrap()).await;
    assert_eq!(again.unwrap(), 0);
}
