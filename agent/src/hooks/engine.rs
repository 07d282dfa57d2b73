//! Shell: the engine, the clock that interrupts guests, and the threads that they run on.

use std::num::NonZeroUsize;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use wasmtime::component::Linker;
use wasmtime::{Config, Engine, EngineWeak};

use super::bindings::Everything;
use super::state::CallState;

/// How often a guest is asked whether its time is over; half of what a deadline may overshoot.
const TICK: Duration = Duration::from_millis(5);
/// Guests get threads of their own, so that one that spins delays neither heartbeats nor uploads.
const THREADS: usize = 2;
/// Enough for real policies and for interpreters.
const GUEST_STACK_BYTES: usize = 512 * 1024;
/// The guest's stack, and as much again for the host functions that it calls.
const STACK_BYTES: usize = 2 * GUEST_STACK_BYTES;
/// A trap's backtrace is for the log.
const BACKTRACE_FRAMES: usize = 20;

/// The engine with its clock and its threads. All of it ends when this is dropped.
pub(super) struct Machine {
    pub(super) engine: Engine,
    pub(super) linker: Linker<CallState>,
    runtime: Option<Runtime>,
    ticker: Option<(SyncSender<()>, JoinHandle<()>)>,
}

impl Machine {
    pub(super) fn start() -> Result<Self, String> {
        let engine = Engine::new(&config()).map_err(|error| format!("{error:#}"))?;
        let linker = linker(&engine).map_err(|error| format!("{error:#}"))?;
        let mut builder = Builder::new_multi_thread();
        let builder = builder.worker_threads(THREADS).thread_name("hooks").enable_time();
        let runtime = builder.build().map_err(|error| error.to_string())?;
        let ticker = start_ticker(engine.weak()).map_err(|error| error.to_string())?;
        Ok(Self { engine, linker, runtime: Some(runtime), ticker: Some(ticker) })
    }

    /// Where guests run. Nothing only while this is dropped.
    pub(super) fn threads(&self) -> Option<&Handle> {
        self.runtime.as_ref().map(Runtime::handle)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // May happen inside another runtime, where waiting is forbidden. Guests end at their next yield.
            runtime.shutdown_background();
        }
        if let Some((stop, thread)) = self.ticker.take() {
            drop(stop);
            // It has no way to panic; and if it had, there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

fn config() -> Config {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .concurrency_support(false)
        .epoch_interruption(true)
        .max_wasm_stack(GUEST_STACK_BYTES)
        .async_stack_size(STACK_BYTES)
        .wasm_backtrace_max_frames(NonZeroUsize::new(BACKTRACE_FRAMES));
    config
}

fn linker(engine: &Engine) -> wasmtime::Result<Linker<CallState>> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    Everything::add_to_linker::<_, wasmtime::component::HasSelf<_>>(&mut linker, |state| state)?;
    Ok(linker)
}

/// A thread and not a task: with every worker busy in a guest no task would run.
fn start_ticker(engine: EngineWeak) -> std::io::Result<(SyncSender<()>, JoinHandle<()>)> {
    let (stop, stopped) = mpsc::sync_channel::<()>(0);
    let tick = move || {
        while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            let Some(engine) = engine.upgrade() else { return };
            engine.increment_epoch();
        }
    };
    Ok((stop, std::thread::Builder::new().name("hooks-clock".to_owned()).spawn(tick)?))
}
