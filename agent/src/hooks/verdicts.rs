//! Shell: from calls to one verdict: waiting for a permit, calling again, and what the configuration makes of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_protocol::Digest;
use kiln_protocol::message::Hook;
use kiln_protocol::verdict::{Outcome, Verdict, Violation, Waiver};
use tokio::sync::Semaphore;

use super::bindings::types;
use super::call::{self, Called, Said, Subject};
use super::config::{Mode, OnFailure};
use super::error::LoadCause;
use super::plugin::Plugin;
use super::{answer, never};
use crate::stop::StopSignal;

/// Shortest pause before a plugin that defers is called again.
const MIN_PAUSE: Duration = Duration::from_millis(10);

impl Subject {
    pub(super) fn repository(&self) -> &str {
        match self {
            Self::Build(build) => &build.repository,
            Self::Image(image) => &image.build.repository,
        }
    }

    fn digest(&self) -> &Digest {
        match self {
            Self::Build(build) => &build.input_digest,
            Self::Image(image) => &image.digest,
        }
    }
}

/// The plugin, if it accepts its settings.
pub(super) async fn validated(plugin: Plugin) -> Result<Plugin, LoadCause> {
    let problems = call::validate(&plugin, &never()).await;
    let problems = problems.map_err(|(outcome, detail)| LoadCause::SettingsFailed { outcome, detail })?;
    let problems = answer::violations(&problems)
        .map_err(|ended| LoadCause::SettingsFailed { outcome: ended.outcome(), detail: ended.to_string() })?;
    if problems.is_empty() { Ok(plugin) } else { Err(LoadCause::Settings { problems }) }
}

/// The verdict of one plugin.
pub(super) async fn ask(
    plugin: &Arc<Plugin>,
    hook: Hook,
    subject: &Subject,
    permits: &Semaphore,
    stop: &StopSignal,
) -> Verdict {
    let first = Instant::now();
    loop {
        let called = match permit(permits, stop).await {
            Some(_permit) => call::call(plugin, subject, stop).await,
            None => return verdict(plugin, hook, subject, cancelled()),
        };
        let Said::Verdict(types::Verdict::Defer(wait)) = &called.said else {
            return verdict(plugin, hook, subject, called);
        };
        let left = plugin.terms.limits.defer().saturating_sub(first.elapsed());
        let pause = Duration::from_millis(wait.retry_after_ms.into()).max(MIN_PAUSE);
        if pause > left {
            let detail = format!("it still defers after limits.defer_ms: {}", wait.reason);
            let said = Said::Nothing(Outcome::Timeout, answer::shortened(&detail));
            return verdict(plugin, hook, subject, Called { said, ..called });
        }
        let mut stop = stop.clone();
        let _ = tokio::time::timeout(pause, stop.stopped()).await;
    }
}

async fn permit<'a>(permits: &'a Semaphore, stop: &StopSignal) -> Option<tokio::sync::SemaphorePermit<'a>> {
    let mut stop = stop.clone();
    tokio::select! {
        biased;
        _ = stop.stopped() => None,
        permit = permits.acquire() => permit.ok(),
    }
}

fn cancelled() -> Called {
    let said = Said::Nothing(Outcome::Cancelled, "the build was asked to stop".to_owned());
    Called { said, report: super::state::Report::default(), duration: Duration::ZERO, memory: 0 }
}

/// What stands in the place of a verdict whose task was lost, which should not happen.
pub(super) fn lost(plugin: &Plugin, hook: Hook, subject: &Subject) -> Verdict {
    let said = Said::Nothing(Outcome::LoadError, "the host lost the call".to_owned());
    verdict(plugin, hook, subject, Called { said, ..cancelled() })
}

fn verdict(plugin: &Plugin, hook: Hook, subject: &Subject, called: Called) -> Verdict {
    let (outcome, detail, violations) = judged(called.said);
    // What a guest reported before it failed may be half of it.
    let answered = matches!(outcome, Outcome::Allow | Outcome::Deny);
    let report = if answered { called.report } else { super::state::Report::default() };
    Verdict {
        plugin: plugin.terms.name.clone(),
        key: plugin.key.clone(),
        hook,
        repository: subject.repository().to_owned(),
        subject: subject.digest().clone(),
        outcome,
        detail,
        violations,
        warnings: report.warnings,
        notes: report.notes,
        duration_us: u64::try_from(called.duration.as_micros()).unwrap_or(u64::MAX),
        memory_peak: called.memory,
        waived: waiver(plugin.mode, plugin.on_failure, outcome),
    }
}

fn judged(said: Said) -> (Outcome, Option<String>, Vec<Violation>) {
    match said {
        Said::Nothing(outcome, detail) => (outcome, Some(detail), Vec::new()),
        Said::Verdict(types::Verdict::Allow) => (Outcome::Allow, None, Vec::new()),
        Said::Verdict(types::Verdict::Deny(violations)) => match answer::violations(&violations) {
            Ok(violations) => (Outcome::Deny, None, violations),
            Err(ended) => (ended.outcome(), Some(ended.to_string()), Vec::new()),
        },
        Said::Verdict(types::Verdict::Defer(wait)) => {
            (Outcome::Timeout, Some(answer::shortened(&wait.reason)), Vec::new())
        }
    }
}

fn waiver(mode: Mode, on_failure: OnFailure, outcome: Outcome) -> Option<Waiver> {
    match (outcome, mode, on_failure) {
        (Outcome::Allow | Outcome::Cancelled, ..) => None,
        (_, Mode::Audit, _) => Some(Waiver::Audit),
        (Outcome::Deny, ..) | (_, _, OnFailure::Closed) => None,
        (_, _, OnFailure::Open) => Some(Waiver::OnFailure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_are_waived_by_open_and_everything_by_audit() {
        for outcome in Outcome::ALL {
            let never = matches!(outcome, Outcome::Allow | Outcome::Cancelled);
            let audit = waiver(Mode::Audit, OnFailure::Closed, outcome);
            assert_eq!(audit, (!never).then_some(Waiver::Audit), "{outcome}");
            let failure = !never && outcome != Outcome::Deny;
            let open = waiver(Mode::Enforce, OnFailure::Open, outcome);
            assert_eq!(open, failure.then_some(Waiver::OnFailure), "{outcome}");
            assert_eq!(waiver(Mode::Enforce, OnFailure::Closed, outcome), None, "{outcome}");
        }
    }
}
