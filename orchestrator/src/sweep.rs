//! What becomes due by itself (shell): it takes no input, it looks and lets the pure functions decide.

use std::time::Duration;

use kiln_protocol::State;
use tokio::time::Instant;

use crate::amnesty::Amnesty;
use crate::build::Build;
use crate::core::{CoreError, Orchestrator};
use crate::decide;
use crate::store::{Recorded, Tx};

/// Pause between two looks.
pub const EVERY: Duration = Duration::from_secs(2);
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
    /// Looks at every build that is not over.
    pub async fn sweep(&self, amnesty: &mut Amnesty) -> Result<Swept, CoreError> {
        let mut swept = Swept::default();
        let mut after = None;
        loop {
            let mut tx = self.store.write().await?;
            let may_expire = amnesty.tick(tx.now(), Instant::now());
            let batch = tx.unfinished(after, BATCH).await?;
            for found in &batch {
                self.sweep_one(&mut tx, found, may_expire, amnesty, &mut swept).await?;
            }
            tx.commit().await?;
            match batch.last() {
                Some(last) if batch.len() == usize::try_from(BATCH).unwrap_or(usize::MAX) => {
                    after = Some(last.build.id);
                }
                _ => return Ok(swept),
            }
        }
    }

    async fn sweep_one(
        &self,
        tx: &mut Tx,
        found: &Recorded,
        may_expire: bool,
        amnesty: &mut Amnesty,
        swept: &mut Swept,
    ) -> Result<(), CoreError> {
        let (tries, now) = (self.tries(&found.spec), tx.now());
        if let Some(lease) = &found.build.lease {
            amnesty.holds(&lease.agent, now);
        }
        let expired = decide::expire(&found.build, tries, now).filter(|_| may_expire);
        if let Some(after) = expired
            && let Some(lease) = &found.build.lease
            && amnesty.spare(&lease.agent, now)
        {
            self.save(tx, found, after).await?;
            swept.expired += 1;
            return Ok(());
        }
        if let Some(after) = self.otherwise(found, now) {
            self.save(tx, found, after).await?;
            swept.ended += 1;
        }
        Ok(())
    }

    fn otherwise(&self, found: &Recorded, now: i64) -> Option<Build> {
        let (build, spec) = (&found.build, &found.spec);
        match build.state {
            State::Pending => decide::queue_timeout(build, spec, now),
            _ => decide::overdue(build, spec, self.tries(spec), now)
                .or_else(|| decide::give_up_publishing(build, now)),
        }
    }
}
