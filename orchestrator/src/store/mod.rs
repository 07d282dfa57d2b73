//! The record: one database, SQLite for one machine or PostgreSQL for any number of equal replicas (shell).
//!
//! Every change is one transaction that loads what it needs, asks a pure function, and saves. SQL is written once
//! for both: `$1` parameters, `RETURNING`, `ON CONFLICT`, integers for moments; a [`Statement`] has two texts where
//! PostgreSQL locks rows and SQLite need not.

mod agents;
mod attempts;
mod brake;
mod builds;
mod clock;
mod database;
mod error;
mod heads;
mod herald;
mod lock;
mod locks;
mod migrations;
mod outbox;
mod postgres;
mod query;
mod queue;
mod retention;
mod streams;
mod trouble;

use std::path::Path;
use std::sync::Arc;

use crate::build::Micros;
use crate::metrics::{Change, Metrics};

use database::{Database, Inner};
use herald::{Herald, Told};
use query::Row;

pub use agents::AgentRow;
pub use builds::{Inserted, Recorded, Saved};
pub use clock::Clock;
pub use error::{Outage, StoreError};
pub use heads::Recheck;
pub use locks::Lock;
pub use outbox::{Outgoing, Pending};
pub use postgres::Server;
pub use query::Statement;
pub use queue::{Due, Line, Which};
pub use retention::Retention;
pub use streams::{BadMessage, StoredEvent};
pub use trouble::{Fate, Trouble, Turn};

/// Changes of one kind that one process has under way on PostgreSQL: each waits for the network and the disk most of the
/// time, and leaves connections for others.
const WRITERS: usize = 4;

/// The record.
#[derive(Debug, Clone)]
pub struct Store {
    database: Database,
    clock: Clock,
    told: Arc<Told>,
    /// Ends with the last copy of this.
    _herald: Option<Arc<Herald>>,
    metrics: Arc<Metrics>,
    trouble: Option<Arc<dyn Trouble>>,
}

/// A transaction. Dropped without [`Tx::commit`] it changes nothing.
#[derive(Debug)]
pub struct Tx {
    inner: Inner,
    now: Micros,
    /// Whether this is a change: what it loads, nobody else changes until it ends.
    writes: bool,
    /// Whom to wake once this is committed: set by an event or a message.
    tells: bool,
    told: Arc<Told>,
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
        Self::on(database::open_sqlite(path).await?, clock)
    }

    /// Opens a database of PostgreSQL and brings its schema up to date. With [`Clock::System`], the clock of the
    /// server counts and not that of this machine.
    pub async fn connect(server: &Server, clock: Clock) -> Result<Self, StoreError> {
        let postgres = postgres::Pg::open(server).await?;
        let told = Arc::default();
        let herald = Herald::start(&postgres, &told);
        let store = Self::on(Database::Postgres(postgres), clock)?;
        Ok(Self { told, _herald: Some(Arc::new(herald)), ..store })
    }

    fn on(database: Database, clock: Clock) -> Result<Self, StoreError> {
        let metrics = Arc::new(Metrics::new()?);
        Ok(Self { database, clock, told: Arc::default(), _herald: None, metrics, trouble: None })
    }

    /// The same record, with what a simulation does to it.
    #[must_use]
    pub fn with_trouble(self, trouble: Arc<dyn Trouble>) -> Self {
        Self { trouble: Some(trouble), ..self }
    }

    /// Microseconds since 1970, by the clock of the database as far as this process knows it.
    pub fn now(&self) -> Micros {
        self.database.now(&self.clock)
    }

    /// Begins a change. On SQLite nobody else writes until it ends; on PostgreSQL nobody else changes the builds that
    /// it loads, and [`Tx::lock`] keeps others away from more than that.
    pub async fn write(&self) -> Result<Tx, StoreError> {
        let turn = self.turn().await;
        let (inner, now) = self.database.write(&self.clock).await?;
        Ok(self.tx(inner, now, true, turn))
    }

    /// Begins to read one consistent state.
    pub async fn read(&self) -> Result<Tx, StoreError> {
        let turn = self.turn().await;
        let (inner, now) = self.database.read(&self.clock).await?;
        Ok(self.tx(inner, now, false, turn))
    }

    fn tx(&self, inner: Inner, now: Micros, writes: bool, turn: Option<Turn>) -> Tx {
        Tx {
            inner,
            now,
            writes,
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

    /// Waits until this process commits an event or a message, from the call on. On PostgreSQL also until another one
    /// does, as a rule: who must not miss anything looks from time to time.
    pub fn next_change(&self) -> impl Future<Output = ()> + Send + '_ {
        self.told.here.notified()
    }

    /// How many changes can be under way at once to any use.
    pub(crate) const fn writers(&self) -> usize {
        match self.database {
            Database::Sqlite { .. } => 1,
            Database::Postgres(_) => WRITERS,
        }
    }

    /// What this process committed.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Ends every use of the database.
    pub async fn close(&self) {
        self.database.close().await;
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
            self.told.tell();
        }
        Ok(())
    }
}

/// Every statement, so that a test can prepare each on a fresh schema. An empty text is none of that kind.
pub fn statements() -> impl Iterator<Item = Statement> {
    let both = [
        agents::STATEMENTS,
        attempts::STATEMENTS,
        brake::STATEMENTS,
        builds::STATEMENTS,
        heads::STATEMENTS,
        outbox::STATEMENTS,
        queue::STATEMENTS,
        retention::STATEMENTS,
        streams::STATEMENTS,
    ];
    let each = [builds::EACH, heads::EACH, outbox::EACH, retention::EACH];
    let postgres = locks::STATEMENTS.iter().map(|&postgres| Statement { sqlite: "", postgres });
    let both = both.into_iter().flatten().map(|&both| Statement::from(both));
    both.chain(each.into_iter().flatten().copied()).chain(postgres)
}

/// Text from elsewhere as PostgreSQL takes it: it knows no NUL.
fn printable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
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
