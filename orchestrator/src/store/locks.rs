//! What keeps replicas apart where a row alone does not (shell). On SQLite the only writer needs none of this.
//!
//! Whoever takes several takes them in the order of [`Lock`], then builds in the order of their ids, then targets.
//! What cannot follow that order runs into a deadlock that PostgreSQL ends, and is done again.

use std::fmt;

use kiln_protocol::id::{AgentId, Namespace};
use kiln_protocol::{Digest, Target};

use super::database::Inner;
use super::{StoreError, Tx};

/// Something that one transaction at a time deals with, until it ends.
#[derive(Debug, Clone, Copy)]
pub enum Lock<'a> {
    /// A request under this idempotency key.
    Key(&'a Namespace, &'a str),
    /// An uploaded context: whether a build needs it, and its end.
    Context(&'a Digest),
    /// What an agent says of itself, and what it is given.
    Agent(&'a AgentId),
    /// The choice of who builds next: limits and groups reach over all pools.
    Claims,
    /// The newest build of a target, also while there is none.
    Target(&'a Target),
    /// Forgetting.
    Prune,
}

impl fmt::Display for Lock<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(namespace, key) => write!(f, "key {namespace} {key}"),
            Self::Context(digest) => write!(f, "context {digest}"),
            Self::Agent(agent) => write!(f, "agent {agent}"),
            Self::Claims => f.write_str("claims"),
            Self::Target(target) => write!(f, "target {target}"),
            Self::Prune => f.write_str("prune"),
        }
    }
}

const LOCK: &str = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))";
const TRY_LOCK: &str = "SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0)) AS got";
/// Only for PostgreSQL.
pub(super) const STATEMENTS: &[&str] = &[LOCK, TRY_LOCK];

impl Tx {
    /// Waits until nobody else deals with it.
    pub async fn lock(&mut self, what: Lock<'_>) -> Result<(), StoreError> {
        if matches!(self.inner, Inner::Postgres(_)) {
            self.inner.query(LOCK).bind(what.to_string()).fetch_one().await?;
        }
        Ok(())
    }

    /// Deals with it alone, unless somebody else does.
    pub async fn try_lock(&mut self, what: Lock<'_>) -> Result<bool, StoreError> {
        match self.inner {
            Inner::Sqlite(_) => Ok(true),
            Inner::Postgres(_) => {
                self.inner.query(TRY_LOCK).bind(what.to_string()).fetch_one().await?.try_get("got")
            }
        }
    }
}
