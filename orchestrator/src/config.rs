//! Configuration of the orchestrator (pure): the section of a TOML file, its defaults and what is refused.

use std::time::Duration;

use kiln_protocol::setting::{self, InvalidSetting};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schedule::Limits;
use crate::store::Retention;

/// Whoever waits for a build must be able to read how it ended.
const MIN_KEEP: Duration = Duration::from_hours(1);

/// `[orchestrator]`: what a server records and schedules.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OrchestratorConfig {
    /// Builds of one namespace that run at once; no limit without it.
    #[schemars(range(min = 1))]
    pub per_namespace: Option<u32>,
    /// What is kept of builds that are over.
    pub retention: Retention,
}

impl OrchestratorConfig {
    /// What is refused although it is well formed.
    pub fn check(&self) -> Result<(), InvalidSetting> {
        let section = |invalid: InvalidSetting| invalid.within("orchestrator");
        setting::at_least("per_namespace", self.per_namespace.unwrap_or(1).into(), 1).map_err(section)?;
        check_retention(&self.retention).map_err(|invalid| section(invalid.within("retention")))
    }

    /// The bounds on builds that run at once.
    pub fn limits(&self) -> Limits {
        Limits { per_namespace: self.per_namespace.unwrap_or(u32::MAX) }
    }
}

fn check_retention(retention: &Retention) -> Result<(), InvalidSetting> {
    for (key, is) in
        [("keep", retention.keep), ("dead_letters", retention.dead_letters), ("contexts", retention.contexts)]
    {
        if is < MIN_KEEP {
            return Err(InvalidSetting::new(key, format!("{is:?} is too short; at least 1h")));
        }
    }
    let least = [
        ("builds", retention.builds),
        ("audit", retention.audit),
        ("bad_messages", retention.bad_messages),
        ("outbox", retention.outbox),
    ];
    least.into_iter().try_for_each(|(key, is)| setting::at_least(key, is.into(), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_refused(config: &OrchestratorConfig) -> String {
        config.check().unwrap_err().key
    }

    #[test]
    fn what_would_stop_every_build_or_forget_at_once_is_refused() {
        let retention = |retention| OrchestratorConfig { retention, ..OrchestratorConfig::default() };
        let default = Retention::default();
        assert_eq!(OrchestratorConfig::default().check(), Ok(()));
        let none = OrchestratorConfig { per_namespace: Some(0), ..OrchestratorConfig::default() };
        assert_eq!(key_refused(&none), "orchestrator.per_namespace");
        let short = Retention { keep: Duration::from_mins(59), ..default };
        assert_eq!(key_refused(&retention(short)), "orchestrator.retention.keep");
        let short = Retention { dead_letters: Duration::from_mins(59), ..default };
        assert_eq!(key_refused(&retention(short)), "orchestrator.retention.dead_letters");
        let short = Retention { contexts: Duration::ZERO, ..default };
        assert_eq!(key_refused(&retention(short)), "orchestrator.retention.contexts");
        let few = Retention { outbox: 0, ..default };
        assert_eq!(key_refused(&retention(few)), "orchestrator.retention.outbox");
    }

    #[test]
    fn without_a_limit_nobody_waits_for_it() {
        assert_eq!(OrchestratorConfig::default().limits().per_namespace, u32::MAX);
        let two = OrchestratorConfig { per_namespace: Some(2), ..OrchestratorConfig::default() };
        assert_eq!(two.limits().per_namespace, 2);
    }
}
