//! Builds (shell).

use std::collections::BTreeSet;

use kiln_protocol::id::{AgentId, ClaimId, Namespace, Pool, SubmitSeq};
use kiln_protocol::{BuildId, BuildSpec, State};
use uuid::Uuid;

use super::{Lock, Row, Statement, StoreError, Tx, json, to_json};
use crate::build::Build;
use crate::decide;

/// A build and what it was submitted as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// The build.
    pub build: Build,
    /// The spec; never changes.
    pub spec: BuildSpec,
}

/// What became of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saved {
    /// It is recorded.
    Updated,
    /// Somebody else changed the build meanwhile: load and decide again.
    Lost,
    /// There is no such build any more.
    Gone,
}

/// What became of a submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is recorded.
    New,
    /// The same request was recorded before.
    Repeated(BuildId),
    /// Another request was recorded under this key.
    OtherRequest(BuildId),
}

const INSERT: &str = "INSERT INTO builds (id, submit_seq, namespace, pool, priority, concurrency_group, \
    repositories, idempotency_key, request_hash, state, version, committed, not_before, due_at, context, spec, document) \
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)";
const BY_KEY: &str = "SELECT id, request_hash FROM builds WHERE namespace = $1 AND idempotency_key = $2";
const NEXT_SEQ: Statement = Statement {
    sqlite: "UPDATE counters SET value = value + 1 WHERE name = 'submit' RETURNING value",
    postgres: "SELECT nextval('submit_seq') AS value",
};
const SAVE: &str = "UPDATE builds SET submit_seq = $3, pool = $4, state = $5, version = $6, committed = $7, \
    not_before = $8, due_at = $9, ended_at = $10, avoid = $11, lease_agent = $12, lease_until = $13, \
    claim_id = $14, document = $15 WHERE id = $1 AND version = $2";
const EXISTS: &str = "SELECT 1 FROM builds WHERE id = $1";
const LOAD: &str = "SELECT document, spec FROM builds WHERE id = $1";
const LOAD_LOCKED: Statement =
    Statement { sqlite: LOAD, postgres: "SELECT document, spec FROM builds WHERE id = $1 FOR UPDATE" };
const LOAD_FREE: Statement = Statement {
    sqlite: LOAD,
    postgres: "SELECT document, spec FROM builds WHERE id = $1 FOR UPDATE SKIP LOCKED",
};
const BY_CLAIM: &str = "SELECT document, spec FROM builds WHERE claim_id = $1";
const LEASED_BY: Statement = Statement {
    sqlite: "SELECT document, spec FROM builds WHERE lease_agent = $1 ORDER BY id",
    postgres: "SELECT document, spec FROM builds WHERE lease_agent = $1 ORDER BY id FOR UPDATE",
};
const IN_STATE: &str = "SELECT document, spec FROM builds WHERE state = $1 AND id > $2 ORDER BY id LIMIT $3";
const IN_POOL: Statement = Statement {
    sqlite: "SELECT document, spec FROM builds WHERE pool = $1 \
        AND state IN ('PENDING', 'BUILDING', 'PUSHING', 'DEAD_LETTER') ORDER BY id",
    postgres: "SELECT document, spec FROM builds WHERE pool = $1 \
        AND state IN ('PENDING', 'BUILDING', 'PUSHING', 'DEAD_LETTER') ORDER BY id FOR UPDATE",
};
const PAGE: &str =
    "SELECT document, spec FROM builds WHERE submit_seq < $1 ORDER BY submit_seq DESC LIMIT $2";
const PAGE_IN_STATE: &str = "SELECT document, spec FROM builds WHERE submit_seq < $1 AND state = $3 \
    ORDER BY submit_seq DESC LIMIT $2";
const TO_PUBLISH: Statement = Statement {
    sqlite: "SELECT document, spec FROM builds WHERE state = 'PUSHING' AND committed AND pool = $1 \
        AND lease_until IS NULL AND (not_before <= $2 OR not_before > $3) ORDER BY submit_seq LIMIT 1",
    postgres: "SELECT document, spec FROM builds WHERE state = 'PUSHING' AND committed AND pool = $1 \
        AND lease_until IS NULL AND (not_before <= $2 OR not_before > $3) ORDER BY submit_seq LIMIT 1 \
        FOR UPDATE SKIP LOCKED",
};
pub(super) const STATEMENTS: &[&str] =
    &[INSERT, BY_KEY, SAVE, EXISTS, LOAD, BY_CLAIM, IN_STATE, PAGE, PAGE_IN_STATE];
pub(super) const EACH: &[Statement] = &[NEXT_SEQ, LOAD_LOCKED, LOAD_FREE, LEASED_BY, IN_POOL, TO_PUBLISH];

impl Tx {
    /// The next place in the order of submission.
    pub async fn next_submit_seq(&mut self) -> Result<SubmitSeq, StoreError> {
        let row = self.inner.query(NEXT_SEQ).fetch_one().await?;
        Ok(SubmitSeq(row.try_get("value")?))
    }

    /// The build that was recorded under this idempotency key. Nobody else records one until this ends.
    pub async fn repeated(
        &mut self,
        namespace: &Namespace,
        key: &str,
        request_hash: &str,
    ) -> Result<Inserted, StoreError> {
        self.lock(Lock::Key(namespace, key)).await?;
        let query = self.inner.query(BY_KEY).bind(namespace.as_str()).bind(key);
        let Some(row) = query.fetch_optional().await? else { return Ok(Inserted::New) };
        let (id, hash): (Uuid, String) = (row.try_get("id")?, row.try_get("request_hash")?);
        let id = BuildId::from_uuid(id);
        Ok(if hash == request_hash { Inserted::Repeated(id) } else { Inserted::OtherRequest(id) })
    }

    /// Records a new build.
    pub async fn insert(
        &mut self,
        build: &Build,
        spec: &BuildSpec,
        key: Option<&str>,
        request_hash: &str,
    ) -> Result<(), StoreError> {
        let repositories: BTreeSet<String> = spec.targets().map(kiln_protocol::Target::name).collect();
        self.inner
            .query(INSERT)
            .bind(build.id.as_uuid())
            .bind(build.submit_seq.0)
            .bind(spec.namespace.as_str())
            .bind(build.pool.as_str())
            .bind(i64::from(spec.priority))
            .bind(spec.group.as_ref().map(kiln_protocol::id::Group::as_str))
            .bind(to_json("repositories", &repositories)?)
            .bind(key)
            .bind(request_hash)
            .bind(build.state.label())
            .bind(version(build.version))
            .bind(build.commit.is_some())
            .bind(build.not_before)
            .bind(decide::due_at(build, spec))
            .bind(spec.context.digest.as_str())
            .bind(to_json("spec", spec)?)
            .bind(to_json("document", build)?)
            .execute()
            .await?;
        Ok(())
    }

    /// Saves a build that was loaded with this version.
    pub async fn save(&mut self, loaded: u64, build: &Build, spec: &BuildSpec) -> Result<Saved, StoreError> {
        let lease = build.lease.as_ref();
        let done = self
            .inner
            .query(SAVE)
            .bind(build.id.as_uuid())
            .bind(version(loaded))
            .bind(build.submit_seq.0)
            .bind(build.pool.as_str())
            .bind(build.state.label())
            .bind(version(build.version))
            .bind(build.commit.is_some())
            .bind(build.not_before)
            .bind(decide::due_at(build, spec))
            .bind(build.ended_at)
            .bind(build.avoid.as_ref().map(AgentId::as_str))
            .bind(lease.map(|lease| lease.agent.as_str()))
            .bind(lease.map(|lease| lease.until))
            .bind(lease.map(|lease| lease.claim.as_uuid()))
            .bind(to_json("document", build)?)
            .execute()
            .await?;
        if done == 1 {
            return Ok(Saved::Updated);
        }
        let exists = self.inner.query(EXISTS).bind(build.id.as_uuid()).fetch_optional().await?;
        Ok(if exists.is_some() { Saved::Lost } else { Saved::Gone })
    }

    /// One build. Within a change it stays as it is until that ends.
    pub async fn load(&mut self, id: BuildId) -> Result<Option<Recorded>, StoreError> {
        let statement = if self.writes { LOAD_LOCKED } else { LOAD.into() };
        let row = self.inner.query(statement).bind(id.as_uuid()).fetch_optional().await?;
        row.as_ref().map(recorded).transpose()
    }

    /// One build to be changed, unless somebody else is at it.
    pub async fn load_free(&mut self, id: BuildId) -> Result<Option<Recorded>, StoreError> {
        let row = self.inner.query(LOAD_FREE).bind(id.as_uuid()).fetch_optional().await?;
        row.as_ref().map(recorded).transpose()
    }

    /// One build that this transaction does not change.
    pub async fn peek(&mut self, id: BuildId) -> Result<Option<Recorded>, StoreError> {
        let row = self.inner.query(LOAD).bind(id.as_uuid()).fetch_optional().await?;
        row.as_ref().map(recorded).transpose()
    }

    /// The build that answers this wish. Not to be changed.
    pub async fn of_claim(&mut self, claim: ClaimId) -> Result<Option<Recorded>, StoreError> {
        let row = self.inner.query(BY_CLAIM).bind(claim.as_uuid()).fetch_optional().await?;
        row.as_ref().map(recorded).transpose()
    }

    /// Builds of an agent.
    pub async fn leased_by(&mut self, agent: &AgentId) -> Result<Vec<Recorded>, StoreError> {
        let rows = self.inner.query(LEASED_BY).bind(agent.as_str()).fetch_all().await?;
        rows.iter().map(recorded).collect()
    }

    /// Builds in a state, by id, after this one.
    pub async fn in_state(
        &mut self,
        state: State,
        after: Option<BuildId>,
        limit: i64,
    ) -> Result<Vec<Recorded>, StoreError> {
        let after = after.map_or(Uuid::nil(), |id| id.as_uuid());
        let query = self.inner.query(IN_STATE).bind(state.label()).bind(after).bind(limit);
        query.fetch_all().await?.iter().map(recorded).collect()
    }

    /// Builds of a pool that are not over.
    pub async fn in_pool(&mut self, pool: &Pool) -> Result<Vec<Recorded>, StoreError> {
        let rows = self.inner.query(IN_POOL).bind(pool.as_str()).fetch_all().await?;
        rows.iter().map(recorded).collect()
    }

    /// Builds that were submitted before this one, the newest first.
    pub async fn page(
        &mut self,
        before: Option<SubmitSeq>,
        state: Option<State>,
        limit: i64,
    ) -> Result<Vec<Recorded>, StoreError> {
        let before = before.map_or(i64::MAX, |seq| seq.0);
        let query = match state {
            Some(state) => self.inner.query(PAGE_IN_STATE).bind(before).bind(limit).bind(state.label()),
            None => self.inner.query(PAGE).bind(before).bind(limit),
        };
        query.fetch_all().await?.iter().map(recorded).collect()
    }

    /// The oldest committed build of a pool on which nobody works, or is about to.
    pub async fn to_publish(&mut self, pool: &Pool) -> Result<Option<Recorded>, StoreError> {
        let far = self.now.saturating_add(decide::LONGEST_PAUSE);
        let query = self.inner.query(TO_PUBLISH).bind(pool.as_str()).bind(self.now).bind(far);
        query.fetch_optional().await?.as_ref().map(recorded).transpose()
    }
}

fn version(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn recorded(row: &Row) -> Result<Recorded, StoreError> {
    let (document, spec): (String, String) = (row.try_get("document")?, row.try_get("spec")?);
    Ok(Recorded { build: json("document", &document)?, spec: json("spec", &spec)? })
}
