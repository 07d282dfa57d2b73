//! The bus on a broker that speaks AMQP 0.9.1, by the client library `lapin` (shell).
//!
//! The library's own recovery stays off: one supervisor connects again, and everything that depended on the old
//! connection ends, so that its users see it. See ADR 13.

mod calls;
mod consumer;
mod convert;
mod failure;
mod link;
mod publisher;
mod session;
mod settings;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub(crate) use self::consumer::{Consumer, Settle};
use self::session::Session;
pub use self::settings::{AmqpSettings, SettingsError, Timing};
use crate::{Backoff, Bus, BusError, ConnectionState, Message, Published, Topology};

/// A session that lived as long was a good one: the next failure is a first one.
const STEADY: Duration = Duration::from_mins(1);
/// How long an owner waits for the goodbyes of both connections.
const CLOSING: Duration = Duration::from_secs(5);

/// Connects to a broker, now or as soon as it is there; see [`Bus::watch`]. Has to be called on a tokio runtime.
pub fn connect(settings: AmqpSettings) -> Result<Bus, SettingsError> {
    settings.check()?;
    let state = watch::channel(State::Down { trouble: None }).0;
    let shared = Arc::new(Shared { settings, state });
    let (closing, told) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(supervise(Arc::clone(&shared), told));
    Ok(Bus::Amqp(Connection(Arc::new(Owner { shared, closing, tasks: Mutex::new(tasks) }))))
}

#[derive(Debug, Clone)]
enum State {
    Down { trouble: Option<String> },
    Up(Arc<Session>),
    Closed,
}

impl State {
    fn seen(&self) -> ConnectionState {
        match self {
            Self::Down { .. } => ConnectionState::Down,
            Self::Up(session) => ConnectionState::Connected { epoch: session.epoch },
            Self::Closed => ConnectionState::Closed,
        }
    }
}

struct Shared {
    settings: AmqpSettings,
    state: watch::Sender<State>,
}

impl Shared {
    /// Takes a new state, unless its owner has closed it.
    fn set(&self, state: State) {
        self.state.send_if_modified(|now| {
            let open = !matches!(now, State::Closed);
            if open {
                *now = state;
            }
            open
        });
    }

    fn session(&self) -> Result<Arc<Session>, BusError> {
        let identity = || self.settings.identity().to_owned();
        match &*self.state.borrow() {
            State::Up(session) => Ok(Arc::clone(session)),
            State::Down { .. } => Err(BusError::Down { identity: identity() }),
            State::Closed => Err(BusError::Closed { identity: identity() }),
        }
    }

    /// An error of a session that was closed meanwhile is that it was closed.
    fn explain(&self, error: BusError) -> BusError {
        match (&error, &*self.state.borrow()) {
            (BusError::Down { identity }, State::Closed) => BusError::Closed { identity: identity.clone() },
            _ => error,
        }
    }
}

/// Connects again and again until the owner closes.
async fn supervise(shared: Arc<Shared>, mut told: watch::Receiver<bool>) {
    let (mut epoch, mut failures) = (0, 0_u32);
    loop {
        let (over, noticed) = watch::channel(false);
        let opened = tokio::select! {
            biased;
            () = closed(&mut told) => return,
            opened = Session::open(&shared.settings, epoch + 1, over) => opened,
        };
        let trouble = match opened {
            Err(trouble) => trouble,
            Ok((session, tasks)) => {
                epoch += 1;
                let since = Instant::now();
                shared.set(State::Up(Arc::clone(&session)));
                let Some(trouble) = live(&shared, &session, tasks, noticed, &mut told).await else { return };
                failures = if since.elapsed() >= STEADY { 0 } else { failures };
                trouble
            }
        };
        shared.set(State::Down { trouble: Some(trouble) });
        failures = failures.saturating_add(1);
        if !pause(shared.settings.timing.backoff, failures, &mut told).await {
            return;
        }
    }
}

/// A session until its end. Why it ended, or nothing if the owner has closed.
async fn live(
    shared: &Shared,
    session: &Session,
    mut tasks: JoinSet<String>,
    mut noticed: watch::Receiver<bool>,
    told: &mut watch::Receiver<bool>,
) -> Option<String> {
    let trouble = tokio::select! {
        biased;
        () = closed(told) => None,
        ended = tasks.join_next() => Some(ended.and_then(Result::ok).unwrap_or_else(|| "a task of it failed".to_owned())),
        _ = noticed.wait_for(|over| *over) => Some("the connection ended".to_owned()),
    };
    if let Some(trouble) = &trouble {
        shared.set(State::Down { trouble: Some(trouble.clone()) });
    }
    session.close().await;
    tasks.shutdown().await;
    trouble
}

/// Waits before the next attempt; false if the owner closes meanwhile.
async fn pause(backoff: Backoff, failures: u32, told: &mut watch::Receiver<bool>) -> bool {
    let delay = backoff.delay(failures, fastrand::f64());
    tokio::time::timeout(delay, closed(told)).await.is_err()
}

async fn closed(told: &mut watch::Receiver<bool>) {
    // An error means that the owner is gone, which is the same.
    drop(told.wait_for(|closing| *closing).await);
}

/// A connection to a broker over the network. Clones share it; it closes with the last one.
#[derive(Clone)]
pub struct Connection(Arc<Owner>);

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.0.shared.settings).finish()
    }
}

struct Owner {
    shared: Arc<Shared>,
    closing: watch::Sender<bool>,
    tasks: Mutex<JoinSet<()>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.set(State::Closed);
        self.closing.send_replace(true);
        // Its goodbye to the broker has a limit of its own.
        self.tasks.get_mut().unwrap_or_else(PoisonError::into_inner).detach_all();
    }
}

impl Connection {
    pub(crate) fn identity(&self) -> &str {
        self.0.shared.settings.identity()
    }

    async fn on<T>(
        &self,
        operation: impl AsyncFnOnce(Arc<Session>) -> Result<T, BusError>,
    ) -> Result<T, BusError> {
        let session = self.0.shared.session()?;
        operation(session).await.map_err(|error| self.0.shared.explain(error))
    }

    pub(crate) async fn declare(&self, topology: &Topology) -> Result<(), BusError> {
        self.on(async |session| session.declare(topology).await).await
    }

    pub(crate) async fn delete_queue(&self, queue: &str) -> Result<(), BusError> {
        self.on(async |session| session.delete_queue(queue).await).await
    }

    pub(crate) async fn queue_depth(&self, queue: &str) -> Result<u64, BusError> {
        self.on(async |session| session.queue_depth(queue).await).await
    }

    pub(crate) async fn publish(
        &self,
        exchange: &str,
        key: &str,
        message: Message,
        mandatory: bool,
    ) -> Result<Published, BusError> {
        self.on(async |session| session.publish(exchange, key, &message, mandatory).await).await
    }

    pub(crate) async fn consume(&self, queue: &str, prefetch: u16) -> Result<Consumer, BusError> {
        self.on(async |session| Consumer::open(session, queue, prefetch).await).await
    }

    pub(crate) async fn call(
        &self,
        exchange: &str,
        key: &str,
        request: Message,
    ) -> Result<Message, BusError> {
        self.on(async |session| session.call(exchange, key, request).await).await
    }

    pub(crate) fn trouble(&self) -> Option<String> {
        match &*self.0.shared.state.borrow() {
            State::Down { trouble } => trouble.clone(),
            State::Up(_) | State::Closed => None,
        }
    }

    pub(crate) fn watch(&self) -> Watch {
        let identity = self.identity().to_owned();
        Watch { identity, state: self.0.shared.state.subscribe() }
    }

    pub(crate) async fn close(&self) {
        self.0.shared.set(State::Closed);
        self.0.closing.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        if tokio::time::timeout(CLOSING, tasks.join_next()).await.is_err() {
            tasks.detach_all();
        }
    }
}

/// Looks at a connection without keeping it open.
#[derive(Debug)]
pub(crate) struct Watch {
    identity: String,
    state: watch::Receiver<State>,
}

impl Watch {
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    pub(crate) fn state(&self) -> ConnectionState {
        self.state.borrow().seen()
    }

    /// Waits for another state than `seen`, or that it is closed.
    pub(crate) async fn state_after(&self, seen: ConnectionState) -> ConnectionState {
        let other = |state: &State| state.seen() != seen || matches!(state, State::Closed);
        match self.state.clone().wait_for(other).await {
            Ok(state) => state.seen(),
            // Its owner is gone, and the last word of an owner is that it has closed.
            Err(_) => ConnectionState::Closed,
        }
    }
}
