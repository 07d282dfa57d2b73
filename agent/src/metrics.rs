//! Numbers of an agent for Prometheus (shell: counters in memory).
//!
//! Every set of labels is closed and there from the start with 0, so that a rate sees the first event too.

use std::time::{Duration, Instant};

use kiln_protocol::Reason;
use kiln_protocol::message::{Hook, RequiredPolicy};
use kiln_protocol::reason::EndState;
use kiln_protocol::result::{LogSummary, Phase, PhaseDuration};
use kiln_protocol::verdict::{Outcome, Verdict};
use prometheus::core::Collector;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// From a build that is all cached to one that compiles a world; the library's own buckets end at 10 s.
const BUILD_SECONDS: [f64; 13] =
    [1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0];
/// A policy takes milliseconds; its deadline is seconds. Few, because each is a series per plugin and hook.
const POLICY_SECONDS: [f64; 8] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0];
/// The reason of what succeeded.
const NO_REASON: &str = "none";

/// How an attempt ended, as far as an agent can tell: whether there is another is decided elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// There is an image.
    Success,
    /// By its own fault, a policy or a limit.
    Failed,
    /// Somebody asked for it.
    Cancelled,
    /// The system failed.
    Error,
}

impl Ending {
    const ALL: [Self; 4] = [Self::Success, Self::Failed, Self::Cancelled, Self::Error];

    const fn of(failure: Option<Reason>) -> Self {
        match failure {
            None => Self::Success,
            Some(reason) => match reason.end_state() {
                EndState::Failed => Self::Failed,
                EndState::Cancelled => Self::Cancelled,
                EndState::DeadLetter => Self::Error,
            },
        }
    }

    const fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Error => "error",
        }
    }
}

/// The numbers of one agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    slots: IntGauge,
    running: IntGauge,
    started: IntCounter,
    finished: IntCounterVec,
    duration: HistogramVec,
    phases: HistogramVec,
    killed: IntCounter,
    log_lines: IntCounter,
    log_bytes: IntCounter,
    log_dropped: IntCounter,
    calls: IntCounterVec,
    call_seconds: HistogramVec,
}

/// An attempt that runs; it counts as running until this is dropped, also by a panic.
#[derive(Debug)]
pub struct Running {
    gauge: IntGauge,
    since: Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

impl Metrics {
    /// Everything at 0. Fails only if a name or a label of this file is none.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let metrics = Self {
            slots: gauge(&registry, "kiln_agent_slots", "Builds that this agent runs at once.")?,
            running: gauge(&registry, "kiln_builds_running", "Attempts that run now.")?,
            started: counter(&registry, "kiln_builds_started_total", "Attempts that began.")?,
            finished: counters(&registry, FINISHED, &["result", "reason"])?,
            duration: histograms(&registry, DURATION, &["result"], &BUILD_SECONDS)?,
            phases: histograms(&registry, PHASES, &["phase"], &BUILD_SECONDS)?,
            killed: counter(&registry, KILLED.0, KILLED.1)?,
            log_lines: counter(&registry, "kiln_log_lines_total", "Lines that ended attempts printed.")?,
            log_bytes: counter(&registry, "kiln_log_bytes_total", "Bytes that ended attempts printed.")?,
            log_dropped: counter(&registry, DROPPED.0, DROPPED.1)?,
            calls: counters(&registry, CALLS, &["plugin", "hook", "outcome"])?,
            call_seconds: histograms(&registry, CALL_SECONDS, &["plugin", "hook"], &POLICY_SECONDS)?,
            registry,
        };
        metrics.zero()?;
        Ok(metrics)
    }

    fn zero(&self) -> prometheus::Result<()> {
        let info = IntGaugeVec::new(
            Opts::new("kiln_build_info", "1; the labels say what runs."),
            &["component", "version"],
        );
        let info = registered(&self.registry, info)?;
        info.with_label_values(&["agent", env!("CARGO_PKG_VERSION")]).set(1);
        for failure in std::iter::once(None).chain(Reason::ALL.iter().copied().map(Some)) {
            self.finished.with_label_values(&labels(failure));
        }
        for ending in Ending::ALL {
            self.duration.with_label_values(&[ending.label()]);
        }
        // Packing is the client's.
        for phase in Phase::ALL.iter().filter(|phase| **phase != Phase::Pack) {
            self.phases.with_label_values(&[phase.label()]);
        }
        Ok(())
    }

    /// What [`Metrics`] gathers.
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The agent has this many slots.
    pub fn offers(&self, slots: u32) {
        self.slots.set(slots.into());
    }

    /// These policies may be called.
    pub fn may_ask(&self, policies: impl Iterator<Item = RequiredPolicy>) {
        for policy in policies {
            for hook in &policy.hooks {
                for outcome in Outcome::ALL {
                    self.calls.with_label_values(&[&policy.name, hook.label(), outcome.label()]);
                }
                self.call_seconds.with_label_values(&[policy.name.as_str(), hook.label()]);
            }
        }
    }

    /// An attempt began.
    pub fn begun(&self) -> Running {
        self.started.inc();
        self.running.inc();
        Running { gauge: self.running.clone(), since: Instant::now() }
    }

    /// An attempt ended; `failure` says why there is no image.
    pub fn ended(&self, running: &Running, failure: Option<Reason>, phases: &[PhaseDuration]) {
        self.finished.with_label_values(&labels(failure)).inc();
        let took = running.since.elapsed().as_secs_f64();
        self.duration.with_label_values(&[Ending::of(failure).label()]).observe(took);
        for PhaseDuration { phase, milliseconds } in phases {
            let took = Duration::from_millis(*milliseconds).as_secs_f64();
            self.phases.with_label_values(&[phase.label()]).observe(took);
        }
    }

    /// The log of an attempt that ended.
    pub fn logged(&self, log: &LogSummary) {
        self.log_lines.inc_by(log.lines);
        self.log_bytes.inc_by(log.bytes);
        self.log_dropped.inc_by(log.dropped_bytes);
    }

    /// A step ended, and with it so many processes that it had left behind.
    pub fn killed(&self, processes: u32) {
        self.killed.inc_by(processes.into());
    }

    /// What policies said.
    pub fn asked(&self, verdicts: &[Verdict]) {
        for Verdict { plugin, hook, outcome, duration_us, .. } in verdicts {
            let hook: Hook = *hook;
            self.calls.with_label_values(&[plugin, hook.label(), outcome.label()]).inc();
            let took = Duration::from_micros(*duration_us).as_secs_f64();
            self.call_seconds.with_label_values(&[plugin, hook.label()]).observe(took);
        }
    }
}

/// Name and help of a metric.
type Named = (&'static str, &'static str);

const FINISHED: Named = (
    "kiln_builds_finished_total",
    "Attempts that ended: success, failed (the build, a policy, a limit), cancelled, error (the system); with the reason.",
);
const DURATION: Named = ("kiln_build_duration_seconds", "Time from the start to the end of an attempt.");
const PHASES: Named = (
    "kiln_build_phase_duration_seconds",
    "Time that an ended attempt spent in a phase; a phase may come twice.",
);
const KILLED: Named = (
    "kiln_processes_killed_total",
    "Processes that a step left behind and the kernel killed with it: background processes, and all of a step that broke a limit.",
);
const DROPPED: Named = (
    "kiln_log_dropped_bytes_total",
    "Bytes of those that are not kept, because the log was longer than logs.max_bytes or could not be written.",
);
const CALLS: Named =
    ("kiln_plugin_calls_total", "Answers of policies. One that defers and is asked again counts once.");
const CALL_SECONDS: Named = ("kiln_plugin_duration_seconds", "Time of the call that gave the answer.");

fn labels(failure: Option<Reason>) -> [&'static str; 2] {
    [Ending::of(failure).label(), failure.map_or(NO_REASON, Reason::label)]
}

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<C>,
) -> prometheus::Result<C> {
    let made = made?;
    registry.register(Box::new(made.clone()))?;
    Ok(made)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    registered(registry, IntGauge::new(name, help))
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    registered(registry, IntCounter::new(name, help))
}

fn counters(registry: &Registry, (name, help): Named, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

fn histograms(
    registry: &Registry,
    (name, help): Named,
    labels: &[&str],
    buckets: &[f64],
) -> prometheus::Result<HistogramVec> {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    registered(registry, HistogramVec::new(options, labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_there_before_anything_ended_and_has_one_result() {
        let metrics = Metrics::new().unwrap();
        let families = metrics.registry().gather();
        let finished = families.iter().find(|f| f.name() == "kiln_builds_finished_total").unwrap();
        let mut reasons: Vec<String> = Vec::new();
        for metric in finished.get_metric() {
            assert!(metric.get_counter().get_value() < 0.5);
            reasons
                .push(metric.get_label().iter().find(|l| l.name() == "reason").unwrap().value().to_owned());
        }
        let mut all: Vec<String> = Reason::ALL.iter().map(|r| r.label().to_owned()).collect();
        all.push(NO_REASON.to_owned());
        all.sort();
        reasons.sort();
        assert_eq!(reasons, all);
    }

    #[test]
    fn an_attempt_that_is_dropped_runs_no_more() {
        let metrics = Metrics::new().unwrap();
        let running = metrics.begun();
        assert_eq!(metrics.running.get(), 1);
        drop(running);
        assert_eq!((metrics.running.get(), metrics.started.get()), (0, 1));
    }
}
