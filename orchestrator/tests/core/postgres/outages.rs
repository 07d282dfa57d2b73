//! A database that goes away, is locked, or takes no writes.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use kiln_orchestrator::amnesty::Amnesty;
use kiln_orchestrator::core::{CoreError, Orchestrator};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::store::{Clock, Outage, Server, Store, StoreError};
use kiln_orchestrator::submit::{Submission, SubmitError};
use kiln_protocol::{BuildId, State};
use kiln_transport::memory::MemoryBroker;
use tokio::time::Instant;

use super::suite::harness::{World, settings, spec};
use crate::database::{Database, Fresh};

const TAG: &str = "r.example/app:1";
const DEADLINE: Duration = Duration::from_secs(30);
const TERMINATE: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '$name' AND pid <> pg_backend_pid()";

fn fresh(world: &World) -> &Fresh {
    match &world.database {
        Database::Postgres(fresh) => fresh,
        Database::Sqlite(_) => panic!("these are tests of PostgreSQL"),
    }
}

async fn submit(orchestrator: &Orchestrator, key: &str) -> Result<BuildId, StoreError> {
    let submission = Submission { spec: spec(&[TAG]), key: Some(key.to_owned()), retry_of: None };
    match orchestrator.submit(submission).await {
        Ok(submitted) => Ok(submitted.id),
        Err(SubmitError::Core(CoreError::Store(error))) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

fn outage(error: &StoreError) -> Outage {
    match error {
        StoreError::Unavailable { why, .. } => *why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_session_that_is_ended_in_the_middle_of_a_change_changes_nothing() {
    let world = World::new().await;
    let id = world.submit(&[TAG]).await;
    let mut tx = world.orchestrator.store().write().await.unwrap();
    let found = tx.load(id).await.unwrap().unwrap();
    let event = found.build.public(&found.spec, 0);
    tx.append_event(&event).await.unwrap();
    fresh(&world).run(TERMINATE).await;
    assert_eq!(outage(&tx.append_event(&event).await.unwrap_err()), Outage::Away);
    drop(tx);
    let found = loop {
        // The pool finds out about its other sessions one by one.
        match world.orchestrator.events(id, 0).await {
            Ok(events) => break events,
            Err(error) => assert!(kiln_orchestrator::error::chain(&error).contains("cannot be reached")),
        }
    };
    assert_eq!(found.len(), 1, "only the submission");
    world.agent("a").take(id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_ended_all_the_time_lose_and_double_nothing() {
    let world = World::new().await;
    let submitting = async {
        let (mut ids, mut errors) = (Vec::new(), 0);
        for i in 0..40 {
            loop {
                match submit(&world.orchestrator, &format!("key-{i}")).await {
                    Ok(id) => break ids.push(id),
                    Err(error) => {
                        assert_eq!(outage(&error), Outage::Away);
                        errors += 1;
                    }
                }
            }
        }
        (ids, errors)
    };
    let killing = async {
        loop {
            fresh(&world).run(TERMINATE).await;
        }
    };
    let (ids, errors) = tokio::select! { done = submitting => done, () = killing => unreachable!() };
    assert!(errors > 0, "nothing was ended");
    let mut listed = Vec::new();
    while listed.is_empty() {
        listed = world.orchestrator.list(None, None, 200).await.unwrap_or_default();
    }
    let mut recorded: Vec<BuildId> = listed.into_iter().map(|found| found.build.id).collect();
    recorded.reverse();
    assert_eq!(recorded, ids);
}

#[tokio::test]
async fn a_read_only_database_can_be_read_and_nothing_expires() {
    let mut world = World::new().await;
    let id = world.submit(&[TAG]).await;
    let lease = world.agent("a").take(id).await;
    let other = world.second(settings()).await;
    fresh(&world).run("ALTER DATABASE $name SET default_transaction_read_only = on").await;
    fresh(&world).run(TERMINATE).await;
    while outage(&submit(&other, "k").await.unwrap_err()) != Outage::ReadOnly {
        // A session that was not new enough.
    }
    let fresh_one = Store::connect(&fresh(&world).server(), Clock::System).await.unwrap_err();
    assert_eq!(outage(&fresh_one), Outage::ReadOnly, "a new replica says so too");
    assert_eq!(other.show(id).await.unwrap().build.state, State::Building);
    world.pass(31);
    let bus = MemoryBroker::new(1).connect("orchestrator");
    bus.declare(&kiln_orchestrator::topology::shared(&[])).await.unwrap();
    let mut ripe = Amnesty::default();
    let start = Instant::now();
    for second in (0..40).step_by(2) {
        ripe.tick(
            world.now() - (40 - second) * 1_000_000,
            start + Duration::from_secs(second.unsigned_abs()),
        );
    }
    let at = start + Duration::from_secs(40);
    let refused = other.probe_and_sweep(&bus, &mut ripe, at).await.unwrap_err();
    assert!(kiln_orchestrator::error::chain(&refused).contains("read-only"), "{refused:?}");
    assert!(!ripe.tick(world.now(), at), "after trouble, silence means nothing for a lease time");
    fresh(&world).run("ALTER DATABASE $name SET default_transaction_read_only = off").await;
    let third = world.second(settings()).await;
    assert!(submit(&third, "k").await.is_ok());
    assert_eq!(world.show(id).await.lease_key(), Some(lease));
}

#[tokio::test]
async fn a_locked_table_is_waited_for_only_so_long() {
    let world = World::new().await;
    let mut session = fresh(&world).session().await;
    sqlx::Executor::execute(&mut session, "BEGIN; LOCK TABLE builds").await.unwrap();
    assert_eq!(outage(&submit(&world.orchestrator, "k").await.unwrap_err()), Outage::Locked);
    drop(session);
    assert!(submit(&world.orchestrator, "k").await.is_ok());
}

#[tokio::test]
async fn a_pool_without_connections_is_waited_for_only_so_long() {
    let world = World::new().await;
    let store = world.orchestrator.store();
    let mut held = Vec::new();
    // One listens for hints.
    for _ in 0..7 {
        held.push(store.read().await.unwrap());
    }
    let refused = loop {
        match store.read().await {
            Ok(tx) => held.push(tx),
            Err(error) => break error,
        }
    };
    assert_eq!(outage(&refused), Outage::Slow);
    held.clear();
    assert!(submit(&world.orchestrator, "k").await.is_ok());
}

#[tokio::test]
async fn a_password_comes_from_a_file_and_is_shown_to_nobody() {
    let world = World::new().await;
    fresh(&world).run("CREATE ROLE guarded SUPERUSER LOGIN PASSWORD 'hunter2'").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    let url = fresh(&world).server().url.replace("user=kiln", "user=guarded");
    let server = |password: &str| {
        std::fs::write(&file, password).unwrap();
        Server { password_file: Some(file.clone()), ..Server::new(&url) }
    };
    let store = Store::connect(&server("hunter2\n"), Clock::System).await.unwrap();
    assert!(!format!("{store:?}").contains("hunter2"));
    store.close().await;
    let refused = Store::connect(&server("hunter3"), Clock::System).await.unwrap_err();
    let text = format!("{refused:?} {}", kiln_orchestrator::error::chain(&refused));
    assert!(text.contains("password authentication failed") && !text.contains("hunter3"), "{text}");
}

fn script(arguments: &[&str]) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/test-postgres.sh");
    let output = Command::new(script).args(arguments).env_remove("NEXTEST_ENV").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_started_again_loses_nothing_that_was_answered() {
    // One that nobody else uses; it ends with this process.
    let started = script(&["start", "durable"]);
    let folder = PathBuf::from(started.trim().strip_prefix("KILN_TEST_POSTGRES=").unwrap());
    let database = Fresh::new(&folder).await;
    let store = Store::connect(&database.server(), Clock::System).await.unwrap();
    let orchestrator = Orchestrator::new(store, settings(), Entropy::System);
    let name = folder.display().to_string();
    let restarting = tokio::task::spawn_blocking(move || {
        for _ in 0..3 {
            script(&["restart", &name]);
        }
    });
    let (mut answered, mut failed, begun) = (Vec::new(), 0, Instant::now());
    while !restarting.is_finished() || answered.len() < 20 {
        assert!(begun.elapsed() < DEADLINE, "{} submissions, {failed} refusals", answered.len());
        match submit(&orchestrator, &format!("key-{}", answered.len())).await {
            Ok(id) => answered.push(id),
            Err(error) => {
                assert_eq!(outage(&error), Outage::Away);
                failed += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
    restarting.await.unwrap();
    assert!(failed > 0, "it was never away");
    for id in &answered {
        assert_eq!(orchestrator.show(*id).await.unwrap().build.state, State::Pending);
    }
    let found = orchestrator.list(None, None, 200).await.unwrap();
    assert_eq!(found.len(), answered.len().min(200), "and none was recorded twice");
    orchestrator.store().close().await;
}
