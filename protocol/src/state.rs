//! The life of a build: every legal transition, and nowhere else (pure).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::reason::EndState;

/// Where a build is in its life, as every client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum State {
    /// Recorded; nobody works on it. Also between two attempts.
    Pending,
    /// An agent builds it.
    Building,
    /// An image exists by digest; tags are about to move, or move.
    Pushing,
    /// Every target was answered, none failed. Final.
    Success,
    /// The user's fault, a policy, a limit, or a target that was refused after the commit. Final.
    Failed,
    /// Somebody asked for the end before the commit. Final.
    Cancelled,
    /// The system gave up. A person may replay or discard it.
    DeadLetter,
}

impl State {
    /// Every state, in the order of a life.
    pub const ALL: &'static [Self] = &[
        Self::Pending,
        Self::Building,
        Self::Pushing,
        Self::Success,
        Self::Failed,
        Self::Cancelled,
        Self::DeadLetter,
    ];

    /// The name on the wire and in metric labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Building => "BUILDING",
            Self::Pushing => "PUSHING",
            Self::Success => "SUCCESS",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::DeadLetter => "DEAD_LETTER",
        }
    }

    /// The state with this name.
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|state| state.label() == label)
    }

    /// Nothing ever changes it again.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Success | Self::Failed | Self::Cancelled)
    }

    /// Nobody works on it, and nobody will unless a person asks for it.
    pub const fn is_over(self) -> bool {
        self.is_final() || matches!(self, Self::DeadLetter)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl From<EndState> for State {
    fn from(end: EndState) -> Self {
        match end {
            EndState::Failed => Self::Failed,
            EndState::Cancelled => Self::Cancelled,
            EndState::DeadLetter => Self::DeadLetter,
        }
    }
}

/// What happens to a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// An agent took an attempt.
    Claimed,
    /// The image is in every registry, by digest.
    CandidateUploaded,
    /// The commit record was written. From here on the build only rolls forward.
    Committed,
    /// Every target was answered, none failed.
    Published,
    /// Every target was answered, at least one was refused for good.
    PartlyPublished,
    /// The attempt ended and there will be another.
    Retried,
    /// The build ended by the user's fault, a policy or a limit.
    Failed,
    /// The build ended because somebody asked for it.
    Cancelled,
    /// The system gave up.
    GaveUp,
    /// A person wants a dead letter to be tried again.
    Replayed,
    /// A person does not.
    Discarded,
}

impl Event {
    /// Every event.
    pub const ALL: &'static [Self] = &[
        Self::Claimed,
        Self::CandidateUploaded,
        Self::Committed,
        Self::Published,
        Self::PartlyPublished,
        Self::Retried,
        Self::Failed,
        Self::Cancelled,
        Self::GaveUp,
        Self::Replayed,
        Self::Discarded,
    ];
}

impl From<EndState> for Event {
    fn from(end: EndState) -> Self {
        match end {
            EndState::Failed => Self::Failed,
            EndState::Cancelled => Self::Cancelled,
            EndState::DeadLetter => Self::GaveUp,
        }
    }
}

/// The event cannot happen in this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a build that is {state}{} cannot be {event:?}", if *committed { " and committed" } else { "" })]
pub struct IllegalTransition {
    /// The state before.
    pub state: State,
    /// Whether the commit record exists.
    pub committed: bool,
    /// What was to happen.
    pub event: Event,
}

/// The state after `event`. `committed` says whether the commit record exists before it: from then on no
/// failure, cancel or retry applies, only the answers of the targets or giving up on them.
#[expect(clippy::match_same_arms, reason = "one line of the picture each")]
pub const fn next(state: State, committed: bool, event: Event) -> Result<State, IllegalTransition> {
    use {Event as E, State as S};
    Ok(match (state, committed, event) {
        (S::Pending, false, E::Claimed) => S::Building,
        (S::Building | S::Pushing, false, E::CandidateUploaded | E::Committed) => S::Pushing,
        (S::Building | S::Pushing, false, E::Retried) => S::Pending,
        (S::Pending | S::Building | S::Pushing, false, E::Failed) => S::Failed,
        (S::Pending | S::Building | S::Pushing, false, E::Cancelled) => S::Cancelled,
        (S::Building | S::Pushing, false, E::GaveUp) | (S::Pushing, true, E::GaveUp) => S::DeadLetter,
        (S::Pushing, true, E::Published) => S::Success,
        (S::Pushing, true, E::PartlyPublished) | (S::DeadLetter, _, E::Discarded) => S::Failed,
        (S::DeadLetter, false, E::Replayed) => S::Pending,
        (S::DeadLetter, true, E::Replayed) => S::Pushing,
        _ => return Err(IllegalTransition { state, committed, event }),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn labels_are_what_serde_writes() {
        for state in State::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.label());
            assert_eq!(State::from_label(state.label()), Some(*state));
        }
        assert_eq!(State::from_label("pending"), None);
    }

    /// The whole table, written as the picture of the design has it: state, committed, event, state after.
    const LEGAL: &[(State, bool, Event, State)] = &[
        (State::Pending, false, Event::Claimed, State::Building),
        (State::Pending, false, Event::Failed, State::Failed),
        (State::Pending, false, Event::Cancelled, State::Cancelled),
        (State::Building, false, Event::CandidateUploaded, State::Pushing),
        (State::Building, false, Event::Committed, State::Pushing),
        (State::Building, false, Event::Retried, State::Pending),
        (State::Building, false, Event::Failed, State::Failed),
        (State::Building, false, Event::Cancelled, State::Cancelled),
        (State::Building, false, Event::GaveUp, State::DeadLetter),
        (State::Pushing, false, Event::CandidateUploaded, State::Pushing),
        (State::Pushing, false, Event::Committed, State::Pushing),
        (State::Pushing, false, Event::Retried, State::Pending),
        (State::Pushing, false, Event::Failed, State::Failed),
        (State::Pushing, false, Event::Cancelled, State::Cancelled),
        (State::Pushing, false, Event::GaveUp, State::DeadLetter),
        (State::Pushing, true, Event::Published, State::Success),
        (State::Pushing, true, Event::PartlyPublished, State::Failed),
        (State::Pushing, true, Event::GaveUp, State::DeadLetter),
        (State::DeadLetter, false, Event::Replayed, State::Pending),
        (State::DeadLetter, false, Event::Discarded, State::Failed),
        (State::DeadLetter, true, Event::Replayed, State::Pushing),
        (State::DeadLetter, true, Event::Discarded, State::Failed),
    ];

    #[test]
    fn every_transition_is_in_the_table_or_refused() {
        for &state in State::ALL {
            for committed in [false, true] {
                for &event in Event::ALL {
                    let expected =
                        LEGAL.iter().find(|(s, c, e, _)| (*s, *c, *e) == (state, committed, event));
                    let found = next(state, committed, event);
                    assert_eq!(found.ok(), expected.map(|row| row.3), "{state} {committed} {event:?}");
                }
            }
        }
    }

    proptest! {
        /// Whatever is dropped, repeated or swapped: final states stay, and a committed build only rolls forward.
        #[test]
        fn any_order_of_events_keeps_the_rules(events in proptest::collection::vec(0..Event::ALL.len(), 0..60)) {
            let (mut state, mut committed) = (State::Pending, false);
            for event in events.into_iter().map(|i| Event::ALL[i]) {
                let Ok(after) = next(state, committed, event) else { continue };
                prop_assert!(!state.is_final(), "{state} changed to {after}");
                committed |= event == Event::Committed;
                if committed {
                    prop_assert!(!matches!(after, State::Pending | State::Building | State::Cancelled));
                }
                if after == State::Success {
                    prop_assert!(committed);
                }
                state = after;
            }
        }
    }
}
