//! What the record knows of a build (pure).

use std::collections::BTreeMap;

use kiln_protocol::id::{AgentId, Attempt, BootId, ClaimId, LeaseToken, Pool, SubmitSeq};
use kiln_protocol::message::{
    Committed, Lane, LeaseKey, Outcome, PolicyVerdict, RequiredPolicy, Snapshot, StatusEvent,
};
use kiln_protocol::result::Failure;
use kiln_protocol::{BuildId, BuildSpec, Reason, State, Target};
use serde::{Deserialize, Serialize};

/// A moment: microseconds since 1970, by the clock of the database.
pub type Micros = i64;

/// One build. Only the functions of [`crate::decide`] change it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// Its id.
    pub id: BuildId,
    /// The order of its submission.
    pub submit_seq: SubmitSeq,
    /// Who may take it now: the pool of the spec, or that of a process that adopted it.
    pub pool: Pool,
    /// State.
    pub state: State,
    /// The running attempt, or the next one while PENDING.
    pub attempt: Attempt,
    /// Number of changes; the compare-and-set of every save.
    pub version: u64,
    /// When it was recorded.
    pub submitted_at: Micros,
    /// Since when it waits, while PENDING.
    pub pending_since: Micros,
    /// Microseconds that it waited before earlier attempts.
    pub waited: Micros,
    /// Not before this time; also paces the publish lane.
    pub not_before: Micros,
    /// The agent on which the last attempt failed by the node's fault.
    pub avoid: Option<AgentId>,
    /// Who works on it.
    pub lease: Option<Lease>,
    /// The last lease whose end was recorded: its holder may forget it.
    pub finished: Option<LeaseKey>,
    /// The last report of the running attempt that was taken.
    pub last_seq: u64,
    /// What the agent says of the running attempt, or said of the last one.
    pub snapshot: Snapshot,
    /// What must speak before the commit, fixed at the claim.
    pub policies: Vec<RequiredPolicy>,
    /// Somebody asked for the end.
    pub cancel: Option<CancelWish>,
    /// What was spent of the retry budgets.
    pub spent: Spent,
    /// What may be published, once that is decided.
    pub commit: Option<Commit>,
    /// Why the last attempt, or the build, did not succeed.
    pub failure: Option<Failure>,
    /// The reason on the record once it is over; none for a success.
    pub reason: Option<Reason>,
    /// When it was over.
    pub ended_at: Option<Micros>,
    /// The build of which this is a new try by a person.
    pub retry_of: Option<BuildId>,
}

/// The right of one agent to work on the running attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Who.
    pub agent: AgentId,
    /// Which run of it.
    pub boot: BootId,
    /// The wish that it answers.
    pub claim: ClaimId,
    /// The proof.
    pub token: LeaseToken,
    /// Which kind of work.
    pub lane: Lane,
    /// Since when.
    pub since: Micros,
    /// Until when, unless it is renewed.
    pub until: Micros,
    /// Whether it was ever renewed.
    pub renewed: bool,
}

/// Somebody asked for the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelWish {
    /// When.
    pub at: Micros,
    /// Why.
    pub reason: Reason,
}

/// What was spent of the retry budgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Spent {
    /// Attempts that ended by a cause that may pass.
    pub transient: u32,
    /// Of these, the ones with a cause that is tried only once more.
    pub unexplained: u32,
    /// Agents lost after a renewal.
    pub lost: u32,
    /// Agents lost before the first renewal.
    pub lost_early: u32,
    /// Ends that count against no budget.
    pub uncounted: u32,
}

/// The commit record: written once; from then on the build only rolls forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The image.
    pub image: Committed,
    /// What the policies said.
    pub verdicts: Vec<PolicyVerdict>,
    /// When; a replay starts it again.
    pub at: Micros,
    /// What became of the destinations so far.
    pub outcomes: BTreeMap<String, Outcome>,
}

/// The newest build of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its place in the order of submission.
    pub submit_seq: SubmitSeq,
    /// The build.
    pub build: BuildId,
}

impl Build {
    /// A build that was just submitted.
    pub fn submitted(
        id: BuildId,
        submit_seq: SubmitSeq,
        spec: &BuildSpec,
        retry_of: Option<BuildId>,
        now: Micros,
    ) -> Self {
        Self {
            id,
            submit_seq,
            pool: spec.pool.clone(),
            state: State::Pending,
            attempt: Attempt::FIRST,
            version: 1,
            submitted_at: now,
            pending_since: now,
            waited: 0,
            not_before: now,
            avoid: None,
            lease: None,
            finished: None,
            last_seq: 0,
            snapshot: Snapshot::default(),
            policies: Vec::new(),
            cancel: None,
            spent: Spent::default(),
            commit: None,
            failure: None,
            reason: None,
            ended_at: None,
            retry_of,
        }
    }

    /// The lease, if `key` proves it and it was given to whoever shows it: a key that leaked is worth nothing.
    pub fn held_by(&self, from: &AgentId, key: &LeaseKey) -> Option<&Lease> {
        let held = self.lease.as_ref().filter(|lease| lease.token == key.token && lease.agent == *from);
        held.filter(|_| self.id == key.build && self.attempt == key.attempt)
    }

    /// What proves the present lease.
    pub fn lease_key(&self) -> Option<LeaseKey> {
        let key = |lease: &Lease| LeaseKey { build: self.id, attempt: self.attempt, token: lease.token };
        self.lease.as_ref().map(key)
    }

    /// How long it has waited for an agent, over all attempts, in microseconds.
    pub fn waited_until(&self, now: Micros) -> Micros {
        match self.state {
            State::Pending => self.waited.saturating_add(now.saturating_sub(self.pending_since).max(0)),
            _ => self.waited,
        }
    }

    /// Targets that were committed and not answered yet, in order.
    pub fn open_targets(&self, spec: &BuildSpec) -> Vec<Target> {
        let Some(commit) = &self.commit else { return Vec::new() };
        let open = |target: &&Target| !commit.outcomes.contains_key(&target.to_string());
        spec.targets().filter(open).cloned().collect()
    }

    /// What everybody may know of it.
    pub fn public(&self, spec: &BuildSpec, now: Micros) -> StatusEvent {
        StatusEvent {
            build: self.id,
            namespace: spec.namespace.clone(),
            version: self.version,
            at: now,
            state: self.state,
            attempt: self.attempt,
            phase: self.snapshot.phase,
            reason: self.reason.or_else(|| self.failure.as_ref().map(|failure| failure.reason)),
            digest: self.commit.as_ref().map(|commit| commit.image.digest.clone()),
            outcomes: self.commit.as_ref().map(|commit| commit.outcomes.clone()).unwrap_or_default(),
        }
    }
}
