//! When a failed request is sent again (pure, except for [`Backoff::wait`]).

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use super::error::Cause;

/// Bounds of everything that waits.
#[derive(Debug, Clone)]
pub struct Limits {
    /// For name lookup, connection and TLS together.
    pub connect: Duration,
    /// Between two pieces of an answer.
    pub idle: Duration,
    /// For one `resolve`, whatever happens.
    pub resolve: Duration,
    /// For one `fetch`, whatever happens.
    pub fetch: Duration,
    /// For a registry to store a blob after it got the last byte.
    pub store: Duration,
    /// How often one request is repeated.
    pub retries: u32,
    /// Pause before the first repetition; it doubles.
    pub pause: Duration,
    /// The longest `Retry-After` that is waited for; a longer one ends the request.
    pub longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_mins(1),
            // Room for every repetition with the longest pause, at two manifests.
            resolve: Duration::from_mins(8),
            // 20 GB at 6 MB/s. It only ends what trickles, the build has its own timeout.
            fetch: Duration::from_hours(1),
            // Registries on object storage copy the blob once more; 10 GB take minutes there.
            store: Duration::from_mins(5),
            retries: 3,
            pause: Duration::from_millis(500),
            longest_pause: Duration::from_mins(1),
        }
    }
}

/// Counts the repetitions of one request.
#[derive(Debug)]
pub(crate) struct Backoff<'a> {
    limits: &'a Limits,
    repeated: u32,
    /// The last endpoint is repeated; before another one, that other is the repetition.
    patient: bool,
}

impl<'a> Backoff<'a> {
    pub(crate) fn new(limits: &'a Limits, patient: bool) -> Self {
        Self { limits, repeated: 0, patient }
    }

    /// Waits if the request may be sent again, else hands the cause back.
    pub(crate) async fn wait(&mut self, cause: Cause) -> Result<(), Cause> {
        let Some(pause) = self.next(&cause, random_fraction()) else { return Err(cause) };
        tracing::debug!(error = %cause, ?pause, "asking the registry again");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn next(&mut self, cause: &Cause, random: f64) -> Option<Duration> {
        if !self.patient || self.repeated >= self.limits.retries {
            return None;
        }
        let pause = match cause {
            // Coming back earlier than asked makes a rate limit longer.
            Cause::Unavailable { retry_after: Some(asked), .. } => {
                (*asked <= self.limits.longest_pause).then_some(*asked)?
            }
            Cause::Unavailable { .. } | Cause::Connect(_) | Cause::Broken(_) => Duration::ZERO,
            Cause::Length { expected, actual } if actual < expected => Duration::ZERO,

            // A timeout has used its time up; everything else would fail again.
            _ => return None,
        };
        let doubled = self.limits.pause.saturating_mul(2_u32.saturating_pow(self.repeated));
        self.repeated += 1;
        // From a half to the whole, so that agents which failed together do not come back together.
        Some(pause.max(doubled.mul_f64(0.5 + random / 2.0)))
    }
}

/// Between 0 and 1; good enough for jitter.
pub(super) fn random_fraction() -> f64 {
    let random = RandomState::new().hash_one(());
    f64::from((random >> 32) as u32) / f64::from(u32::MAX)
}

/// The seconds of a `Retry-After` header. Its other form, a date, needs two clocks that agree and is treated
/// as missing.
pub(crate) fn retry_after(value: &str) -> Option<Duration> {
    value.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Said;

    fn unavailable(retry_after: Option<u64>) -> Cause {
        let retry_after = retry_after.map(Duration::from_secs);
        Cause::Unavailable { by: "h".into(), status: 503, said: Said::default(), retry_after }
    }

    #[test]
    fn pauses_double_and_end() {
        let limits = Limits::default();
        let mut backoff = Backoff::new(&limits, true);
        let pauses: Vec<_> = (0..4).map(|_| backoff.next(&unavailable(None), 1.0)).collect();
        let expected = [500, 1000, 2000].map(|ms| Some(Duration::from_millis(ms)));
        assert_eq!(pauses[..3], expected);
        assert_eq!(pauses[3], None);
        let shortest = Backoff::new(&limits, true).next(&unavailable(None), 0.0);
        assert_eq!(shortest, Some(Duration::from_millis(250)));
    }

    #[test]
    fn retry_after_is_obeyed_up_to_a_bound() {
        let limits = Limits::default();
        let next = |seconds| Backoff::new(&limits, true).next(&unavailable(Some(seconds)), 1.0);
        assert_eq!(next(7), Some(Duration::from_secs(7)));
        assert_eq!(next(0), Some(Duration::from_millis(500)));
        assert_eq!(next(61), None);
        assert_eq!(retry_after(" 12 "), Some(Duration::from_secs(12)));
        assert_eq!(retry_after("Fri, 31 Dec 1999 23:59:59 GMT"), None);
    }

    #[test]
    fn what_would_fail_again_and_what_another_endpoint_may_have_is_not_repeated() {
        let limits = Limits::default();
        assert_eq!(Backoff::new(&limits, true).next(&Cause::NotFound { said: Said::default() }, 1.0), None);
        let timeout = Cause::Timeout { what: "x", limit: limits.idle };
        assert_eq!(Backoff::new(&limits, true).next(&timeout, 1.0), None);
        assert_eq!(Backoff::new(&limits, false).next(&unavailable(None), 1.0), None);
    }

    #[test]
    fn jitter_is_a_fraction() {
        let values: Vec<_> = (0..50).map(|_| random_fraction()).collect();
        assert!(values.iter().all(|value| (0.0..=1.0).contains(value)));
        assert!(values.iter().any(|value| (value - values[0]).abs() > f64::EPSILON));
    }
}
