//! What an agent does next (pure): every event goes in, and what follows from it comes out.

use std::collections::BTreeMap;

use kiln_protocol::id::ClaimId;
use kiln_protocol::message::{
    BuildGrant, Cancel, ClaimAnswer, Lane, LeaseKey, PublishGrant, Standing, TagCheck,
};
use kiln_protocol::{BuildId, Reason};

use crate::stop::StopReason;

/// Tags are moved beside the slots; more at once would only wait for the same registries.
const MAX_PUBLISHING: usize = 2;

/// Something happened.
#[derive(Debug)]
pub(super) enum Event {
    /// A claim was answered, or given up.
    Answered(Lane, ClaimAnswer),
    /// A piece of work ended. Its last report is in the spool.
    Ended(BuildId, Lane),
    /// A renewal said what became of a lease.
    Standing(LeaseKey, Standing),
    /// Somebody asked for the end of a build.
    Cancel(Cancel),
    /// The agent is to stop: first give back what runs when it ends by itself, then end it.
    Wish(Wish),
}

/// How much an agent is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Wish {
    /// Take work.
    #[default]
    Work,
    /// Take no more, finish what runs.
    Drain,
    /// Give back what runs.
    Stop,
}

/// What follows.
#[derive(Debug)]
pub(super) enum Reaction {
    /// Ask for work of this kind.
    Seek(Lane, ClaimId),
    /// Build this.
    Build(Box<BuildGrant>),
    /// Move the tags of this.
    Publish(Box<PublishGrant>),
    /// Look at this tag.
    Check(Box<TagCheck>),
    /// Give this back untouched.
    HandBack(Box<BuildGrant>),
    /// End this.
    Stop(BuildId, StopReason),
}

/// What an agent has in hand.
#[derive(Debug)]
pub(super) struct Core {
    slots: usize,
    building: BTreeMap<BuildId, LeaseKey>,
    publishing: BTreeMap<BuildId, LeaseKey>,
    seeking: [bool; 2],
    wish: Wish,
}

impl Core {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            slots,
            building: BTreeMap::new(),
            publishing: BTreeMap::new(),
            seeking: [false; 2],
            wish: Wish::Work,
        }
    }

    /// Leases that are worked on.
    pub(super) fn leases(&self) -> impl Iterator<Item = LeaseKey> {
        self.building.values().chain(self.publishing.values()).copied()
    }

    /// Slots without a build.
    pub(super) fn free(&self) -> usize {
        if self.wish == Wish::Work { self.slots.saturating_sub(self.building.len()) } else { 0 }
    }

    /// Nothing is left to do.
    pub(super) fn is_done(&self) -> bool {
        self.wish != Wish::Work
            && self.building.is_empty()
            && self.publishing.is_empty()
            && self.seeking == [false; 2]
    }

    /// What to do at the start.
    pub(super) fn start(&mut self) -> Vec<Reaction> {
        self.seek()
    }

    pub(super) fn handle(&mut self, event: Event) -> Vec<Reaction> {
        let mut reactions = match event {
            Event::Answered(lane, answer) => self.answered(lane, answer),
            Event::Ended(build, lane) => {
                self.of(lane).remove(&build);
                Vec::new()
            }
            Event::Standing(key, standing) => self.standing(key, standing),
            Event::Cancel(cancel) => self.cancel(&cancel),
            Event::Wish(wish) => self.wish(wish),
        };
        reactions.extend(self.seek());
        reactions
    }

    fn of(&mut self, lane: Lane) -> &mut BTreeMap<BuildId, LeaseKey> {
        match lane {
            Lane::Build => &mut self.building,
            Lane::Publish => &mut self.publishing,
        }
    }

    fn answered(&mut self, lane: Lane, answer: ClaimAnswer) -> Vec<Reaction> {
        self.seeking[index(lane)] = false;
        match answer {
            ClaimAnswer::Nothing => Vec::new(),
            ClaimAnswer::Build(grant) if self.wish != Wish::Work => vec![Reaction::HandBack(grant)],
            ClaimAnswer::Build(grant) => {
                self.building.insert(grant.lease.build, grant.lease);
                vec![Reaction::Build(grant)]
            }
            // Also while it shuts down: the tags of a committed build move as soon as somebody can.
            ClaimAnswer::Publish(grant) => {
                self.publishing.insert(grant.lease.build, grant.lease);
                vec![Reaction::Publish(grant)]
            }
            ClaimAnswer::Check(check) => vec![Reaction::Check(check)],
        }
    }

    fn standing(&mut self, key: LeaseKey, standing: Standing) -> Vec<Reaction> {
        let ours = self.building.get(&key.build).is_some_and(|held| *held == key);
        match standing {
            Standing::Cancel(reason) if ours => vec![Reaction::Stop(key.build, stop_reason(reason))],
            Standing::Revoked if ours => vec![Reaction::Stop(key.build, StopReason::Revoked)],
            Standing::Revoked if self.publishing.get(&key.build) == Some(&key) => {
                vec![Reaction::Stop(key.build, StopReason::Revoked)]
            }
            _ => Vec::new(),
        }
    }

    fn cancel(&mut self, cancel: &Cancel) -> Vec<Reaction> {
        let ours = self.building.get(&cancel.build).is_some_and(|held| held.attempt == cancel.attempt);
        if ours { vec![Reaction::Stop(cancel.build, stop_reason(cancel.reason))] } else { Vec::new() }
    }

    fn wish(&mut self, wish: Wish) -> Vec<Reaction> {
        self.wish = self.wish.max(wish);
        if self.wish < Wish::Stop {
            return Vec::new();
        }
        let all = self.building.keys().chain(self.publishing.keys());
        all.map(|build| Reaction::Stop(*build, StopReason::Drain)).collect()
    }

    /// One question per lane at a time.
    fn seek(&mut self) -> Vec<Reaction> {
        let mut reactions = Vec::new();
        if self.wish != Wish::Work {
            return reactions;
        }
        for lane in [Lane::Build, Lane::Publish] {
            let room = match lane {
                Lane::Build => self.free() > 0,
                Lane::Publish => self.publishing.len() < MAX_PUBLISHING,
            };
            if room && !self.seeking[index(lane)] {
                self.seeking[index(lane)] = true;
                reactions.push(Reaction::Seek(lane, ClaimId::generate()));
            }
        }
        reactions
    }
}

const fn index(lane: Lane) -> usize {
    match lane {
        Lane::Build => 0,
        Lane::Publish => 1,
    }
}

const fn stop_reason(reason: Reason) -> StopReason {
    match reason {
        Reason::ClientGone => StopReason::ClientGone,
        Reason::Timeout => StopReason::Timeout,
        _ => StopReason::Cancelled,
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::id::{Attempt, LeaseToken};
    use proptest::prelude::*;

    use super::*;

    fn grant() -> Box<BuildGrant> {
        let json = serde_json::json!({
            "lease": {"build": BuildId::generate(), "attempt": 1, "token": LeaseToken::generate()},
            "ttl_ms": 1, "submit_seq": 1, "policies": [],
            "spec": {
                "namespace": "local", "pool": "local", "priority": 5, "group": null, "requester": "",
                "request": {
                    "dockerfile": "", "dockerfile_name": "", "build_args": {}, "labels": {}, "target": null,
                    "format": "docker", "timestamp": null, "network": "isolated",
                    "timeout": {"secs": 1, "nanos": 0}, "root_filesystem": false
                },
                "context": {"digest": kiln_protocol::Digest::from_sha256([0; 32]), "size": 1},
                "destinations": [], "secrets": [], "credentials": "client", "max_attempts": 1,
                "queue_timeout": {"secs": 1, "nanos": 0}
            }
        });
        serde_json::from_value(json).unwrap()
    }

    fn seeks(reactions: &[Reaction]) -> usize {
        reactions.iter().filter(|r| matches!(r, Reaction::Seek(Lane::Build, _))).count()
    }

    #[test]
    fn an_agent_seeks_while_it_has_room_and_asks_one_question_at_a_time() {
        let mut core = Core::new(2);
        assert_eq!(seeks(&core.start()), 1);
        let (first, second) = (grant(), grant());
        let ended = first.lease.build;
        let reactions = core.handle(Event::Answered(Lane::Build, ClaimAnswer::Build(first)));
        assert!(matches!(reactions[0], Reaction::Build(_)));
        assert_eq!(seeks(&reactions), 1);
        assert_eq!(seeks(&core.handle(Event::Answered(Lane::Build, ClaimAnswer::Build(second)))), 0);
        assert_eq!(core.free(), 0);
        assert_eq!(seeks(&core.handle(Event::Ended(ended, Lane::Build))), 1);
    }

    #[test]
    fn a_drained_agent_takes_nothing_and_a_stopped_one_gives_back() {
        let mut core = Core::new(1);
        core.start();
        core.handle(Event::Wish(Wish::Drain));
        let reactions = core.handle(Event::Answered(Lane::Build, ClaimAnswer::Build(grant())));
        assert!(matches!(reactions[..], [Reaction::HandBack(_)]), "{reactions:?}");
        assert!(!core.is_done(), "the publish lane is still asked");
        core.handle(Event::Answered(Lane::Publish, ClaimAnswer::Nothing));
        assert!(core.is_done());

        let mut core = Core::new(1);
        core.start();
        let held = grant();
        let build = held.lease.build;
        core.handle(Event::Answered(Lane::Build, ClaimAnswer::Build(held)));
        let reactions = core.handle(Event::Wish(Wish::Stop));
        assert!(matches!(reactions[..], [Reaction::Stop(b, StopReason::Drain)] if b == build));
    }

    #[test]
    fn only_the_attempt_that_runs_is_stopped() {
        let mut core = Core::new(1);
        core.start();
        let held = grant();
        let key = held.lease;
        core.handle(Event::Answered(Lane::Build, ClaimAnswer::Build(held)));
        let cancel = |attempt| Cancel { build: key.build, attempt, reason: Reason::Cancelled };
        assert!(core.handle(Event::Cancel(cancel(Attempt::FIRST.next()))).is_empty());
        let reactions = core.handle(Event::Cancel(cancel(Attempt::FIRST)));
        assert!(matches!(reactions[..], [Reaction::Stop(_, StopReason::Cancelled)]));
        let older = LeaseKey { token: LeaseToken::generate(), ..key };
        assert!(core.handle(Event::Standing(older, Standing::Revoked)).is_empty());
        let reactions = core.handle(Event::Standing(key, Standing::Revoked));
        assert!(matches!(reactions[..], [Reaction::Stop(_, StopReason::Revoked)]));
    }

    proptest! {
        /// Whatever happens in whatever order, an agent never runs more than its slots.
        #[test]
        fn never_more_than_the_slots(slots in 1usize..4, events in proptest::collection::vec(0u8..4, 0..60)) {
            let mut core = Core::new(slots);
            let mut asked = seeks(&core.start());
            let mut running: Vec<BuildId> = Vec::new();
            for event in events {
                let reactions = match event {
                    0 if asked > 0 => {
                        asked -= 1;
                        core.handle(Event::Answered(Lane::Build, ClaimAnswer::Build(grant())))
                    }
                    1 if asked > 0 => {
                        asked -= 1;
                        core.handle(Event::Answered(Lane::Build, ClaimAnswer::Nothing))
                    }
                    2 if !running.is_empty() => core.handle(Event::Ended(running.remove(0), Lane::Build)),
                    _ => continue,
                };
                asked += seeks(&reactions);
                running.extend(reactions.iter().filter_map(|r| match r {
                    Reaction::Build(grant) => Some(grant.lease.build),
                    _ => None,
                }));
                prop_assert!(running.len() + asked <= slots);
            }
        }
    }
}
