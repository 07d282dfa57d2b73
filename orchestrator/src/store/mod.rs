//! The record: one database, SQLite for one machine (shell).
//!
//! Every change is one transaction that loads what it needs, asks a pure function, and saves. SQL is written
//! so that PostgreSQL can execute it too: `$1` parameters, `RETURNING`, `ON CONFLICT`, integers for moments.

mod agents;
mod attempts;
mod builds;
mod clock;
mod heads;
mod lock;
mod outbox;
mod retention;
mod streams;
mod trouble;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{SqlSafeStr as _, Sqlite, Transaction};
use tokio::sync::Notify;

use crate::build::Micros;
use crate::metrics::{Change, Metrics};

pub use agents::AgentRow;
pub use builds::{Due, Inserted, Line, Recorded, Saved, Which};
pub use clock::Clock;
pub use heads::Recheck;
pub use outbox::{Outgoing, Pending};
pub use retention::Retention;
pub use streams::{BadMessage, StoredEvent};
pub use trouble::{Fate, Trouble, Turn};

/// A writer waits this long for another process that writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Every use of the database ends within this time.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// Readers at once; they never wait for the writer.
const READERS: u32 = 4;

/// The record cannot be read or written now.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be opened.
    #[error("open the database {}", path.display())]
    Open {
        /// Its file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
    /// Its schema cannot be brought up to date.
    #[error("bring the schema of the database {} up to date", path.display())]
    Migrate {
        /// Its file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// Two numbers have the same name.
    #[error("prepare the metrics")]
    Metrics(#[from] prometheus::Error),
    /// A statement failed.
    #[error("use the database")]
    Sql(#[from] sqlx::Error),
    /// A row does not say what it should.
    #[error("the {what} of a row cannot be read: {why}")]
    Row {
        /// Which column.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
}

/// The record.
#[derive(Debug, Clone)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
    clock: Clock,
    told: Arc<Notify>,
    metrics: Arc<Metrics>,
    trouble: Option<Arc<dyn Trouble>>,
}

/// A transaction. Dropped without [`Tx::commit`] it changes nothing.
#[derive(Debug)]
pub struct Tx {
    inner: Transaction<'static, Sqlite>,
    now: Micros,
    /// Whom to wake once this is committed: set by an event or a message.
    tells: bool,
    told: Arc<Notify>,
    /// What is counted once this is committed.
    changes: Vec<Change>,
    metrics: Arc<Metrics>,
    trouble: Option<Arc<dyn Trouble>>,
    /// Given back after the transaction has ended.
    _turn: Option<Turn>,
}

impl Store {
    /// Opens the database in this file, made if it is missing.
    pub async fn open(path: &Path, clock: Clock) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open { path: path.to_owned(), source };
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
        let migrated = migrations().run(&writer).await;
        migrated.map_err(|source| StoreError::Migrate { path: path.to_owned(), source })?;
        let readers = pool(READERS).connect_with(options).await.map_err(failed)?;
        let metrics = Arc::new(Metrics::new()?);
        Ok(Self { writer, readers, clock, told: Arc::default(), metrics, trouble: None })
    }

    /// The same record, with what a simulation does to it.
    #[must_use]
    pub fn with_trouble(self, trouble: Arc<dyn Trouble>) -> Self {
        Self { trouble: Some(trouble), ..self }
    }

    /// Microseconds since 1970, by the clock of the database.
    pub fn now(&self) -> Micros {
        self.clock.now()
    }

    /// Begins a change. Nobody else writes until it ends.
    pub async fn write(&self) -> Result<Tx, StoreError> {
        // Immediate: a transaction that becomes a writer later fails at once when another one was faster.
        let turn = self.turn().await;
        let inner = self.writer.begin_with("BEGIN IMMEDIATE".into_sql_str()).await?;
        Ok(self.tx(inner, turn))
    }

    /// Begins to read one consistent state.
    pub async fn read(&self) -> Result<Tx, StoreError> {
        let turn = self.turn().await;
        let inner = self.readers.begin().await?;
        Ok(self.tx(inner, turn))
    }

    fn tx(&self, inner: Transaction<'static, Sqlite>, turn: Option<Turn>) -> Tx {
        Tx {
            inner,
            now: self.clock.now(),
            tells: false,
            told: Arc::clone(&self.told),
            changes: Vec::new(),
            metrics: Arc::clone(&self.metrics),
            trouble: self.trouble.clone(),
            _turn: turn,
        }
    }

    async fn turn(&self) -> Option<Turn> {
        match &self.trouble {
            Some(trouble) => Some(trouble.turn().await),
            None => None,
        }
    }

    /// Waits until this process commits an event or a message, from the call on. Other processes wake nobody here.
    pub fn next_change(&self) -> impl Future<Output = ()> + Send + '_ {
        self.told.notified()
    }

    /// What this process committed.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Ends every use of the database.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

impl Tx {
    /// The moment of this transaction, by the clock of the database.
    pub const fn now(&self) -> Micros {
        self.now
    }

    /// Counts this, if it is committed.
    pub(crate) fn count(&mut self, changes: Vec<Change>) {
        self.changes.extend(changes);
    }

    /// Makes the changes last.
    pub async fn commit(self) -> Result<(), StoreError> {
        let fate = self.trouble.as_ref().map_or(Fate::Kept, |trouble| trouble.fate());
        fate.before()?;
        self.inner.commit().await?;
        for change in self.changes {
            self.metrics.count(change);
        }
        fate.after()?;
        if self.tells {
            self.told.notify_waiters();
        }
        Ok(())
    }
}

/// Every statement, so that a test can prepare each on a fresh schema.
pub fn statements() -> impl Iterator<Item = &'static str> {
    let all = [
        agents::STATEMENTS,
        attempts::STATEMENTS,
        builds::STATEMENTS,
        heads::STATEMENTS,
        outbox::STATEMENTS,
        retention::STATEMENTS,
        streams::STATEMENTS,
    ];
    all.into_iter().flatten().copied()
}

fn migrations() -> Migrator {
    let record = include_str!("../../migrations/sqlite/0001_record.sql").into_sql_str();
    let migration = |version, name: &'static str, sql| {
        Migration::new(version, name.into(), MigrationType::Simple, sql, false)
    };
    Migrator::with_migrations(vec![migration(1, "record", record)])
}

/// Reads JSON out of a column.
fn json<T: serde::de::DeserializeOwned>(what: &'static str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|e| StoreError::Row { what, why: e.to_string() })
}

/// Writes JSON for a column.
fn to_json<T: serde::Serialize>(what: &'static str, value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|e| StoreError::Row { what, why: e.to_string() })
}

/// Reads a typed text, a name or a digest, out of a column.
fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
    what: &'static str,
    text: &str,
) -> Result<T, StoreError> {
    text.parse().map_err(|e: T::Err| StoreError::Row { what, why: e.to_string() })
}

#[cfg(test)]
mod tests {
    use kiln_protocol::Reason;

    use super::*;

    #[tokio::test]
    async fn only_what_is_committed_counts() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("kiln.db"), Clock::System).await.unwrap();
        let counted = || {
            let families = store.metrics().registry().gather();
            let retries = families.iter().find(|f| f.name() == "kiln_retries_total").unwrap();
            retries.get_metric().iter().map(|metric| metric.get_counter().get_value()).sum::<f64>()
        };
        let mut tx = store.write().await.unwrap();
        tx.count(vec![Change::Retried(Reason::Network)]);
        drop(tx);
        assert!(counted() < 0.5, "a change that was undone was counted");
        let mut tx = store.write().await.unwrap();
        tx.count(vec![Change::Retried(Reason::Network)]);
        tx.commit().await.unwrap();
        assert!((counted() - 1.0).abs() < 0.5, "a change that was committed was not");
    }
}
