//! Messages of committed changes that the bus has not confirmed yet (shell).

use kiln_protocol::envelope::{EnvelopeError, Message, encode};
use kiln_protocol::id::MessageId;
use uuid::Uuid;

use super::{Row, Statement, StoreError, Tx, printable};
use crate::build::Micros;

/// A message that a change causes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Where it goes.
    pub exchange: &'static str,
    /// To whom.
    pub key: String,
    /// What it is called.
    pub kind: &'static str,
    /// Its text.
    pub body: Vec<u8>,
}

impl Outgoing {
    /// Writes a message.
    pub fn new<T: Message>(exchange: &'static str, key: String, message: &T) -> Result<Self, EnvelopeError> {
        Ok(Self { exchange, key, kind: T::TYPE, body: encode(message)? })
    }
}

/// A message that waits for the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Its row.
    pub id: i64,
    /// Its id on the bus: the same at every try.
    pub message: MessageId,
    /// Where it goes.
    pub exchange: String,
    /// To whom.
    pub key: String,
    /// What it is called.
    pub kind: String,
    /// Its text.
    pub body: Vec<u8>,
    /// How often it was tried.
    pub tries: u32,
}

const PUT: &str = "INSERT INTO outbox (exchange, routing_key, message_type, message_id, body, created_at, \
    locked_until, tries) VALUES ($1, $2, $3, $4, $5, $6, $6, 0)";
const TAKE: Statement = Statement {
    sqlite: "UPDATE outbox SET locked_until = $1, tries = tries + 1 WHERE id IN \
        (SELECT id FROM outbox WHERE locked_until <= $2 ORDER BY id LIMIT $3) \
        RETURNING id, exchange, routing_key, message_type, message_id, body, tries",
    // Materialized: a subquery that the planner repeats would lock other rows each time.
    postgres: "WITH taken AS MATERIALIZED (SELECT id FROM outbox WHERE locked_until <= $2 ORDER BY id LIMIT $3 \
        FOR UPDATE SKIP LOCKED) UPDATE outbox SET locked_until = $1, tries = tries + 1 WHERE id IN (SELECT id FROM taken) \
        RETURNING id, exchange, routing_key, message_type, message_id, body, tries",
};
const DONE: &str = "DELETE FROM outbox WHERE id = $1";
const FAILED: &str = "UPDATE outbox SET locked_until = $2, error = $3 WHERE id = $1";
const OLDEST: &str = "SELECT COUNT(*) AS rows, MIN(created_at) AS oldest FROM outbox";
pub(super) const STATEMENTS: &[&str] = &[PUT, DONE, FAILED, OLDEST];
pub(super) const EACH: &[Statement] = &[TAKE];

impl Tx {
    /// Adds a message to be sent once this change is committed.
    pub async fn send(&mut self, message: &Outgoing) -> Result<(), StoreError> {
        self.tells = true;
        self.inner
            .query(PUT)
            .bind(message.exchange)
            .bind(&message.key)
            .bind(message.kind)
            .bind(MessageId::generate().as_uuid())
            .bind(message.body.as_slice())
            .bind(self.now)
            .execute()
            .await?;
        Ok(())
    }

    /// Takes messages to send; nobody else takes them until `locked_until`.
    pub async fn take_outgoing(
        &mut self,
        locked_until: Micros,
        limit: i64,
    ) -> Result<Vec<Pending>, StoreError> {
        let query = self.inner.query(TAKE).bind(locked_until).bind(self.now).bind(limit);
        let rows = query.fetch_all().await?;
        let mut taken = rows.iter().map(pending).collect::<Result<Vec<_>, _>>()?;
        taken.sort_by_key(|message| message.id);
        Ok(taken)
    }

    /// The bus confirmed it.
    pub async fn sent(&mut self, id: i64) -> Result<(), StoreError> {
        self.inner.query(DONE).bind(id).execute().await?;
        Ok(())
    }

    /// The bus did not take it: again at this time.
    pub async fn not_sent(&mut self, id: i64, again_at: Micros, error: &str) -> Result<(), StoreError> {
        self.inner.query(FAILED).bind(id).bind(again_at).bind(printable(error)).execute().await?;
        Ok(())
    }

    /// How many messages wait, and since when the oldest does.
    pub async fn outbox_backlog(&mut self) -> Result<(u64, Option<Micros>), StoreError> {
        let row = self.inner.query(OLDEST).fetch_one().await?;
        let rows: i64 = row.try_get("rows")?;
        Ok((u64::try_from(rows).unwrap_or(0), row.try_get("oldest")?))
    }
}

fn pending(row: &Row) -> Result<Pending, StoreError> {
    let (message, tries): (Uuid, i64) = (row.try_get("message_id")?, row.try_get("tries")?);
    Ok(Pending {
        id: row.try_get("id")?,
        message: MessageId::from_uuid(message),
        exchange: row.try_get("exchange")?,
        key: row.try_get("routing_key")?,
        kind: row.try_get("message_type")?,
        body: row.try_get("body")?,
        tries: u32::try_from(tries).unwrap_or(u32::MAX),
    })
}
