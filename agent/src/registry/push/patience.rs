//! How long a push goes on trying (pure, except for [`Patience::wait`]).

use std::time::Duration;

use tokio::time::Instant;

use super::failed::{Again, Failed};
use crate::registry::error::Cause;
use crate::registry::retry::{Limits, random_fraction};

/// A registry that restarts is back within this; asking more rarely only costs time.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Repeats one request until the push's time is over.
#[derive(Debug)]
pub(super) struct Patience<'a> {
    limits: &'a Limits,
    deadline: Instant,
    repeated: u32,
    doubtful: u32,
}

impl<'a> Patience<'a> {
    pub(super) fn new(limits: &'a Limits, deadline: Instant) -> Self {
        Self { limits, deadline, repeated: 0, doubtful: 0 }
    }

    /// Waits if the request may be sent again, else hands the failure back.
    pub(super) async fn wait(&mut self, failed: Failed) -> Result<(), Failed> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let Some(pause) = self.next(&failed, left, random_fraction()) else { return Err(failed) };
        tracing::debug!(error = %failed, ?pause, "asking the registry again");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn next(&mut self, failed: &Failed, left: Duration, random: f64) -> Option<Duration> {
        match failed.again() {
            Again::Never => return None,
            Again::Sometimes if self.doubtful >= self.limits.retries => return None,
            Again::Sometimes => self.doubtful += 1,
            Again::Always => {}
        }
        // Coming back earlier than asked makes a rate limit longer.
        let asked = match failed {
            Failed::Client(Cause::Unavailable { retry_after: Some(asked), .. }) => *asked,
            _ => Duration::ZERO,
        };
        let doubled = self.limits.pause.saturating_mul(2_u32.saturating_pow(self.repeated));
        self.repeated += 1;
        // From a half to the whole, so that agents which failed together do not come back together.
        let pause = asked.max(doubled.min(LONGEST_PAUSE).mul_f64(0.5 + random / 2.0));
        (pause < left).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Said;

    fn busy(retry_after: Option<u64>) -> Failed {
        let retry_after = retry_after.map(Duration::from_secs);
        Cause::Unavailable { by: "h".into(), status: 429, said: Said::default(), retry_after }.into()
    }

    fn pauses(count: usize, failed: &Failed) -> Vec<Option<Duration>> {
        let limits = Limits::default();
        let mut patience = Patience::new(&limits, Instant::now());
        (0..count).map(|_| patience.next(failed, Duration::from_mins(15), 1.0)).collect()
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_go_on() {
        let found = pauses(40, &busy(None));
        assert_eq!(found[..3], [500, 1000, 2000].map(|ms| Some(Duration::from_millis(ms))));
        assert_eq!(found[39], Some(LONGEST_PAUSE));
    }

    #[test]
    fn retry_after_is_obeyed_as_long_as_there_is_time() {
        let limits = Limits::default();
        let next = |seconds, left| {
            let mut patience = Patience::new(&limits, Instant::now());
            patience.next(&busy(Some(seconds)), Duration::from_secs(left), 1.0)
        };
        assert_eq!(next(120, 900), Some(Duration::from_mins(2)));
        assert_eq!(next(0, 900), Some(Duration::from_millis(500)));
        assert_eq!(next(120, 100), None);
    }

    #[test]
    fn what_may_be_for_good_is_tried_a_few_times_only() {
        let said = Said { code: Some("DIGEST_INVALID".into()), message: None };
        let failed = Cause::Refused { by: "h".into(), status: 400, said }.into();
        let found = pauses(5, &failed);
        assert_eq!(found.iter().flatten().count(), 3);
        assert_eq!(found[3], None);
    }
}
