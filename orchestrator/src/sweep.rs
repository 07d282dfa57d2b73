//! What becomes due by itself (shell): it takes no input, it looks and lets the pure functions decide.

use std::time::Duration;

use kiln_protocol::id::AgentId;
use kiln_protocol::{BuildId, State, topology as names};
use kiln_transport::Bus;
use kiln_transport::crash::{self, CrashPoint};
use tokio::time::Instant;

use crate::amnesty::Amnesty;
use crate::build::{Build, Micros};
use crate::core::{CoreError, Orchestrator, tries};
use crate::decide::{self, Tries};
use crate::store::{Due, Lock, Recorded, Retention, Tx};

/// Pause between two looks.
pub const EVERY: Duration = Duration::from_secs(2);
/// Pause between two looks for what can be forgotten.
pub(crate) const PRUNE_EVERY: Duration = Duration::from_hours(1);
/// One look forgets at most this many batches; the next one goes on.
const PRUNE_ROUNDS: usize = 1000;
/// An answer that takes longer means that the way to the broker is blocked.
const PROBE: Duration = Duration::from_secs(2);
/// More questions than this in the queue take longer to answer than renewals may be late.
const BACKLOG: u64 = 1000;
/// Builds of one transaction: others must be able to write in between.
const BATCH: i64 = 100;

/// What one look changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Builds whose agent went silent.
    pub expired: usize,
    /// Builds that ended otherwise.
    pub ended: usize,
}

impl Orchestrator {
    /// Sweeps, after a look at the way that renewals take: while it is blocked, no silence means anything.
    pub async fn probe_and_sweep(
        &self,
        bus: &Bus,
        amnesty: &mut Amnesty,
        at: Instant,
    ) -> Result<Swept, CoreError> {
        let probe = tokio::time::timeout(PROBE, bus.queue_depth(names::LEASE)).await;
        if !matches!(probe, Ok(Ok(waiting)) if waiting <= BACKLOG) {
            amnesty.interrupted();
        }
        let swept = self.sweep(amnesty, at).await;
        // Whom the database put off is not cut off from it.
        if swept.as_ref().is_err_and(|error| !matches!(error, CoreError::Store(e) if e.is_contended())) {
            amnesty.interrupted();
        }
        swept
    }

    /// Forgets what is over for long enough. Gives the number of rows.
    pub async fn prune(&self, retention: &Retention) -> Result<u64, CoreError> {
        let mut pruned = 0;
        for _ in 0..PRUNE_ROUNDS {
            let mut tx = self.store.write().await?;
            if !tx.try_lock(Lock::Prune).await? {
                break;
            }
            let gone = tx.prune(retention, BATCH).await?;
            tx.commit().await?;
            pruned += gone;
            if gone == 0 {
                break;
            }
        }
        Ok(pruned)
    }

    /// Looks at every build about which something may have to be decided by now. `at` is the same moment by the
    /// clock of this process.
    pub async fn sweep(&self, amnesty: &mut Amnesty, at: Instant) -> Result<Swept, CoreError> {
        let mut tx = self.store.read().await?;
        let may_expire = amnesty.tick(tx.now(), at);
        for agent in tx.holders().await? {
            amnesty.holds(&agent, tx.now());
        }
        // Only after the clock was set back.
        let far = tx.leased_beyond(decide::farthest_lease(tx.now()), BATCH).await?;
        drop(tx);
        let mut swept = Swept::default();
        self.sweep_batch(&far, may_expire, amnesty, &mut swept).await?;
        let mut after = Due(Micros::MIN, BuildId::from_uuid(uuid::Uuid::nil()));
        loop {
            let batch = self.store.read().await?.due(after, BATCH).await?;
            let Some(last) = batch.last() else { return Ok(swept) };
            after = *last;
            let ids: Vec<BuildId> = batch.iter().map(|due| due.1).collect();
            self.sweep_batch(&ids, may_expire, amnesty, &mut swept).await?;
        }
    }

    async fn sweep_batch(
        &self,
        ids: &[BuildId],
        may_expire: bool,
        amnesty: &mut Amnesty,
        swept: &mut Swept,
    ) -> Result<(), CoreError> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut tx = self.store.write().await?;
        for id in ids {
            // What somebody else is at, perhaps another replica that sweeps too, need not be looked at twice.
            if let Some(found) = tx.load_free(*id).await?.filter(|found| self.serves(&found.build.pool)) {
                self.sweep_one(&mut tx, &found, may_expire, amnesty, swept).await?;
            }
        }
        tx.commit().await?;
        if *swept != Swept::default() {
            crash::reach(CrashPoint::SweepRecorded);
        }
        Ok(())
    }

    async fn sweep_one(
        &self,
        tx: &mut Tx,
        found: &Recorded,
        may_expire: bool,
        amnesty: &mut Amnesty,
        swept: &mut Swept,
    ) -> Result<(), CoreError> {
        let (tries, now) = (tries(found), tx.now());
        let expired = decide::expire(&found.build, tries, now).filter(|_| may_expire);
        if let Some(after) = expired
            && let Some(lease) = &found.build.lease
            && silence(tx, amnesty, &lease.agent).await?
        {
            self.save(tx, found, after).await?;
            swept.expired += 1;
            return Ok(());
        }
        if let Some(after) = otherwise(found, tries, now) {
            self.save(tx, found, after).await?;
            swept.ended += 1;
        }
        Ok(())
    }
}

/// Whether an agent may be believed dead, with the brake that every process shares.
async fn silence(tx: &mut Tx, amnesty: &mut Amnesty, agent: &AgentId) -> Result<bool, CoreError> {
    let before = tx.brake().await?;
    let mut brake = before.clone();
    let may = amnesty.may_silence(&mut brake, agent, tx.now());
    if brake != before {
        tx.save_brake(&brake).await?;
    }
    Ok(may)
}

fn otherwise(found: &Recorded, tries: Tries, now: Micros) -> Option<Build> {
    let (build, spec) = (&found.build, &found.spec);
    match build.state {
        State::Pending => decide::queue_timeout(build, spec, now),
        _ => decide::overdue(build, spec, tries, now).or_else(|| decide::give_up_publishing(build, now)),
    }
}
