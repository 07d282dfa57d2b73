//! When a tag is looked at again (pure).
//!
//! A registry has no conditional PUT: a writer that was stopped just before its PUT moves the tag back when it
//! wakes up. So a tag whose head changed while an earlier writer had not answered is looked at again.

use super::SECOND;
use crate::build::Micros;

const MINUTE: Micros = 60 * SECOND;
const DAY: Micros = 24 * 60 * MINUTE;
/// No stopped process is expected to come back after a month.
const MAX_RECHECKS: u32 = 33;

/// How long after the look number `done` the next one is: 1, 10, 60 minutes, then daily.
pub const fn recheck_delay(done: u32) -> Micros {
    match done {
        0 => MINUTE,
        1 => 10 * MINUTE,
        2 => 60 * MINUTE,
        _ => DAY,
    }
}

/// When the look after this one is, if there is one.
pub fn next_recheck(done: u32, now: Micros) -> Option<Micros> {
    let done = done.saturating_add(1);
    (done < MAX_RECHECKS).then(|| now.saturating_add(recheck_delay(done)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_become_rare_and_end() {
        assert_eq!(recheck_delay(0), MINUTE);
        assert_eq!(next_recheck(0, 0), Some(10 * MINUTE));
        assert_eq!(next_recheck(1, 0), Some(60 * MINUTE));
        assert_eq!(next_recheck(2, 5), Some(5 + DAY));
        assert_eq!(next_recheck(MAX_RECHECKS, 0), None);
    }
}
