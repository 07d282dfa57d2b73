//! What happens to a build (pure).
//!
//! Every function takes the build as it is recorded and the moment, and gives the build as it is to be
//! recorded. None reads a clock, draws randomness or does I/O: these are arguments.

mod attempt;
mod commit;
mod dead;
mod lease;
mod recheck;
mod report;

pub use attempt::{MAX_UNCOUNTED, Tries, client_gone, end_attempt, queue_timeout};
pub use commit::{CommitChange, commit, is_head};
pub use dead::{GIVE_UP_AFTER, ReplayRefused, discard, give_up_publishing, replay};
pub use lease::{
    CANCEL_GRACE, ClaimRefused, Claimant, OVERDUE_GRACE, TTL, cancel, claim, expire, overdue, release, renew,
};
pub use recheck::{next_recheck, recheck_delay};
pub use report::{Taken, report};

use kiln_protocol::State;
use kiln_protocol::state::{self, Event, IllegalTransition};

use crate::build::{Build, Micros};

/// Microseconds in a second.
pub const SECOND: Micros = 1_000_000;

/// Somebody asked to cancel a build whose result is committed, or that ended otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CancelRefused {
    /// The commit record exists.
    #[error("it is too late: the image is committed and its tags are moving")]
    Committed,
    /// It is over.
    #[error("it is over already: {0}")]
    Over(State),
}

impl Build {
    /// The only way in which a state changes.
    fn enter(&mut self, event: Event, now: Micros) -> Result<(), IllegalTransition> {
        let after = state::next(self.state, self.commit.is_some(), event)?;
        if self.state == State::Pending {
            self.waited = self.waited_until(now);
        }
        if after == State::Pending {
            self.pending_since = now;
        }
        self.ended_at = after.is_over().then_some(now);
        self.state = after;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod testing;
