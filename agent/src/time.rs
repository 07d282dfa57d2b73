//! Durations as numbers, and the one clock that names dates (edge).

use std::time::Duration;

/// Whole milliseconds.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Time since 1970.
pub(crate) fn now() -> Duration {
    Duration::try_from(jiff::Timestamp::now().as_duration()).unwrap_or_default()
}

/// From 0 to 1, to spread what would otherwise happen at once.
pub(crate) fn jitter() -> f64 {
    fastrand::f64()
}
