//! What is only ever appended: events, the audit, messages that nobody could read (shell).

use kiln_protocol::BuildId;
use kiln_protocol::message::StatusEvent;

use super::{Row, StoreError, Tx, json, printable, to_json};
use crate::build::Micros;

/// A recorded change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEvent {
    /// Its place in the stream.
    pub id: i64,
    /// What happened.
    pub event: StatusEvent,
}

/// A message that nobody could read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadMessage {
    /// Its row.
    pub id: i64,
    /// When it came.
    pub at: Micros,
    /// Where it came from.
    pub queue: String,
    /// What is wrong with it.
    pub error: String,
    /// Its bytes.
    pub body: Vec<u8>,
}

const EVENT: &str = "INSERT INTO events (build, namespace, at, body) VALUES ($1, $2, $3, $4)";
const EVENTS: &str = "SELECT id, body FROM events WHERE build = $1 AND id > $2 ORDER BY id LIMIT $3";
const AUDIT: &str = "INSERT INTO audit (at, actor, action, build, detail) VALUES ($1, $2, $3, $4, $5)";
const BAD: &str = "INSERT INTO bad_messages (at, queue, error, body) VALUES ($1, $2, $3, $4)";
const ALL_BAD: &str = "SELECT id, at, queue, error, body FROM bad_messages ORDER BY id DESC LIMIT $1";
pub(super) const STATEMENTS: &[&str] = &[EVENT, EVENTS, AUDIT, BAD, ALL_BAD];

impl Tx {
    /// Appends what everybody may know of a change.
    pub async fn append_event(&mut self, event: &StatusEvent) -> Result<(), StoreError> {
        let query = self.inner.query(EVENT).bind(event.build.as_uuid()).bind(event.namespace.as_str());
        query.bind(event.at).bind(to_json("event", event)?).execute().await?;
        self.tells = true;
        Ok(())
    }

    /// Changes of a build after the one with this id.
    pub async fn events(
        &mut self,
        build: BuildId,
        after: i64,
        limit: i64,
    ) -> Result<Vec<StoredEvent>, StoreError> {
        let query = self.inner.query(EVENTS).bind(build.as_uuid()).bind(after).bind(limit);
        let event = |row: &Row| {
            let body: String = row.try_get("body")?;
            Ok(StoredEvent { id: row.try_get("id")?, event: json("event", &body)? })
        };
        query.fetch_all().await?.iter().map(event).collect()
    }

    /// Notes who changed what.
    pub async fn audit(
        &mut self,
        actor: &str,
        action: &str,
        build: Option<BuildId>,
        detail: &str,
    ) -> Result<(), StoreError> {
        let detail = &printable(detail);
        let query = self.inner.query(AUDIT).bind(self.now).bind(actor).bind(action);
        query.bind(build.map(|id| id.as_uuid())).bind(detail).execute().await?;
        Ok(())
    }

    /// Keeps a message that nobody could read.
    pub async fn keep_bad(&mut self, queue: &str, error: &str, body: &[u8]) -> Result<(), StoreError> {
        let error = &printable(error);
        let query = self.inner.query(BAD).bind(self.now).bind(queue).bind(error).bind(body);
        query.execute().await?;
        Ok(())
    }

    /// The newest messages that nobody could read.
    pub async fn bad_messages(&mut self, limit: i64) -> Result<Vec<BadMessage>, StoreError> {
        let rows = self.inner.query(ALL_BAD).bind(limit).fetch_all().await?;
        let bad = |row: &Row| {
            Ok(BadMessage {
                id: row.try_get("id")?,
                at: row.try_get("at")?,
                queue: row.try_get("queue")?,
                error: row.try_get("error")?,
                body: row.try_get("body")?,
            })
        };
        rows.iter().map(bad).collect()
    }
}
