//! Reports that are late, early, repeated, or from somebody else.

use kiln_orchestrator::decide::Taken;
use kiln_protocol::message::{CommitAnswer, Outcome, Snapshot, Standing};
use kiln_protocol::result::Phase;
use kiln_protocol::{Reason, State};

use super::harness::{Registry, World, digest, failed};

const TAG: &str = "r.example/app:1";

fn uploaded() -> Snapshot {
    Snapshot { phase: Some(Phase::Build), candidate: Some(digest(1)), ..Snapshot::default() }
}

#[tokio::test]
async fn a_late_report_after_a_dead_letter_and_its_discard_changes_nothing() {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.report(lease, 3, failed(Reason::HookFault)).await;
    let dead = world.show(id).await;
    assert_eq!(dead.state, State::DeadLetter);
    assert_eq!(agent.report(lease, 4, uploaded()).await, Taken::Stale);
    assert_eq!(world.show(id).await, dead);
    assert_eq!(world.orchestrator.discard(id, "somebody").await.unwrap(), State::Failed);
    let over = world.show(id).await;
    assert_eq!(agent.report(lease, 5, failed(Reason::Network)).await, Taken::Stale);
    assert_eq!(world.show(id).await, over, "a final state never changes");
    assert_eq!(agent.renew(&[lease]).await[0].standing, Standing::Finished, "so it forgets the report");
    assert!(world.orchestrator.discard(id, "somebody").await.is_err());
}

#[tokio::test]
async fn a_report_sent_before_the_commit_and_received_after_it() {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.commit(lease, 1).await;
    assert!(matches!(agent.report(lease, 1, uploaded()).await, Taken::Applied(_)));
    let after = world.show(id).await;
    assert_eq!((after.state, after.commit.unwrap().outcomes.len()), (State::Pushing, 0));
    agent.publish(lease, 1, &mut Registry::default()).await;
    assert_eq!(world.state(id).await, State::Success);
    assert_eq!(agent.report(lease, 2, failed(Reason::Unknown)).await, Taken::Stale);
    assert_eq!(world.state(id).await, State::Success);
}

#[tokio::test]
async fn of_reports_out_of_order_the_newest_counts() {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.report(lease, 2, uploaded()).await;
    let planning = Snapshot { phase: Some(Phase::Plan), ..Snapshot::default() };
    assert_eq!(agent.report(lease, 1, planning).await, Taken::Old);
    let after = world.show(id).await;
    assert_eq!((after.state, after.snapshot.phase), (State::Pushing, Some(Phase::Build)));
    assert_eq!(agent.renew(&[lease]).await[0].last_seq, 2);
}

#[tokio::test]
async fn a_report_in_the_name_of_another_agent_is_stale() {
    let world = World::new().await;
    let (agent, thief) = (world.agent("a"), world.agent("b"));
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    assert_eq!(thief.report(lease, 1, failed(Reason::BuildFailed)).await, Taken::Stale);
    assert_eq!(world.state(id).await, State::Building);
    assert!(matches!(agent.report(lease, 1, uploaded()).await, Taken::Applied(_)));
}

#[tokio::test]
async fn a_report_of_an_earlier_attempt_is_stale() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let first = agent.take(id).await;
    agent.report(first, 1, failed(Reason::Network)).await;
    world.pass(20);
    agent.renew(&[]).await;
    let second = agent.take(id).await;
    assert_eq!(second.attempt.get(), 2);
    assert_eq!(agent.report(first, 9, failed(Reason::BuildFailed)).await, Taken::Stale);
    assert_eq!(world.state(id).await, State::Building);
}

#[tokio::test]
async fn success_needs_the_commit_and_a_refused_target_is_partial() {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG, "r.example/app:2"]).await;
    let lease = agent.take(id).await;
    let answers = |first: Outcome| Snapshot {
        outcomes: [(TAG.to_owned(), first), ("r.example/app:2".to_owned(), Outcome::Moved)].into(),
        end: Some(kiln_protocol::message::AttemptEnd::Answered),
        ..Snapshot::default()
    };
    agent.report(lease, 1, answers(Outcome::Moved)).await;
    assert_eq!(world.state(id).await, State::Building, "no commit record, no success");
    assert!(matches!(agent.commit(lease, 1).await, CommitAnswer::Granted { .. }));
    agent.report(lease, 2, answers(Outcome::Failed("immutable".to_owned()))).await;
    let after = world.show(id).await;
    assert_eq!((after.state, after.reason), (State::Failed, Some(Reason::PartialPublish)));
}
