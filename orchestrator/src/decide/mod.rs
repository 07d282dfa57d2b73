//! What happens to a build (pure).
//!
//! Every function takes the build as it is recorded and the moment, and gives the build as it is to be
//! recorded. None reads a clock, draws randomness or does I/O: these are arguments.

mod attempt;
mod commit;
mod dead;
mod history;
mod lease;
mod recheck;
mod report;

pub use attempt::{MAX_UNCOUNTED, Tries, client_gone, end_attempt, queue_timeout};
pub use commit::{CommitChange, commit, is_head};
pub use dead::{GIVE_UP_AFTER, ReplayRefused, discard, give_up_publishing, replay};
pub use history::{EndedAttempt, ended};
pub use lease::{
    CANCEL_GRACE, ClaimRefused, Claimant, OVERDUE_GRACE, TTL, cancel, claim, due_at, expire, farthest_lease,
    overdue, release, renew,
};
pub use recheck::{next_recheck, recheck_delay};
pub use report::{Taken, report};

use kiln_protocol::State;
use kiln_protocol::state::{self, Event, IllegalTransition};

use crate::build::{Build, Micros};

/// Microseconds in a second.
pub const SECOND: Micros = 1_000_000;

/// No pause before another try is longer.
pub const LONGEST_PAUSE: Micros = 900 * SECOND;

/// Whether a try that is not to begin before this time may begin now. What lies farther ahead than any pause was
/// written before the clock was set back; waiting for it would stop everything for as long as that was.
pub const fn is_due(not_before: Micros, now: Micros) -> bool {
    not_before <= now || not_before > now.saturating_add(LONGEST_PAUSE)
}

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
