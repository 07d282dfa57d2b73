//! Who gets which build, and when.

use std::collections::BTreeSet;

use kiln_orchestrator::build::Micros;
use kiln_orchestrator::core::Settings;
use kiln_orchestrator::decide::{SECOND, Taken};
use kiln_orchestrator::schedule::{Limits, Wait};
use kiln_protocol::id::ClaimId;
use kiln_protocol::message::{
    ClaimAnswer, CommitAnswer, CommitRefusal, CommitRequest, HeadAnswer, Hook, Lane, PolicyVerdict, Standing,
};
use kiln_protocol::{BuildId, BuildSpec, Reason, State};

use super::harness::{World, digest, failed, image_of, policy_rule, settings, spec};

const TAG: &str = "r.example/app:1";

#[tokio::test]
async fn a_lost_answer_comes_again() {
    let world = World::new().await;
    let agent = world.agent("a");
    world.submit(&[TAG]).await;
    world.submit(&[TAG]).await;
    let claim = ClaimId::generate();
    let first = agent.claim_as(Lane::Build, claim).await;
    assert!(matches!(first, ClaimAnswer::Build(_)));
    assert_eq!(agent.claim_as(Lane::Build, claim).await, first);
    assert_ne!(agent.claim().await.unwrap().lease, lease_of(&first));
    let thief = world.agent("b").claim_as(Lane::Build, claim).await;
    assert_eq!(thief, ClaimAnswer::Nothing, "the lease of somebody else is nobody's business");
}

#[tokio::test]
async fn a_key_is_worth_nothing_in_the_hands_of_another_agent() {
    let mut world = World::new().await;
    let (holder, thief) = (world.agent("a"), world.agent("b"));
    let id = world.submit(&[TAG]).await;
    let lease = holder.take(id).await;
    let until = world.show(id).await.lease.unwrap().until;
    world.pass(5);
    assert_eq!(thief.renew(&[lease]).await[0].standing, Standing::Revoked);
    assert_eq!(world.show(id).await.lease.unwrap().until, until, "nobody prolonged it");
    let refused = CommitAnswer::Refused { reason: CommitRefusal::Revoked };
    assert_eq!(thief.commit(lease, 9).await, refused);
    assert_eq!(thief.report(lease, 1, failed(Reason::BuildFailed)).await, Taken::Stale);
    holder.commit(lease, 1).await;
    assert_eq!(thief.head(lease, TAG).await, HeadAnswer::Revoked);
    assert_eq!(holder.head(lease, TAG).await, HeadAnswer::Head);
    assert_eq!(holder.renew(&[lease]).await[0].standing, Standing::Held);
}

fn lease_of(answer: &ClaimAnswer) -> kiln_protocol::message::LeaseKey {
    match answer {
        ClaimAnswer::Build(grant) => grant.lease,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_claim_that_comes_again_after_its_build_ended_gets_nothing() {
    let world = World::new().await;
    let agent = world.agent("a");
    let first = world.submit(&[TAG]).await;
    let second = world.submit(&[TAG]).await;
    let claim = ClaimId::generate();
    let lease = lease_of(&agent.claim_as(Lane::Build, claim).await);
    assert_eq!(lease.build, first);
    agent.report(lease, 1, failed(Reason::BuildFailed)).await;
    assert_eq!(agent.claim_as(Lane::Build, claim).await, ClaimAnswer::Nothing, "nobody waits for it");
    assert_eq!(world.state(second).await, State::Pending);
}

#[tokio::test]
async fn a_retry_is_not_due_before_its_time() {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    agent.report(lease, 1, failed(Reason::Network)).await;
    let due = world.show(id).await.not_before;
    assert!((5 * SECOND..=15 * SECOND).contains(&(due - world.now())));
    set(&world, due - 1);
    assert!(agent.claim().await.is_none());
    assert!(matches!(world.orchestrator.queue().await.unwrap()[0].wait, Wait::NotDue { seconds: 1 }));
    set(&world, due);
    assert_eq!(agent.take(id).await.attempt.get(), 2);
}

fn set(world: &World, now: Micros) {
    world.clock.store(now, std::sync::atomic::Ordering::SeqCst);
}

#[tokio::test]
async fn a_clock_set_back_an_hour_stops_nothing() {
    let mut world = World::new().await;
    let (agent, silent) = (world.agent("a"), world.agent("b"));
    let retried = world.submit(&[TAG]).await;
    let running = world.submit(&["r.example/app:2"]).await;
    let lost = world.submit(&["r.example/app:3"]).await;
    let published = world.submit(&["r.example/app:4"]).await;
    let lease = agent.take(retried).await;
    let held = agent.take(running).await;
    silent.take(lost).await;
    let given_back = silent.take(published).await;
    silent.commit(given_back, 4).await;
    let end = Some(kiln_protocol::message::AttemptEnd::Answered);
    silent.report(given_back, 1, kiln_protocol::message::Snapshot { end, ..Default::default() }).await;
    agent.report(lease, 1, failed(Reason::Network)).await;
    let waiting = world.submit(&["r.example/app:5"]).await;

    world.set_clock(-3600);
    assert_eq!(agent.renew(&[held]).await[0].standing, Standing::Held);
    world.sweep().await;
    assert_eq!(world.state(running).await, State::Building, "no healthy build is swept");
    assert_eq!(agent.take(retried).await.attempt.get(), 2, "not an hour later");
    agent.take(waiting).await;
    assert_eq!(agent.claim_publish().await.unwrap().lease.build, published);
    for _ in 0..20 {
        world.pass(4);
        agent.renew(&[held]).await;
        world.sweep().await;
    }
    assert_eq!(world.state(lost).await, State::Pending, "the silent agent is not believed for an hour");
    assert_eq!(world.state(running).await, State::Building);
    // The clock is right again: every lease looks as if it had ended an hour ago.
    world.set_clock(3600);
    world.sweep().await;
    assert_eq!(world.state(running).await, State::Building);
    assert_eq!(agent.renew(&[held]).await[0].standing, Standing::Held);
}

#[tokio::test]
async fn groups_run_one_at_a_time() {
    let world = World::new().await;
    let agent = world.agent("a");
    let grouped = |tag: &str| BuildSpec { group: Some("deploy".parse().unwrap()), ..spec(&[tag]) };
    let first = world.submit_spec(grouped(TAG)).await;
    let second = world.submit_spec(grouped("r.example/app:2")).await;
    let free = world.submit(&["r.example/app:3"]).await;
    let lease = agent.take(first).await;
    agent.take(free).await;
    assert!(agent.claim().await.is_none());
    agent.report(lease, 1, failed(Reason::BuildFailed)).await;
    agent.take(second).await;
}

#[tokio::test]
async fn a_long_group_does_not_hide_what_else_its_namespace_has() {
    let world = World::new().await;
    let agent = world.agent("a");
    for _ in 0..200 {
        world.submit_spec(BuildSpec { group: Some("deploy".parse().unwrap()), ..spec(&[TAG]) }).await;
    }
    let free = world.submit(&["r.example/app:2"]).await;
    agent.claim().await.unwrap();
    agent.take(free).await;
}

#[tokio::test]
async fn retries_that_wait_do_not_hide_what_is_due() {
    let world = World::new().await;
    let agent = world.agent("a");
    for _ in 0..70 {
        world.submit(&[TAG]).await;
        let lease = agent.claim().await.unwrap().lease;
        agent.report(lease, 1, failed(Reason::Network)).await;
    }
    let fresh = world.submit(&["r.example/app:2"]).await;
    agent.take(fresh).await;
}

#[tokio::test]
async fn a_namespace_has_a_limit_and_namespaces_take_turns() {
    let limits = Limits { per_namespace: 2 };
    let world = World::with(Settings { limits, ..settings() }).await;
    let agent = world.agent("a");
    let of = |namespace: &str| BuildSpec { namespace: namespace.parse().unwrap(), ..spec(&[TAG]) };
    let mut big = Vec::new();
    for _ in 0..4 {
        big.push(world.submit_spec(of("big")).await);
    }
    let small = world.submit_spec(of("small")).await;
    let mut order = Vec::new();
    while let Some(grant) = agent.claim().await {
        order.push(grant.lease.build);
    }
    assert_eq!(order, [big[0], small, big[1]]);
}

#[tokio::test]
async fn priority_goes_first() {
    let world = World::new().await;
    let agent = world.agent("a");
    let with = |priority| BuildSpec { priority, ..spec(&[TAG]) };
    let mut ids: Vec<BuildId> = Vec::new();
    for priority in [1, 9, 5] {
        ids.push(world.submit_spec(with(priority)).await);
    }
    for expected in [ids[1], ids[2], ids[0]] {
        agent.take(expected).await;
    }
}

#[tokio::test]
async fn an_agent_without_a_required_policy_gets_no_such_build() {
    let rules = vec![policy_rule("tags", 5, "r.example/judged/**")];
    let world = World::with(Settings { policies: rules.clone(), ..settings() }).await;
    let without = world.agent("a");
    let mut with = world.agent("b");
    with.policies.insert(rules[0].key.clone());
    for i in 0..100 {
        world.submit(&[&format!("r.example/judged/app:{i}")]).await;
    }
    let other = world.submit(&["r.example/other/app:1"]).await;
    without.take(other).await;
    assert!(without.claim().await.is_none());
    let grant = with.claim().await.unwrap();
    assert_eq!(grant.policies.len(), 1);

    let missing = CommitRefusal::MissingVerdict { policy: "tags".to_owned() };
    assert_eq!(with.commit(grant.lease, 1).await, CommitAnswer::Refused { reason: missing });
    let verdict = PolicyVerdict {
        name: "tags".to_owned(),
        key: rules[0].key.clone(),
        hook: Hook::PostPush,
        repository: "r.example/judged/app".to_owned(),
        subject: digest(1),
        passed: true,
        outcome: "allow".to_owned(),
    };
    let request = CommitRequest { lease: grant.lease, committed: image_of(1), verdicts: vec![verdict] };
    let granted = world.orchestrator.commit(&with.id, &request).await.unwrap();
    assert!(matches!(granted, CommitAnswer::Granted { .. }));
}

#[tokio::test]
async fn concurrent_claims_of_two_processes_give_each_build_once() {
    let world = World::new().await;
    let other = world.second(settings()).await;
    let mut submitted = BTreeSet::new();
    for i in 0..40 {
        submitted.insert(world.submit(&[&format!("r.example/app:{i}")]).await);
    }
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..8 {
        let mut agent = world.agent(&format!("agent-{i}"));
        if i % 2 == 1 {
            agent.orchestrator = std::sync::Arc::clone(&other);
        }
        tasks.spawn(async move {
            let mut mine = Vec::new();
            while let Some(grant) = agent.claim().await {
                mine.push(grant.lease.build);
            }
            mine
        });
    }
    let claimed: Vec<BuildId> = tasks.join_all().await.into_iter().flatten().collect();
    assert_eq!(claimed.len(), 40);
    assert_eq!(claimed.into_iter().collect::<BTreeSet<_>>(), submitted);
}

#[tokio::test]
async fn a_free_slot_is_counted_until_somebody_takes_it() {
    let world = World::new().await;
    let agent = world.agent("a");
    agent.renew(&[]).await;
    for i in 0..3 {
        let id = world.submit(&[&format!("r.example/app:{i}")]).await;
        agent.take(id).await;
    }
    world.submit(&["r.example/app:8"]).await;
    world.submit(&["r.example/app:9"]).await;
    let waits: Vec<Wait> =
        world.orchestrator.queue().await.unwrap().into_iter().map(|queued| queued.wait).collect();
    assert_eq!(waits, [Wait::Next, Wait::Busy { ahead: 0 }], "one of four slots is left");
}

#[tokio::test]
async fn a_process_with_its_own_pool_leaves_the_others_alone() {
    let mut world = World::with(Settings { only_pool: Some("mine".parse().unwrap()), ..settings() }).await;
    let stranger = world.submit(&[TAG]).await;
    let mut agent = world.agent("a");
    assert!(agent.claim().await.is_none(), "nobody runs a stranger's build");
    agent.orchestrator = world.second(settings()).await;
    agent.take(stranger).await;
    world.pass(40);
    world.sweep().await;
    assert_eq!(world.state(stranger).await, State::Building, "nor ends it");
}
