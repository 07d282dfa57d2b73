//! The clock of the database (shell).

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::build::Micros;

/// What time it is. SQLite has no clock of its own, so the process that opened it lends one.
#[derive(Debug, Clone, Default)]
pub enum Clock {
    /// The clock of this machine.
    #[default]
    System,
    /// Whatever somebody sets, for tests and simulations.
    Manual(Arc<AtomicI64>),
}

impl Clock {
    /// Microseconds since 1970.
    pub fn now(&self) -> Micros {
        match self {
            Self::System => jiff::Timestamp::now().as_microsecond(),
            Self::Manual(now) => now.load(Ordering::SeqCst),
        }
    }
}
