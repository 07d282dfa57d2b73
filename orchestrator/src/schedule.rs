//! Which build goes next, and why another one waits (pure).
//!
//! By priority, then the namespace with the fewest running builds, then the order of submission.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use kiln_protocol::BuildId;
use kiln_protocol::id::{AgentId, Group, Namespace, Pool, SubmitSeq};
use kiln_protocol::message::PolicyKey;
use serde::Serialize;

use crate::build::Micros;
use crate::decide::{SECOND, is_due};

/// A build keeps away from the node that failed it for this long; then any node is better than none.
const AVOID_FOR: Micros = 60 * SECOND;

/// A build that waits, as far as the order matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The build.
    pub id: BuildId,
    /// Its place in the order of submission.
    pub submit_seq: SubmitSeq,
    /// Its priority; higher first.
    pub priority: u8,
    /// Whose it is.
    pub namespace: Namespace,
    /// Its concurrency group.
    pub group: Option<Group>,
    /// Who may take it.
    pub pool: Pool,
    /// Who should not.
    pub avoid: Option<AgentId>,
    /// Not before this.
    pub not_before: Micros,
    /// What an agent must have loaded for it.
    pub policies: BTreeSet<PolicyKey>,
}

/// A build that somebody works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Whose it is.
    pub namespace: Namespace,
    /// Its concurrency group.
    pub group: Option<Group>,
}

/// An agent that renewed lately.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// Who.
    pub id: AgentId,
    /// Pools that it serves.
    pub pools: BTreeSet<Pool>,
    /// Policies that it has loaded.
    pub policies: BTreeSet<PolicyKey>,
    /// Slots without a build.
    pub free: u32,
}

/// Bounds of the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Builds of one namespace at once.
    pub per_namespace: u32,
}

/// Why a build waits, in the order in which it is found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "wait", rename_all = "kebab-case")]
pub enum Wait {
    /// It is tried again later.
    NotDue {
        /// In this many seconds.
        seconds: i64,
    },
    /// No agent of its pool is alive.
    NoAgent {
        /// The pool.
        pool: Pool,
    },
    /// No agent of its pool has loaded the policies that it needs.
    NoPolicies,
    /// Another build of its group runs or goes first.
    Group {
        /// The group.
        group: Group,
    },
    /// Its namespace runs as many builds as it may.
    NamespaceLimit {
        /// The limit.
        limit: u32,
    },
    /// The only free agent is the one that failed it.
    Avoiding {
        /// The agent.
        agent: AgentId,
    },
    /// Every slot is taken.
    Busy {
        /// Builds that go first.
        ahead: usize,
    },
    /// An agent is about to take it.
    Next,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotDue { seconds } => write!(f, "it is tried again in {seconds} s"),
            Self::NoAgent { pool } => write!(f, "no agent serves the pool {pool} now"),
            Self::NoPolicies => f.write_str("no agent of its pool has loaded the policies that it needs"),
            Self::Group { group } => write!(f, "another build of group {group} goes first"),
            Self::NamespaceLimit { limit } => {
                write!(f, "its namespace runs {limit} builds, which is its limit")
            }
            Self::Avoiding { agent } => write!(f, "it keeps away from {agent}, which failed it"),
            Self::Busy { ahead: 0 } => f.write_str("every slot is taken; it is the next"),
            Self::Busy { ahead } => write!(f, "every slot is taken; {ahead} builds go first"),
            Self::Next => f.write_str("an agent is about to take it"),
        }
    }
}

/// Every waiting build, the next one first, and why it waits.
pub fn order(
    waiting: &[Waiting],
    running: &[Running],
    agents: &[Agent],
    limits: Limits,
    now: Micros,
) -> Vec<(BuildId, Wait)> {
    let mut round = Round::new(running, agents, limits, now);
    let mut order = Vec::with_capacity(waiting.len());
    let mut sorted: Vec<&Waiting> = waiting.iter().collect();
    sorted.sort_by_key(|w| (Reverse(w.priority), w.submit_seq));
    let mut lines: BTreeMap<&Namespace, VecDeque<&Waiting>> = BTreeMap::new();
    for build in sorted {
        lines.entry(&build.namespace).or_default().push_back(build);
    }
    // Each choice changes only the share of its own namespace, so only the first of that one moves.
    let mut firsts: BTreeSet<Turn<'_>> =
        lines.values().filter_map(|l| l.front()).map(|b| round.turn(b)).collect();
    while let Some((.., namespace)) = firsts.pop_first() {
        let Some(line) = lines.get_mut(namespace) else { continue };
        if let Some(build) = line.pop_front() {
            order.push((build.id, round.place(build)));
        }
        firsts.extend(line.front().map(|next| round.turn(next)));
    }
    order
}

/// What decides whose turn it is: the priority of the first build, the share of its namespace, its place.
type Turn<'a> = (Reverse<u8>, u32, SubmitSeq, &'a Namespace);

/// The build that this agent should get, if there is one.
pub fn pick(
    waiting: &[Waiting],
    running: &[Running],
    agents: &[Agent],
    limits: Limits,
    asking: &AgentId,
    now: Micros,
) -> Option<BuildId> {
    let asking = agents.iter().find(|agent| agent.id == *asking)?;
    let by_id: BTreeMap<BuildId, &Waiting> = waiting.iter().map(|w| (w.id, w)).collect();
    let others: Vec<Agent> = agents.iter().filter(|a| a.id != asking.id).cloned().collect();
    // As if only this agent were free: what is not its to take does not stand in the way.
    let alone = [Agent { free: u32::MAX, ..asking.clone() }];
    let due = order(waiting, running, &alone, limits, now);
    let fits = |(id, wait): &(BuildId, Wait)| match wait {
        Wait::Next => true,
        // Nobody else could take it.
        Wait::Avoiding { .. } => {
            by_id.get(id).is_some_and(|build| !others.iter().any(|a| eligible(a, build)))
        }
        _ => false,
    };
    due.iter().find(|entry| fits(entry)).map(|(id, _)| *id)
}

fn eligible(agent: &Agent, build: &Waiting) -> bool {
    agent.pools.contains(&build.pool) && build.policies.is_subset(&agent.policies)
}

/// The state of one ordering.
struct Round<'a> {
    agents: &'a [Agent],
    limits: Limits,
    now: Micros,
    shares: BTreeMap<&'a Namespace, u32>,
    groups: BTreeSet<&'a Group>,
    free: Vec<u32>,
    queued: BTreeMap<&'a Pool, usize>,
}

impl<'a> Round<'a> {
    fn new(running: &'a [Running], agents: &'a [Agent], limits: Limits, now: Micros) -> Self {
        let mut shares = BTreeMap::new();
        for build in running {
            *shares.entry(&build.namespace).or_default() += 1;
        }
        let groups = running.iter().filter_map(|build| build.group.as_ref()).collect();
        let free = agents.iter().map(|agent| agent.free).collect();
        Self { agents, limits, now, shares, groups, free, queued: BTreeMap::new() }
    }

    fn share(&self, namespace: &Namespace) -> u32 {
        self.shares.get(namespace).copied().unwrap_or(0)
    }

    fn turn(&self, first: &'a Waiting) -> Turn<'a> {
        (Reverse(first.priority), self.share(&first.namespace), first.submit_seq, &first.namespace)
    }

    fn place(&mut self, build: &'a Waiting) -> Wait {
        let wait = self.judge(build);
        if matches!(wait, Wait::Next | Wait::Busy { .. }) {
            *self.shares.entry(&build.namespace).or_default() += 1;
            self.groups.extend(&build.group);
        }
        wait
    }

    fn judge(&mut self, build: &'a Waiting) -> Wait {
        if !is_due(build.not_before, self.now) {
            // Rounded up: it is not due before.
            return Wait::NotDue { seconds: (build.not_before - self.now + SECOND - 1) / SECOND };
        }
        if !self.agents.iter().any(|agent| agent.pools.contains(&build.pool)) {
            return Wait::NoAgent { pool: build.pool.clone() };
        }
        if !self.agents.iter().any(|agent| eligible(agent, build)) {
            return Wait::NoPolicies;
        }
        if let Some(group) = build.group.as_ref().filter(|group| self.groups.contains(group)) {
            return Wait::Group { group: group.clone() };
        }
        if self.share(&build.namespace) >= self.limits.per_namespace {
            return Wait::NamespaceLimit { limit: self.limits.per_namespace };
        }
        self.seat(build)
    }

    fn seat(&mut self, build: &'a Waiting) -> Wait {
        let avoids = |agent: &Agent| {
            build.avoid.as_ref() == Some(&agent.id) && build.not_before.saturating_add(AVOID_FOR) > self.now
        };
        let free = |(i, agent): &(usize, &Agent)| self.free[*i] > 0 && eligible(agent, build);
        let seats: Vec<(usize, &Agent)> = self.agents.iter().enumerate().filter(free).collect();
        if let Some((seat, _)) = seats.iter().find(|(_, agent)| !avoids(agent)) {
            self.free[*seat] -= 1;
            return Wait::Next;
        }
        if let Some((_, agent)) = seats.first() {
            return Wait::Avoiding { agent: agent.id.clone() };
        }
        let ahead = self.queued.entry(&build.pool).or_default();
        *ahead += 1;
        Wait::Busy { ahead: *ahead - 1 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Micros = 1_000_000 * SECOND;

    fn waiting(seq: i64, namespace: &str) -> Waiting {
        Waiting {
            id: BuildId::from_uuid(uuid::Uuid::from_u128(u128::from(seq.unsigned_abs()))),
            submit_seq: SubmitSeq(seq),
            priority: 5,
            namespace: namespace.parse().unwrap(),
            group: None,
            pool: "default".parse().unwrap(),
            avoid: None,
            not_before: NOW,
            policies: BTreeSet::new(),
        }
    }

    fn agent(name: &str, free: u32) -> Agent {
        let pools = BTreeSet::from(["default".parse().unwrap()]);
        Agent { id: name.parse().unwrap(), pools, policies: BTreeSet::new(), free }
    }

    fn of(namespace: &str) -> Running {
        Running { namespace: namespace.parse().unwrap(), group: None }
    }

    const LIMITS: Limits = Limits { per_namespace: 100 };

    fn ids(order: &[(BuildId, Wait)]) -> Vec<u128> {
        order.iter().map(|(id, _)| id.as_uuid().as_u128()).collect()
    }

    #[test]
    fn namespaces_take_turns_and_priority_goes_first() {
        let mut builds: Vec<Waiting> = (1..=4).map(|seq| waiting(seq, "big")).collect();
        builds.push(waiting(5, "small"));
        builds.push(Waiting { priority: 9, ..waiting(6, "big") });
        let found = order(&builds, &[], &[agent("a", 9)], LIMITS, NOW);
        assert_eq!(ids(&found), [6, 5, 1, 2, 3, 4]);
        let found = order(&builds, &[of("small"), of("small"), of("small")], &[agent("a", 9)], LIMITS, NOW);
        assert_eq!(ids(&found), [6, 1, 2, 3, 5, 4], "who runs more waits longer");
    }

    #[test]
    fn every_wait_has_its_reason() {
        let group: Group = "deploy".parse().unwrap();
        let policy = PolicyKey {
            plugin: kiln_protocol::Digest::from_sha256([1; 32]),
            settings: kiln_protocol::Digest::from_sha256([2; 32]),
        };
        let builds = [
            waiting(1, "a"),
            waiting(2, "a"),
            waiting(3, "b"),
            Waiting { not_before: NOW + SECOND / 2, ..waiting(4, "a") },
            Waiting { pool: "gpu".parse().unwrap(), ..waiting(5, "a") },
            Waiting { policies: BTreeSet::from([policy]), ..waiting(6, "a") },
            Waiting { group: Some(group.clone()), ..waiting(7, "c") },
        ];
        let running = [Running { namespace: "d".parse().unwrap(), group: Some(group.clone()) }];
        let found: BTreeMap<u128, Wait> =
            order(&builds, &running, &[agent("a", 2)], Limits { per_namespace: 1 }, NOW)
                .into_iter()
                .map(|(id, wait)| (id.as_uuid().as_u128(), wait))
                .collect();
        assert_eq!(found[&1], Wait::Next);
        assert_eq!(found[&2], Wait::NamespaceLimit { limit: 1 });
        assert_eq!(found[&3], Wait::Next);
        assert_eq!(found[&4], Wait::NotDue { seconds: 1 });
        assert_eq!(found[&5], Wait::NoAgent { pool: "gpu".parse().unwrap() });
        assert_eq!(found[&6], Wait::NoPolicies);
        assert_eq!(found[&7], Wait::Group { group });
        let busy = order(&builds[..3], &[], &[agent("a", 1)], LIMITS, NOW);
        assert_eq!(busy[2].1, Wait::Busy { ahead: 1 });
    }

    #[test]
    fn a_build_keeps_away_from_the_node_that_failed_it_if_there_is_another() {
        let (first, second) = (agent("a", 1), agent("b", 1));
        let builds = [Waiting { avoid: Some(first.id.clone()), ..waiting(1, "x") }];
        let pick =
            |agents: &[Agent], asking: &Agent, now| pick(&builds, &[], agents, LIMITS, &asking.id, now);
        let both = [first.clone(), second.clone()];
        assert_eq!(pick(&both, &first, NOW), None);
        assert_eq!(pick(&both, &second, NOW), Some(builds[0].id));
        assert_eq!(pick(&both, &first, NOW + AVOID_FOR), Some(builds[0].id), "the aversion lapses");
        assert_eq!(pick(&both[..1], &first, NOW), Some(builds[0].id), "nobody else could take it");
    }

    #[test]
    fn an_agent_gets_the_first_build_that_fits_it() {
        let builds = [Waiting { pool: "gpu".parse().unwrap(), ..waiting(1, "x") }, waiting(2, "x")];
        let agents = [agent("a", 0)];
        assert_eq!(pick(&builds, &[], &agents, LIMITS, &agents[0].id, NOW), Some(builds[1].id));
        assert_eq!(pick(&builds, &[], &agents, LIMITS, &"nobody".parse().unwrap(), NOW), None);
    }

    proptest! {
        /// Every waiting build gets exactly one answer; no more are about to run than there are free slots.
        #[test]
        fn nobody_is_forgotten_and_nothing_is_promised_twice(
            builds in proptest::collection::vec((0u8..3, 0u8..3, 0i64..3), 0..30),
            free in 0u32..5,
            limit in 1u32..4,
        ) {
            let builds: Vec<Waiting> = builds.into_iter().zip(1..).map(|((namespace, priority, due), seq)| Waiting {
                priority,
                not_before: NOW + (due - 1) * SECOND,
                ..waiting(seq, ["a", "b", "c"][usize::from(namespace)])
            }).collect();
            let found = order(&builds, &[], &[agent("a", free)], Limits { per_namespace: limit }, NOW);
            let mut seen = ids(&found);
            seen.sort_unstable();
            prop_assert_eq!(seen.len(), builds.len());
            seen.dedup();
            prop_assert_eq!(seen.len(), builds.len());
            let next = found.iter().filter(|(_, wait)| *wait == Wait::Next).count();
            prop_assert!(next <= free as usize);
        }
    }
}
