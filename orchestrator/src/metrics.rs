//! Numbers of an orchestrator for Prometheus (shell: counters in memory; [`changes`] is pure).
//!
//! Counters count what this process committed. Gauges are the whole record, read for whoever asks: every
//! orchestrator on one record shows the same.

use std::collections::BTreeSet;

use kiln_protocol::state::{self, Event};
use kiln_protocol::{Reason, State};
use prometheus::core::Collector;
use prometheus::{Gauge, Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::build::{Build, Micros};

/// From "a slot was free" to a queue of an hour.
const QUEUE_SECONDS: [f64; 10] = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 1800.0, 3600.0];
/// States of builds that are not over.
const LIVE: [State; 3] = [State::Pending, State::Building, State::Pushing];

/// Something that is counted once it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The state is another.
    Moved(State, State),
    /// An agent took it, so long after it could have been taken.
    Taken(Micros),
    /// There will be another attempt.
    Retried(Reason),
    /// The system gave up.
    GivenUp(Reason),
}

/// What is counted of a change.
pub(crate) fn changes(before: &Build, after: &Build) -> Vec<Change> {
    if before.state == after.state {
        return Vec::new();
    }
    let failure = || after.failure.as_ref().map_or(Reason::Unknown, |failure| failure.reason);
    let also = match (before.state, after.state) {
        (State::Pending, State::Building) => after.lease.as_ref().map(|lease| {
            let due = before.pending_since.max(before.not_before);
            Change::Taken(lease.since.saturating_sub(due).max(0))
        }),
        (State::Building | State::Pushing, State::Pending) => Some(Change::Retried(failure())),
        (_, State::DeadLetter) => Some(Change::GivenUp(after.reason.unwrap_or_else(failure))),
        _ => None,
    };
    std::iter::once(Change::Moved(before.state, after.state)).chain(also).collect()
}

/// What the record says of all builds, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Builds by state; none of a state that is missing.
    pub(crate) counts: Vec<(State, u64)>,
    /// When the oldest build that waits was submitted.
    pub(crate) oldest_pending: Option<Micros>,
    /// Messages that the bus has not confirmed.
    pub(crate) outbox: u64,
    /// Since when the oldest of them waits.
    pub(crate) outbox_oldest: Option<Micros>,
}

/// The numbers of one orchestrator.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    builds: IntGaugeVec,
    oldest_pending: Gauge,
    queued: Histogram,
    transitions: IntCounterVec,
    retries: IntCounterVec,
    given_up: IntCounterVec,
    dead_letters: IntGauge,
    outbox: IntGauge,
    outbox_oldest: Gauge,
}

impl Metrics {
    /// Everything at 0. Fails only if a name or a label of this file is none.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let queued = HistogramOpts::new(QUEUED.0, QUEUED.1).buckets(QUEUE_SECONDS.to_vec());
        let metrics = Self {
            builds: gauges(&registry, ("kiln_builds", "Builds that are not over."), &["state"])?,
            oldest_pending: registered(&registry, Gauge::new(OLDEST.0, OLDEST.1))?,
            queued: registered(&registry, Histogram::with_opts(queued))?,
            transitions: counters(&registry, TRANSITIONS, &["from", "to"])?,
            retries: counters(&registry, RETRIES, &["reason"])?,
            given_up: counters(&registry, GIVEN_UP, &["reason"])?,
            dead_letters: registered(&registry, IntGauge::new(DEAD.0, DEAD.1))?,
            outbox: registered(&registry, IntGauge::new(OUTBOX.0, OUTBOX.1))?,
            outbox_oldest: registered(&registry, Gauge::new(OUTBOX_OLDEST.0, OUTBOX_OLDEST.1))?,
            registry,
        };
        metrics.zero()?;
        Ok(metrics)
    }

    fn zero(&self) -> prometheus::Result<()> {
        let info = gauges(
            &self.registry,
            ("kiln_build_info", "1; the labels say what runs."),
            &["component", "version"],
        )?;
        info.with_label_values(&["orchestrator", env!("CARGO_PKG_VERSION")]).set(1);
        for state in LIVE {
            self.builds.with_label_values(&[state.label()]);
        }
        for (from, to) in transitions() {
            self.transitions.with_label_values(&[from, to]);
        }
        for reason in Reason::ALL {
            self.retries.with_label_values(&[reason.label()]);
            self.given_up.with_label_values(&[reason.label()]);
        }
        Ok(())
    }

    /// What [`Metrics`] gathers. Its gauges are those of the last scrape.
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(crate) fn count(&self, change: Change) {
        match change {
            Change::Moved(from, to) => self.transitions.with_label_values(&[from.label(), to.label()]).inc(),
            Change::Taken(after) => self.queued.observe(seconds(after)),
            Change::Retried(reason) => self.retries.with_label_values(&[reason.label()]).inc(),
            Change::GivenUp(reason) => self.given_up.with_label_values(&[reason.label()]).inc(),
        }
    }

    pub(crate) fn show(&self, standing: &Standing) {
        let count = |state: State| {
            let found = standing.counts.iter().find(|(found, _)| *found == state);
            found.map_or(0, |(_, builds)| i64::try_from(*builds).unwrap_or(i64::MAX))
        };
        for state in LIVE {
            self.builds.with_label_values(&[state.label()]).set(count(state));
        }
        self.dead_letters.set(count(State::DeadLetter));
        self.oldest_pending.set(seconds(standing.oldest_pending.unwrap_or(0)));
        self.outbox.set(i64::try_from(standing.outbox).unwrap_or(i64::MAX));
        self.outbox_oldest.set(seconds(standing.outbox_oldest.unwrap_or(0)));
    }
}

/// Name and help of a metric.
type Named = (&'static str, &'static str);

const OLDEST: Named = (
    "kiln_oldest_pending_timestamp_seconds",
    "When the oldest build that waits for an agent was submitted; 0 if none waits.",
);
const QUEUED: Named = (
    "kiln_build_queue_duration_seconds",
    "Time from when an attempt could begin to when an agent took it; pauses before a retry are not in it.",
);
const TRANSITIONS: Named = ("kiln_state_transitions_total", "Changes of state that this process committed.");
const RETRIES: Named = ("kiln_retries_total", "Attempts that ended and are followed by another.");
const GIVEN_UP: Named = ("kiln_dead_lettered_total", "Builds that the system gave up.");
const DEAD: Named = ("kiln_dead_letters", "Builds that were given up and wait for a person.");
const OUTBOX: Named = ("kiln_outbox_pending", "Messages that the broker has not confirmed.");
const OUTBOX_OLDEST: Named = (
    "kiln_outbox_oldest_timestamp_seconds",
    "When the oldest of these messages was written; 0 if none waits.",
);

/// Every change of state that an event can make.
fn transitions() -> BTreeSet<(&'static str, &'static str)> {
    let events = || Event::ALL.iter().flat_map(|event| [(false, *event), (true, *event)]);
    let of = |from: State| {
        let after = events().filter_map(move |(committed, event)| state::next(from, committed, event).ok());
        after.filter(move |to| *to != from).map(move |to| (from.label(), to.label()))
    };
    State::ALL.iter().copied().flat_map(of).collect()
}

#[expect(clippy::cast_precision_loss, reason = "microseconds since 1970 fit until the year 2255")]
fn seconds(micros: Micros) -> f64 {
    micros as f64 / 1e6
}

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<C>,
) -> prometheus::Result<C> {
    let made = made?;
    registry.register(Box::new(made.clone()))?;
    Ok(made)
}

fn gauges(registry: &Registry, (name, help): Named, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    registered(registry, IntGaugeVec::new(Opts::new(name, help), labels))
}

fn counters(registry: &Registry, (name, help): Named, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

#[cfg(test)]
mod tests {
    use kiln_protocol::result::{Failure, Phase};

    use super::*;
    use crate::decide::testing::{building, claimant, committed, now, pending, tries};
    use crate::decide::{SECOND, claim, end_attempt};

    fn fail(reason: Reason) -> Failure {
        Failure::new(reason, Phase::Build, String::new())
    }

    #[test]
    fn the_pause_before_a_retry_is_no_time_in_the_queue() {
        let waits = Build { pending_since: now() - 60 * SECOND, not_before: now() - 7 * SECOND, ..pending() };
        let lane = kiln_protocol::message::Lane::Build;
        let taken = claim(&waits, claimant(), lane, Vec::new(), now()).unwrap();
        let moved = Change::Moved(State::Pending, State::Building);
        assert_eq!(changes(&waits, &taken), [moved, Change::Taken(7 * SECOND)]);
    }

    #[test]
    fn what_is_retried_or_given_up_counts_with_its_reason() {
        let (build, network) = (building(), Reason::Network);
        let retried = end_attempt(&build, fail(network), tries(), now()).unwrap();
        let moved = Change::Moved(State::Building, State::Pending);
        assert_eq!(changes(&build, &retried), [moved, Change::Retried(network)]);
        let dead = end_attempt(&build, fail(Reason::HookFault), tries(), now()).unwrap();
        let moved = Change::Moved(State::Building, State::DeadLetter);
        assert_eq!(changes(&build, &dead), [moved, Change::GivenUp(Reason::HookFault)]);
        assert_eq!(changes(&committed(), &committed()), []);
    }

    #[test]
    fn every_set_of_labels_is_there_with_0_before_anything_happens() {
        let metrics = Metrics::new().unwrap();
        let families = metrics.registry().gather();
        let series = |name: &str| families.iter().find(|f| f.name() == name).unwrap().get_metric();
        for name in ["kiln_retries_total", "kiln_dead_lettered_total"] {
            assert_eq!(series(name).len(), Reason::ALL.len(), "{name}");
            assert!(series(name).iter().all(|metric| metric.get_counter().get_value() < 0.5), "{name}");
        }
        assert_eq!(series("kiln_builds").len(), LIVE.len());
        let moves = transitions();
        assert!(moves.contains(&("PENDING", "BUILDING")) && !moves.contains(&("SUCCESS", "PENDING")));
        assert_eq!(series("kiln_state_transitions_total").len(), moves.len());
    }
}
