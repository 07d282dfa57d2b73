//! Cancels at random instants: published stores stay as they are, and the next build succeeds.
//!
//! `KILN_CANCELS` is their number, `KILN_SEED` their seed.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::{Duration, Instant};

use kiln_tests::base::{BaseImage, LayerTar};
use kiln_tests::image::Image;
use kiln_tests::kiln::Kiln;
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers;
use kiln_tests::process::Outcome;
use kiln_tests::tree::Tree;
use nix::sys::signal::Signal;

const DEFAULT_CANCELS: u64 = 40;
const DEFAULT_SEED: u64 = 20_261_123;
/// Enough to spend time in every phase.
const FILES: usize = 40;
const FILE_BYTES: usize = 256 * 1024;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// xorshift64: the instants are the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let share = u32::try_from(self.0 >> 32).unwrap_or_default();
        limit.mul_f64(f64::from(share) / f64::from(u32::MAX))
    }
}

/// Bytes that do not compress to nothing.
fn noise(seed: usize) -> Vec<u8> {
    let mut random = Random(seed as u64 + 1);
    std::iter::repeat_with(|| {
        random.below(Duration::from_secs(1));
        random.0.to_le_bytes()
    })
    .take(FILE_BYTES / 8)
    .flatten()
    .collect()
}

fn lab() -> Lab {
    let lab = Lab::new();
    let layer = LayerTar::default().file("big", 0o644, &noise(99));
    lab.registry.push("library/busybox", "1", &BaseImage::busybox().layer(layer));
    lab.dockerfile(
        "FROM busybox:1\nCOPY . /c/\nRUN --mount=type=cache,target=/cache echo x >> /cache/x && cat /c/* > /all\n\
         RUN for i in 1 2 3 4 5; do echo $i; sleep 0.05; done; sha256sum /all > /sum\n",
    );
    for n in 0..FILES {
        lab.context.file(&format!("f{n}"), noise(n));
    }
    lab
}

/// The build, into `out`, always the same image.
fn build(lab: &Lab, data: &Path, out: &Path) -> Kiln {
    let kiln = Kiln::new("build", data, &lab.path("kiln.toml"), &lab.path("home"));
    let kiln =
        kiln.args(["--timestamp", "0", "--progress", "plain"]).arg("--file").arg(lab.path("Dockerfile"));
    kiln.arg(format!("--output=docker-archive:{}", out.display())).arg(lab.context.path())
}

/// Every second build runs every step; the others find most of them in the cache.
fn flags(round: u64) -> &'static [&'static str] {
    if round.is_multiple_of(2) { &["--no-cache"] } else { &[] }
}

fn wait(delay: Duration) {
    let deadline = Instant::now() + delay;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        std::thread::park_timeout(left);
    }
}

/// Starts a build and cancels it after `delay`; it either ended before or is cancelled.
fn cancel_after(lab: &Lab, data: &Path, flags: &[&str], delay: Duration) -> Outcome {
    let out = lab.path("cancelled.tar");
    let _ = std::fs::remove_file(&out);
    let build = build(lab, data, &out).args(flags).start();
    wait(delay);
    let outcome = build.stop(Signal::SIGTERM);
    leftovers::assert_none(data, CLEAN);
    // 143: the signal came before the first line of our code.
    assert!([0, 130, 143].contains(&outcome.code), "after {delay:?}: {}\n{}", outcome.code, outcome.output());
    assert_eq!(outcome.code == 0, out.exists(), "output and exit code disagree after {delay:?}");
    outcome
}

#[test]
fn with_everything_fetched() {
    let lab = lab();
    let (data, out) = (lab.data(), lab.path("image.tar"));
    let _ = build(&lab, &data, &out).run().expect_code(0);
    let first = Image::docker_archive(&out);
    let warm = [0, 1].map(|round| build(&lab, &data, &out).args(flags(round)).run().expect_code(0).elapsed);
    let stores = || Tree::of(&data.join("store/base"));
    let before = stores();
    let mut random = Random(number("KILN_SEED", DEFAULT_SEED));
    for round in 0..number("KILN_CANCELS", DEFAULT_CANCELS) / 2 {
        let length = warm[usize::from(round % 2 == 1)];
        let _ = cancel_after(&lab, &data, flags(round), random.below(length));
        before.assert_same(&stores());
        assert_no_half_layers(&data);
    }
    let _ = build(&lab, &data, &out).run().expect_code(0);
    assert_eq!(Image::docker_archive(&out).diff_ids(), first.diff_ids());
}

/// Every generation that a layer cache names is there.
fn assert_no_half_layers(data: &Path) {
    let heads = std::fs::read_dir(data.join("layers")).into_iter().flatten().flatten();
    for head in heads.map(|e| e.path()).filter(|path| path.extension().is_some_and(|e| e == "json")) {
        let text = std::fs::read(&head).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        for generation in value["chain"].as_array().unwrap() {
            let name = generation["name"].as_str().unwrap();
            assert!(data.join("store/layers").join(name).is_dir(), "{} names {name}", head.display());
        }
    }
}

/// Most instants are late: between the build, the export in a slot made afresh, and what is kept of both.
#[test]
fn with_an_agent_that_is_killed() {
    let lab = lab();
    let (data, out) = (lab.data(), lab.path("image.tar"));
    let _ = build(&lab, &data, &out).run().expect_code(0);
    let first = Image::docker_archive(&out);
    let warm = [0, 1].map(|round| build(&lab, &data, &out).args(flags(round)).run().expect_code(0).elapsed);
    let before = Tree::of(&data.join("store/base"));
    let mut random = Random(number("KILN_SEED", DEFAULT_SEED) ^ 1);
    // Each is followed by a whole build.
    for round in 0..number("KILN_CANCELS", DEFAULT_CANCELS) / 4 {
        let length = warm[usize::from(round % 2 == 1)];
        let delay = length.mul_f64(0.4) + random.below(length.mul_f64(0.6));
        let killed = build(&lab, &data, &lab.path("killed.tar")).args(flags(round)).start();
        wait(delay);
        let _ = killed.stop(Signal::SIGKILL);
        leftovers::assert_none_live(&data, CLEAN);
        before.assert_same(&Tree::of(&data.join("store/base")));
        assert_no_half_layers(&data);
        let _ = build(&lab, &data, &out).run().expect_code(0);
        leftovers::assert_none(&data, CLEAN);
        assert_eq!(Image::docker_archive(&out).diff_ids(), first.diff_ids(), "after {delay:?}");
    }
}

#[test]
fn with_nothing_fetched() {
    let lab = lab();
    let out = lab.path("image.tar");
    let cold = build(&lab, &lab.path("data-first"), &out).run().expect_code(0).elapsed;
    let first = Image::docker_archive(&out);
    let mut random = Random(number("KILN_SEED", DEFAULT_SEED) ^ u64::MAX);
    let data = lab.data();
    for round in 0..number("KILN_CANCELS", DEFAULT_CANCELS) / 2 {
        let outcome = cancel_after(&lab, &data, &[], random.below(cold.mul_f64(0.6)));
        let stores = std::fs::read_dir(data.join("store/base")).map_or(0, Iterator::count);
        let records = std::fs::read_dir(data.join("bases")).into_iter().flatten().flatten();
        let records = records.filter(|e| e.path().extension().is_some_and(|e| e == "json")).count();
        assert!(records <= stores, "a record without its store after {outcome:?}");
        if round % 4 == 3 {
            let _ = build(&lab, &data, &out).run().expect_code(0);
            assert_eq!(Image::docker_archive(&out).diff_ids(), first.diff_ids());
            // From nothing again.
            let _ = lab.kiln("prune").arg("--all").run().expect_code(0);
        }
    }
}
