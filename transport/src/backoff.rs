//! How long to wait before the next try (pure).

use std::time::Duration;

/// Exponential backoff with full jitter: somewhere between nothing and `min(cap, base · 2^failures)`. Full
/// jitter spreads those who failed together, so that they do not come back together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
}

impl Backoff {
    /// Waits at most `base` after the first failure and never more than `cap`.
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap }
    }

    /// The longest wait after `failures` failures in a row, counted from 1; no wait after none.
    pub fn ceiling(self, failures: u32) -> Duration {
        let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        self.base.checked_mul(factor).unwrap_or(self.cap).min(self.cap)
    }

    /// The wait after `failures` failures in a row. `jitter` is a random number from 0 to 1 of the caller's own
    /// generator; what lies outside is taken as the nearer end.
    pub fn delay(self, failures: u32, jitter: f64) -> Duration {
        let share = if jitter.is_nan() { 1.0 } else { jitter.clamp(0.0, 1.0) };
        self.ceiling(failures).mul_f64(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(1));

    #[test]
    fn the_ceiling_doubles_up_to_the_cap() {
        for (failures, seconds) in
            [(0, 0), (1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (32, 60), (33, 60), (u32::MAX, 60)]
        {
            assert_eq!(BACKOFF.ceiling(failures), Duration::from_secs(seconds), "{failures} failures");
        }
    }

    #[test]
    fn jitter_takes_a_share_of_the_ceiling() {
        for (jitter, millis) in [
            (0.0, 0),
            (0.5, 2000),
            (1.0, 4000),
            (7.0, 4000),
            (-1.0, 0),
            (f64::NAN, 4000),
            (f64::INFINITY, 4000),
        ] {
            assert_eq!(BACKOFF.delay(3, jitter), Duration::from_millis(millis), "jitter {jitter}");
        }
    }

    #[test]
    fn a_base_that_overflows_is_capped() {
        let backoff = Backoff::new(Duration::MAX, Duration::from_secs(5));
        assert_eq!(backoff.delay(9, 1.0), Duration::from_secs(5));
    }
}
