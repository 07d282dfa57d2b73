//! Which build a tag shows in the end.

use kiln_protocol::message::{
    AttemptEnd, CommitAnswer, CommitRefusal, HeadAnswer, Outcome, Snapshot, TagAnswer,
};
use kiln_protocol::{Reason, State};

use super::harness::{Registry, World, digest};

const LATEST: &str = "r.example/app:latest";

#[tokio::test]
async fn a_holder_stopped_before_its_put_is_repaired_after_it_wakes() {
    let mut world = World::new().await;
    let mut registry = Registry::default();
    let (older, newer) = (world.submit(&[LATEST]).await, world.submit(&[LATEST]).await);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let old = a.take(older).await;
    assert!(matches!(a.commit(old, 1).await, CommitAnswer::Granted { .. }));
    assert_eq!(a.head(old, LATEST).await, HeadAnswer::Head);
    // Here it is stopped. The newer build moves the tag.
    let new = b.take(newer).await;
    b.publish(new, 2, &mut registry).await;
    // It wakes up.
    registry.put(&LATEST.parse().unwrap(), &digest(1));

    assert_eq!(b.claim_check().await, None, "not at once");
    world.pass(61);
    let check = b.claim_check().await.unwrap();
    assert_eq!((check.target.to_string().as_str(), check.build), (LATEST, newer));
    assert_eq!(check.committed.digest, digest(2));
    assert_eq!(b.saw(&check, registry.shows(LATEST).cloned()).await, TagAnswer::Repair);
    // A repair is a PUT too: the tag is looked at again soon.
    world.pass(61);
    let again = b.claim_check().await.unwrap();
    assert_eq!(b.saw(&again, Some(digest(2))).await, TagAnswer::Leave);
    assert_eq!(b.claim_check().await, None);
}

#[tokio::test]
async fn a_writer_lost_long_ago_is_remembered_when_the_head_changes() {
    let mut world = World::new().await;
    let mut registry = Registry::default();
    let (a, b) = (world.agent("a"), world.agent("b"));
    let older = world.submit(&[LATEST]).await;
    let lost = a.take(older).await;
    a.commit(lost, 1).await;
    world.pass(32);
    world.sweep().await;
    // Somebody else finishes its work, so the older build has no open target any more.
    let grant = b.claim_publish().await.unwrap();
    b.roll_forward(grant.lease, &digest(1), &grant.open, &mut registry).await;
    assert_eq!(world.state(older).await, State::Success);
    // The looks have become rare when the newer build comes.
    for pause in [61, 601, 3601] {
        world.pass(pause);
        b.renew(&[]).await;
        let check = b.claim_check().await.unwrap();
        assert_eq!(b.saw(&check, Some(digest(1))).await, TagAnswer::Leave);
    }
    let newer = world.submit(&[LATEST]).await;
    let lease = b.take(newer).await;
    b.publish(lease, 2, &mut registry).await;
    registry.put(&LATEST.parse().unwrap(), &digest(1));
    world.pass(61);
    let check = b.claim_check().await.expect("the first writer may wake up at any time");
    assert_eq!(b.saw(&check, registry.shows(LATEST).cloned()).await, TagAnswer::Repair);
}

#[tokio::test]
async fn an_agent_that_gave_back_an_unanswered_target_is_an_unconfirmed_writer() {
    let mut world = World::new().await;
    let mut registry = Registry::default();
    let (a, b) = (world.agent("a"), world.agent("b"));
    let older = world.submit(&[LATEST]).await;
    let lease = a.take(older).await;
    a.commit(lease, 1).await;
    // Its PUT got no answer, so it says nothing about the target and goes.
    a.report(lease, 1, Snapshot { end: Some(AttemptEnd::Answered), ..Snapshot::default() }).await;
    world.pass(11);
    let grant = b.claim_publish().await.unwrap();
    b.roll_forward(grant.lease, &digest(1), &grant.open, &mut registry).await;
    let newer = world.submit(&[LATEST]).await;
    let lease = b.take(newer).await;
    b.publish(lease, 2, &mut registry).await;
    world.pass(61);
    assert!(b.claim_check().await.is_some(), "the PUT without an answer may arrive now");
}

#[tokio::test]
async fn a_tag_that_somebody_else_moved_is_never_overwritten() {
    let mut world = World::new().await;
    let mut registry = Registry::default();
    let (older, newer) = (world.submit(&[LATEST]).await, world.submit(&[LATEST]).await);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let old = a.take(older).await;
    a.commit(old, 1).await;
    let new = b.take(newer).await;
    b.publish(new, 2, &mut registry).await;
    world.pass(61);
    let check = b.claim_check().await.unwrap();
    assert_eq!(b.saw(&check, Some(digest(99))).await, TagAnswer::Drift);
    assert_eq!(b.saw(&check, None).await, TagAnswer::Drift, "a tag that was deleted");
    assert_eq!(b.saw(&check, Some(digest(2))).await, TagAnswer::Leave);
}

#[tokio::test]
async fn a_check_of_a_pool_that_nobody_serves_does_not_hide_the_others() {
    let mut world = World::new().await;
    let gone = world.agent("gone");
    let here = world.agent("here");
    for i in 0..70 {
        let mut spec = super::harness::spec(&[&format!("r.example/old:{i}")]);
        spec.pool = "gone".parse().unwrap();
        let id = world.submit_spec(spec).await;
        let agent = super::harness::FakeAgent { pools: ["gone".to_owned()].into(), ..gone.clone() };
        let lease = agent.take(id).await;
        agent.commit(lease, 1).await;
    }
    let mine = world.submit(&["r.example/app:1"]).await;
    let lease = here.take(mine).await;
    here.commit(lease, 1).await;
    for _ in 0..80 {
        world.pass(32);
        world.sweep().await;
    }
    let grant = here.claim_publish().await.expect("64 older ones belong to a pool without agents");
    assert_eq!(grant.lease.build, mine);
    here.roll_forward(grant.lease, &digest(1), &grant.open, &mut Registry::default()).await;
    assert!(here.claim_check().await.is_some(), "64 older looks belong to that pool too");
}

#[tokio::test]
async fn death_between_two_targets_leaves_only_the_open_one() {
    let mut world = World::new().await;
    let mut registry = Registry::default();
    let build = world.submit(&["r.example/app:1", LATEST]).await;
    let (a, b) = (world.agent("a"), world.agent("b"));
    let lease = a.take(build).await;
    a.commit(lease, 1).await;
    let moved =
        Snapshot { outcomes: [("r.example/app:1".to_owned(), Outcome::Moved)].into(), ..Snapshot::default() };
    a.report(lease, 1, moved).await;
    world.pass(32);
    assert_eq!(world.sweep().await.expired, 1);
    assert_eq!(world.state(build).await, State::Pushing, "it is not built again");
    assert!(b.claim().await.is_none());
    let grant = b.claim_publish().await.unwrap();
    assert_eq!(grant.open, [LATEST.parse().unwrap()]);
    b.roll_forward(grant.lease, &grant.committed.digest, &grant.open, &mut registry).await;
    let after = world.show(build).await;
    assert_eq!((after.state, after.attempt.get()), (State::Success, 1));
    assert_eq!(after.commit.unwrap().outcomes.len(), 2);
    assert_eq!(a.head(lease, LATEST).await, HeadAnswer::Revoked);
}

#[tokio::test]
async fn two_builds_of_one_tag_with_the_older_ones_agent_dead() {
    let mut world = World::new().await;
    let mut registry = Registry::default();
    let (older, newer) = (world.submit(&[LATEST]).await, world.submit(&[LATEST]).await);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let old = a.take(older).await;
    let new = b.take(newer).await;
    b.publish(new, 2, &mut registry).await;
    world.pass(32);
    world.sweep().await;
    assert_eq!(world.state(older).await, State::Pending, "it is tried again");
    b.renew(&[]).await;
    assert!(b.claim().await.is_none(), "but it has nothing to publish");
    let after = world.show(older).await;
    assert_eq!((after.state, after.reason), (State::Cancelled, Some(Reason::Superseded)));
    assert!(after.failure.unwrap().message.contains("newer build"));
    let late = CommitAnswer::Refused { reason: CommitRefusal::Revoked };
    assert_eq!(a.commit(old, 1).await, late);
    assert_eq!(registry.shows(LATEST), Some(&digest(2)));
}

#[tokio::test]
async fn sha_and_latest_from_two_builds_out_of_order() {
    let world = World::new().await;
    let mut registry = Registry::default();
    let older = world.submit(&["r.example/app:sha-1", LATEST]).await;
    let newer = world.submit(&["r.example/app:sha-2", LATEST]).await;
    let (a, b) = (world.agent("a"), world.agent("b"));
    let (old, new) = (a.take(older).await, b.take(newer).await);
    b.publish(new, 2, &mut registry).await;
    let granted = a.commit(old, 1).await;
    assert_eq!(granted, CommitAnswer::Granted { overtaken: [LATEST.parse().unwrap()].into() });
    a.publish(old, 1, &mut registry).await;
    assert_eq!(registry.shows("r.example/app:sha-1"), Some(&digest(1)));
    assert_eq!(registry.shows("r.example/app:sha-2"), Some(&digest(2)));
    assert_eq!(registry.shows(LATEST), Some(&digest(2)));
    let after = world.show(older).await;
    assert_eq!(after.state, State::Success);
    assert_eq!(after.commit.unwrap().outcomes[LATEST], Outcome::Overtaken);
}

#[tokio::test]
async fn every_target_overtaken_at_the_commit_means_superseded() {
    let world = World::new().await;
    let (older, newer) = (world.submit(&[LATEST]).await, world.submit(&[LATEST]).await);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let (old, new) = (a.take(older).await, b.take(newer).await);
    b.commit(new, 2).await;
    assert_eq!(a.commit(old, 1).await, CommitAnswer::Refused { reason: CommitRefusal::Superseded });
    let after = world.show(older).await;
    assert_eq!((after.state, after.reason), (State::Cancelled, Some(Reason::Superseded)));
}

#[tokio::test]
async fn heads_never_go_back_in_the_order_of_submission() {
    let mut world = World::new().await;
    let mut registry = Registry::default();
    let (a, b) = (world.agent("a"), world.agent("b"));
    let (older, newer) = (world.submit(&[LATEST]).await, world.submit(&[LATEST]).await);
    let (old, new) = (a.take(older).await, b.take(newer).await);
    // Both clocks lie: the newer build commits an hour before the older one.
    b.publish(new, 2, &mut registry).await;
    world.set_clock(-3600);
    a.commit(old, 1).await;
    assert_eq!(world.state(older).await, State::Cancelled);
    world.pass(4);
    assert_eq!(registry.shows(LATEST), Some(&digest(2)));
}
