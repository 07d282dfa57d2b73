//! Many builds at once, and every statement.
//!
//! The figures: `cargo test --release -p kiln-orchestrator --test core scale -- --ignored --nocapture`.

use std::time::Instant;

use kiln_orchestrator::store;
use kiln_protocol::message::CommitAnswer;
use kiln_protocol::{BuildSpec, State};
use kiln_transport::memory::MemoryBroker;
use sqlx::{Executor as _, SqlSafeStr as _};

use crate::harness::{World, spec};

#[tokio::test]
async fn every_statement_can_be_prepared() {
    let world = World::new().await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(world.path());
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let mut seen = 0;
    for statement in store::statements() {
        let prepared = (&pool).prepare(statement.into_sql_str()).await;
        assert!(prepared.is_ok(), "{statement}: {:?}", prepared.err());
        seen += 1;
    }
    assert!(seen > 40);
}

/// Looks that happen all the time must not read every row. What a statement reads, SQLite says.
#[tokio::test]
async fn nothing_that_happens_all_the_time_reads_every_build() {
    let world = World::new().await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(world.path());
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    // Counts for metrics read an index; a person who asks for the newest builds reads their order.
    let may_scan =
        |sql: &str| sql.contains("GROUP BY state") || sql.contains("ORDER BY submit_seq DESC LIMIT $1");
    for statement in store::statements().filter(|sql| sql.contains("builds") && !may_scan(sql)) {
        let explain = format!("EXPLAIN QUERY PLAN {statement}");
        let rows = sqlx::query(sqlx::AssertSqlSafe(explain).into_sql_str()).fetch_all(&pool).await.unwrap();
        for row in rows {
            let detail: String = sqlx::Row::get(&row, "detail");
            let scan = detail.starts_with("SCAN builds") && !detail.contains("INDEX");
            assert!(!scan && !detail.starts_with("SCAN b "), "{statement}: {detail}");
        }
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

#[tokio::test]
#[ignore = "prints figures; minutes without --release"]
async fn figures() {
    let mut world = World::new().await;
    let agent = world.agent("a");
    let begun = Instant::now();
    for i in 0..1000 {
        world.submit(&[&format!("r.example/app:{i}")]).await;
    }
    println!("submit: {:.0} per second", 1000.0 / begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    for _ in 0..1000 {
        let lease = agent.claim().await.unwrap().lease;
        let granted = agent.commit(lease, 1).await;
        assert!(matches!(granted, CommitAnswer::Granted { .. }));
    }
    println!("claim and commit: {:.0} pairs per second", 1000.0 / begun.elapsed().as_secs_f64());
    fill(&world, 100_000).await;
    let bus = MemoryBroker::new(1).connect("orchestrator");
    bus.declare(&kiln_orchestrator::topology::shared(&["default".parse().unwrap()])).await.unwrap();
    for _ in 0..3 {
        let begun = Instant::now();
        world.sweep().await;
        let sweep = milliseconds(begun);
        let begun = Instant::now();
        agent.claim().await.unwrap();
        let claim = milliseconds(begun);
        let begun = Instant::now();
        world.orchestrator.hint(&bus).await.unwrap();
        let hint = milliseconds(begun);
        let begun = Instant::now();
        world.orchestrator.queue().await.unwrap();
        let queue = milliseconds(begun);
        println!(
            "100000 pending: sweep {sweep:.1} ms, claim {claim:.1} ms, hint {hint:.1} ms, queue {queue:.1} ms"
        );
    }
    assert_eq!(
        world.state(world.orchestrator.list(None, None, 200).await.unwrap()[0].build.id).await,
        State::Pending
    );
}

/// Waiting builds of a hundred namespaces, in few transactions.
async fn fill(world: &World, builds: usize) {
    use kiln_orchestrator::build::Build;
    let mut left = builds;
    while left > 0 {
        let mut tx = world.orchestrator.store().write().await.unwrap();
        for i in 0..left.min(1000) {
            let namespace = format!("team-{}", (left + i) % 100).parse().unwrap();
            let spec = BuildSpec { namespace, ..spec(&[&format!("r.example/app-{}:x", i % 50)]) };
            let seq = tx.next_submit_seq().await.unwrap();
            let build = Build::submitted(kiln_protocol::BuildId::generate(), seq, &spec, None, tx.now());
            tx.insert(&build, &spec, None, "").await.unwrap();
        }
        tx.commit().await.unwrap();
        left -= left.min(1000);
    }
}
