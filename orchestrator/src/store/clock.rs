//! The clock of the database (shell).

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tokio::time::Instant;

use crate::build::Micros;

/// What time it is. SQLite has no clock of its own, so the process that opened it lends one.
#[derive(Debug, Clone, Default)]
pub enum Clock {
    /// The clock of this machine.
    #[default]
    System,
    /// Whatever somebody sets, for tests and simulations.
    Manual(Arc<AtomicI64>),
    /// The clock of the runtime, which a simulation pauses: the time since an instant, after what somebody sets.
    Runtime(Instant, Arc<AtomicI64>),
}

impl Clock {
    /// Microseconds since 1970.
    pub fn now(&self) -> Micros {
        match self {
            Self::System => jiff::Timestamp::now().as_microsecond(),
            Self::Manual(now) => now.load(Ordering::SeqCst),
            Self::Runtime(since, set) => {
                let passed = Micros::try_from(since.elapsed().as_micros()).unwrap_or(Micros::MAX);
                set.load(Ordering::SeqCst).saturating_add(passed)
            }
        }
    }
}
