//! Dead letters: given up on, replayed, discarded (pure).

use kiln_protocol::id::SubmitSeq;
use kiln_protocol::message::Outcome;
use kiln_protocol::state::{Event, IllegalTransition};
use kiln_protocol::{BuildSpec, Reason, State, Target};

use super::SECOND;
use super::attempt::plain;
use crate::build::{Build, Head, Micros, Spent};

/// A committed build whose tags cannot be moved for this long needs a person.
pub const GIVE_UP_AFTER: Micros = 24 * 3600 * SECOND;

/// A dead letter cannot be tried again like this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayRefused {
    /// It is not one.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// It would publish an older image over a newer one.
    #[error(
        "a newer build published {0} meanwhile; replay it as the newest build with --take-head, or discard it"
    )]
    NewerHead(Target),
}

/// Gives up on the tags of a committed build.
pub fn give_up_publishing(build: &Build, now: Micros) -> Option<Build> {
    let commit = build.commit.as_ref().filter(|_| build.state == State::Pushing)?;
    if commit.at.saturating_add(GIVE_UP_AFTER) >= now {
        return None;
    }
    let mut after = build.clone();
    after.lease = None;
    after.reason = Some(Reason::PartialPublish);
    let message = "its tags could not be moved for a day after the commit".to_owned();
    after.failure = Some(plain(Reason::PartialPublish, message));
    after.enter(Event::GaveUp, now).ok()?;
    Some(after)
}

/// Tries a dead letter again. What is committed is not built again: its open tags move, where it is the newest. `newest` is a fresh place in the order of submission, if the person wants the
/// build to count as the newest of its targets.
pub fn replay<'a>(
    build: &Build,
    spec: &BuildSpec,
    head: impl Fn(&Target) -> Option<&'a Head>,
    newest: Option<SubmitSeq>,
    now: Micros,
) -> Result<Build, ReplayRefused> {
    let mut after = build.clone();
    after.enter(Event::Replayed, now)?;
    after.submit_seq = newest.unwrap_or(build.submit_seq);
    // What is committed asks before every tag anyway.
    let newer = |t: &&Target| head(t).is_some_and(|head| head.submit_seq > after.submit_seq);
    if let (None, Some(target)) = (&build.commit, spec.targets().find(newer)) {
        return Err(ReplayRefused::NewerHead(target.clone()));
    }
    if let Some(commit) = &mut after.commit {
        commit.at = now;
    } else {
        after.attempt = build.attempt.next();
        after.last_seq = 0;
    }
    after.spent = Spent::default();
    after.waited = 0;
    after.avoid = None;
    after.reason = None;
    after.not_before = now;
    Ok(after)
}

/// Nobody wants it any more.
pub fn discard(build: &Build, spec: &BuildSpec, now: Micros) -> Result<Build, IllegalTransition> {
    let mut after = build.clone();
    after.enter(Event::Discarded, now)?;
    let open = build.open_targets(spec);
    if let Some(commit) = &mut after.commit {
        let given_up = || Outcome::Failed("discarded as a dead letter".to_owned());
        commit.outcomes.extend(open.into_iter().map(|target| (target.to_string(), given_up())));
        after.reason = Some(Reason::PartialPublish);
    }
    Ok(after)
}

#[cfg(test)]
mod tests {
    use kiln_protocol::BuildId;

    use super::super::testing::{building, committed, fail, now, spec, tries};
    use super::super::{end_attempt, lease};
    use super::*;

    fn dead() -> Build {
        end_attempt(&building(), fail(Reason::HookFault), tries(), now()).unwrap()
    }

    fn nobody<'a>(_: &Target) -> Option<&'a Head> {
        None
    }

    #[test]
    fn a_replay_starts_with_fresh_budgets_and_the_next_attempt() {
        let mut build = dead();
        build.spent.transient = 4;
        let after = replay(&build, &spec(), nobody, None, now()).unwrap();
        assert_eq!((after.state, after.attempt.get(), after.spent), (State::Pending, 2, Spent::default()));
        assert_eq!(after.ended_at, None);
        assert!(replay(&after, &spec(), nobody, None, now()).is_err(), "a second click is refused");
    }

    #[test]
    fn a_replay_does_not_publish_over_a_newer_build() {
        let build = dead();
        let newer = Head { submit_seq: SubmitSeq(build.submit_seq.0 + 1), build: BuildId::generate() };
        let refused = replay(&build, &spec(), |_| Some(&newer), None, now());
        assert!(matches!(refused, Err(ReplayRefused::NewerHead(_))));
        let newest = SubmitSeq(newer.submit_seq.0 + 1);
        let after = replay(&build, &spec(), |_| Some(&newer), Some(newest), now()).unwrap();
        assert_eq!(after.submit_seq, newest);
    }

    #[test]
    fn a_discard_is_final_and_a_late_report_changes_nothing() {
        let after = discard(&dead(), &spec(), now()).unwrap();
        assert_eq!((after.state, after.reason), (State::Failed, Some(Reason::HookFault)));
        assert!(discard(&after, &spec(), now()).is_err());
    }

    #[test]
    fn a_committed_build_gives_up_after_a_day_and_is_replayed_without_a_rebuild() {
        let build = committed();
        assert_eq!(give_up_publishing(&build, now() + GIVE_UP_AFTER), None);
        let dead = give_up_publishing(&build, now() + GIVE_UP_AFTER + 1).unwrap();
        assert_eq!(dead.state, State::DeadLetter);
        let again = replay(&dead, &spec(), nobody, None, now()).unwrap();
        assert_eq!(
            (again.state, again.attempt, again.commit.is_some()),
            (State::Pushing, build.attempt, true)
        );
        assert_eq!(lease::expire(&again, tries(), now()), None);
        let gone = discard(&dead, &spec(), now()).unwrap();
        assert_eq!((gone.state, gone.reason), (State::Failed, Some(Reason::PartialPublish)));
        assert_eq!(gone.commit.unwrap().outcomes.len(), 2);
    }
}
