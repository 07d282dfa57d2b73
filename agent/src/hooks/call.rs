//! Shell: one call of one hook, in an instance of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_protocol::verdict::Outcome;
use wasmtime::component::{Instance, Resource};
use wasmtime::{Store, Trap, UpdateDeadline};

use super::answer;
use super::bindings::types::{Fault, Verdict};
use super::bindings::{BuildHandle, ImageHandle, ReportHandle, types};
use super::plugin::Plugin;
use super::state::{CallState, Ended, Report};
use super::view::{BuildView, ImageView};
use crate::stop::StopSignal;

/// A guest that waits in the host meets no epoch; this much after its deadline the call is dropped.
const GRACE: Duration = Duration::from_millis(10);
/// Bytes that one call moves from the guest into the host.
const TRANSFER_BYTES: usize = 8 << 20;

/// What is judged.
#[derive(Debug, Clone)]
pub(super) enum Subject {
    Build(Arc<BuildView>),
    Image(Arc<ImageView>),
}

/// How a call ended.
#[derive(Debug)]
pub(super) enum Said {
    Verdict(Verdict),
    Nothing(Outcome, String),
}

/// A call that is over; its instance is gone.
#[derive(Debug)]
pub(super) struct Called {
    pub(super) said: Said,
    pub(super) report: Report,
    pub(super) duration: Duration,
    pub(super) memory: u64,
}

type Guest = Result<Verdict, Fault>;

/// Calls the hook that belongs to the subject.
pub(super) async fn call(plugin: &Plugin, subject: &Subject, stop: &StopSignal) -> Called {
    let started = Instant::now();
    let mut store = store(plugin, stop);
    let result = bounded(plugin, stop, judge(plugin, subject, &mut store)).await;
    let said = match result {
        Ok(Ok(verdict)) => Said::Verdict(verdict),
        Ok(Err(fault)) => of_fault(fault),
        Err(error) => of_error(&error, store.data()),
    };
    let duration = started.elapsed();
    let memory = store.data().memory_used();
    Called { said, report: store.into_data().report, duration, memory }
}

/// Asks the plugin whether it can use its settings.
pub(super) async fn validate(
    plugin: &Plugin,
    stop: &StopSignal,
) -> Result<Vec<types::Violation>, (Outcome, String)> {
    let mut store = store(plugin, stop);
    let settings = &plugin.terms.settings;
    let result = bounded(plugin, stop, async {
        let instance = plugin.instance.instantiate_async(&mut store).await?;
        let guest = plugin.setup.load(&mut store, &instance)?;
        guest.call_validate_settings(&mut store, settings).await
    });
    match result.await {
        Ok(answer) => Ok(answer.err().unwrap_or_default()),
        Err(error) => match of_error(&error, store.data()) {
            Said::Nothing(outcome, detail) => Err((outcome, detail)),
            Said::Verdict(_) => Err((Outcome::Trap, String::new())),
        },
    }
}

fn store(plugin: &Plugin, stop: &StopSignal) -> Store<CallState> {
    let mut store = Store::new(plugin.instance.engine(), CallState::new(&plugin.terms, stop));
    store.limiter(|state| &mut state.memory);
    store.set_hostcall_fuel(TRANSFER_BYTES);
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(|store| match store.data().ended() {
        Some(ended) => Err(wasmtime::Error::new(ended)),
        // At the end of the queue: a plain yield comes back before the others had their turn.
        None => Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))),
    });
    store
}

/// The store is never used again after this gave up, only dropped.
async fn bounded<T>(
    plugin: &Plugin,
    stop: &StopSignal,
    work: impl Future<Output = wasmtime::Result<T>>,
) -> wasmtime::Result<T> {
    let mut stop = stop.clone();
    tokio::select! {
        biased;
        result = work => result,
        _ = stop.stopped() => Err(wasmtime::Error::new(Ended::Cancelled)),
        () = tokio::time::sleep(plugin.terms.limits.deadline() + GRACE) => {
            Err(wasmtime::Error::new(Ended::Timeout))
        }
    }
}

async fn judge(plugin: &Plugin, subject: &Subject, store: &mut Store<CallState>) -> wasmtime::Result<Guest> {
    let instance = plugin.instance.instantiate_async(&mut *store).await?;
    let report = store.data_mut().push(ReportHandle)?;
    let report = Resource::new_borrow(report.rep());
    match subject {
        Subject::Build(build) => judge_build(plugin, build, &instance, store, report).await,
        Subject::Image(image) => judge_image(plugin, image, &instance, store, report).await,
    }
}

async fn judge_build(
    plugin: &Plugin,
    build: &Arc<BuildView>,
    instance: &Instance,
    store: &mut Store<CallState>,
    report: Resource<ReportHandle>,
) -> wasmtime::Result<Guest> {
    let Some(hook) = &plugin.pre_build else { return Err(wasmtime::format_err!("it has no such hook")) };
    let build = store.data_mut().push(BuildHandle(Arc::clone(build)))?;
    let guest = hook.load(&mut *store, instance)?;
    guest.call_check(&mut *store, Resource::new_borrow(build.rep()), report).await
}

async fn judge_image(
    plugin: &Plugin,
    image: &Arc<ImageView>,
    instance: &Instance,
    store: &mut Store<CallState>,
    report: Resource<ReportHandle>,
) -> wasmtime::Result<Guest> {
    let Some(hook) = &plugin.post_push else { return Err(wasmtime::format_err!("it has no such hook")) };
    let image = store.data_mut().push(ImageHandle(Arc::clone(image)))?;
    let guest = hook.load(&mut *store, instance)?;
    guest.call_check(&mut *store, Resource::new_borrow(image.rep()), report).await
}

fn of_fault(fault: Fault) -> Said {
    let (outcome, text) = match fault {
        Fault::CapabilityDenied(text) => (Outcome::CapabilityDenied, text),
        Fault::InvalidSettings(text) | Fault::Unavailable(text) | Fault::Other(text) => {
            (Outcome::Fault, text)
        }
    };
    Said::Nothing(outcome, answer::shortened(&text))
}

fn of_error(error: &wasmtime::Error, state: &CallState) -> Said {
    let (outcome, text) = match (error.downcast_ref::<Ended>(), error.downcast_ref::<Trap>()) {
        (Some(ended), _) => (ended.outcome(), ended.to_string()),
        (None, Some(trap)) => (Outcome::Trap, trap.to_string()),
        (None, None) => unnamed(&error.root_cause().to_string()),
    };
    tracing::debug!(plugin = state.terms.name, %outcome, "{error:?}");
    Said::Nothing(outcome, answer::shortened(&text))
}

/// The engine has no public type for this one.
fn unnamed(text: &str) -> (Outcome, String) {
    let outcome =
        if text.contains("fuel allocated for hostcalls") { Outcome::OutputLimit } else { Outcome::Trap };
    (outcome, text.to_owned())
}
