//! What becomes due by itself: silent agents, builds that wait or run too long.

use std::time::Duration;

use kiln_orchestrator::amnesty::Amnesty;
use kiln_protocol::message::Standing;
use kiln_protocol::{BuildSpec, Reason, State};

use tokio::time::Instant;

use super::harness::{World, settings, spec};

const TAG: &str = "r.example/app:1";

#[tokio::test]
async fn a_silent_agent_loses_its_build_and_a_talking_one_does_not() {
    let mut world = World::new().await;
    let (silent, talking) = (world.agent("a"), world.agent("b"));
    let lost = world.submit(&[TAG]).await;
    let kept = world.submit(&["r.example/app:2"]).await;
    let old = silent.take(lost).await;
    let lease = talking.take(kept).await;
    world.pass(30);
    talking.renew(&[lease]).await;
    assert_eq!(world.sweep().await.expired, 0, "its lease lasts until now");
    world.pass(1);
    assert_eq!(world.sweep().await.expired, 1);
    let after = world.show(lost).await;
    assert_eq!((after.state, after.attempt.get()), (State::Pending, 2));
    assert_eq!(world.state(kept).await, State::Building);
    assert_eq!(silent.renew(&[old]).await[0].standing, Standing::Revoked);
}

#[tokio::test]
async fn after_an_outage_no_healthy_build_is_swept() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    world.sleep(300);
    assert_eq!(world.sweep().await.expired, 0, "this process slept too");
    for _ in 0..7 {
        world.pass(4);
        assert_eq!(world.sweep().await.expired, 0, "the agent has a whole lease time to come back");
    }
    assert_eq!(agent.renew(&[lease]).await[0].standing, Standing::Held);
    world.pass(20);
    assert_eq!(world.sweep().await.expired, 0);
    world.amnesty.interrupted();
    world.pass(20);
    assert_eq!(world.sweep().await.expired, 0, "an interruption starts it again");
    world.pass(20);
    assert_eq!(world.sweep().await.expired, 1, "but not for ever");
}

#[tokio::test]
async fn a_fifth_of_the_agents_may_be_believed_dead_at_once() {
    let mut world = World::new().await;
    let agents: Vec<_> = (0..10).map(|i| world.agent(&format!("agent-{i}"))).collect();
    for (i, agent) in agents.iter().enumerate() {
        let id = world.submit(&[&format!("r.example/app:{i}")]).await;
        agent.take(id).await;
    }
    world.pass(31);
    assert_eq!(world.sweep().await.expired, 2);
    world.pass(4);
    assert_eq!(world.sweep().await.expired, 0, "no more within this lease time");
    let mut sweeps = 0;
    while world.orchestrator.list_in(State::Building, None).await.unwrap().len() > 5 {
        world.pass(31);
        assert!((1..=2).contains(&world.sweep().await.expired));
        sweeps += 1;
        assert!(sweeps < 10);
    }
}

#[tokio::test]
async fn processes_on_one_record_brake_together() {
    let mut world = World::new().await;
    let other = world.second(settings()).await;
    let (mut amnesty, mut at) = (Amnesty::default(), Instant::now());
    for i in 0..10 {
        let agent = world.agent(&format!("agent-{i}"));
        let id = world.submit(&[&format!("r.example/app:{i}")]).await;
        agent.take(id).await;
    }
    for _ in 0..16 {
        world.pass(2);
        at += Duration::from_secs(2);
        amnesty.tick(world.now(), at);
    }
    assert_eq!(world.sweep().await.expired, 2);
    assert_eq!(other.sweep(&mut amnesty, at).await.unwrap().expired, 0, "the other one did that already");
    for _ in 0..16 {
        world.pass(2);
        at += Duration::from_secs(2);
        amnesty.tick(world.now(), at);
    }
    assert!((1..=2).contains(&other.sweep(&mut amnesty, at).await.unwrap().expired));
    assert_eq!(world.sweep().await.expired, 0);
}

#[tokio::test]
async fn a_build_that_nobody_takes_ends() {
    let mut world = World::new().await;
    let queue_timeout = std::time::Duration::from_mins(10);
    let id = world.submit_spec(BuildSpec { queue_timeout, ..spec(&[TAG]) }).await;
    let patient = world.submit(&["r.example/app:2"]).await;
    world.pass(600);
    assert_eq!(world.sweep().await.ended, 0);
    world.pass(1);
    assert_eq!(world.sweep().await.ended, 1);
    let after = world.show(id).await;
    assert_eq!((after.state, after.reason), (State::Failed, Some(Reason::QueueTimeout)));
    assert_eq!(world.state(patient).await, State::Pending);
}

#[tokio::test]
async fn an_attempt_that_its_agent_does_not_end_ends() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    for _ in 0..186 {
        world.pass(20);
        agent.renew(&[lease]).await;
        assert_eq!(world.sweep().await.ended, 0);
    }
    world.pass(1);
    assert_eq!(world.sweep().await.ended, 1);
    let after = world.show(id).await;
    assert_eq!((after.state, after.reason), (State::Failed, Some(Reason::Timeout)));
    assert_eq!(agent.renew(&[lease]).await[0].standing, Standing::Revoked);
}

#[tokio::test]
async fn nothing_ends_a_committed_build_before_a_day() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.commit(lease, 1).await;
    world.pass(40);
    world.sweep().await;
    world.sleep(23 * 3600);
    world.sweep().await;
    assert_eq!(world.state(id).await, State::Pushing);
    world.sleep(3600);
    world.sweep().await;
    assert_eq!(world.state(id).await, State::DeadLetter);
}
