//! The end of an attempt: try again, or end the build (pure).

use kiln_protocol::reason::RetryClass;
use kiln_protocol::result::{Failure, Phase};
use kiln_protocol::state::{Event, IllegalTransition};
use kiln_protocol::{BuildSpec, Reason, State};

use super::SECOND;
use crate::build::{Build, Micros};

/// First delay before a retry; it doubles with every further one.
const FIRST_DELAY: Micros = 10 * SECOND;
/// Longest delay, before the jitter.
const LONGEST_DELAY: Micros = 600 * SECOND;
/// Lost agents that a build may cost: then it is more likely the cause than the victim.
const MAX_LOST: u32 = 3;
/// An unexplained failure is tried once more.
const MAX_UNEXPLAINED: u32 = 1;
/// Ends that count against no budget; without a cap a node that refuses everything would spin for ever.
pub const MAX_UNCOUNTED: u32 = 10;

/// What a retry needs from outside.
#[derive(Debug, Clone, Copy)]
pub struct Tries {
    /// Attempts that the build may have.
    pub max_attempts: u32,
    /// Factor of the delay, from 0.5 to 1.5, so that builds that failed together do not come back together.
    pub jitter: f64,
}

enum Next {
    Retry { delay: Micros, elsewhere: bool },
    End,
}

/// Ends the running attempt of a build that is not committed.
pub fn end_attempt(
    build: &Build,
    failure: Failure,
    tries: Tries,
    now: Micros,
) -> Result<Build, IllegalTransition> {
    let mut after = build.clone();
    after.finished = build.lease_key();
    let lease = after.lease.take();
    if let Some(wish) = &build.cancel {
        // Whatever the attempt died of: its end is what was asked for.
        after.reason = Some(wish.reason);
        after.failure = Some(Failure { phase: failure.phase, ..asked_for(wish.reason) });
        after.enter(Event::Cancelled, now)?;
        return Ok(after);
    }
    let reason = failure.reason;
    after.failure = Some(failure);
    match spend(&mut after, reason, lease.as_ref().is_some_and(|l| l.renewed), tries) {
        Next::Retry { delay, elsewhere } => {
            after.enter(Event::Retried, now)?;
            after.attempt = build.attempt.next();
            after.not_before = now.saturating_add(delay);
            after.avoid = lease.map(|l| l.agent).filter(|_| elsewhere);
            after.last_seq = 0;
        }
        Next::End => {
            after.reason = Some(reason);
            after.enter(reason.end_state().into(), now)?;
        }
    }
    Ok(after)
}

/// No agent took the build in time.
pub fn queue_timeout(build: &Build, spec: &BuildSpec, now: Micros) -> Option<Build> {
    let limit = queue_limit(spec);
    if build.state != State::Pending || build.waited_until(now) <= limit {
        return None;
    }
    let mut after = build.clone();
    let message = format!("no agent took it within {} s", limit / SECOND);
    after.failure = Some(plain(Reason::QueueTimeout, message));
    after.reason = Some(Reason::QueueTimeout);
    after.enter(Event::Failed, now).ok()?;
    Some(after)
}

/// How long a build may wait, over all attempts.
pub(super) fn queue_limit(spec: &BuildSpec) -> Micros {
    Micros::try_from(spec.queue_timeout.as_micros()).unwrap_or(Micros::MAX)
}

/// The client that waited for the build is gone, and with it the agent in its process.
pub fn client_gone(build: &Build, now: Micros) -> Option<Build> {
    let mut after = build.clone();
    after.lease = None;
    if build.commit.is_some() {
        after.not_before = now;
        return (build.state == State::Pushing && build.lease.is_some()).then_some(after);
    }
    after.failure = Some(plain(Reason::ClientGone, "the client that waited for it is gone".to_owned()));
    after.reason = Some(Reason::ClientGone);
    after.enter(Event::Cancelled, now).ok()?;
    Some(after)
}

/// Counts the end against the budget of its class.
fn spend(build: &mut Build, reason: Reason, renewed: bool, tries: Tries) -> Next {
    let spent = &mut build.spent;
    let (again, elsewhere) = match reason.retry_class() {
        RetryClass::Never => (false, false),
        RetryClass::AgentLost => {
            if renewed {
                spent.lost += 1;
            } else {
                spent.lost_early += 1;
            }
            // One agent that dies at once had bad luck; from the second on the build is suspected.
            let early = if spent.lost_early > 1 { spent.lost_early } else { 0 };
            return at_once(spent.lost + early < MAX_LOST);
        }
        RetryClass::Uncounted => {
            spent.uncounted += 1;
            return at_once(spent.uncounted <= MAX_UNCOUNTED);
        }
        class => {
            spent.transient += 1;
            let once = class == RetryClass::OnceElsewhere;
            spent.unexplained += u32::from(once);
            let left = spent.transient < tries.max_attempts;
            (left && (!once || spent.unexplained <= MAX_UNEXPLAINED), class != RetryClass::Transient)
        }
    };
    if again { Next::Retry { delay: delay(spent.transient, tries.jitter), elsewhere } } else { Next::End }
}

const fn at_once(again: bool) -> Next {
    if again { Next::Retry { delay: 0, elsewhere: false } } else { Next::End }
}

/// `min(600 s, 10 s · 2^(n-1))`, times the jitter.
fn delay(failures: u32, jitter: f64) -> Micros {
    let doubled = FIRST_DELAY.saturating_mul(1 << failures.saturating_sub(1).min(16));
    scale(doubled.min(LONGEST_DELAY), jitter.clamp(0.5, 1.5))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "at most 900 s in microseconds, far below 2^53"
)]
fn scale(delay: Micros, factor: f64) -> Micros {
    (delay as f64 * factor) as Micros
}

/// Why a build ends that somebody wants to end.
pub(super) fn asked_for(reason: Reason) -> Failure {
    let message = match reason {
        Reason::Superseded => "every target belongs to a newer build",
        _ => "somebody asked for it to stop",
    };
    plain(reason, message.to_owned())
}

/// A failure of which no phase is known.
pub(crate) const fn plain(reason: Reason, message: String) -> Failure {
    Failure::new(reason, Phase::Start, message)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{agent, building, fail, now, spec};
    use super::*;

    fn tries(max_attempts: u32) -> Tries {
        Tries { max_attempts, jitter: 1.0 }
    }

    /// Ends attempts for `reason` until the build is over; gives the state and the number of attempts.
    fn exhaust(reason: Reason, renewed: bool) -> (State, u32) {
        let mut build = building();
        for _ in 0..50 {
            if let Some(lease) = &mut build.lease {
                lease.renewed = renewed;
            }
            build = end_attempt(&build, fail(reason), tries(4), now()).unwrap();
            if build.state != State::Pending {
                return (build.state, build.attempt.get());
            }
            let lease = building().lease;
            build.state = State::Building;
            build.lease = lease;
        }
        panic!("a build must end");
    }

    #[test]
    fn every_class_has_its_budget() {
        for (reason, state, attempts) in [
            (Reason::BuildFailed, State::Failed, 1),
            (Reason::PolicyDenied, State::Failed, 1),
            (Reason::HookFault, State::DeadLetter, 1),
            (Reason::RegistryUnavailable, State::DeadLetter, 4),
            (Reason::DiskFull, State::DeadLetter, 4),
            (Reason::Unknown, State::DeadLetter, 2),
            (Reason::OutOfMemory, State::DeadLetter, 2),
            (Reason::AgentLost, State::DeadLetter, 3),
            (Reason::AgentDrain, State::DeadLetter, 11),
            (Reason::Timeout, State::Failed, 1),
            (Reason::Superseded, State::Cancelled, 1),
        ] {
            assert_eq!(exhaust(reason, true), (state, attempts), "{reason}");
        }
        assert_eq!(
            exhaust(Reason::AgentLost, false),
            (State::DeadLetter, 3),
            "an agent killed in its first seconds"
        );
    }

    #[test]
    fn one_early_loss_is_forgiven() {
        let mut build = building();
        build.spent.lost_early = 1;
        build.spent.lost = 1;
        build.lease.as_mut().unwrap().renewed = true;
        let after = end_attempt(&build, fail(Reason::AgentLost), tries(4), now()).unwrap();
        assert_eq!(after.state, State::Pending, "two late losses and one early one");
    }

    #[test]
    fn delays_double_up_to_their_cap() {
        assert_eq!(delay(1, 1.0), 10 * SECOND);
        assert_eq!(delay(3, 1.0), 40 * SECOND);
        assert_eq!(delay(2, 0.5), 10 * SECOND);
        assert_eq!(delay(30, 1.5), 900 * SECOND);
        assert_eq!(delay(u32::MAX, 9.0), 900 * SECOND);
    }

    #[test]
    fn a_node_s_fault_is_avoided_and_a_registry_s_is_not() {
        let after = end_attempt(&building(), fail(Reason::DiskFull), tries(4), now()).unwrap();
        assert_eq!(after.avoid, Some(agent()));
        assert_eq!(after.not_before, now() + 10 * SECOND);
        assert_eq!((after.attempt.get(), after.last_seq, after.lease), (2, 0, None));
        let after = end_attempt(&building(), fail(Reason::Network), tries(4), now()).unwrap();
        assert_eq!(after.avoid, None);
    }

    #[test]
    fn a_wish_to_cancel_beats_every_reason() {
        let mut build = building();
        build.cancel = Some(crate::build::CancelWish { at: now(), reason: Reason::Cancelled });
        for reason in Reason::ALL {
            let after = end_attempt(&build, fail(*reason), tries(4), now()).unwrap();
            assert_eq!((after.state, after.reason), (State::Cancelled, Some(Reason::Cancelled)));
        }
    }

    #[test]
    fn waiting_adds_up_over_attempts() {
        let spec = spec();
        let limit = Micros::try_from(spec.queue_timeout.as_micros()).unwrap();
        let mut build = building();
        build.waited = limit / 2;
        let build = end_attempt(&build, fail(Reason::Network), tries(4), now()).unwrap();
        assert_eq!(queue_timeout(&build, &spec, now() + limit / 2), None);
        let after = queue_timeout(&build, &spec, now() + limit / 2 + 1).unwrap();
        assert_eq!((after.state, after.reason), (State::Failed, Some(Reason::QueueTimeout)));
    }
}
