//! What is accepted, and what of it everybody hears.

use kiln_orchestrator::store::Clock;
use kiln_orchestrator::submit::{Submission, SubmitError};
use kiln_protocol::{BuildSpec, State};

use super::harness::{World, spec};
use crate::database::{Database, Fresh, Kind};

fn keyed(spec: BuildSpec, key: &str) -> Submission {
    Submission { spec, key: Some(key.to_owned()), retry_of: None }
}

#[tokio::test]
async fn the_same_key_gives_the_same_build_and_another_request_is_refused() {
    let world = World::new().await;
    let first = world.orchestrator.submit(keyed(spec(&["r.example/app:1"]), "k")).await.unwrap();
    let again = world.orchestrator.submit(keyed(spec(&["r.example/app:1"]), "k")).await.unwrap();
    assert_eq!((again.id, again.repeated), (first.id, true));
    let other = world.orchestrator.submit(keyed(spec(&["r.example/app:2"]), "k")).await;
    assert!(matches!(other, Err(SubmitError::OtherRequest(id)) if id == first.id));
    let elsewhere = BuildSpec { namespace: "team-b".parse().unwrap(), ..spec(&["r.example/app:1"]) };
    assert!(!world.orchestrator.submit(keyed(elsewhere, "k")).await.unwrap().repeated);
    assert_eq!(world.orchestrator.list(None, None, 200).await.unwrap().len(), 2);
}

#[tokio::test]
async fn one_key_at_once_from_two_processes_gives_one_build() {
    let world = World::new().await;
    let other = world.second(super::harness::settings()).await;
    for round in 0..10 {
        let submission = || keyed(spec(&["r.example/app:1"]), &format!("k{round}"));
        let (one, two) = tokio::join!(world.orchestrator.submit(submission()), other.submit(submission()));
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_eq!(one.id, two.id);
        assert_ne!(one.repeated, two.repeated);
    }
}

#[tokio::test]
async fn a_change_is_told_if_and_only_if_it_is_recorded() {
    let world = World::new().await;
    let backlog = async || {
        let mut tx = world.orchestrator.store().read().await.unwrap();
        tx.outbox_backlog().await.unwrap().0
    };
    let id = world.submit(&["r.example/app:1"]).await;
    assert_eq!(backlog().await, 1, "a submission is told too");
    world.agent("a").take(id).await;
    assert_eq!(backlog().await, 2);
    let events = world.orchestrator.events(id, 0).await.unwrap();
    let states: Vec<State> = events.iter().map(|stored| stored.event.state).collect();
    assert_eq!(states, [State::Pending, State::Building]);
    assert_eq!(world.orchestrator.events(id, events[0].id).await.unwrap().len(), 1);

    // The process dies between the change and its commit.
    let mut tx = world.orchestrator.store().write().await.unwrap();
    let found = tx.load(id).await.unwrap().unwrap();
    tx.append_event(&found.build.public(&found.spec, 0)).await.unwrap();
    let event = found.build.public(&found.spec, 0);
    let message = kiln_orchestrator::store::Outgoing::new("kiln.event", "event.x".to_owned(), &event);
    tx.send(&message.unwrap()).await.unwrap();
    drop(tx);
    assert_eq!(backlog().await, 2);
    assert_eq!(world.orchestrator.events(id, 0).await.unwrap().len(), 2);
}

#[tokio::test]
async fn only_what_is_over_can_be_submitted_again() {
    let world = World::new().await;
    let id = world.submit(&["r.example/app:1"]).await;
    assert!(matches!(world.orchestrator.retry(id, None, None).await, Err(SubmitError::NotOver { .. })));
    world.orchestrator.cancel(id, kiln_protocol::Reason::Cancelled, "somebody").await.unwrap();
    let again = world.orchestrator.retry(id, None, None).await.unwrap();
    let build = world.show(again.id).await;
    assert_eq!((build.retry_of, build.state), (Some(id), State::Pending));
    assert!(build.submit_seq > world.show(id).await.submit_seq);
}

#[tokio::test]
async fn processes_that_open_a_fresh_database_at_once_all_can() {
    for _ in 0..5 {
        let database = match super::KIND {
            Kind::Sqlite => Database::new(Kind::Sqlite).await,
            Kind::Postgres => Database::Postgres(Fresh::empty().await),
        };
        let opened = futures_util::future::join_all((0..8).map(|_| database.open(Clock::System))).await;
        for store in opened {
            store.unwrap().close().await;
        }
    }
}

/// While replicas are replaced one by one, those of this version work, and start, on what the next one added.
#[tokio::test]
async fn a_schema_with_a_later_step_is_good_enough() {
    let world = World::new().await;
    let agent = world.agent("a");
    let waiting = world.submit(&["r.example/app:1"]).await;
    let lease = agent.take(waiting).await;
    world.database.execute("ALTER TABLE builds ADD COLUMN later TEXT").await;
    world.database.execute("CREATE INDEX builds_by_later ON builds (later)").await;
    let applied = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
        SELECT version + 1000, 'later', success, checksum, 0 FROM _sqlx_migrations";
    world.database.execute(applied).await;
    let started = world.second(super::harness::settings()).await;
    let agent = super::harness::FakeAgent { orchestrator: started, ..agent };
    assert_eq!(agent.renew(&[lease]).await[0].standing, kiln_protocol::message::Standing::Held);
    let fresh = world.submit(&["r.example/app:2"]).await;
    agent.take(fresh).await;
}

#[tokio::test]
async fn text_that_no_database_takes_is_taken() {
    let world = World::new().await;
    let mut tx = world.orchestrator.store().write().await.unwrap();
    tx.keep_bad("kiln.report", "a \0 in it", b"\0").await.unwrap();
    tx.audit("somebody", "cancel", None, "\0").await.unwrap();
    tx.commit().await.unwrap();
    let bad = world.orchestrator.bad_messages().await.unwrap();
    assert_eq!((bad[0].error.as_str(), bad[0].body.as_slice()), ("a \u{fffd} in it", b"\0".as_slice()));
}
