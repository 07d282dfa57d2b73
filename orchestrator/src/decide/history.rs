//! What is remembered of a lease that ended (pure).

use kiln_protocol::Reason;
use kiln_protocol::id::{AgentId, Attempt, BootId, ClaimId};
use kiln_protocol::message::Lane;
use kiln_protocol::result::{Failure, LogSummary, PhaseDuration};
use serde::{Deserialize, Serialize};

use crate::build::{Build, Lease, Micros};

/// One try of one agent at a build, or at its tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedAttempt {
    /// Its number. Moving the tags of a committed build goes on under the number of the attempt that built it.
    pub attempt: Attempt,
    /// What was done.
    pub lane: Lane,
    /// Who did it.
    pub agent: AgentId,
    /// Which run of it.
    pub boot: BootId,
    /// The wish that the lease answered.
    pub claim: ClaimId,
    /// When it began.
    pub began_at: Micros,
    /// When it ended.
    pub ended_at: Micros,
    /// Why it was not the last one, or why there is no image; none for what ended well.
    pub reason: Option<Reason>,
    /// The same for people.
    pub failure: Option<Failure>,
    /// What was spent where.
    pub phases: Vec<PhaseDuration>,
    /// The log in numbers.
    pub log: Option<LogSummary>,
}

/// The lease that this change ended, if it did.
pub fn ended(before: &Build, after: &Build, now: Micros) -> Option<EndedAttempt> {
    let lease = before.lease.as_ref()?;
    if after.lease.as_ref().is_some_and(|kept| kept.token == lease.token) {
        return None;
    }
    let failure = if after.commit.is_none() || after.state.is_over() { after.failure.clone() } else { None };
    Some(EndedAttempt {
        attempt: before.attempt,
        lane: lease.lane,
        agent: lease.agent.clone(),
        boot: lease.boot,
        claim: lease.claim,
        began_at: lease.since,
        ended_at: now,
        reason: why(before, after, lease, failure.as_ref()),
        failure,
        phases: after.snapshot.phases.clone(),
        log: after.snapshot.log.clone(),
    })
}

fn why(before: &Build, after: &Build, lease: &Lease, failure: Option<&Failure>) -> Option<Reason> {
    let finished = after.finished.as_ref().is_some_and(|key| key.token == lease.token);
    match failure {
        Some(failure) => Some(failure.reason),
        None if finished || before.commit.is_none() => None,
        None => Some(Reason::AgentLost),
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::message::{AttemptEnd, Outcome, Report, Snapshot};

    use super::super::testing::{agent, building, committed, fail, key, now, spec, tries};
    use super::super::{Taken, end_attempt, expire, renew, report};
    use super::*;

    #[test]
    fn a_failed_attempt_is_remembered_with_its_reason() {
        let before = building();
        let after = end_attempt(&before, fail(Reason::Network), tries(), now()).unwrap();
        let ended = ended(&before, &after, now() + 1).unwrap();
        assert_eq!((ended.attempt.get(), ended.reason), (1, Some(Reason::Network)));
        assert_eq!((ended.began_at, ended.ended_at), (now(), now() + 1));
    }

    #[test]
    fn a_lease_that_goes_on_is_not_remembered() {
        let before = building();
        let (after, _) = renew(&before, &agent(), &key(&before), now());
        assert_eq!(ended(&before, &after.unwrap(), now()), None);
    }

    #[test]
    fn a_lost_publisher_is_told_from_one_that_finished() {
        let before = Build { failure: Some(fail(Reason::Network)), ..committed() };
        let lost = expire(&before, tries(), now() + super::super::TTL + 1).unwrap();
        let lost = ended(&before, &lost, now()).unwrap();
        assert_eq!((lost.reason, lost.failure), (Some(Reason::AgentLost), None), "not of the attempt before");

        let outcomes = spec().targets().map(|t| (t.to_string(), Outcome::Moved)).collect();
        let snapshot = Snapshot { end: Some(AttemptEnd::Answered), outcomes, ..Snapshot::default() };
        let said = Report { lease: key(&before), seq: 1, snapshot };
        let Taken::Applied(after) = report((&before, &spec()), &agent(), &said, tries(), now()) else {
            panic!()
        };
        assert_eq!(ended(&before, &after, now()).unwrap().reason, None);
    }
}
