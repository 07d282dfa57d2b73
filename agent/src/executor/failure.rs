//! From what went wrong to what the user reads (pure).

use kiln_protocol::Reason;
use kiln_protocol::request::NetworkMode;
use kiln_protocol::result::{Failure, LimitReport, Location};

use super::Run;
use crate::classify::{self, Verdict};
use crate::dockerfile::{Dockerfile, DockerfileError};
use crate::error::chain;
use crate::slot::SlotLost;
use crate::slot::wire::{Breach, StepEnd};

/// Less than one layer of anything: whatever failed, it failed for want of space.
const FULL_BELOW_BYTES: u64 = 32 * 1024 * 1024;

impl Run {
    /// A failure of the present phase.
    pub(super) fn fail(&self, reason: Reason, message: impl Into<String>) -> Failure {
        Failure::new(reason, self.phase, message.into())
    }

    /// The slot was lost or could not be made.
    pub(super) fn lost(&self, error: &SlotLost) -> Failure {
        let reason = match error {
            SlotLost::Setup(_) => Reason::NodeUnfit,
            SlotLost::Gone { .. } | SlotLost::Stuck { .. } => Reason::Unknown,
        };
        let hint = match error {
            SlotLost::Setup(setup) if setup.network => {
                "run `kiln doctor`; --network=none builds without any network, --network=unsafe-host with the host's"
            }
            _ => "run `kiln doctor`",
        };
        Failure { hint: Some(hint.to_owned()), ..self.fail(reason, chain(error)) }
    }

    /// A Dockerfile that cannot be built.
    pub(super) fn refused(&self, error: &DockerfileError) -> Failure {
        let location = error.line().map(|line| self.location(line));
        Failure { location, hint: error.hint(), ..self.fail(Reason::BadRequest, chain(error)) }
    }

    /// A line of the Dockerfile.
    pub(super) fn location(&self, line: usize) -> Location {
        let text = self.request.dockerfile.lines().nth(line.saturating_sub(1)).unwrap_or_default();
        Location { line: u32::try_from(line).unwrap_or(u32::MAX), text: text.trim_end().to_owned() }
    }

    /// A step that buildah or Kiln ended with an error.
    pub(super) fn step_failed(&self, end: &StepEnd, dockerfile: Option<&Dockerfile>) -> Failure {
        if let Some(breach) = end.breach {
            return self.over_limit(breach);
        }
        let verdict = self.unless_disk_full(classify::classify(end));
        let instruction = verdict.step.as_deref().zip(dockerfile).and_then(|(text, file)| file.locate(text));
        let hint = verdict.hint.map(str::to_owned).or_else(|| self.network_hint(verdict.run_exit_code));
        Failure {
            location: instruction.map(|i| self.location(i.start_line)),
            hint,
            run_exit_code: verdict.run_exit_code,
            ..self.fail(verdict.reason, verdict.message)
        }
    }

    /// A command that meets a closed network only says that it cannot connect.
    fn network_hint(&self, run_exit_code: Option<i32>) -> Option<String> {
        run_exit_code?;
        match self.request.network {
            NetworkMode::None => Some("RUN has no network: --network=none was asked for".to_owned()),
            NetworkMode::Isolated if self.agent.config.network.allow.is_some() => Some(
                "RUN reaches only what network.allow lists; add the destination there if it needs more"
                    .to_owned(),
            ),
            NetworkMode::Isolated | NetworkMode::UnsafeHost => None,
        }
    }

    /// A command that cannot write says so in words of its own; the file system says it in numbers.
    fn unless_disk_full(&self, verdict: Verdict) -> Verdict {
        match self.agent.state.free_bytes() {
            Ok(free) if free < FULL_BELOW_BYTES => Verdict {
                reason: Reason::DiskFull,
                hint: Some("free space below the data directory: `kiln prune`"),
                ..verdict
            },
            // Unknown free space changes no verdict.
            Ok(_) | Err(_) => verdict,
        }
    }

    fn over_limit(&self, breach: Breach) -> Failure {
        let limits = &self.agent.config.build.limits;
        let (resource, limit, peak, key) = match breach {
            Breach::Pids { peak } => ("pids", limits.pids, peak, "build.limits.pids"),
            Breach::Memory { peak } => ("memory", limits.memory.unwrap_or(0), peak, "build.limits.memory"),
            Breach::Disk { peak } => ("disk", limits.disk, peak, "build.limits.disk"),
        };
        let report = LimitReport { resource: resource.to_owned(), limit, peak, key: key.to_owned() };
        let message = format!("{resource} limit of {limit} exceeded; the peak was {peak}");
        let hint = Some(format!("raise {key} if the build needs it"));
        Failure { hint, limit: Some(report), ..self.fail(Reason::LimitExceeded, message) }
    }
}
