//! Pure but for the clock: what one call may still do, and what it has said so far.

use std::sync::Arc;
use std::time::Instant;

use kiln_protocol::verdict::{Note, Outcome, Violation};
use wasmtime::ResourceLimiter;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};

use super::config::Limits;
use crate::stop::StopSignal;
use kiln_protocol::glob::Glob;

/// Resources that a guest may hold: each instruction of the longest Dockerfile three times.
const MAX_HANDLES: usize = 32 * 1024;
/// Instances, tables and memories of one component; Python's, the largest seen, have about forty modules.
const MAX_PARTS: usize = 256;
/// Bytes that one element of a table takes.
const TABLE_ELEMENT_BYTES: usize = 16;
/// What a guest may ask the random generator for at once.
const MAX_RANDOM_BYTES: u64 = 64 * 1024;

/// Why the host ended a call. The guest cannot catch it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Ended {
    /// Time is over.
    #[error("it took longer than limits.deadline_ms")]
    Timeout,
    /// The build ends.
    #[error("the build was asked to stop")]
    Cancelled,
    /// Memory is used up.
    #[error("it wanted more memory than limits.memory_mib")]
    Memory,
    /// Too many calls.
    #[error("it called the host more often than limits.host_calls")]
    HostCalls,
    /// Too many resources at once.
    #[error("it held more than {MAX_HANDLES} resources at once")]
    Handles,
    /// Too much said.
    #[error("it said more than the host takes: {0}")]
    Output(&'static str),
}

impl Ended {
    pub(super) const fn outcome(self) -> Outcome {
        match self {
            Self::Timeout => Outcome::Timeout,
            Self::Cancelled => Outcome::Cancelled,
            Self::Memory => Outcome::Oom,
            Self::HostCalls | Self::Handles => Outcome::HostCallLimit,
            Self::Output(_) => Outcome::OutputLimit,
        }
    }
}

/// All memories and tables of a call together.
#[derive(Debug)]
pub(super) struct Memory {
    used: usize,
    limit: usize,
}

impl Memory {
    const fn new(limits: &Limits) -> Self {
        Self { used: 0, limit: limits.memory_mib.saturating_mul(1 << 20) }
    }

    /// A guest gets no second chance after a refusal: most would trap in an unclear way or try for ever.
    fn grow(&mut self, bytes: usize) -> wasmtime::Result<bool> {
        let used = self.used.saturating_add(bytes);
        if used > self.limit {
            return Err(wasmtime::Error::new(Ended::Memory));
        }
        self.used = used;
        Ok(true)
    }
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, now: usize, wanted: usize, _max: Option<usize>) -> wasmtime::Result<bool> {
        self.grow(wanted.saturating_sub(now))
    }

    fn table_growing(&mut self, now: usize, wanted: usize, _max: Option<usize>) -> wasmtime::Result<bool> {
        self.grow(wanted.saturating_sub(now).saturating_mul(TABLE_ELEMENT_BYTES))
    }

    fn instances(&self) -> usize {
        MAX_PARTS
    }

    fn tables(&self) -> usize {
        MAX_PARTS
    }

    fn memories(&self) -> usize {
        MAX_PARTS
    }
}

/// What the plugin may use and see; the same for all its calls.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) name: String,
    pub(super) limits: Limits,
    pub(super) context_read: Vec<Glob>,
    pub(super) settings: String,
}

/// What a hook has said besides its verdict.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) warnings: Vec<Violation>,
    pub(super) notes: Vec<Note>,
}

/// The state of one call, dropped with its instance.
pub(super) struct CallState {
    pub(super) table: ResourceTable,
    wasi: WasiCtx,
    pub(super) memory: Memory,
    pub(super) terms: Arc<Terms>,
    pub(super) report: Report,
    pub(super) log_left: usize,
    calls_left: u64,
    deadline: Instant,
    stop: StopSignal,
}

impl CallState {
    /// The clock starts now.
    pub(super) fn new(terms: &Arc<Terms>, stop: &StopSignal) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_HANDLES);
        Self {
            table,
            wasi: empty_wasi(),
            memory: Memory::new(&terms.limits),
            terms: Arc::clone(terms),
            report: Report::default(),
            log_left: terms.limits.log_kib.saturating_mul(1024),
            calls_left: terms.limits.host_calls,
            deadline: Instant::now() + terms.limits.deadline(),
            stop: stop.clone(),
        }
    }

    /// Why the call has to end now, if it has to.
    pub(super) fn ended(&self) -> Option<Ended> {
        if self.is_stopping() {
            Some(Ended::Cancelled)
        } else {
            (Instant::now() >= self.deadline).then_some(Ended::Timeout)
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.current().is_some()
    }

    /// Every host function begins with this: epochs do not interrupt the host.
    pub(super) fn count_call(&mut self) -> wasmtime::Result<()> {
        let ended = self.ended().or_else(|| (self.calls_left == 0).then_some(Ended::HostCalls));
        self.calls_left = self.calls_left.saturating_sub(1);
        ended.map_or(Ok(()), |ended| Err(wasmtime::Error::new(ended)))
    }

    pub(super) const fn memory_used(&self) -> u64 {
        self.memory.used as u64
    }
}

/// Guests import WASI even if they never use it. This one has no files, no environment, no network, and its
/// streams end nowhere.
fn empty_wasi() -> WasiCtx {
    WasiCtxBuilder::new()
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .max_random_size(MAX_RANDOM_BYTES)
        .build()
}

impl WasiView for CallState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}
