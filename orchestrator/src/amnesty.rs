//! When a silent agent may be believed dead (pure: moments are arguments).
//!
//! After an outage of the database or the broker, or after a laptop slept, every lease looks expired though every
//! agent lives. So leases expire only after the path was seen to work for a whole lease time, and only few
//! agents at once, however many processes look.

use std::collections::{BTreeMap, BTreeSet};

use kiln_protocol::id::AgentId;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::build::Micros;
use crate::decide::{SECOND, TTL};

/// A longer pause between two looks means that this process, or the machine, stood still.
const LONGEST_GAP: Micros = 10 * SECOND;
/// The clock of the database and that of the process may differ by this much within one look.
const LARGEST_JUMP: Micros = 5 * SECOND;
/// Share of the agents that may be believed dead within one lease time.
const PART: usize = 5;

/// Whether leases may expire.
#[derive(Debug, Default)]
pub struct Amnesty {
    last: Option<(Micros, Instant)>,
    healthy_since: Option<Micros>,
    /// Agents that held leases, and when they were seen to.
    holders: BTreeMap<AgentId, Micros>,
}

/// Agents that were believed dead lately, and since when: one row that every process shares.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Brake(BTreeMap<AgentId, Micros>);

impl Amnesty {
    /// A look at the database worked at this moment. Says whether leases may expire.
    pub fn tick(&mut self, now: Micros, at: Instant) -> bool {
        let steady = self.last.is_some_and(|(before, then)| {
            let elapsed = Micros::try_from(at.duration_since(then).as_micros()).unwrap_or(Micros::MAX);
            let jump = now.saturating_sub(before).saturating_sub(elapsed);
            elapsed <= LONGEST_GAP && jump.abs() <= LARGEST_JUMP
        });
        self.last = Some((now, at));
        if !steady {
            self.healthy_since = Some(now);
        }
        self.healthy_since.is_some_and(|since| now.saturating_sub(since) > TTL)
    }

    /// The path to the database or the broker was interrupted.
    pub fn interrupted(&mut self) {
        self.last = None;
        self.healthy_since = None;
    }

    /// An agent holds a lease, whether or not it is silent.
    pub fn holds(&mut self, agent: &AgentId, now: Micros) {
        self.holders.insert(agent.clone(), now);
    }

    /// Whether one more agent may be believed dead: at least one, at most a fifth of them per lease time.
    pub fn may_silence(&mut self, brake: &mut Brake, agent: &AgentId, now: Micros) -> bool {
        // What lies ahead was written before the clock was set back.
        let recent = |_: &AgentId, at: &mut Micros| now.saturating_sub(*at).abs() <= TTL;
        brake.0.retain(recent);
        self.holders.retain(recent);
        self.holds(agent, now);
        if brake.0.contains_key(agent) {
            return true;
        }
        let known: BTreeSet<&AgentId> = self.holders.keys().chain(brake.0.keys()).collect();
        if brake.0.len() >= (known.len() / PART).max(1) {
            return false;
        }
        brake.0.insert(agent.clone(), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn run(amnesty: &mut Amnesty, start: Micros, at: Instant, seconds: i64) -> bool {
        let mut may = false;
        for second in (0..=seconds).step_by(2) {
            let later = at + Duration::from_secs(second.unsigned_abs());
            may = amnesty.tick(start + second * SECOND, later);
        }
        may
    }

    #[test]
    fn nothing_expires_before_the_path_worked_for_a_lease_time() {
        let (mut amnesty, at) = (Amnesty::default(), Instant::now());
        assert!(!run(&mut amnesty, 0, at, 30));
        assert!(run(&mut amnesty, 32 * SECOND, at + Duration::from_secs(32), 2));
        amnesty.interrupted();
        assert!(!run(&mut amnesty, 100 * SECOND, at + Duration::from_secs(100), 30));
    }

    #[test]
    fn a_jump_of_the_clock_or_a_long_sleep_starts_it_again() {
        let (mut amnesty, at) = (Amnesty::default(), Instant::now());
        assert!(run(&mut amnesty, 0, at, 40));
        let later = at + Duration::from_secs(42);
        assert!(!amnesty.tick(42 * SECOND + 3600 * SECOND, later), "an hour ahead");
        let (mut amnesty, at) = (Amnesty::default(), Instant::now());
        assert!(run(&mut amnesty, 0, at, 40));
        assert!(!amnesty.tick(42 * SECOND - 3600 * SECOND, later), "an hour back");
        let (mut amnesty, at) = (Amnesty::default(), Instant::now());
        assert!(run(&mut amnesty, 0, at, 40));
        assert!(!amnesty.tick(400 * SECOND, at + Duration::from_secs(400)), "asleep for minutes");
    }

    #[test]
    fn few_agents_are_believed_dead_at_once() {
        let (mut amnesty, mut brake) = (Amnesty::default(), Brake::default());
        let agents: Vec<AgentId> = (0..10).map(|i| format!("agent-{i}").parse().unwrap()).collect();
        for agent in &agents {
            amnesty.holds(agent, 0);
        }
        let dead: Vec<bool> =
            agents.iter().map(|agent| amnesty.may_silence(&mut brake, agent, SECOND)).collect();
        assert_eq!(dead.iter().filter(|&&dead| dead).count(), 2);
        assert!(amnesty.may_silence(&mut brake, &agents[0], SECOND), "its other builds too");
        assert!(
            !Amnesty::default().may_silence(&mut brake, &agents[9], SECOND),
            "another process brakes too"
        );
        let later = SECOND + TTL + 1;
        assert!(
            amnesty.may_silence(&mut brake.clone(), &agents[9], later),
            "and the next after a lease time"
        );
        let earlier = SECOND - TTL - 1;
        assert!(amnesty.may_silence(&mut brake, &agents[9], earlier), "also when the clock was set back");
        let alone = &mut Brake::default();
        assert!(Amnesty::default().may_silence(alone, &agents[0], 0), "the only agent there is");
    }
}
