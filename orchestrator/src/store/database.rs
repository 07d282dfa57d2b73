//! The two kinds of database (shell).

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Postgres, SqlSafeStr as _, Sqlite, Transaction};

use super::postgres::Pg;
use super::query::{Query, Statement, bounded};
use super::{Clock, StoreError, lock, migrations};
use crate::build::Micros;

/// A writer waits this long for another process that writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Every use of the database ends within this time.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// Readers at once; they never wait for the writer.
const READERS: u32 = 4;

#[derive(Debug, Clone)]
pub(super) enum Database {
    /// One file, one writer at a time.
    Sqlite { writer: SqlitePool, readers: SqlitePool },
    /// One server, as many writers as there are connections.
    Postgres(Pg),
}

pub(super) async fn open_sqlite(path: &Path) -> Result<Database, StoreError> {
    let database = path.display().to_string();
    let failed = |source| StoreError::Open { database: database.clone(), source };
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // A commit that was answered survives a loss of power.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true);
    let _alone = lock::lock(path).await.map_err(|e| failed(sqlx::Error::Io(e)))?;
    let pool = |size| SqlitePoolOptions::new().max_connections(size).acquire_timeout(ACQUIRE_TIMEOUT);
    // SQLite has one writer: waiting for it in the pool is fairer than in the file.
    let writer = pool(1).connect_with(options.clone()).await.map_err(failed)?;
    let migrated = migrations::sqlite().run(&writer).await;
    migrated.map_err(|source| StoreError::Migrate { database: database.clone(), source })?;
    let readers = pool(READERS).connect_with(options).await.map_err(failed)?;
    Ok(Database::Sqlite { writer, readers })
}

impl Database {
    /// Begins a change, and says when that is. On SQLite nobody else writes until it ends; on PostgreSQL nobody else
    /// changes what it loads.
    pub(super) async fn write(&self, clock: &Clock) -> Result<(Inner, Micros), StoreError> {
        match self {
            Self::Sqlite { writer, .. } => {
                // Immediate: a transaction that becomes a writer later fails at once when another one was faster.
                let inner = writer.begin_with("BEGIN IMMEDIATE".into_sql_str()).await?;
                Ok((Inner::Sqlite(inner), clock.now()))
            }
            Self::Postgres(postgres) => {
                let mut inner = postgres.write().await?;
                let now = postgres.now(&mut inner, clock).await?;
                Ok((Inner::Postgres(inner), now))
            }
        }
    }

    /// Begins to read one consistent state.
    pub(super) async fn read(&self, clock: &Clock) -> Result<(Inner, Micros), StoreError> {
        match self {
            Self::Sqlite { readers, .. } => Ok((Inner::Sqlite(readers.begin().await?), clock.now())),
            Self::Postgres(postgres) => {
                let mut inner = postgres.read().await?;
                let now = postgres.now(&mut inner, clock).await?;
                Ok((Inner::Postgres(inner), now))
            }
        }
    }

    pub(super) fn now(&self, clock: &Clock) -> Micros {
        match self {
            Self::Sqlite { .. } => clock.now(),
            Self::Postgres(postgres) => postgres.estimate(clock),
        }
    }

    pub(super) async fn close(&self) {
        match self {
            Self::Sqlite { writer, readers } => {
                readers.close().await;
                writer.close().await;
            }
            Self::Postgres(postgres) => postgres.close().await,
        }
    }
}

/// A transaction of either kind.
#[derive(Debug)]
pub(super) enum Inner {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Inner {
    pub(super) fn query(&mut self, statement: impl Into<Statement>) -> Query<'_> {
        let statement = statement.into();
        match self {
            Self::Sqlite(tx) => Query::Sqlite(&mut *tx, sqlx::query(statement.sqlite)),
            Self::Postgres(tx) => Query::Postgres(&mut *tx, sqlx::query(statement.postgres)),
        }
    }

    pub(super) async fn commit(self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(tx) => Ok(tx.commit().await?),
            Self::Postgres(tx) => bounded(tx.commit()).await,
        }
    }
}
