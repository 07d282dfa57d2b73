//! The orchestrator: the record, its settings, and how a change is saved (shell).

use std::collections::BTreeSet;

use kiln_protocol::envelope::EnvelopeError;
use kiln_protocol::id::{LeaseToken, Pool};
use kiln_protocol::message::{Cancel, StatusEvent};
use kiln_protocol::state::IllegalTransition;
use kiln_protocol::{BuildId, topology};

use crate::build::{Build, Micros};
use crate::decide::{self, Tries};
use crate::entropy::{self, Entropy};
use crate::metrics;
use crate::policy::{self, PolicyRule};
use crate::schedule::{Agent, Limits, Waiting};
use crate::store::{Line, Outgoing, Recorded, Retention, Saved, Store, StoreError, Tx, Which};

/// What the operator decides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bounds on builds that run at once.
    pub limits: Limits,
    /// Policies that builds need.
    pub policies: Vec<PolicyRule>,
    /// How much is kept of what is over.
    pub retention: Retention,
    /// The only pool that this process schedules for; every pool if there is none.
    pub only_pool: Option<Pool>,
}

/// Records builds and decides about them. Any number of processes may do so on one record.
#[derive(Debug)]
pub struct Orchestrator {
    pub(crate) store: Store,
    pub(crate) settings: Settings,
    pub(crate) entropy: Entropy,
}

/// Something cannot be recorded or decided now.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The record.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A message cannot be written.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// Another process changed the build at the same time.
    #[error("build {0} was changed by somebody else at the same time; ask again")]
    Conflict(BuildId),
    /// The build is not in a state for this.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
}

/// How often a change is tried that the database undid in favour of another one. Each time one of those who wait for
/// each other gets through.
const TRIES: usize = 5;

/// Does it again when the database undid it in favour of somebody else's change. It must begin with a transaction of
/// its own.
pub(crate) async fn undisturbed<T, F>(mut once: impl FnMut() -> F) -> Result<T, CoreError>
where
    F: Future<Output = Result<T, CoreError>>,
{
    for _ in 1..TRIES {
        match once().await {
            Err(CoreError::Store(error)) if error.is_contended() => {
                tracing::debug!(error = crate::error::chain(&error), "again");
            }
            other => return other,
        }
    }
    once().await
}

impl Orchestrator {
    /// On this record.
    pub fn new(store: Store, settings: Settings, entropy: Entropy) -> Self {
        Self { store, settings, entropy }
    }

    /// The record.
    pub const fn store(&self) -> &Store {
        &self.store
    }

    pub(crate) fn fresh_token(&self) -> LeaseToken {
        self.entropy.lease_token()
    }

    /// The only pool that is configured; none if agents may register any.
    pub(crate) const fn only_pool(&self) -> Option<&Pool> {
        self.settings.only_pool.as_ref()
    }

    /// Whether this process schedules for that pool.
    pub(crate) fn serves(&self, pool: &Pool) -> bool {
        self.settings.only_pool.as_ref().is_none_or(|only| only == pool)
    }

    /// Saves what a decision made of a build, tells everybody, and sends what follows from it.
    pub(crate) async fn save(
        &self,
        tx: &mut Tx,
        before: &Recorded,
        after: Build,
    ) -> Result<Build, CoreError> {
        if after == before.build {
            return Ok(after);
        }
        let loaded = before.build.version;
        let after = Build { version: loaded + 1, ..after };
        if tx.save(loaded, &after, &before.spec).await? != Saved::Updated {
            return Err(CoreError::Conflict(after.id));
        }
        if let Some(ended) = decide::ended(&before.build, &after, tx.now()) {
            tx.add_attempt(after.id, &ended).await?;
        }
        self.tell(tx, before, &after).await?;
        if let Some(cancel) = wish_to_send(&before.build, &after)? {
            tx.send(&cancel).await?;
        }
        self.watch_tags(tx, before, &after).await?;
        tx.count(metrics::changes(&before.build, &after));
        Ok(after)
    }

    /// Appends to the public stream what changed for everybody.
    async fn tell(&self, tx: &mut Tx, before: &Recorded, after: &Build) -> Result<(), CoreError> {
        let (old, new) = (before.build.public(&before.spec, 0), after.public(&before.spec, tx.now()));
        let same = StatusEvent { version: new.version, at: new.at, ..old };
        if same == new {
            return Ok(());
        }
        self.publish_event(tx, &new).await
    }

    /// Appends to the public stream, and sends the same to everybody who watches.
    pub(crate) async fn publish_event(&self, tx: &mut Tx, event: &StatusEvent) -> Result<(), CoreError> {
        tx.append_event(event).await?;
        let key = topology::status(&event.namespace);
        tx.send(&Outgoing::new(topology::EVENTS, key, event)?).await?;
        Ok(())
    }

    /// A holder that is gone without an answer about a target, lost or not, may have sent a PUT that arrives later; so
    /// may one that asked again after it got no answer.
    async fn watch_tags(&self, tx: &mut Tx, before: &Recorded, after: &Build) -> Result<(), CoreError> {
        if before.build.lease.is_none() || after.lease.is_some() {
            return Ok(());
        }
        let repeated =
            |target: &&kiln_protocol::Target| after.snapshot.repeated.contains(&target.to_string());
        let mut unsettled: BTreeSet<_> = before.spec.targets().filter(repeated).cloned().collect();
        unsettled.extend(after.open_targets(&before.spec));
        for target in unsettled {
            let first = tx.now().saturating_add(decide::recheck_delay(0));
            tx.recheck_at(&target, Some(first), 0).await?;
        }
        Ok(())
    }

    /// What the scheduler chooses from: the first builds of every line in these pools.
    pub(crate) async fn situation(
        &self,
        tx: &mut Tx,
        pools: Option<&BTreeSet<Pool>>,
        which: Which,
        window: usize,
    ) -> Result<Situation, CoreError> {
        let wanted = |line: &Line| self.serves(&line.pool) && pools.is_none_or(|p| p.contains(&line.pool));
        let lines: Vec<Line> = tx.lines().await?.into_iter().filter(wanted).collect();
        let window = window.min(LARGEST_SITUATION / lines.len().max(1)).max(1);
        let (mut waiting, mut more) = (Vec::new(), false);
        for line in &lines {
            let rows = tx.waiting(line, which, i64::try_from(window).unwrap_or(i64::MAX)).await?;
            more |= rows.len() == window;
            waiting.extend(rows.into_iter().map(|(build, repositories)| {
                let required = policy::required(&self.settings.policies, &repositories);
                Waiting { policies: policy::keys(&required), ..build }
            }));
        }
        let alive_since = tx.now().saturating_sub(decide::TTL);
        let agents = tx.agents_since(alive_since).await?.into_iter().map(|row| Agent {
            id: row.id,
            pools: row.pools,
            policies: row.policies,
            free: row.free,
        });
        let (agents, running) = (agents.collect(), tx.running().await?);
        Ok(Situation { waiting, more, running, agents, now: tx.now() })
    }
}

/// Waiting builds that one choice looks at, over all lines.
const LARGEST_SITUATION: usize = 16_384;
/// Waiting builds of one line that a choice looks at first.
pub(crate) const WINDOW: usize = 64;

/// What the scheduler chooses from.
pub(crate) struct Situation {
    pub(crate) waiting: Vec<Waiting>,
    /// There are builds behind these.
    pub(crate) more: bool,
    pub(crate) running: Vec<crate::schedule::Running>,
    pub(crate) agents: Vec<Agent>,
    pub(crate) now: Micros,
}

/// What a retry of this build needs to know.
pub(crate) fn tries(found: &Recorded) -> Tries {
    let jitter = entropy::jitter(found.build.id, found.build.attempt);
    Tries { max_attempts: found.spec.max_attempts, jitter }
}

/// The message to the agent, when somebody has just asked for the end.
fn wish_to_send(before: &Build, after: &Build) -> Result<Option<Outgoing>, EnvelopeError> {
    let (Some(wish), None, Some(lease)) = (&after.cancel, &before.cancel, &after.lease) else {
        return Ok(None);
    };
    let cancel = Cancel { build: after.id, attempt: after.attempt, reason: wish.reason };
    Outgoing::new(topology::COMMANDS, topology::cancels(&lease.agent), &cancel).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_the_database_undid_is_done_again_but_not_for_ever() {
        let undone = || CoreError::Store(StoreError::Contended(sqlx::Error::RowNotFound));
        for (undone_times, succeeds) in [(0, true), (TRIES - 1, true), (TRIES, false)] {
            let mut calls = 0;
            let result = undisturbed(|| {
                calls += 1;
                let done = calls > undone_times;
                async move { if done { Ok(()) } else { Err(undone()) } }
            });
            assert_eq!(result.await.is_ok(), succeeds, "undone {undone_times} times");
        }
        let mut calls = 0;
        let other: Result<(), _> = undisturbed(|| {
            calls += 1;
            async { Err(CoreError::Store(StoreError::Settings(String::new()))) }
        })
        .await;
        assert!(other.is_err() && calls == 1, "nothing else is done again");
    }
}
