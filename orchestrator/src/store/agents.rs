//! Agents that were heard of (shell).

use std::collections::BTreeSet;

use kiln_protocol::id::{AgentId, BootId, Pool};
use kiln_protocol::message::PolicyKey;
use uuid::Uuid;

use super::{Row, StoreError, Tx, json, parse, to_json};
use crate::build::Micros;

/// What an agent said of itself last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentRow {
    /// Who.
    pub id: AgentId,
    /// Which run of it.
    pub boot: BootId,
    /// Pools that it serves.
    pub pools: BTreeSet<Pool>,
    /// Policies that it has loaded.
    pub policies: BTreeSet<PolicyKey>,
    /// Builds that it can run at once.
    pub slots: u32,
    /// Slots without a build.
    pub free: u32,
    /// When it was heard of.
    pub seen_at: Micros,
}

const UPSERT: &str = "INSERT INTO agents (id, boot, pools, policies, slots, free, seen_at) \
    VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO UPDATE SET boot = excluded.boot, \
    pools = excluded.pools, policies = excluded.policies, slots = excluded.slots, free = excluded.free, \
    seen_at = excluded.seen_at";
const ONE: &str = "SELECT id, boot, pools, policies, slots, free, seen_at FROM agents WHERE id = $1";
const SEEN_SINCE: &str =
    "SELECT id, boot, pools, policies, slots, free, seen_at FROM agents WHERE seen_at >= $1 ORDER BY id";
const FORGET: &str = "DELETE FROM agents WHERE id = $1";
const TOOK_SLOT: &str = "UPDATE agents SET free = free - 1 WHERE id = $1 AND free > 0";
const RETIRE: &str = "INSERT INTO retired_boots (boot, agent, at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
const IS_RETIRED: &str = "SELECT 1 FROM retired_boots WHERE boot = $1";
pub(super) const STATEMENTS: &[&str] = &[UPSERT, ONE, SEEN_SINCE, FORGET, TOOK_SLOT, RETIRE, IS_RETIRED];

impl Tx {
    /// Notes what an agent says of itself.
    pub async fn see_agent(&mut self, agent: &AgentRow) -> Result<(), StoreError> {
        self.inner
            .query(UPSERT)
            .bind(agent.id.as_str())
            .bind(agent.boot.as_uuid())
            .bind(to_json("pools", &agent.pools)?)
            .bind(to_json("policies", &agent.policies)?)
            .bind(i64::from(agent.slots))
            .bind(i64::from(agent.free))
            .bind(agent.seen_at)
            .execute()
            .await?;
        Ok(())
    }

    /// One agent.
    pub async fn agent(&mut self, id: &AgentId) -> Result<Option<AgentRow>, StoreError> {
        let row = self.inner.query(ONE).bind(id.as_str()).fetch_optional().await?;
        row.as_ref().map(agent).transpose()
    }

    /// Agents that were heard of since then.
    pub async fn agents_since(&mut self, since: Micros) -> Result<Vec<AgentRow>, StoreError> {
        let rows = self.inner.query(SEEN_SINCE).bind(since).fetch_all().await?;
        rows.iter().map(agent).collect()
    }

    /// An agent has one free slot less, until it says otherwise.
    pub async fn took_slot(&mut self, id: &AgentId) -> Result<(), StoreError> {
        self.inner.query(TOOK_SLOT).bind(id.as_str()).execute().await?;
        Ok(())
    }

    /// A run of an agent was replaced by a newer one.
    pub async fn retire_boot(&mut self, id: &AgentId, boot: BootId) -> Result<(), StoreError> {
        let query = self.inner.query(RETIRE).bind(boot.as_uuid()).bind(id.as_str()).bind(self.now);
        query.execute().await?;
        Ok(())
    }

    /// Whether a newer run replaced this one.
    pub async fn is_retired(&mut self, boot: BootId) -> Result<bool, StoreError> {
        let query = self.inner.query(IS_RETIRED).bind(boot.as_uuid());
        Ok(query.fetch_optional().await?.is_some())
    }

    /// An agent that will not come back.
    pub async fn forget_agent(&mut self, id: &AgentId) -> Result<(), StoreError> {
        self.inner.query(FORGET).bind(id.as_str()).execute().await?;
        Ok(())
    }
}

fn agent(row: &Row) -> Result<AgentRow, StoreError> {
    let boot: Uuid = row.try_get("boot")?;
    let (slots, free): (i64, i64) = (row.try_get("slots")?, row.try_get("free")?);
    Ok(AgentRow {
        id: parse("id", row.try_get("id")?)?,
        boot: BootId::from_uuid(boot),
        pools: json("pools", row.try_get("pools")?)?,
        policies: json("policies", row.try_get("policies")?)?,
        slots: u32::try_from(slots).unwrap_or(0),
        free: u32::try_from(free).unwrap_or(0),
        seen_at: row.try_get("seen_at")?,
    })
}
