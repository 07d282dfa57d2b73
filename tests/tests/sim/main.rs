//! Whole clusters on one thread: real orchestrators and real agents, a clock that waits for nobody, and faults from
//! a seed. `KILN_SIM_SEED=7 cargo nextest run -p kiln-tests --test sim` runs one seed and prints its trace.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::disallowed_methods, reason = "every task ends with the runtime of its seed")]

mod check;
mod cluster;
mod outside;
mod record;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use cluster::{Ran, run};

/// Seeds of one run of the suite, less than a second of CPU each; `KILN_SIM_SEEDS` asks for more.
const SEEDS: u64 = 300;

fn wanted() -> Option<u64> {
    std::env::var("KILN_SIM_SEED").ok().map(|seed| seed.parse().unwrap())
}

fn command(seed: u64) -> String {
    format!("KILN_SIM_SEED={seed} cargo nextest run -p kiln-tests --test sim --no-capture")
}

/// Before anything else is believed: one seed is one course of events.
#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in wanted().map_or(0..3, |seed| seed..seed + 1) {
        let (first, second) = (run(seed).trace, run(seed).trace);
        let differs = first.iter().zip(&second).position(|(a, b)| a != b);
        if let Some(at) = differs {
            let around = at.saturating_sub(3)..=at;
            panic!("seed {seed}, line {at}:\n{:#?}\n{:#?}", &first[around.clone()], &second[around]);
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
        assert!(first.len() > 20, "seed {seed} does nothing: {first:#?}");
    }
}

#[test]
fn every_invariant_holds_whatever_goes_wrong() {
    if let Some(seed) = wanted() {
        let ran = run(seed);
        for line in &ran.trace {
            eprintln!("{line}");
        }
        eprintln!("{:?}", ran.happened);
        assert!(ran.broken.is_empty(), "{}: {:#?}", command(seed), ran.broken);
        return;
    }
    let seeds = std::env::var("KILN_SIM_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    let (next, failures) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let totals = Mutex::new(std::collections::BTreeMap::<&'static str, u64>::new());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let Ran { broken, happened, .. } = run(seed);
                    for (what, count) in happened {
                        *totals.lock().unwrap().entry(what).or_default() += count;
                    }
                    if !broken.is_empty() {
                        failures.lock().unwrap().push((seed, broken));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    for (seed, broken) in &failures {
        eprintln!("{}: {broken:#?}", command(*seed));
    }
    assert!(failures.is_empty(), "{} of {seeds} seeds failed; their commands are above", failures.len());
    // A suite in which nothing goes wrong proves nothing.
    let totals = totals.into_inner().unwrap();
    eprintln!("{totals:?}");
    for what in [
        "succeeded",
        "cancelled",
        "agent killed",
        "commit lost",
        "commit unheard",
        "put late",
        "put abandoned",
        "lose",
    ] {
        assert!(totals.get(what).is_some_and(|&count| count > 0), "never: {what}; {totals:?}");
    }
}
