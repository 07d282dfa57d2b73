//! Every statement, and what it reads.

use kiln_orchestrator::store;
use sqlx::{Executor as _, SqlSafeStr as _};

use crate::harness::World;

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
