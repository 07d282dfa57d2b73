//! What people ask: show, cancel, replay, discard (shell).

use kiln_protocol::id::{Pool, SubmitSeq};
use kiln_protocol::{BuildId, Reason, State, Target};
use kiln_transport::crash::{self, CrashPoint};

use crate::build::Head;
use crate::core::{CoreError, Orchestrator, WINDOW};
use crate::decide::{self, CancelRefused, EndedAttempt, ReplayRefused};
use crate::schedule::{self, Wait};
use crate::store::{BadMessage, Recorded, StoreError, StoredEvent, Tx, Which};

/// Rows that one question answers at most.
pub const PAGE: i64 = kiln_protocol::api::PAGE as i64;

/// What a person asked for is refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no such build.
    #[error("there is no build {0}")]
    Missing(BuildId),
    /// It cannot be cancelled.
    #[error("build {id} cannot be cancelled")]
    Cancel {
        /// The build.
        id: BuildId,
        /// Why.
        #[source]
        source: CancelRefused,
    },
    /// It cannot be replayed.
    #[error("build {id} cannot be replayed")]
    Replay {
        /// The build.
        id: BuildId,
        /// Why.
        #[source]
        source: ReplayRefused,
    },
    /// The record.
    #[error(transparent)]
    Core(#[from] CoreError),
}

impl From<StoreError> for ControlError {
    fn from(error: StoreError) -> Self {
        Self::Core(error.into())
    }
}

/// A build in the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// The build.
    pub id: BuildId,
    /// Why it waits.
    pub wait: Wait,
}

impl Orchestrator {
    /// One build.
    pub async fn show(&self, id: BuildId) -> Result<Recorded, ControlError> {
        self.store.read().await?.load(id).await?.ok_or(ControlError::Missing(id))
    }

    /// Builds that were submitted before this one, in one state or in any, the newest first; [`PAGE`] at most.
    pub async fn list(
        &self,
        before: Option<SubmitSeq>,
        state: Option<State>,
        limit: i64,
    ) -> Result<Vec<Recorded>, ControlError> {
        Ok(self.store.read().await?.page(before, state, limit.min(PAGE)).await?)
    }

    /// Builds in a state, by id, after this one.
    pub async fn list_in(&self, state: State, after: Option<BuildId>) -> Result<Vec<Recorded>, ControlError> {
        Ok(self.store.read().await?.in_state(state, after, PAGE).await?)
    }

    /// Every lease of a build that ended.
    pub async fn attempts(&self, id: BuildId) -> Result<Vec<EndedAttempt>, ControlError> {
        Ok(self.store.read().await?.attempts(id).await?)
    }

    /// Changes of a build after the one with this id.
    pub async fn events(&self, id: BuildId, after: i64) -> Result<Vec<StoredEvent>, ControlError> {
        Ok(self.store.read().await?.events(id, after, PAGE).await?)
    }

    /// A build and its changes after the one with this id, as of one moment.
    pub async fn changes(
        &self,
        id: BuildId,
        after: i64,
    ) -> Result<(Recorded, Vec<StoredEvent>), ControlError> {
        let mut tx = self.store.read().await?;
        let found = tx.load(id).await?.ok_or(ControlError::Missing(id))?;
        Ok((found, tx.events(id, after, PAGE).await?))
    }

    /// Messages that nobody could read, the newest first.
    pub async fn bad_messages(&self) -> Result<Vec<BadMessage>, ControlError> {
        Ok(self.store.read().await?.bad_messages(PAGE).await?)
    }

    /// Builds by id, without those that are gone.
    pub async fn find(&self, ids: &[BuildId]) -> Result<Vec<Recorded>, ControlError> {
        let mut tx = self.store.read().await?;
        let mut found = Vec::with_capacity(ids.len());
        for &id in ids {
            found.extend(tx.load(id).await?);
        }
        Ok(found)
    }

    /// Every waiting build that may be among the next, the next one first, and why it waits.
    pub async fn queue(&self) -> Result<Vec<Queued>, ControlError> {
        let mut tx = self.store.read().await?;
        let situation = self.situation(&mut tx, None, Which::All, WINDOW).await?;
        let (waiting, now) = (&situation.waiting, situation.now);
        let order =
            schedule::order(waiting, &situation.running, &situation.agents, self.settings.limits, now);
        Ok(order.into_iter().map(|(id, wait)| Queued { id, wait }).collect())
    }

    /// Asks for the end of a build. When this returns, the build will never move a tag.
    pub async fn cancel(&self, id: BuildId, reason: Reason, actor: &str) -> Result<State, ControlError> {
        let mut tx = self.store.write().await?;
        let found = tx.load(id).await?.ok_or(ControlError::Missing(id))?;
        let after = decide::cancel(&found.build, reason, tx.now());
        let after = after.map_err(|source| ControlError::Cancel { id, source })?;
        let after = self.save(&mut tx, &found, after).await?;
        tx.audit(actor, "cancel", Some(id), reason.label()).await?;
        tx.commit().await?;
        crash::reach(CrashPoint::CancelRecorded);
        Ok(after.state)
    }

    /// Tries a dead letter again. With `take_head` it counts as the newest build of its targets; of a committed one,
    /// of those that were not answered yet.
    pub async fn replay(&self, id: BuildId, take_head: bool, actor: &str) -> Result<State, ControlError> {
        let mut tx = self.store.write().await?;
        let found = tx.load(id).await?.ok_or(ControlError::Missing(id))?;
        let newest = if take_head { Some(tx.next_submit_seq().await?) } else { None };
        let heads = heads(&mut tx, &found).await?;
        let head = |target: &Target| heads.iter().find(|(t, _)| t == target).map(|(_, head)| head);
        let after = decide::replay(&found.build, &found.spec, head, newest, tx.now());
        let after = after.map_err(|source| ControlError::Replay { id, source })?;
        let after = self.save(&mut tx, &found, after).await?;
        if take_head {
            // What is not committed takes them at its commit.
            for target in after.open_targets(&found.spec) {
                self.take_head(&mut tx, &after, &target, head(&target)).await?;
            }
        }
        tx.audit(actor, "replay", Some(id), if take_head { "take-head" } else { "" }).await?;
        tx.commit().await?;
        crash::reach(CrashPoint::ReplayRecorded);
        Ok(after.state)
    }

    /// Ends a dead letter for good.
    pub async fn discard(&self, id: BuildId, actor: &str) -> Result<State, ControlError> {
        let mut tx = self.store.write().await?;
        let found = tx.load(id).await?.ok_or(ControlError::Missing(id))?;
        let after = decide::discard(&found.build, &found.spec, tx.now());
        let after = after.map_err(CoreError::from)?;
        let after = self.save(&mut tx, &found, after).await?;
        tx.audit(actor, "discard", Some(id), "").await?;
        tx.commit().await?;
        crash::reach(CrashPoint::DiscardRecorded);
        Ok(after.state)
    }

    /// Ends the builds of a pool whose only process is gone: what is not committed is cancelled, what is goes to
    /// `heir` and rolls forward there.
    pub async fn bury(&self, pool: &Pool, heir: &Pool) -> Result<usize, ControlError> {
        let mut tx = self.store.write().await?;
        let mut ended = 0;
        for found in tx.in_pool(pool).await? {
            let now = tx.now();
            let after = decide::client_gone(&found.build, now).unwrap_or_else(|| found.build.clone());
            let pool = if after.commit.is_some() { heir.clone() } else { after.pool.clone() };
            let after = crate::build::Build { pool, ..after };
            ended += usize::from(after != found.build);
            self.save(&mut tx, &found, after).await?;
        }
        tx.commit().await?;
        Ok(ended)
    }
}

async fn heads(tx: &mut Tx, found: &Recorded) -> Result<Vec<(Target, Head)>, StoreError> {
    let mut heads = Vec::new();
    for target in found.spec.targets() {
        if let Some(head) = tx.head(target).await? {
            heads.push((target.clone(), head));
        }
    }
    Ok(heads)
}
