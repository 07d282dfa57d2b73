//! What the API shows of the record (pure). Proofs of leases stay inside.

use jiff::Timestamp;
use kiln_protocol::State;
use kiln_protocol::api::{BadMessage, BuildDetail, BuildSummary, EndedAttempt};

use crate::build::{Build, Micros};
use crate::decide;
use crate::store::{self, Recorded};

/// Bytes that are shown of a message that nobody could read.
const SHOWN_BYTES: usize = 4 * 1024;

pub(super) fn summary(recorded: &Recorded) -> BuildSummary {
    let Recorded { build, spec } = recorded;
    BuildSummary {
        id: build.id,
        namespace: spec.namespace.clone(),
        pool: build.pool.clone(),
        group: spec.group.clone(),
        priority: spec.priority,
        requester: spec.requester.clone(),
        state: build.state,
        attempt: build.attempt,
        phase: build.snapshot.phase.filter(|_| !build.state.is_over()),
        agent: build.lease.as_ref().map(|lease| lease.agent.clone()),
        reason: build.reason.or_else(|| build.failure.as_ref().map(|failure| failure.reason)),
        failure: build.failure.clone(),
        cancel: build.cancel.as_ref().map(|wish| wish.reason),
        submitted_at: moment(build.submitted_at),
        not_before: later(build).map(moment),
        ended_at: build.ended_at.map(moment),
        destinations: spec.destinations.iter().map(ToString::to_string).collect(),
        digest: build.commit.as_ref().map(|commit| commit.image.digest.clone()),
        outcomes: build.commit.as_ref().map(|commit| commit.outcomes.clone()).unwrap_or_default(),
        retry_of: build.retry_of,
    }
}

pub(super) fn detail(recorded: Recorded, attempts: Vec<decide::EndedAttempt>, now: Micros) -> BuildDetail {
    let summary = summary(&recorded);
    let Recorded { build, spec } = recorded;
    let waited = build.waited_until(now) / 1_000_000;
    let verdicts = build.commit.map_or(build.snapshot.verdicts, |commit| commit.verdicts);
    BuildDetail {
        summary,
        spec,
        waited_seconds: u64::try_from(waited).unwrap_or(0),
        phases: build.snapshot.phases,
        log: build.snapshot.log,
        attempts: attempts.into_iter().map(attempt).collect(),
        policies: build.policies,
        verdicts,
    }
}

fn attempt(ended: decide::EndedAttempt) -> EndedAttempt {
    EndedAttempt {
        attempt: ended.attempt,
        lane: ended.lane,
        agent: ended.agent,
        began_at: moment(ended.began_at),
        ended_at: moment(ended.ended_at),
        reason: ended.reason,
        failure: ended.failure,
    }
}

pub(super) fn bad_message(message: store::BadMessage) -> BadMessage {
    let shown = &message.body[..message.body.len().min(SHOWN_BYTES)];
    BadMessage {
        id: message.id,
        at: moment(message.at),
        queue: message.queue,
        error: message.error,
        body: String::from_utf8_lossy(shown).into_owned(),
        bytes: message.body.len() as u64,
    }
}

/// When a build that is tried again may start.
fn later(build: &Build) -> Option<Micros> {
    (build.state == State::Pending && build.not_before > build.submitted_at).then_some(build.not_before)
}

fn moment(micros: Micros) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MAX)
}
