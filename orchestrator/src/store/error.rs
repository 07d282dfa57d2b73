//! What goes wrong with a record (pure).

use std::fmt;

use sqlx::postgres::PgDatabaseError;

/// The record cannot be read or written now.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The settings of the database do not say what they should.
    #[error("{0}")]
    Settings(String),
    /// The database cannot be opened.
    #[error("open the database {database}")]
    Open {
        /// Its file, or its host and name.
        database: String,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
    /// Its schema cannot be brought up to date.
    #[error("bring the schema of the database {database} up to date")]
    Migrate {
        /// Its file, or its host and name.
        database: String,
        /// The cause.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// Two numbers have the same name.
    #[error("prepare the metrics")]
    Metrics(#[from] prometheus::Error),
    /// The database is in trouble; the same may work later.
    #[error("the database {why}")]
    Unavailable {
        /// What kind of trouble.
        why: Outage,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
    /// Nothing was changed, because somebody else changed the same at the same time; the same works at once.
    #[error("the database undid the change in favour of another one")]
    Contended(#[source] sqlx::Error),
    /// A statement failed.
    #[error("use the database")]
    Sql(#[source] sqlx::Error),
    /// A row does not say what it should.
    #[error("the {what} of a row cannot be read: {why}")]
    Row {
        /// Which column.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
}

/// Trouble that goes away without a change to Kiln.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// It cannot be reached, or it ended the connection.
    Away,
    /// It is a standby, or somebody made it read-only.
    ReadOnly,
    /// Somebody holds a lock for too long.
    Locked,
    /// It answers too slowly.
    Slow,
    /// It has no disk, memory or connections left.
    Full,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Away => "cannot be reached",
            Self::ReadOnly => "is read-only; point Kiln to the primary, or allow writes again",
            Self::Locked => "is locked by somebody else",
            Self::Slow => "did not answer in time",
            Self::Full => "has no disk, memory or connections left",
        })
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(source: sqlx::Error) -> Self {
        match kind(&source) {
            Kind::Contended => Self::Contended(source),
            Kind::Outage(why) => Self::Unavailable { why, source },
            Kind::Other => Self::Sql(source),
        }
    }
}

enum Kind {
    Contended,
    Outage(Outage),
    Other,
}

fn kind(error: &sqlx::Error) -> Kind {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
            Kind::Outage(Outage::Away)
        }
        sqlx::Error::PoolTimedOut => Kind::Outage(Outage::Slow),
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default();
            if database.try_downcast_ref::<PgDatabaseError>().is_some() {
                of_sqlstate(&code)
            } else {
                code.parse().map_or(Kind::Other, of_sqlite)
            }
        }
        _ => Kind::Other,
    }
}

/// By the appendix "PostgreSQL Error Codes" of its manual.
fn of_sqlstate(code: &str) -> Kind {
    Kind::Outage(match code {
        // Serialization failure, deadlock.
        "40001" | "40P01" => return Kind::Contended,
        "25006" => Outage::ReadOnly,
        "55P03" => Outage::Locked,
        // Cancelled by a time limit; idle within a transaction for too long.
        "57014" | "25P03" => Outage::Slow,
        // Not accepting connections.
        "55000" => Outage::Away,
        _ => match code.get(..2) {
            Some("53" | "54") => Outage::Full,
            // Connection, operator intervention, system error.
            Some("08" | "57" | "58") => Outage::Away,
            _ => return Kind::Other,
        },
    })
}

/// By the low byte of SQLite's extended result codes.
fn of_sqlite(code: i32) -> Kind {
    Kind::Outage(match code & 0xff {
        5 | 6 => Outage::Locked,
        8 => Outage::ReadOnly,
        10 | 14 => Outage::Away,
        7 | 13 => Outage::Full,
        _ => return Kind::Other,
    })
}

impl StoreError {
    /// No answer came within this program's own limit.
    pub(super) fn no_answer() -> Self {
        let source = std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer came in time");
        Self::Unavailable { why: Outage::Slow, source: sqlx::Error::Io(source) }
    }

    /// Whether the same works at once, because nothing was changed in favour of somebody else's change.
    pub const fn is_contended(&self) -> bool {
        matches!(self, Self::Contended(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_that_pass_by_themselves_are_outages() {
        let outage = |kind| match kind {
            Kind::Outage(why) => Some(why),
            Kind::Contended | Kind::Other => None,
        };
        for (code, expected) in [
            ("57P01", Some(Outage::Away)),
            ("57P03", Some(Outage::Away)),
            ("08006", Some(Outage::Away)),
            ("25006", Some(Outage::ReadOnly)),
            ("55P03", Some(Outage::Locked)),
            ("57014", Some(Outage::Slow)),
            ("53100", Some(Outage::Full)),
            ("53300", Some(Outage::Full)),
            ("23505", None),
            ("42P01", None),
            ("", None),
        ] {
            assert_eq!(outage(of_sqlstate(code)), expected, "{code}");
        }
        assert!(matches!(of_sqlstate("40P01"), Kind::Contended));
        // SQLITE_BUSY_SNAPSHOT, SQLITE_READONLY_DBMOVED, SQLITE_CONSTRAINT.
        assert_eq!(outage(of_sqlite(517)), Some(Outage::Locked));
        assert_eq!(outage(of_sqlite(1032)), Some(Outage::ReadOnly));
        assert_eq!(outage(of_sqlite(19)), None);
    }
}
