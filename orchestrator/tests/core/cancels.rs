//! The end that somebody asks for.

use std::sync::Arc;

use kiln_orchestrator::control::ControlError;
use kiln_orchestrator::decide::CancelRefused;
use kiln_protocol::message::{CommitAnswer, CommitRefusal, Standing};
use kiln_protocol::{BuildId, Reason, State};

use super::harness::{World, failed};

const TAG: &str = "r.example/app:1";

async fn cancel(world: &World, id: BuildId) -> Result<State, ControlError> {
    world.orchestrator.cancel(id, Reason::Cancelled, "somebody").await
}

fn refused(result: Result<State, ControlError>) -> CancelRefused {
    match result {
        Err(ControlError::Cancel { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_cancel_before_the_commit_wins_and_one_after_it_is_too_late() {
    let world = World::new().await;
    let agent = world.agent("a");
    let first = world.submit(&[TAG]).await;
    let lease = agent.take(first).await;
    assert_eq!(cancel(&world, first).await.unwrap(), State::Building);
    assert_eq!(agent.renew(&[lease]).await[0].standing, Standing::Cancel(Reason::Cancelled));
    assert_eq!(agent.commit(lease, 1).await, CommitAnswer::Refused { reason: CommitRefusal::Cancelled });
    agent.report(lease, 1, failed(Reason::Network)).await;
    assert_eq!(world.state(first).await, State::Cancelled, "whatever it died of");
    assert_eq!(cancel(&world, first).await.unwrap(), State::Cancelled, "asking twice is the same");

    let second = world.submit(&[TAG]).await;
    let lease = agent.take(second).await;
    assert!(matches!(agent.commit(lease, 1).await, CommitAnswer::Granted { .. }));
    assert_eq!(refused(cancel(&world, second).await), CancelRefused::Committed);
    assert_eq!(agent.renew(&[lease]).await[0].standing, Standing::Held);
}

#[tokio::test]
async fn of_a_cancel_and_a_commit_at_once_exactly_one_wins() {
    let world = World::new().await;
    let agent = world.agent("a");
    let other = world.second(super::harness::settings()).await;
    let mut wins = [0, 0];
    for round in 0..40u8 {
        let id = world.submit(&[&format!("r.example/app:{round}")]).await;
        let lease = agent.take(id).await;
        let whose = if round % 2 == 0 { &other } else { &world.orchestrator };
        let asks = whose.cancel(id, Reason::Cancelled, "somebody");
        // Whoever is polled first tends to win, so they take turns.
        let (asked, answer) = if round % 3 == 0 {
            tokio::join!(asks, agent.commit(lease, 1))
        } else {
            let (answer, asked) = tokio::join!(agent.commit(lease, 1), asks);
            (asked, answer)
        };
        let committed = matches!(answer, CommitAnswer::Granted { .. });
        assert_ne!(asked.is_ok(), committed, "round {round}");
        assert_eq!(world.show(id).await.commit.is_some(), committed);
        wins[usize::from(committed)] += 1;
        agent.report(lease, 1, failed(Reason::Cancelled)).await;
    }
    assert!(wins.iter().all(|&wins| wins > 0), "both orders happened: {wins:?}");
}

#[tokio::test]
async fn what_nobody_works_on_ends_at_once() {
    let world = World::new().await;
    let agent = world.agent("a");
    let pending = world.submit(&[TAG]).await;
    assert_eq!(cancel(&world, pending).await.unwrap(), State::Cancelled);
    assert!(agent.claim().await.is_none());

    let retried = world.submit(&[TAG]).await;
    let lease = agent.take(retried).await;
    agent.report(lease, 1, failed(Reason::Network)).await;
    assert_eq!(world.state(retried).await, State::Pending);
    assert_eq!(cancel(&world, retried).await.unwrap(), State::Cancelled);
    world.set_clock(3600);
    assert!(agent.claim().await.is_none());
    assert_eq!(agent.renew(&[lease]).await[0].standing, Standing::Finished);
}

#[tokio::test]
async fn a_cancel_that_no_agent_confirms_needs_no_agent() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    cancel(&world, id).await.unwrap();
    for _ in 0..14 {
        world.pass(4);
        agent.renew(&[lease]).await;
        assert_eq!(world.sweep().await.ended, 0);
    }
    world.pass(5);
    agent.renew(&[lease]).await;
    assert_eq!(world.sweep().await.ended, 1);
    assert_eq!(world.state(id).await, State::Cancelled);
    assert_eq!(agent.renew(&[lease]).await[0].standing, Standing::Revoked);
}

#[tokio::test]
async fn a_cancel_is_sent_to_the_agent_that_holds_the_lease() {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    agent.take(id).await;
    let mut tx = world.orchestrator.store().write().await.unwrap();
    tx.take_outgoing(world.now() + 1, 100).await.unwrap();
    tx.commit().await.unwrap();
    cancel(&world, id).await.unwrap();
    let mut tx = world.orchestrator.store().write().await.unwrap();
    let sent = tx.take_outgoing(world.now() + 1, 100).await.unwrap();
    let keys: Vec<&str> = sent.iter().map(|message| message.key.as_str()).collect();
    assert_eq!(keys, ["cmd.build.cancel.a"]);
}

#[tokio::test]
async fn a_lost_agent_with_a_cancelled_build_is_no_reason_to_retry() {
    let mut world = World::new().await;
    let id = world.submit(&[TAG]).await;
    let agent = Arc::new(world.agent("a"));
    agent.take(id).await;
    cancel(&world, id).await.unwrap();
    world.pass(31);
    world.sweep().await;
    assert_eq!(world.state(id).await, State::Cancelled);
}
