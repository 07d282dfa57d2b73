//! SIGINT, SIGTERM and SIGHUP cancel; a second one leaves at once (edge).

use std::time::{Duration, Instant};

use kiln_agent::stop::{StopReason, Stopper};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::Exit;

/// Exit code of a cancelled command.
const CANCELLED: i32 = 130;

/// `timeout` and shells signal the process and its group: both mean one wish.
const SAME_SIGNAL: Duration = Duration::from_millis(500);

/// The three signals that people and Jenkins send.
pub(crate) struct Signals([Signal; 3]);

impl Signals {
    /// Starts to listen.
    pub(crate) fn listen() -> Result<Self, Exit> {
        let open = |kind| signal(kind).map_err(|e| Exit::system(format!("listen to signals: {e}")));
        Ok(Self([
            open(SignalKind::interrupt())?,
            open(SignalKind::terminate())?,
            open(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }

    /// Passes the first signal on; never returns after the second.
    pub(crate) async fn watch(mut self, stopper: &Stopper) -> std::convert::Infallible {
        self.next().await;
        say("cancelling; a second signal leaves at once");
        stopper.request(StopReason::Cancelled);
        let first = Instant::now();
        while first.elapsed() < SAME_SIGNAL {
            self.next().await;
        }
        leave()
    }
}

#[expect(clippy::print_stderr, reason = "the edge speaks to the user")]
fn say(text: &str) {
    eprintln!("kiln: {text}");
}

/// The slot sees our end and cleans up by itself.
#[expect(clippy::exit, reason = "the second signal leaves at once, whatever is going on")]
fn leave() -> ! {
    std::process::exit(CANCELLED)
}
