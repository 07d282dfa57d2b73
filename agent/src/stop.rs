//! The wish to end a build early: a typed message with an ordered reason (pure, over a watch channel).

use kiln_protocol::Reason;
use tokio::sync::watch;

/// Why a build is to stop. A later, higher one replaces a lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopReason {
    /// The agent shuts down and gives its builds back.
    Drain,
    /// It took longer than it may.
    Timeout,
    /// Whoever waited for it is gone.
    ClientGone,
    /// Somebody asked.
    Cancelled,
    /// Somebody else has the build, so nobody wants its end.
    Revoked,
}

impl StopReason {
    /// The reason that the build ends with.
    pub const fn reason(self) -> Reason {
        match self {
            Self::Drain => Reason::AgentDrain,
            Self::Timeout => Reason::Timeout,
            Self::ClientGone => Reason::ClientGone,
            Self::Cancelled => Reason::Cancelled,
            Self::Revoked => Reason::AgentLost,
        }
    }
}

impl StopReason {
    /// The same for people.
    pub const fn message(self) -> &'static str {
        match self {
            Self::Drain => "the agent shuts down",
            Self::Timeout => "it took longer than it may",
            Self::ClientGone => "the client that waited for it is gone",
            Self::Cancelled => "somebody asked for it to stop",
            Self::Revoked => "somebody else has it",
        }
    }
}

/// A request to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// Why.
    pub reason: StopReason,
    /// Asked more than once: do not wait for the grace.
    pub force: bool,
}

/// The side that asks.
#[derive(Debug)]
pub struct Stopper(watch::Sender<Option<Stop>>);

/// The side that obeys.
#[derive(Debug, Clone)]
pub struct StopSignal(watch::Receiver<Option<Stop>>);

/// A connected pair.
pub fn channel() -> (Stopper, StopSignal) {
    let (sender, receiver) = watch::channel(None);
    (Stopper(sender), StopSignal(receiver))
}

impl Stopper {
    /// Asks for the end. The second request forces it.
    pub fn request(&self, reason: StopReason) {
        self.0.send_modify(|stop| {
            *stop = Some(match *stop {
                None => Stop { reason, force: false },
                Some(before) => Stop { reason: before.reason.max(reason), force: true },
            });
        });
    }
}

impl StopSignal {
    /// The request, if there is one.
    pub fn current(&self) -> Option<Stop> {
        *self.0.borrow()
    }

    /// Returns at the next request. Never, if the other side is gone without one.
    pub async fn changed(&mut self) -> Stop {
        loop {
            if self.0.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            if let Some(stop) = *self.0.borrow_and_update() {
                return stop;
            }
        }
    }

    /// Returns as soon as there is a request, also an earlier one.
    pub async fn stopped(&mut self) -> Stop {
        match self.current() {
            Some(stop) => stop,
            None => self.changed().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_request_forces_and_the_higher_reason_stays() {
        let (stopper, signal) = channel();
        assert_eq!(signal.current(), None);
        stopper.request(StopReason::Cancelled);
        assert_eq!(signal.current(), Some(Stop { reason: StopReason::Cancelled, force: false }));
        stopper.request(StopReason::Timeout);
        assert_eq!(signal.current(), Some(Stop { reason: StopReason::Cancelled, force: true }));
    }
}
