//! Every statement, and what it reads.

use kiln_orchestrator::store::{self, Statement};
use sqlx::{Executor as _, Row as _, SqlSafeStr as _};

use super::harness::World;
use crate::database::Database;

/// Counts for metrics read an index; a person who asks for the newest builds reads their order.
fn may_scan(sql: &str) -> bool {
    sql.contains("GROUP BY state") || sql.contains("ORDER BY submit_seq DESC LIMIT $1")
}

#[tokio::test]
async fn every_statement_can_be_prepared() {
    let world = World::new().await;
    let mut seen = 0;
    match &world.database {
        Database::Sqlite(folder) => {
            let mut session = sqlite(folder).await;
            for Statement { sqlite, .. } in store::statements().filter(|s| !s.sqlite.is_empty()) {
                let prepared = (&mut session).prepare(sqlite.into_sql_str()).await;
                assert!(prepared.is_ok(), "{sqlite}: {:?}", prepared.err());
                seen += 1;
            }
        }
        Database::Postgres(fresh) => {
            let mut session = fresh.session().await;
            for Statement { postgres, .. } in store::statements() {
                let prepared = (&mut session).prepare(postgres.into_sql_str()).await;
                assert!(prepared.is_ok(), "{postgres}: {:?}", prepared.err());
                seen += 1;
            }
        }
    }
    assert!(seen > 40);
}

async fn sqlite(folder: &tempfile::TempDir) -> sqlx::SqliteConnection {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.path().join("kiln.db"));
    <sqlx::SqliteConnection as sqlx::Connection>::connect_with(&options).await.unwrap()
}

/// Looks that happen all the time must not read every row. What a statement reads, the database says.
#[tokio::test]
async fn nothing_that_happens_all_the_time_reads_every_build() {
    let world = World::new().await;
    let looks = store::statements().filter(|s| s.postgres.contains("builds") && !may_scan(s.postgres));
    match &world.database {
        Database::Sqlite(folder) => {
            let mut session = sqlite(folder).await;
            for Statement { sqlite, .. } in looks {
                for detail in lines(&mut session, format!("EXPLAIN QUERY PLAN {sqlite}"), "detail").await {
                    let scan = detail.starts_with("SCAN builds") && !detail.contains("INDEX");
                    assert!(!scan && !detail.starts_with("SCAN b "), "{sqlite}: {detail}");
                }
            }
        }
        Database::Postgres(fresh) => {
            let mut session = fresh.session().await;
            // Else it reads a table without rows, for which nothing is faster.
            let prefer = "SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan";
            session.execute(prefer).await.unwrap();
            for (number, Statement { postgres, .. }) in looks.enumerate() {
                let prepare = format!("PREPARE s{number} AS {postgres}");
                session.execute(sqlx::AssertSqlSafe(prepare).into_sql_str()).await.unwrap();
                let nulls = vec!["NULL"; (1..20).filter(|n| postgres.contains(&format!("${n}"))).count()];
                let list = if nulls.is_empty() { String::new() } else { format!("({})", nulls.join(", ")) };
                let explain = format!("EXPLAIN EXECUTE s{number}{list}");
                for line in lines(&mut session, explain, "QUERY PLAN").await {
                    assert!(!line.contains("Seq Scan on builds"), "{postgres}: {line}");
                }
            }
        }
    }
}

async fn lines<C>(session: &mut C, sql: String, column: &str) -> Vec<String>
where
    C: sqlx::Connection,
    for<'c> &'c mut C: sqlx::Executor<'c, Database = C::Database>,
    for<'c> &'c str: sqlx::ColumnIndex<<C::Database as sqlx::Database>::Row>,
    String: for<'r> sqlx::Decode<'r, C::Database> + sqlx::Type<C::Database>,
{
    let query = sqlx::AssertSqlSafe(sql).into_sql_str();
    let rows = (&mut *session).fetch_all(query).await.unwrap();
    rows.iter().map(|row| row.get::<String, _>(column)).collect()
}
