//! Leases that ended (shell).

use kiln_protocol::BuildId;
use kiln_protocol::id::ClaimId;
use kiln_protocol::message::Lane;

use super::{StoreError, Tx, json, to_json};
use crate::decide::EndedAttempt;

/// Attempts that one question answers at most: more than the budgets allow between two replays.
const PAGE: i64 = 200;

const INSERT: &str = "INSERT INTO attempts (build, attempt, lane, claim_id, ended_at, document) \
    VALUES ($1, $2, $3, $4, $5, $6)";
const OF_BUILD: &str = "SELECT document FROM attempts WHERE build = $1 ORDER BY id DESC LIMIT $2";
const BY_CLAIM: &str = "SELECT 1 FROM attempts WHERE claim_id = $1";
pub(super) const STATEMENTS: &[&str] = &[INSERT, OF_BUILD, BY_CLAIM];

impl Tx {
    /// Remembers a lease that ended.
    pub async fn add_attempt(&mut self, build: BuildId, ended: &EndedAttempt) -> Result<(), StoreError> {
        self.inner
            .query(INSERT)
            .bind(build.as_uuid())
            .bind(i64::from(ended.attempt.get()))
            .bind(match ended.lane {
                Lane::Build => "build",
                Lane::Publish => "publish",
            })
            .bind(ended.claim.as_uuid())
            .bind(ended.ended_at)
            .bind(to_json("attempt", ended)?)
            .execute()
            .await?;
        Ok(())
    }

    /// The latest leases of a build that ended, in the order in which they did.
    pub async fn attempts(&mut self, build: BuildId) -> Result<Vec<EndedAttempt>, StoreError> {
        let query = self.inner.query(OF_BUILD).bind(build.as_uuid()).bind(PAGE);
        let rows = query.fetch_all().await?;
        rows.iter().rev().map(|row| json("attempt", row.try_get("document")?)).collect()
    }

    /// Whether the lease that answered this wish has ended.
    pub async fn is_spent(&mut self, claim: ClaimId) -> Result<bool, StoreError> {
        let query = self.inner.query(BY_CLAIM).bind(claim.as_uuid());
        Ok(query.fetch_optional().await?.is_some())
    }
}
