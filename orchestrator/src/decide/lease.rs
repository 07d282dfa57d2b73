//! Leases: given, renewed, revoked, expired (pure).

use kiln_protocol::id::{AgentId, BootId, ClaimId, LeaseToken};
use kiln_protocol::message::{Lane, LeaseKey, Renewed, RequiredPolicy, Snapshot, Standing};
use kiln_protocol::state::{Event, IllegalTransition};
use kiln_protocol::{BuildSpec, Reason, State};

use super::attempt::queue_limit;
use super::attempt::{Tries, asked_for, end_attempt, plain};
use super::dead::GIVE_UP_AFTER;
use super::{CancelRefused, SECOND, is_due};
use crate::build::{Build, CancelWish, Lease, Micros};

/// A lease ends this long after its last renewal: six renewals may be lost.
pub const TTL: Micros = 30 * SECOND;
/// An agent ends a build by itself at its timeout; after this much more it is not believed to.
pub const OVERDUE_GRACE: Micros = 120 * SECOND;
/// A cancel that no agent confirms within this time needs no agent.
pub const CANCEL_GRACE: Micros = 60 * SECOND;

/// Who asks for a lease.
#[derive(Debug, Clone)]
pub struct Claimant {
    /// The agent.
    pub agent: AgentId,
    /// Its run.
    pub boot: BootId,
    /// The wish.
    pub claim: ClaimId,
    /// A fresh random token.
    pub token: LeaseToken,
}

/// The build is not to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClaimRefused {
    /// It is not due, or cancelled.
    #[error("it is not due")]
    NotDue,
    /// It is in another state.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
}

/// Gives a due build to an agent.
pub fn claim(
    build: &Build,
    who: Claimant,
    lane: Lane,
    policies: Vec<RequiredPolicy>,
    now: Micros,
) -> Result<Build, ClaimRefused> {
    if !is_due(build.not_before, now) || build.lease.is_some() || build.cancel.is_some() {
        return Err(ClaimRefused::NotDue);
    }
    let mut after = build.clone();
    match lane {
        Lane::Build => {
            after.enter(Event::Claimed, now)?;
            after.policies = policies;
            after.snapshot = Snapshot::default();
            after.last_seq = 0;
        }
        Lane::Publish if build.state == State::Pushing && build.commit.is_some() => after.last_seq = 0,
        Lane::Publish => return Err(ClaimRefused::NotDue),
    }
    let Claimant { agent, boot, claim, token } = who;
    let until = now.saturating_add(TTL);
    after.lease = Some(Lease { agent, boot, claim, token, lane, since: now, until, renewed: false });
    Ok(after)
}

/// Prolongs a lease, or says what became of it.
pub fn renew(build: &Build, from: &AgentId, key: &LeaseKey, now: Micros) -> (Option<Build>, Renewed) {
    let last_seq = build.last_seq;
    if build.held_by(from, key).is_none() {
        let finished = build.finished.as_ref() == Some(key);
        let standing = if finished { Standing::Finished } else { Standing::Revoked };
        // Whatever is in its spool, nobody wants it any more.
        return (None, Renewed { standing, last_seq: u64::MAX });
    }
    let mut after = build.clone();
    if let Some(lease) = &mut after.lease {
        // Also when that is earlier: the clock was set back, and the old end would outlive a dead agent.
        lease.until = now.saturating_add(TTL);
        lease.renewed = true;
    }
    let standing = match &build.cancel {
        Some(wish) if build.commit.is_none() => Standing::Cancel(wish.reason),
        _ => Standing::Held,
    };
    (Some(after), Renewed { standing, last_seq })
}

/// Asks for the end of a build. Nobody needs to work on it: then it ends at once.
pub fn cancel(build: &Build, reason: Reason, now: Micros) -> Result<Build, CancelRefused> {
    if build.state == State::Cancelled {
        return Ok(build.clone());
    }
    if build.state.is_over() {
        return Err(CancelRefused::Over(build.state));
    }
    if build.commit.is_some() {
        return Err(CancelRefused::Committed);
    }
    let mut after = build.clone();
    if after.cancel.is_none() {
        after.cancel = Some(CancelWish { at: now, reason });
    }
    if build.state == State::Pending {
        after.reason = Some(reason);
        after.failure = Some(asked_for(reason));
        after.enter(Event::Cancelled, now).map_err(|e| CancelRefused::Over(e.state))?;
    }
    Ok(after)
}

/// The agent went silent. Nothing happens while the lease lasts.
pub fn expire(build: &Build, tries: Tries, now: Micros) -> Option<Build> {
    build.lease.as_ref().filter(|lease| ran_out(lease, now))?;
    revoke(build, "the agent that built it went silent", tries, now)
}

/// A renewal never reaches farther than one lease time. What does was written before the clock was set back, and
/// its holder has had the time of the amnesty to renew it.
const fn ran_out(lease: &Lease, now: Micros) -> bool {
    lease.until < now || lease.until > farthest_lease(now)
}

/// No lease that is renewed ends after this.
pub const fn farthest_lease(now: Micros) -> Micros {
    now.saturating_add(2 * TTL)
}

/// The agent started anew, so its earlier run is dead.
pub fn release(build: &Build, tries: Tries, now: Micros) -> Option<Build> {
    build.lease.as_ref()?;
    revoke(build, "the agent that built it started anew", tries, now)
}

fn revoke(build: &Build, message: &str, tries: Tries, now: Micros) -> Option<Build> {
    if build.commit.is_some() {
        return Some(Build { lease: None, not_before: now, ..build.clone() });
    }
    let phase = build.snapshot.phase;
    let failure = plain(Reason::AgentLost, message.to_owned());
    let failure = kiln_protocol::result::Failure { phase: phase.unwrap_or(failure.phase), ..failure };
    let after = end_attempt(build, failure, tries, now).ok()?;
    // The holder may live on: it must hear that it was revoked, not that it finished.
    Some(Build { finished: build.finished, ..after })
}

/// An attempt that should have ended long ago, or a cancel that nobody confirmed.
pub fn overdue(build: &Build, spec: &BuildSpec, tries: Tries, now: Micros) -> Option<Build> {
    let lease = build.lease.as_ref().filter(|_| build.commit.is_none())?;
    let unconfirmed = build.cancel.as_ref().is_some_and(|wish| wish.at.saturating_add(CANCEL_GRACE) < now);
    let late = lease.since.saturating_add(timeout_of(spec)).saturating_add(OVERDUE_GRACE) < now;
    if !unconfirmed && !late {
        return None;
    }
    let message = "its agent did not end it at its time limit".to_owned();
    let after = end_attempt(build, plain(Reason::Timeout, message), tries, now).ok()?;
    Some(Build { finished: build.finished, ..after })
}

fn timeout_of(spec: &BuildSpec) -> Micros {
    Micros::try_from(spec.request.timeout.as_micros()).unwrap_or(Micros::MAX)
}

/// When somebody must look at a build again that nobody changes until then: nothing becomes due before.
pub fn due_at(build: &Build, spec: &BuildSpec) -> Option<Micros> {
    let lease = build.lease.as_ref();
    let expires = lease.map(|lease| lease.until);
    let ends = if build.state == State::Pending {
        Some(build.pending_since.saturating_add(queue_limit(spec)).saturating_sub(build.waited))
    } else if let Some(commit) = build.commit.as_ref().filter(|_| build.state == State::Pushing) {
        Some(commit.at.saturating_add(GIVE_UP_AFTER))
    } else {
        lease.map(|lease| lease.since.saturating_add(timeout_of(spec)).saturating_add(OVERDUE_GRACE))
    };
    let wish = build.cancel.as_ref().filter(|_| lease.is_some());
    let unconfirmed = wish.map(|wish| wish.at.saturating_add(CANCEL_GRACE));
    [expires, ends, unconfirmed].into_iter().flatten().min().filter(|_| !build.state.is_over())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{agent, building, claimant, committed, key, now, pending, spec, tries};
    use super::*;

    #[test]
    fn a_claim_needs_a_due_build_that_nobody_has() {
        let build = pending();
        let given = claim(&build, claimant(), Lane::Build, Vec::new(), now()).unwrap();
        assert_eq!((given.state, given.lease.as_ref().unwrap().until), (State::Building, now() + TTL));
        let refused = |build: &Build| claim(build, claimant(), Lane::Build, Vec::new(), now()).unwrap_err();
        assert_eq!(refused(&Build { not_before: now() + 1, ..pending() }), ClaimRefused::NotDue);
        assert_eq!(refused(&given), ClaimRefused::NotDue);
        assert!(matches!(refused(&Build { state: State::Failed, ..pending() }), ClaimRefused::Illegal(_)));
        let wish = Some(CancelWish { at: now(), reason: Reason::Cancelled });
        assert_eq!(refused(&Build { cancel: wish, ..pending() }), ClaimRefused::NotDue);
    }

    #[test]
    fn only_a_committed_build_goes_to_the_publish_lane() {
        let publish = |build: &Build| claim(build, claimant(), Lane::Publish, Vec::new(), now());
        assert_eq!(publish(&pending()), Err(ClaimRefused::NotDue));
        let lost = Build { lease: None, ..committed() };
        let given = publish(&lost).unwrap();
        assert_eq!((given.state, given.attempt), (State::Pushing, lost.attempt));
        assert!(claim(&lost, claimant(), Lane::Build, Vec::new(), now()).is_err());
    }

    #[test]
    fn a_renewal_tells_the_three_standings_apart() {
        let build = building();
        let (after, renewed) = renew(&build, &agent(), &key(&build), now() + SECOND);
        assert_eq!(renewed, Renewed { standing: Standing::Held, last_seq: 0 });
        assert_eq!(after.unwrap().lease.unwrap().until, now() + SECOND + TTL);

        let cancelled = cancel(&build, Reason::Cancelled, now()).unwrap();
        let (_, renewed) = renew(&cancelled, &agent(), &key(&build), now());
        assert_eq!(renewed.standing, Standing::Cancel(Reason::Cancelled));

        let lost = expire(&build, tries(), now() + TTL + 1).unwrap();
        assert_eq!(renew(&lost, &agent(), &key(&build), now()).1.standing, Standing::Revoked);
        let ended = end_attempt(&build, plain(Reason::BuildFailed, String::new()), tries(), now()).unwrap();
        assert_eq!(renew(&ended, &agent(), &key(&build), now()).1.standing, Standing::Finished);
    }

    #[test]
    fn a_lease_that_lasts_does_not_expire_even_if_the_clock_goes_back() {
        let build = building();
        assert_eq!(expire(&build, tries(), now() + TTL), None);
        let earlier = now() - 3600 * SECOND;
        let (renewed, _) = renew(&build, &agent(), &key(&build), earlier);
        let renewed = renewed.unwrap();
        assert_eq!(expire(&renewed, tries(), earlier + TTL), None);
        assert!(expire(&renewed, tries(), earlier + TTL + 1).is_some(), "not an hour later");
        assert!(expire(&build, tries(), earlier).is_some(), "nobody renewed it since the clock was set back");
        let after = expire(&build, tries(), now() + TTL + 1).unwrap();
        assert_eq!((after.state, after.attempt.get()), (State::Pending, 2));
    }

    #[test]
    fn cancel_ends_what_waits_flags_what_runs_and_is_too_late_after_the_commit() {
        let at_once = cancel(&pending(), Reason::Cancelled, now()).unwrap();
        assert_eq!(at_once.state, State::Cancelled);
        assert_eq!(cancel(&at_once, Reason::Cancelled, now()).unwrap(), at_once, "asking twice is the same");
        let flagged = cancel(&building(), Reason::Cancelled, now()).unwrap();
        assert_eq!(flagged.state, State::Building);
        let lost = expire(&flagged, tries(), now() + TTL + 1).unwrap();
        assert_eq!(lost.state, State::Cancelled, "a lost agent with a cancelled build is no reason to retry");
        assert_eq!(cancel(&committed(), Reason::Cancelled, now()), Err(CancelRefused::Committed));
        let over = Build { state: State::DeadLetter, ..pending() };
        assert_eq!(cancel(&over, Reason::Cancelled, now()), Err(CancelRefused::Over(State::DeadLetter)));
    }

    #[test]
    fn what_is_overdue_ends_without_its_agent() {
        let (build, spec) = (building(), spec());
        let limit = Micros::try_from(spec.request.timeout.as_micros()).unwrap() + OVERDUE_GRACE;
        assert_eq!(overdue(&build, &spec, tries(), now() + limit), None);
        let late = overdue(&build, &spec, tries(), now() + limit + 1).unwrap();
        assert_eq!((late.state, late.reason), (State::Failed, Some(Reason::Timeout)));
        let flagged = cancel(&build, Reason::Cancelled, now()).unwrap();
        let unconfirmed = overdue(&flagged, &spec, tries(), now() + CANCEL_GRACE + 1).unwrap();
        assert_eq!(unconfirmed.state, State::Cancelled);
        assert_eq!(
            overdue(&committed(), &spec, tries(), now() + 10 * limit),
            None,
            "roll-forward has no timeout"
        );
    }

    #[test]
    fn a_committed_build_whose_holder_is_lost_rolls_forward() {
        let after = expire(&committed(), tries(), now() + TTL + 1).unwrap();
        assert_eq!((after.state, after.lease.is_none(), after.attempt.get()), (State::Pushing, true, 1));
    }
}
