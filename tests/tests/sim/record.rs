//! What goes wrong with the record, and the hold on the clock while it is in use.

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use fastrand::Rng;
use futures_util::future::{BoxFuture, FutureExt as _};
use kiln_orchestrator::store::{Fate, Trouble, Turn};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The database works on threads of its own. While it does, the runtime looks idle, and a paused clock would run on
/// as fast as the machine happens to be. So the clock is held, and one transaction follows the other.
#[derive(Debug)]
pub(crate) struct Record {
    turns: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    random: Rng,
    rate: f64,
    counts: BTreeMap<&'static str, u64>,
}

impl Record {
    pub(crate) fn new(random: Rng) -> Self {
        let state = State { random, rate: 0.0, counts: BTreeMap::new() };
        Self { turns: Arc::new(Semaphore::new(1)), state: Mutex::new(state) }
    }

    /// How many commits go wrong, from 0 to 1.
    pub(crate) fn set_rate(&self, rate: f64) {
        self.state.lock().unwrap().rate = rate;
    }

    pub(crate) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.state.lock().unwrap().counts.clone()
    }
}

impl Trouble for Record {
    fn turn(&self) -> BoxFuture<'_, Turn> {
        async {
            let permit = Arc::clone(&self.turns).acquire_owned().await.unwrap();
            *self.state.lock().unwrap().counts.entry("transactions").or_default() += 1;
            let held = Held::begin();
            // Until nobody else can run: whether the database answers before its answer is waited for, or after,
            // then changes no order.
            tokio::task::yield_now().await;
            Box::new((held, permit) as (Held, OwnedSemaphorePermit)) as Turn
        }
        .boxed()
    }

    fn fate(&self) -> Fate {
        let mut state = self.state.lock().unwrap();
        let (wrong, unheard) = (state.random.f64() < state.rate, state.random.bool());
        let (fate, what) = match (wrong, unheard) {
            (false, _) => return Fate::Kept,
            (true, true) => (Fate::Unheard, "commit unheard"),
            (true, false) => (Fate::Lost, "commit lost"),
        };
        *state.counts.entry(what).or_default() += 1;
        fate
    }
}

/// Holds the clock of a runtime: a paused one does not run on while a blocking task is at work. The clock stands still
/// until this is dropped.
#[derive(Debug)]
pub(crate) struct Held(#[expect(dead_code, reason = "its drop ends the task")] Sender<()>);

impl Held {
    /// Only within the runtime.
    pub(crate) fn begin() -> Self {
        let (held, released) = channel();
        tokio::task::spawn_blocking(move || {
            // An error says that it was dropped.
            let _ = released.recv();
        });
        Self(held)
    }
}
