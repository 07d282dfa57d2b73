//! One statement on either kind of database (shell).

use std::time::Duration;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{ColumnIndex, Decode, Encode, PgConnection, Postgres, Row as _, Sqlite, SqliteConnection, Type};

use super::StoreError;

/// Longer than PostgreSQL lets a statement run: who does not even say that it took too long is gone.
pub(super) const ANSWER: Duration = Duration::from_secs(15);

/// SQL that both kinds understand, or one text for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statement {
    /// For SQLite.
    pub sqlite: &'static str,
    /// For PostgreSQL.
    pub postgres: &'static str,
}

impl From<&'static str> for Statement {
    fn from(both: &'static str) -> Self {
        Self { sqlite: both, postgres: both }
    }
}

/// What can be bound to a statement of either kind.
pub(super) trait Value<'q>:
    Encode<'q, Sqlite> + Type<Sqlite> + Encode<'q, Postgres> + Type<Postgres> + 'q
{
}

impl<'q, T> Value<'q> for T where
    T: Encode<'q, Sqlite> + Type<Sqlite> + Encode<'q, Postgres> + Type<Postgres> + 'q
{
}

/// A statement and what is bound to it.
pub(super) enum Query<'t> {
    Sqlite(&'t mut SqliteConnection, sqlx::query::Query<'t, Sqlite, SqliteArguments>),
    Postgres(&'t mut PgConnection, sqlx::query::Query<'t, Postgres, PgArguments>),
}

impl Query<'_> {
    pub(super) fn bind<'v, T: Value<'v>>(self, value: T) -> Self {
        match self {
            Self::Sqlite(connection, query) => Self::Sqlite(connection, query.bind(value)),
            Self::Postgres(connection, query) => Self::Postgres(connection, query.bind(value)),
        }
    }

    /// Gives the number of rows that it changed.
    pub(super) async fn execute(self) -> Result<u64, StoreError> {
        Ok(match self {
            Self::Sqlite(connection, query) => query.execute(connection).await?.rows_affected(),
            Self::Postgres(connection, query) => bounded(query.execute(connection)).await?.rows_affected(),
        })
    }

    pub(super) async fn fetch_all(self) -> Result<Vec<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite(connection, query) => {
                query.fetch_all(connection).await?.into_iter().map(Row::Sqlite).collect()
            }
            Self::Postgres(connection, query) => {
                bounded(query.fetch_all(connection)).await?.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    pub(super) async fn fetch_optional(self) -> Result<Option<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite(connection, query) => query.fetch_optional(connection).await?.map(Row::Sqlite),
            Self::Postgres(connection, query) => {
                bounded(query.fetch_optional(connection)).await?.map(Row::Postgres)
            }
        })
    }

    pub(super) async fn fetch_one(self) -> Result<Row, StoreError> {
        self.fetch_optional().await?.ok_or(StoreError::Sql(sqlx::Error::RowNotFound))
    }
}

/// Waits for PostgreSQL, which may be behind a network that swallows everything.
pub(super) async fn bounded<T>(
    answer: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, StoreError> {
    let answer = tokio::time::timeout(ANSWER, answer).await;
    Ok(answer.map_err(|_| StoreError::no_answer())??)
}

/// A row of either kind.
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    pub(super) fn try_get<'r, T>(&'r self, column: &str) -> Result<T, StoreError>
    where
        T: Decode<'r, Sqlite> + Type<Sqlite> + Decode<'r, Postgres> + Type<Postgres>,
        for<'c> &'c str: ColumnIndex<SqliteRow> + ColumnIndex<PgRow>,
    {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }
}
