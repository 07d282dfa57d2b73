//! PostgreSQL (shell): how it is reached, and the limits that every session of it has.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{Connection as _, PgConnection, Postgres, SqlSafeStr as _, Transaction};

use super::query::{ANSWER, bounded};
use super::{Clock, StoreError, migrations};
use crate::build::Micros;

/// Every statement reads an index and few rows; one that takes this long does harm to others.
const STATEMENT_TIMEOUT: &str = "10s";
/// Longest wait for somebody else's change. A lease lasts six times as long.
const LOCK_TIMEOUT: &str = "5s";
/// A process that stands still gives its locks back after this time, before leases of others run out.
const IDLE_TIMEOUT: &str = "10s";
/// Longest wait for a connection out of the pool.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that does not end its last transaction within this time is cut.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection gets no older: after a failover nobody talks to the former primary for longer.
const LIFETIME: Duration = Duration::from_mins(5);
/// Largest file with a password.
const MAX_PASSWORD_BYTES: usize = 4096;

const NOW: &str = "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::BIGINT";

/// Where a database of PostgreSQL is, and how much of it is used.
#[derive(Clone)]
pub struct Server {
    /// `postgres://user@host:port/name?sslmode=verify-full&sslrootcert=…`. Without a password here, it comes from
    /// the file below, `PGPASSWORD`, or the file that `PGPASSFILE` names.
    pub url: String,
    /// A file with nothing but the password. It is read whenever the database is opened.
    pub password_file: Option<PathBuf>,
    /// Connections of this process at most.
    pub connections: u32,
}

/// Five replicas and somebody who looks fit into the hundred connections that PostgreSQL has unless told otherwise.
const CONNECTIONS: u32 = 16;

impl Server {
    /// At this address, with the usual number of connections.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), password_file: None, connections: CONNECTIONS }
    }

    /// Its host and name. Never the password.
    fn name(options: &PgConnectOptions) -> String {
        let host = options.get_socket().map_or(options.get_host().into(), |path| path.to_string_lossy());
        format!("{} on {host}", options.get_database().unwrap_or(options.get_username()))
    }

    fn address(&self) -> Result<PgConnectOptions, StoreError> {
        // The cause is left out: it may quote the address with its password.
        PgConnectOptions::from_str(&self.url).map_err(|_| {
            StoreError::Settings(
                "the address of the database is none; write postgres://user@host:port/name".to_owned(),
            )
        })
    }

    fn options(&self) -> Result<PgConnectOptions, StoreError> {
        let options = match &self.password_file {
            Some(file) => self.address()?.password(&password(file)?),
            None => self.address()?,
        };
        let limits = [
            ("statement_timeout", STATEMENT_TIMEOUT),
            ("lock_timeout", LOCK_TIMEOUT),
            ("idle_in_transaction_session_timeout", IDLE_TIMEOUT),
        ];
        Ok(options.application_name("kiln-orchestrator").options(limits))
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.address().map(|options| Self::name(&options));
        f.debug_struct("Server")
            .field("name", &name.ok())
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

/// A database that is in trouble is not one whose schema is wrong.
fn not_migrated(database: &str, source: MigrateError) -> StoreError {
    let failed = |source| StoreError::Migrate { database: database.to_owned(), source };
    match source {
        MigrateError::Execute(cause) => match StoreError::from(cause) {
            StoreError::Sql(cause) => failed(MigrateError::Execute(cause)),
            outage => outage,
        },
        other => failed(other),
    }
}

fn password(file: &Path) -> Result<String, StoreError> {
    let failed = |why: String| {
        StoreError::Settings(format!(
            "the password of the database cannot be read from {}: {why}",
            file.display()
        ))
    };
    let text = std::fs::read_to_string(file).map_err(|e| failed(e.to_string()))?;
    if text.len() > MAX_PASSWORD_BYTES {
        return Err(failed(format!("it has {} bytes; the most is {MAX_PASSWORD_BYTES}", text.len())));
    }
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// An open database.
#[derive(Clone)]
pub(super) struct Pg {
    pub(super) pool: PgPool,
    /// How far the clock of the database was ahead of that of this process when it was last asked.
    ahead: Arc<AtomicI64>,
}

impl fmt::Debug for Pg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The pool would print the password with its options.
        f.debug_struct("Pg").field("connections", &self.pool.size()).finish_non_exhaustive()
    }
}

impl Pg {
    pub(super) async fn open(server: &Server) -> Result<Self, StoreError> {
        let options = server.options()?;
        let database = Server::name(&options);
        let failed = |source| StoreError::Open { database: database.clone(), source };
        // Directly: a pool says only that it waited in vain.
        let connected = tokio::time::timeout(ANSWER, PgConnection::connect_with(&options)).await;
        let timed_out = || sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
        let mut connection = connected.map_err(|_| failed(timed_out()))?.map_err(failed)?;
        // Replicas that start together wait for each other here.
        let relaxed = sqlx::raw_sql("SET lock_timeout = 0; SET statement_timeout = 0".into_sql_str());
        relaxed.execute(&mut connection).await.map_err(failed)?;
        let migrated = migrations::postgres().run(&mut connection).await;
        migrated.map_err(|source| not_migrated(&database, source))?;
        bounded(connection.close()).await?;
        let pool = PgPoolOptions::new()
            .max_connections(server.connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .max_lifetime(LIFETIME)
            .after_release(|connection, _| {
                Box::pin(async move {
                    // A server that vanished would keep the place in the pool until the kernel gives up.
                    let ended = tokio::time::timeout(RELEASE_TIMEOUT, connection.ping()).await;
                    ended
                        .unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
                        .map(|()| true)
                })
            });
        Ok(Self { pool: pool.connect_lazy_with(options), ahead: Arc::default() })
    }

    /// Begins a change. Every statement sees what was committed before it, so that whoever waited for a lock sees
    /// what its holder did.
    pub(super) async fn write(&self) -> Result<Transaction<'static, Postgres>, StoreError> {
        bounded(self.pool.begin_with("BEGIN ISOLATION LEVEL READ COMMITTED".into_sql_str())).await
    }

    /// Begins to read one consistent state.
    pub(super) async fn read(&self) -> Result<Transaction<'static, Postgres>, StoreError> {
        bounded(self.pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY".into_sql_str())).await
    }

    /// The moment, by the clock of the database unless somebody lends another one.
    pub(super) async fn now(
        &self,
        connection: &mut PgConnection,
        clock: &Clock,
    ) -> Result<Micros, StoreError> {
        if !matches!(clock, Clock::System) {
            return Ok(clock.now());
        }
        let now: Micros = bounded(sqlx::query_scalar(NOW).fetch_one(connection)).await?;
        self.ahead.store(now.saturating_sub(clock.now()), Ordering::Relaxed);
        Ok(now)
    }

    pub(super) async fn close(&self) {
        // A connection in use whose server is gone does not end.
        let closed = tokio::time::timeout(RELEASE_TIMEOUT, self.pool.close()).await;
        if closed.is_err() {
            tracing::debug!("a connection to the database did not end in time");
        }
    }

    /// The moment without a question to the database: by this process and what it last knew of the other clock.
    pub(super) fn estimate(&self, clock: &Clock) -> Micros {
        clock.now().saturating_add(self.ahead.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_shown_nowhere() {
        let server = Server::new("postgres://kiln:hunter2@db.example/record");
        assert_eq!(
            format!("{server:?}"),
            r#"Server { name: Some("record on db.example"), connections: 16, .. }"#
        );
        let wrong = Server::new("postgres://kiln:hunter2@db.example:port/record");
        let error = wrong.options().unwrap_err();
        assert!(!format!("{error:?} {error} {wrong:?}").contains("hunter2"));
    }

    #[test]
    fn a_password_comes_from_a_file_without_its_last_line_break() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        std::fs::write(&file, "hunter2\n").unwrap();
        assert_eq!(password(&file).unwrap(), "hunter2");
        let missing = password(&folder.path().join("other")).unwrap_err();
        assert!(missing.to_string().contains("other"));
        std::fs::write(&file, "x".repeat(MAX_PASSWORD_BYTES + 1)).unwrap();
        assert!(password(&file).is_err());
    }
}
