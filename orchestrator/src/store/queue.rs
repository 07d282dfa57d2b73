//! Which builds wait, run and become due: what the scheduler and the sweep look at (shell).

use std::collections::BTreeSet;

use kiln_protocol::id::{AgentId, Namespace, Pool, SubmitSeq};
use kiln_protocol::{BuildId, State};
use uuid::Uuid;

use super::{Row, StoreError, Tx, json, parse};
use crate::build::Micros;
use crate::decide;
use crate::schedule::{Running, Waiting};

/// A place in the order in which builds become due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due(pub Micros, pub BuildId);

/// The waiting builds of one namespace in one pool, in the order of their turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The pool.
    pub pool: Pool,
    /// The namespace.
    pub namespace: Namespace,
}

/// Which waiting builds are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those that may begin now.
    Due,
    /// Also those that are tried again later.
    All,
}

const RUNNING: &str = "SELECT namespace, concurrency_group FROM builds WHERE state = 'BUILDING' OR (state = 'PUSHING' AND NOT committed)";
// Each step is one seek in an index: DISTINCT would read every waiting build.
const POOLS: &str = "WITH RECURSIVE pools (pool) AS (SELECT MIN(pool) FROM builds WHERE state = 'PENDING' \
    UNION ALL SELECT (SELECT MIN(b.pool) FROM builds AS b WHERE b.state = 'PENDING' AND b.pool > pools.pool) \
    FROM pools WHERE pool IS NOT NULL) SELECT pool FROM pools WHERE pool IS NOT NULL";
const NAMESPACES: &str = "WITH RECURSIVE names (namespace) AS ( \
    SELECT MIN(namespace) FROM builds WHERE state = 'PENDING' AND pool = $1 \
    UNION ALL SELECT (SELECT MIN(b.namespace) FROM builds AS b WHERE b.state = 'PENDING' AND b.pool = $1 \
    AND b.namespace > names.namespace) FROM names WHERE namespace IS NOT NULL) \
    SELECT namespace FROM names WHERE namespace IS NOT NULL";
const WAITING: &str = "SELECT id, submit_seq, namespace, pool, priority, concurrency_group, repositories, \
    not_before, avoid FROM builds WHERE state = 'PENDING' AND pool = $1 AND namespace = $2 \
    AND (not_before <= $3 OR not_before > $4) ORDER BY priority DESC, submit_seq LIMIT $5";
const DUE: &str = "SELECT id, due_at FROM builds WHERE due_at < $1 AND (due_at, id) > ($2, $3) ORDER BY due_at, id LIMIT $4";
const FAR_LEASES: &str = "SELECT id FROM builds WHERE lease_until > $1 ORDER BY lease_until DESC LIMIT $2";
const HOLDERS: &str =
    "SELECT DISTINCT lease_agent FROM builds WHERE lease_agent IS NOT NULL ORDER BY lease_agent";
const COUNTS: &str = "SELECT state, COUNT(*) AS builds FROM builds \
    WHERE state IN ('PENDING', 'BUILDING', 'PUSHING', 'DEAD_LETTER') GROUP BY state";
pub(super) const STATEMENTS: &[&str] =
    &[RUNNING, POOLS, NAMESPACES, WAITING, DUE, FAR_LEASES, HOLDERS, COUNTS];

impl Tx {
    /// Builds about which something may have to be decided by now, after this place in their order.
    pub async fn due(&mut self, after: Due, limit: i64) -> Result<Vec<Due>, StoreError> {
        let query = self.inner.query(DUE).bind(self.now).bind(after.0).bind(after.1.as_uuid()).bind(limit);
        let due = |row: &Row| Ok(Due(row.try_get("due_at")?, BuildId::from_uuid(row.try_get("id")?)));
        query.fetch_all().await?.iter().map(due).collect()
    }

    /// Builds whose lease ends after this.
    pub async fn leased_beyond(&mut self, until: Micros, limit: i64) -> Result<Vec<BuildId>, StoreError> {
        let rows = self.inner.query(FAR_LEASES).bind(until).bind(limit).fetch_all().await?;
        rows.iter().map(|row| Ok(BuildId::from_uuid(row.try_get("id")?))).collect()
    }

    /// Agents that hold a lease.
    pub async fn holders(&mut self) -> Result<Vec<AgentId>, StoreError> {
        let rows = self.inner.query(HOLDERS).fetch_all().await?;
        rows.iter().map(|row| parse("lease_agent", row.try_get("lease_agent")?)).collect()
    }

    /// Builds that take part in the shares.
    pub async fn running(&mut self) -> Result<Vec<Running>, StoreError> {
        let rows = self.inner.query(RUNNING).fetch_all().await?;
        let running = |row: &Row| {
            let group: Option<String> = row.try_get("concurrency_group")?;
            Ok(Running {
                namespace: parse("namespace", row.try_get("namespace")?)?,
                group: group.map(|text| parse("concurrency_group", &text)).transpose()?,
            })
        };
        rows.iter().map(running).collect()
    }

    /// Pools and namespaces that have waiting builds: each is a line of its own.
    pub async fn lines(&mut self) -> Result<Vec<Line>, StoreError> {
        let mut lines = Vec::new();
        for row in self.inner.query(POOLS).fetch_all().await? {
            let pool: Pool = parse("pool", row.try_get("pool")?)?;
            let rows = self.inner.query(NAMESPACES).bind(pool.as_str()).fetch_all().await?;
            for row in rows {
                let namespace = parse("namespace", row.try_get("namespace")?)?;
                lines.push(Line { pool: pool.clone(), namespace });
            }
        }
        Ok(lines)
    }

    /// The first waiting builds of a line, each with the repositories that it publishes to.
    pub async fn waiting(
        &mut self,
        line: &Line,
        which: Which,
        limit: i64,
    ) -> Result<Vec<(Waiting, BTreeSet<String>)>, StoreError> {
        let (due, far) = match which {
            Which::Due => (self.now, self.now.saturating_add(decide::LONGEST_PAUSE)),
            Which::All => (Micros::MAX, Micros::MAX),
        };
        let query = self.inner.query(WAITING).bind(line.pool.as_str()).bind(line.namespace.as_str());
        let rows = query.bind(due).bind(far).bind(limit).fetch_all().await?;
        rows.iter().map(waiting).collect()
    }

    /// How many builds there are in each state that has some; the final ones, which nobody counts, are left out.
    pub async fn counts(&mut self) -> Result<Vec<(State, u64)>, StoreError> {
        let rows = self.inner.query(COUNTS).fetch_all().await?;
        let count = |row: &Row| {
            let builds: i64 = row.try_get("builds")?;
            Ok((state(row.try_get("state")?)?, u64::try_from(builds).unwrap_or(0)))
        };
        rows.iter().map(count).collect()
    }
}

fn state(label: &str) -> Result<State, StoreError> {
    let unknown = || StoreError::Row { what: "state", why: format!("`{label}` is none") };
    State::from_label(label).ok_or_else(unknown)
}

fn waiting(row: &Row) -> Result<(Waiting, BTreeSet<String>), StoreError> {
    let (id, priority): (Uuid, i64) = (row.try_get("id")?, row.try_get("priority")?);
    let (group, avoid): (Option<String>, Option<String>) =
        (row.try_get("concurrency_group")?, row.try_get("avoid")?);
    let not_before: Micros = row.try_get("not_before")?;
    let waiting = Waiting {
        id: BuildId::from_uuid(id),
        submit_seq: SubmitSeq(row.try_get("submit_seq")?),
        priority: u8::try_from(priority).unwrap_or(0),
        namespace: parse("namespace", row.try_get("namespace")?)?,
        group: group.map(|text| parse("concurrency_group", &text)).transpose()?,
        pool: parse("pool", row.try_get("pool")?)?,
        avoid: avoid.map(|text| parse("avoid", &text)).transpose()?,
        not_before,
        policies: BTreeSet::new(),
    };
    Ok((waiting, json("repositories", row.try_get("repositories")?)?))
}
