//! Hints between replicas that something changed (shell): LISTEN and NOTIFY, beside the polling that everybody does.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPool};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::query::bounded;
use super::{StoreError, postgres::Pg};

const CHANNEL: &str = "kiln_change";
const TELL: &str = "SELECT pg_notify('kiln_change', $1)";
/// Pause after a hint: one says as much as many. PostgreSQL lets one transaction with a NOTIFY commit at a time, so
/// changes themselves carry none.
const PAUSE: Duration = Duration::from_millis(20);
/// A connection on which nothing was heard for this long may be dead without knowing it, and is made anew.
const SILENCE: Duration = Duration::from_mins(1);
/// Pause before a lost connection is made anew.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Whom to wake.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Everybody in this process who waits for a change.
    pub(super) here: Notify,
    /// The one who tells the other replicas.
    pub(super) elsewhere: Notify,
}

impl Told {
    /// This process committed something that others may wait for.
    pub(super) fn tell(&self) {
        self.here.notify_waiters();
        self.elsewhere.notify_one();
    }
}

/// Hears and tells for as long as it lives. A hint that is lost costs the time until the next look.
#[derive(Debug)]
pub(super) struct Herald {
    _tasks: JoinSet<()>,
}

impl Herald {
    pub(super) fn start(postgres: &Pg, told: &Arc<Told>) -> Self {
        let mut tasks = JoinSet::new();
        // Its own hints come back to it.
        let own = Uuid::new_v4().to_string();
        tasks.spawn(hear(postgres.pool.clone(), Arc::clone(told), own.clone()));
        tasks.spawn(tell(postgres.pool.clone(), Arc::clone(told), own));
        Self { _tasks: tasks }
    }
}

async fn hear(pool: PgPool, told: Arc<Told>, own: String) {
    loop {
        let Err(error) = listen(&pool, &told, &own).await;
        if pool.is_closed() {
            return;
        }
        tracing::debug!(
            error = crate::error::chain(&error),
            "nothing is heard of other replicas; again soon"
        );
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

async fn listen(pool: &PgPool, told: &Told, own: &str) -> Result<std::convert::Infallible, StoreError> {
    let mut listener = bounded(PgListener::connect_with(pool)).await?;
    bounded(listener.listen(CHANNEL)).await?;
    // What happened before is not heard.
    told.here.notify_waiters();
    loop {
        let heard = tokio::time::timeout(SILENCE, listener.recv()).await;
        let hint = heard.map_err(|_| StoreError::no_answer())??;
        if hint.payload() != own {
            told.here.notify_waiters();
        }
    }
}

async fn tell(pool: PgPool, told: Arc<Told>, own: String) {
    loop {
        told.elsewhere.notified().await;
        if pool.is_closed() {
            return;
        }
        let sent = bounded(sqlx::query(TELL).bind(&own).execute(&pool)).await;
        if let Err(error) = sent {
            tracing::debug!(error = crate::error::chain(&error), "other replicas were not told of a change");
        }
        tokio::time::sleep(PAUSE).await;
    }
}
