//! Reports of agents: snapshots, of which the highest number says it all (pure).

use kiln_protocol::id::AgentId;
use kiln_protocol::message::{AttemptEnd, Outcome, Report};
use kiln_protocol::state::Event;
use kiln_protocol::{BuildSpec, Reason, State};

use super::SECOND;
use super::attempt::{Tries, end_attempt, plain};
use crate::build::{Build, Commit, Micros};

/// Pause before another agent tries to move the tags that one gave up on.
const PUBLISH_AGAIN_AFTER: Micros = 10 * SECOND;

/// What became of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It changed the build.
    Applied(Box<Build>),
    /// A newer one was there before.
    Old,
    /// Its sender does not hold the lease.
    Stale,
}

/// Takes a report of an agent.
pub fn report(
    (build, spec): (&Build, &BuildSpec),
    from: &AgentId,
    report: &Report,
    tries: Tries,
    now: Micros,
) -> Taken {
    if build.held_by(from, &report.lease).is_none() {
        return Taken::Stale;
    }
    if report.seq <= build.last_seq {
        return Taken::Old;
    }
    let mut after = build.clone();
    after.last_seq = report.seq;
    after.snapshot = report.snapshot.clone();
    let applied = match &mut after.commit {
        Some(commit) => {
            merge(commit, spec, report);
            roll_forward(after, spec, report, now)
        }
        None => before_commit(after, report, tries, now),
    };
    Taken::Applied(Box::new(applied))
}

fn before_commit(mut after: Build, report: &Report, tries: Tries, now: Micros) -> Build {
    if report.snapshot.candidate.is_some() && after.state == State::Building {
        // Legal in this state, by the table.
        let _ = after.enter(Event::CandidateUploaded, now);
    }
    match &report.snapshot.end {
        Some(AttemptEnd::Failed(failure)) => {
            end_attempt(&after, (**failure).clone(), tries, now).unwrap_or(after)
        }
        // Without a commit record there is no success. The lease runs out, and another attempt begins.
        Some(AttemptEnd::Answered) | None => after,
    }
}

/// An answer about a target is never taken back.
fn merge(commit: &mut Commit, spec: &BuildSpec, report: &Report) {
    for destination in &spec.destinations {
        let name = destination.to_string();
        if let Some(outcome) = report.snapshot.outcomes.get(&name) {
            commit.outcomes.entry(name).or_insert_with(|| outcome.clone());
        }
    }
}

fn roll_forward(mut after: Build, spec: &BuildSpec, report: &Report, now: Micros) -> Build {
    let Some(commit) = &after.commit else { return after };
    let answered = spec.destinations.iter().all(|d| commit.outcomes.contains_key(&d.to_string()));
    let failed = commit.outcomes.values().any(|outcome| matches!(outcome, Outcome::Failed(_)));
    match (&report.snapshot.end, answered) {
        (Some(_), true) => {
            after.finished = after.lease_key();
            after.lease = None;
            if failed {
                after.reason = Some(Reason::PartialPublish);
                after.failure = Some(plain(Reason::PartialPublish, refused(&after)));
            } else {
                after.failure = None;
            }
            // Legal in this state, by the table.
            let _ = after.enter(if failed { Event::PartlyPublished } else { Event::Published }, now);
        }
        // The holder gives up or goes; somebody else moves the rest.
        (Some(_), false) => {
            after.finished = after.lease_key();
            after.lease = None;
            after.not_before = now.saturating_add(PUBLISH_AGAIN_AFTER);
        }
        (None, _) => {}
    }
    after
}

/// The targets that were refused, and why, for people.
fn refused(build: &Build) -> String {
    let outcomes = build.commit.iter().flat_map(|commit| &commit.outcomes);
    let failed = outcomes.filter_map(|(target, outcome)| match outcome {
        Outcome::Failed(why) => Some(format!("{target} was refused: {why}")),
        Outcome::Moved | Outcome::Overtaken => None,
    });
    failed.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use kiln_protocol::message::Snapshot;
    use proptest::prelude::*;

    use super::super::testing::{agent, building, committed, digest, fail, key, now, spec, tries};
    use super::*;

    fn says(build: &Build, seq: u64, snapshot: Snapshot) -> Report {
        Report { lease: key(build), seq, snapshot }
    }

    fn take(build: &Build, seq: u64, snapshot: Snapshot) -> Taken {
        report((build, &spec()), &agent(), &says(build, seq, snapshot), tries(), now())
    }

    fn applied(taken: Taken) -> Build {
        match taken {
            Taken::Applied(build) => *build,
            other => panic!("{other:?}"),
        }
    }

    fn ended(reason: Reason) -> Snapshot {
        Snapshot { end: Some(AttemptEnd::Failed(Box::new(fail(reason)))), ..Snapshot::default() }
    }

    #[test]
    fn a_candidate_and_an_end_move_the_state() {
        let build = building();
        let uploaded =
            applied(take(&build, 2, Snapshot { candidate: Some(digest(1)), ..Snapshot::default() }));
        assert_eq!((uploaded.state, uploaded.last_seq), (State::Pushing, 2));
        assert_eq!(take(&uploaded, 1, Snapshot::default()), Taken::Old);
        let failed = applied(take(&uploaded, 3, ended(Reason::BuildFailed)));
        assert_eq!((failed.state, failed.finished), (State::Failed, Some(key(&build))));
        let late =
            report((&failed, &spec()), &agent(), &says(&build, 4, Snapshot::default()), tries(), now());
        assert_eq!(late, Taken::Stale, "a final state never changes");
    }

    #[test]
    fn success_needs_the_commit_and_an_answer_per_target() {
        let end = Some(AttemptEnd::Answered);
        let unanswered = Snapshot { end: end.clone(), ..Snapshot::default() };
        let early = applied(take(&building(), 1, unanswered.clone()));
        assert_eq!(early.state, State::Building, "no commit record, no success");

        let build = committed();
        let given_back = applied(take(&build, 1, unanswered));
        assert_eq!((given_back.state, given_back.lease.is_none()), (State::Pushing, true));

        let all = |outcome: &Outcome| spec().targets().map(|t| (t.to_string(), outcome.clone())).collect();
        let outcomes = all(&Outcome::Moved);
        let done = applied(take(&build, 1, Snapshot { end: end.clone(), outcomes, ..Snapshot::default() }));
        assert_eq!((done.state, done.reason), (State::Success, None));

        let outcomes = all(&Outcome::Failed("immutable".to_owned()));
        let partial = applied(take(&build, 1, Snapshot { end, outcomes, ..Snapshot::default() }));
        assert_eq!((partial.state, partial.reason), (State::Failed, Some(Reason::PartialPublish)));
        assert!(partial.failure.unwrap().message.contains("immutable"));
    }

    #[test]
    fn after_the_commit_no_failure_counts_and_no_answer_is_taken_back() {
        let build = committed();
        let target = spec().targets().next().unwrap().to_string();
        let moved = Snapshot { outcomes: [(target.clone(), Outcome::Moved)].into(), ..Snapshot::default() };
        let build = applied(take(&build, 1, moved));
        let mut worse = ended(Reason::Cancelled);
        worse.outcomes.insert(target.clone(), Outcome::Failed("late".to_owned()));
        let after = applied(take(&build, 2, worse));
        assert_eq!((after.state, after.lease.is_none()), (State::Pushing, true));
        assert_eq!(after.commit.unwrap().outcomes[&target], Outcome::Moved);
    }

    /// A run of an attempt: its reports in the order in which the agent wrote them.
    fn run(steps: u64, end: Option<Reason>) -> Vec<Snapshot> {
        let mut snapshots: Vec<Snapshot> = (0..steps)
            .map(|i| Snapshot {
                candidate: (i * 2 > steps).then(|| digest(1)),
                phase: Some(kiln_protocol::result::Phase::Build),
                ..Snapshot::default()
            })
            .collect();
        snapshots.extend(end.map(ended));
        snapshots
    }

    proptest! {
        /// Any order and multiplicity of the same reports gives the same build, as long as the last arrives.
        #[test]
        fn the_order_of_reports_does_not_matter(
            steps in 1u64..8,
            end in proptest::option::of(0..Reason::ALL.len()),
            order in proptest::collection::vec(0usize..16, 0..40),
        ) {
            let build = building();
            let reports: Vec<Report> = run(steps, end.map(|i| Reason::ALL[i])).into_iter()
                .zip(1..)
                .map(|(snapshot, seq)| says(&build, seq, snapshot))
                .collect();
            let feed = |sequence: &mut dyn Iterator<Item = &Report>| {
                sequence.fold(build.clone(), |build, r| match report((&build, &spec()), &agent(), r, tries(), now()) {
                    Taken::Applied(after) => *after,
                    Taken::Old | Taken::Stale => build,
                })
            };
            let straight = feed(&mut reports.iter());
            let shuffled = order.iter().map(|i| &reports[i % reports.len()]);
            let shuffled = feed(&mut shuffled.chain(reports.last()));
            prop_assert_eq!(straight, shuffled);
        }
    }
}
