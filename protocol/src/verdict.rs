//! What policy plugins say, and what that means for the build (pure).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::message::{Hook, PolicyKey, PolicyVerdict};
use crate::{Digest, Reason};

/// How one call of a hook ended. The names are metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The plugin has nothing against it.
    Allow,
    /// The plugin is against it.
    Deny,
    /// The plugin said that it cannot answer.
    Fault,
    /// The plugin crashed.
    Trap,
    /// The plugin took longer than it may.
    Timeout,
    /// The plugin wanted more memory than it may have.
    Oom,
    /// The plugin called the host more often than it may.
    HostCallLimit,
    /// The plugin needs what the operator did not grant.
    CapabilityDenied,
    /// The plugin said more than it may.
    OutputLimit,
    /// The plugin could not be started.
    LoadError,
    /// The build ended meanwhile.
    Cancelled,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 11] = [
        Self::Allow,
        Self::Deny,
        Self::Fault,
        Self::Trap,
        Self::Timeout,
        Self::Oom,
        Self::HostCallLimit,
        Self::CapabilityDenied,
        Self::OutputLimit,
        Self::LoadError,
        Self::Cancelled,
    ];

    /// The name on the wire and in metric labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Fault => "fault",
            Self::Trap => "trap",
            Self::Timeout => "timeout",
            Self::Oom => "oom",
            Self::HostCallLimit => "host_call_limit",
            Self::CapabilityDenied => "capability_denied",
            Self::OutputLimit => "output_limit",
            Self::LoadError => "load_error",
            Self::Cancelled => "cancelled",
        }
    }

    /// What a build ends with whose policy answered so; nothing if it goes on.
    pub const fn reason(self) -> Option<Reason> {
        match self {
            Self::Allow => None,
            Self::Deny => Some(Reason::PolicyDenied),
            Self::Cancelled => Some(Reason::Cancelled),
            Self::Fault
            | Self::Trap
            | Self::Timeout
            | Self::Oom
            | Self::HostCallLimit
            | Self::CapabilityDenied
            | Self::OutputLimit
            | Self::LoadError => Some(Reason::HookFault),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Something that a policy does not like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// The rule's name.
    pub rule: String,
    /// What is wrong, and what would be right.
    pub message: String,
    /// `error`, `warning` or a word of the plugin's own.
    pub severity: String,
    /// Line and column in the Dockerfile, both counted from 1.
    pub at: Option<(u32, u32)>,
    /// Where a person reads more.
    pub help_url: Option<String>,
}

/// A fact that a policy adds to the build's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Its name.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// Why an answer other than `allow` does not end the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Waiver {
    /// The plugin only watches: `mode = "audit"`.
    Audit,
    /// The plugin failed, and `on_failure = "open"`.
    OnFailure,
}

/// What one plugin said about one subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The plugin's name in the configuration.
    pub plugin: String,
    /// Which code with which settings.
    pub key: PolicyKey,
    /// When it spoke.
    pub hook: Hook,
    /// The repository it spoke about; empty for a build that goes nowhere.
    pub repository: String,
    /// Digest of what it saw: of the input, or of the image.
    pub subject: Digest,
    /// How the call ended.
    pub outcome: Outcome,
    /// Why, if the outcome is neither `allow` nor `deny`. For people.
    pub detail: Option<String>,
    /// What it is against.
    pub violations: Vec<Violation>,
    /// What it would like to be mended.
    pub warnings: Vec<Violation>,
    /// What it wants to be remembered.
    pub notes: Vec<Note>,
    /// From the first instruction to the answer, in microseconds.
    pub duration_us: u64,
    /// Most bytes that it had at once.
    pub memory_peak: u64,
    /// Why the build goes on although the outcome is not `allow`.
    pub waived: Option<Waiver>,
}

impl Verdict {
    /// Whether the build may go on.
    pub const fn passed(&self) -> bool {
        matches!(self.outcome, Outcome::Allow) || self.waived.is_some()
    }

    /// What the orchestrator needs of it.
    pub fn brief(&self) -> PolicyVerdict {
        PolicyVerdict {
            name: self.plugin.clone(),
            key: self.key.clone(),
            hook: self.hook,
            repository: self.repository.clone(),
            subject: self.subject.clone(),
            passed: self.passed(),
            outcome: self.outcome.label().to_owned(),
        }
    }
}

/// Whether the build goes on. A request to stop counts most, then a denial, which no repetition changes, then a
/// failure.
pub fn decide(verdicts: &[Verdict]) -> Result<(), Reason> {
    let stopping = verdicts.iter().filter(|verdict| !verdict.passed());
    let reasons: Vec<Reason> = stopping.filter_map(|verdict| verdict.outcome.reason()).collect();
    let order = [Reason::Cancelled, Reason::PolicyDenied, Reason::HookFault];
    order.into_iter().find(|reason| reasons.contains(reason)).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(outcome: Outcome, waived: Option<Waiver>) -> Verdict {
        let digest = Digest::from_sha256([1; 32]);
        Verdict {
            plugin: "p".to_owned(),
            key: PolicyKey { plugin: digest.clone(), settings: digest.clone() },
            hook: Hook::PreBuild,
            repository: "r.example.com/app".to_owned(),
            subject: digest,
            outcome,
            detail: None,
            violations: Vec::new(),
            warnings: Vec::new(),
            notes: Vec::new(),
            duration_us: 1,
            memory_peak: 1,
            waived,
        }
    }

    #[test]
    fn labels_are_what_goes_over_the_wire() {
        for outcome in Outcome::ALL {
            assert_eq!(serde_json::to_string(&outcome).unwrap(), format!("\"{}\"", outcome.label()));
        }
    }

    #[test]
    fn only_allow_and_waived_pass() {
        for outcome in Outcome::ALL {
            assert_eq!(verdict(outcome, None).passed(), outcome == Outcome::Allow, "{outcome}");
            assert_eq!(decide(&[verdict(outcome, None)]).err(), outcome.reason(), "{outcome}");
            assert_eq!(decide(&[verdict(outcome, Some(Waiver::Audit))]), Ok(()), "{outcome}");
            assert!(verdict(outcome, Some(Waiver::OnFailure)).brief().passed);
        }
    }

    #[test]
    fn the_strongest_reason_decides() {
        let verdicts = [Outcome::Allow, Outcome::Trap, Outcome::Deny].map(|o| verdict(o, None));
        assert_eq!(decide(&verdicts), Err(Reason::PolicyDenied));
        assert_eq!(decide(&verdicts[..2]), Err(Reason::HookFault));
        assert_eq!(decide(&verdicts[..1]), Ok(()));
        assert_eq!(decide(&[]), Ok(()));
        let waived = [verdict(Outcome::Deny, Some(Waiver::Audit)), verdict(Outcome::Timeout, None)];
        assert_eq!(decide(&waived), Err(Reason::HookFault));
    }
}
