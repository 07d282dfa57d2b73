//! The loops of an orchestrator (shell).

use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::id::Pool;
use kiln_protocol::topology as names;
use kiln_transport::{Blobs, Bus, BusError};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::amnesty::Amnesty;
use crate::core::Orchestrator;
use crate::error::chain;
use crate::{outbox, sweep, topology};

/// Pause before something that broke is begun anew.
pub(crate) const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Declares the topology and starts every loop in the set. Each goes on until the set is aborted or dropped: the
/// record is whole between any two statements.
pub async fn start(
    orchestrator: &Arc<Orchestrator>,
    bus: &Bus,
    pools: &[Pool],
    loops: &mut JoinSet<()>,
) -> Result<(), BusError> {
    bus.declare(&topology::shared(pools)).await?;
    let on = |loops: &mut JoinSet<()>, work: Work| {
        loops.spawn(keep_on(Arc::clone(orchestrator), bus.clone(), work));
    };
    for _ in 0..orchestrator.store().writers() {
        on(loops, Work::Questions);
        on(loops, Work::Reports);
    }
    on(loops, Work::DeadCommands);
    on(loops, Work::DeadReports);
    loops.spawn(relay(Arc::clone(orchestrator), bus.clone()));
    loops.spawn(sweep(Arc::clone(orchestrator), bus.clone()));
    loops.spawn(prune(Arc::clone(orchestrator)));
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Work {
    Questions,
    Reports,
    DeadCommands,
    DeadReports,
}

async fn keep_on(orchestrator: Arc<Orchestrator>, bus: Bus, work: Work) {
    loop {
        let ended = match work {
            Work::Questions => orchestrator.consume_questions(&bus).await,
            Work::Reports => orchestrator.consume_reports(&bus).await,
            Work::DeadCommands => orchestrator.consume_dead(&bus, names::DEAD_COMMANDS).await,
            Work::DeadReports => orchestrator.consume_dead(&bus, names::DEAD_REPORTS).await,
        };
        tracing::debug!(?work, error = ?ended.err(), "a subscription ended; it is begun anew");
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

async fn relay(orchestrator: Arc<Orchestrator>, bus: Bus) {
    loop {
        // Before looking, so that what happens while we look wakes us.
        let woken = orchestrator.store().next_change();
        let sent = log_error("relay messages", orchestrator.relay(&bus).await).unwrap_or(0);
        let hinted = log_error("hint at builds", orchestrator.hint(&bus).await).unwrap_or(0);
        if sent + hinted == 0 {
            let _ = tokio::time::timeout(outbox::LOOK_EVERY, woken).await;
        }
    }
}

async fn sweep(orchestrator: Arc<Orchestrator>, bus: Bus) {
    let mut amnesty = Amnesty::default();
    loop {
        let swept = orchestrator.probe_and_sweep(&bus, &mut amnesty, Instant::now()).await;
        log_error("sweep", swept);
        tokio::time::sleep(sweep::EVERY).await;
    }
}

async fn prune(orchestrator: Arc<Orchestrator>) {
    loop {
        log_error("forget old rows", orchestrator.prune(&orchestrator.settings.retention).await);
        tokio::time::sleep(sweep::PRUNE_EVERY).await;
    }
}

/// Deletes uploaded contexts that nothing needs, for ever.
pub async fn tidy_contexts(orchestrator: Arc<Orchestrator>, contexts: Blobs) {
    loop {
        let now = jiff::Timestamp::now().into();
        log_error("delete old contexts", orchestrator.prune_contexts(&contexts, now).await);
        tokio::time::sleep(sweep::PRUNE_EVERY).await;
    }
}

fn log_error<T, E: std::error::Error + 'static>(what: &str, result: Result<T, E>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(error = chain(&error), "cannot {what} now");
            None
        }
    }
}
