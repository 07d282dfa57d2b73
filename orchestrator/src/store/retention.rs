//! What is forgotten: nothing that somebody still works on, and a bounded number of rows at a time (shell).

use std::time::Duration;

use kiln_protocol::{BuildId, Digest, setting};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Row, Statement, StoreError, Tx};
use crate::build::Micros;

/// How much of what is over is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Builds, their events and attempts, the audit and bad messages are kept this long after the end.
    #[serde(with = "setting::duration")]
    #[schemars(with = "setting::DurationText")]
    pub keep: Duration,
    /// Dead letters, which wait for a person, are kept this long.
    #[serde(with = "setting::duration")]
    #[schemars(with = "setting::DurationText")]
    pub dead_letters: Duration,
    /// Uploaded contexts that no open build and no dead letter needs are kept this long after their last use.
    #[serde(with = "setting::duration")]
    #[schemars(with = "setting::DurationText")]
    pub contexts: Duration,
    /// Bytes of uploaded contexts: above this the least recently used go that nothing needs.
    #[serde(with = "setting::bytes")]
    #[schemars(with = "setting::BytesText")]
    pub context_bytes: u64,
    /// Builds that are over, at most.
    #[schemars(range(min = 1))]
    pub builds: u32,
    /// Rows of the audit, at most.
    #[schemars(range(min = 1))]
    pub audit: u32,
    /// Messages that nobody could read, at most.
    #[schemars(range(min = 1))]
    pub bad_messages: u32,
    /// Messages that wait for the bus, at most. All are hints: whoever misses one finds it in the record.
    #[schemars(range(min = 1))]
    pub outbox: u32,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            keep: Duration::from_hours(30 * 24),
            dead_letters: Duration::from_hours(90 * 24),
            // A retry a week later uploads again.
            contexts: Duration::from_hours(7 * 24),
            context_bytes: 20 << 30,
            // A build has a few kilobytes of rows: some hundred megabytes.
            builds: 100_000,
            audit: 500_000,
            bad_messages: 10_000,
            outbox: 100_000,
        }
    }
}

/// Who changed what nobody asked for.
const ITSELF: &str = "kiln";

const NTH_END: &str = "SELECT ended_at FROM builds WHERE ended_at IS NOT NULL \
    AND state IN ('SUCCESS', 'FAILED', 'CANCELLED') ORDER BY ended_at DESC LIMIT 1 OFFSET $1";
/// A build whose tag is still watched is needed to repair it.
const OLD_BUILDS: &str = "SELECT id FROM builds WHERE ended_at < $1 \
    AND state IN ('SUCCESS', 'FAILED', 'CANCELLED') AND NOT EXISTS \
    (SELECT 1 FROM tag_heads WHERE tag_heads.build = builds.id AND tag_heads.recheck_at IS NOT NULL) \
    ORDER BY ended_at LIMIT $2";
const OLD_DEAD: &str = "SELECT id FROM builds WHERE ended_at < $1 AND state = 'DEAD_LETTER' AND NOT EXISTS \
    (SELECT 1 FROM tag_heads WHERE tag_heads.build = builds.id AND tag_heads.recheck_at IS NOT NULL) \
    ORDER BY ended_at LIMIT $2";
/// Of what is committed nobody reads the context, but a retry of it costs no upload.
const PINNED: &str = "SELECT 1 FROM builds WHERE context = $1 \
    AND state IN ('PENDING', 'BUILDING', 'PUSHING', 'DEAD_LETTER') LIMIT 1";
const BUILD: &str = "DELETE FROM builds WHERE id = $1";
const EVENTS: &str = "DELETE FROM events WHERE build = $1";
const ATTEMPTS: &str = "DELETE FROM attempts WHERE build = $1";
/// A head stays while its build does, while its tag is watched, and while an older build might still commit.
const HEADS: Statement = Statement {
    sqlite: "DELETE FROM tag_heads WHERE target IN (SELECT target FROM tag_heads AS h \
        WHERE recheck_at IS NULL AND NOT EXISTS (SELECT 1 FROM builds WHERE builds.id = h.build) \
        AND NOT (submit_seq > (SELECT COALESCE(MIN(submit_seq), 9223372036854775807) FROM builds \
        WHERE state IN ('PENDING', 'BUILDING', 'PUSHING', 'DEAD_LETTER'))) LIMIT $1)",
    // Locked: a head that a commit replaces meanwhile is another one.
    postgres: "WITH old AS MATERIALIZED (SELECT target FROM tag_heads AS h \
        WHERE recheck_at IS NULL AND NOT EXISTS (SELECT 1 FROM builds WHERE builds.id = h.build) \
        AND NOT (submit_seq > (SELECT COALESCE(MIN(submit_seq), 9223372036854775807) FROM builds \
        WHERE state IN ('PENDING', 'BUILDING', 'PUSHING', 'DEAD_LETTER'))) LIMIT $1 FOR UPDATE OF h SKIP LOCKED) \
        DELETE FROM tag_heads WHERE target IN (SELECT target FROM old)",
};
const HISTORY: &str = "DELETE FROM tag_history WHERE (target, digest, build) IN \
    (SELECT target, digest, build FROM tag_history AS h WHERE at < $1 AND NOT EXISTS \
    (SELECT 1 FROM tag_heads WHERE tag_heads.target = h.target AND tag_heads.recheck_at IS NOT NULL) \
    ORDER BY at LIMIT $2)";
const AUDIT: &str = "DELETE FROM audit WHERE id IN (SELECT id FROM audit WHERE at < $1 \
    OR id <= (SELECT MAX(id) FROM audit) - $2 ORDER BY id LIMIT $3)";
const BAD: &str = "DELETE FROM bad_messages WHERE id IN (SELECT id FROM bad_messages WHERE at < $1 \
    OR id <= (SELECT MAX(id) FROM bad_messages) - $2 ORDER BY id LIMIT $3)";
const OUTBOX: &str = "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox WHERE created_at < $1 \
    OR id <= (SELECT MAX(id) FROM outbox) - $2 ORDER BY id LIMIT $3)";
const AGENTS: &str = "DELETE FROM agents WHERE id IN (SELECT id FROM agents WHERE seen_at < $1 AND NOT EXISTS \
    (SELECT 1 FROM builds WHERE builds.lease_agent = agents.id) LIMIT $2)";
const BOOTS: &str =
    "DELETE FROM retired_boots WHERE boot IN (SELECT boot FROM retired_boots WHERE at < $1 LIMIT $2)";
pub(super) const STATEMENTS: &[&str] = &[
    NTH_END, OLD_BUILDS, OLD_DEAD, PINNED, BUILD, EVENTS, ATTEMPTS, HISTORY, AUDIT, BAD, OUTBOX, AGENTS,
    BOOTS,
];
pub(super) const EACH: &[Statement] = &[HEADS];

impl Tx {
    /// Forgets at most `limit` rows of each kind, and says how many went.
    pub async fn prune(&mut self, retention: &Retention, limit: i64) -> Result<u64, StoreError> {
        let keep = Micros::try_from(retention.keep.as_micros()).unwrap_or(Micros::MAX);
        let before = self.now.saturating_sub(keep);
        let mut gone = self.prune_builds(before, retention.builds, limit).await?;
        gone += self.prune_dead(retention.dead_letters, limit).await?;
        for (statement, most) in
            [(AUDIT, retention.audit), (BAD, retention.bad_messages), (OUTBOX, retention.outbox)]
        {
            let query = self.inner.query(statement).bind(before).bind(i64::from(most)).bind(limit);
            gone += query.execute().await?;
        }
        gone += self.inner.query(HEADS).bind(limit).execute().await?;
        // A tag is watched for a month after the last writer was lost, and what writers put there must be known.
        let twice = self.now.saturating_sub(keep.saturating_mul(2));
        for (statement, before) in [(HISTORY, twice), (AGENTS, before), (BOOTS, before)] {
            let query = self.inner.query(statement).bind(before).bind(limit);
            gone += query.execute().await?;
        }
        Ok(gone)
    }

    async fn prune_builds(&mut self, before: Micros, most: u32, limit: i64) -> Result<u64, StoreError> {
        let nth = self.inner.query(NTH_END).bind(i64::from(most)).fetch_optional().await?;
        let beyond: Option<Micros> = nth.map(|row| row.try_get("ended_at")).transpose()?;
        let before = beyond.map_or(before, |end| before.max(end.saturating_add(1)));
        let gone = self.delete_builds(OLD_BUILDS, before, limit).await?;
        Ok(gone.len() as u64)
    }

    /// Nobody came for them. Somebody may still ask where they are.
    async fn prune_dead(&mut self, keep: Duration, limit: i64) -> Result<u64, StoreError> {
        let keep = Micros::try_from(keep.as_micros()).unwrap_or(Micros::MAX);
        let gone = self.delete_builds(OLD_DEAD, self.now.saturating_sub(keep), limit).await?;
        for id in &gone {
            self.audit(ITSELF, "forget", Some(*id), "a dead letter that nobody replayed or discarded")
                .await?;
        }
        Ok(gone.len() as u64)
    }

    async fn delete_builds(
        &mut self,
        which: &'static str,
        before: Micros,
        limit: i64,
    ) -> Result<Vec<BuildId>, StoreError> {
        let rows = self.inner.query(which).bind(before).bind(limit).fetch_all().await?;
        let id = |row: &Row| Ok(BuildId::from_uuid(row.try_get("id")?));
        let ids = rows.iter().map(id).collect::<Result<Vec<_>, StoreError>>()?;
        for id in &ids {
            for statement in [EVENTS, ATTEMPTS, BUILD] {
                self.inner.query(statement).bind(id.as_uuid()).execute().await?;
            }
        }
        Ok(ids)
    }

    /// Whether a build that is not over for good needs this context.
    pub async fn needs_context(&mut self, context: &Digest) -> Result<bool, StoreError> {
        let found = self.inner.query(PINNED).bind(context.as_str()).fetch_optional().await?;
        Ok(found.is_some())
    }
}
