//! SIGINT, SIGTERM and SIGHUP cancel; a second one leaves at once (edge).

use std::time::{Duration, Instant};

use kiln_agent::stop::{StopReason, Stopper};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::Exit;
use crate::terminal;

/// Exit code of a cancelled command.
const CANCELLED: i32 = 130;

/// `timeout` and shells signal the process and its group: both mean one wish.
const SAME_SIGNAL: Duration = Duration::from_millis(500);

/// The three signals that people and Jenkins send.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Not listened to under `nohup`, which ignores it for us.
    hangup: Option<Signal>,
}

impl Signals {
    /// Starts to listen.
    pub(crate) fn listen() -> Result<Self, Exit> {
        let open = |kind| signal(kind).map_err(|e| Exit::system(format!("listen to signals: {e}")));
        let hangup = if ignores_hangup() { None } else { Some(open(SignalKind::hangup())?) };
        Ok(Self {
            interrupt: open(SignalKind::interrupt())?,
            terminate: open(SignalKind::terminate())?,
            hangup,
        })
    }

    /// Waits for a signal.
    pub(crate) async fn next(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hangup => {}
        }
    }

    /// Passes the first signal on; never returns after the second.
    pub(crate) async fn watch(mut self, stopper: &Stopper) -> std::convert::Infallible {
        self.next().await;
        terminal::say("cancelling; a second signal leaves at once");
        stopper.request(StopReason::Cancelled);
        let first = Instant::now();
        while first.elapsed() < SAME_SIGNAL {
            self.next().await;
        }
        leave()
    }
}

/// Whether whoever started us ignores SIGHUP: the lowest bit of `SigIgn` in `/proc/self/status` (proc(5)).
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// The slot sees our end and cleans up by itself.
#[expect(clippy::exit, reason = "the second signal leaves at once, whatever is going on")]
fn leave() -> ! {
    std::process::exit(CANCELLED)
}
