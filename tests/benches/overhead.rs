//! What Kiln adds to the same pull, build and push by hand.
//!
//! Both run alternately against the same registry on the same machine, so that a noisy neighbour meets both;
//! the median of the differences is the figure. `make bench` runs it with the release binary.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark fails by panicking and reports by printing"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use kiln_tests::base::{BaseImage, LayerTar};
use kiln_tests::lab::Lab;
use kiln_tests::plain::Plain;

const ROUNDS: usize = 15;
const DOCKERFILE: &str = "FROM base:1\nCOPY . /src\nRUN cat /src/* > /all\nRUN echo done > /done\n";
/// A base layer of this size cannot be compressed: the worst case for anyone who copies it.
const LARGE_BASE_BYTES: usize = 64 * 1024 * 1024;

fn main() {
    let small = BaseImage::busybox();
    let large = BaseImage::busybox().layer(LayerTar::default().file("blob", 0o644, &noise(LARGE_BASE_BYTES)));
    measure("small base (2 MB), into a directory", &small, Where::Directory);
    measure("large base (64 MB), into a directory", &large, Where::Directory);
    measure("small base (2 MB), published", &small, Where::Registry);
}

/// Where the image goes.
#[derive(Debug, Clone, Copy)]
enum Where {
    Directory,
    Registry,
}

/// Bytes that no compressor likes, from a fixed seed (xorshift64).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn measure(name: &str, base: &BaseImage, to: Where) {
    let lab = Lab::empty(kiln_tests::registry::Access::Open);
    lab.registry.push("library/base", "1", base);
    lab.dockerfile(DOCKERFILE);
    for index in 0..20 {
        lab.context.file(&format!("file-{index}"), noise(10_000));
    }
    std::fs::create_dir(lab.path("plain")).unwrap();
    let plain = Plain::new(lab.path("plain"), &lab.registry.host());
    let mut kiln = Vec::new();
    let mut hand = Vec::new();
    let mut parts: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        // New content each time, so that both have something to send.
        lab.context.file("round", round.to_string());
        let by_hand = timed(|| by_hand(&plain, &lab, to));
        let by_kiln = timed(|| by_kiln(&lab, to));
        // The first round fetches and imports the base.
        if round > 0 {
            hand.push(by_hand);
            kiln.push(by_kiln);
            for (part, milliseconds) in phases(&lab.path("metadata.json")) {
                parts.entry(part).or_default().push(milliseconds);
            }
        }
    }
    report(name, &hand, &kiln, &parts);
}

fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64() * 1000.0
}

fn by_kiln(lab: &Lab, to: Where) {
    let build = lab.build().arg("--no-cache").arg("--metadata-file").arg(lab.path("metadata.json"));
    let build = match to {
        Where::Directory => build.arg("--output").arg(format!("dir:{}", lab.path("kiln-layout").display())),
        Where::Registry => build.arg("-t").arg(format!("{}/kiln:latest", lab.registry.host())),
    };
    let _ = build.run().expect_code(0);
}

fn by_hand(plain: &Plain, lab: &Lab, to: Where) {
    let layout = lab.path("plain-layout");
    let _ = std::fs::remove_dir_all(&layout);
    plain.pull("docker.io/library/base:1");
    let flags = ["--pull=never".to_owned()];
    let _ = plain.build("docker", &lab.path("Dockerfile"), lab.context.path(), &flags).expect_code(0);
    match to {
        Where::Directory => plain.push(&layout),
        Where::Registry => plain.publish(&format!("{}/plain:latest", lab.registry.host())),
    }
}

fn phases(metadata: &Path) -> Vec<(String, f64)> {
    let text = std::fs::read_to_string(metadata).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let phases = json["kiln.build.phases.milliseconds"].as_object().unwrap();
    phases.iter().map(|(part, value)| (part.clone(), value.as_f64().unwrap())).collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn report(name: &str, hand: &[f64], kiln: &[f64], parts: &BTreeMap<String, Vec<f64>>) {
    let added: Vec<f64> = kiln.iter().zip(hand).map(|(kiln, hand)| kiln - hand).collect();
    let ratio: Vec<f64> = kiln.iter().zip(hand).map(|(kiln, hand)| kiln / hand).collect();
    println!("{name}: medians of {ROUNDS} warm pairs, milliseconds");
    println!("  by hand {:>8.0}   (pull, build, push)", median(hand));
    println!("  kiln    {:>8.0}", median(kiln));
    println!("  added   {:>8.0}   ratio {:.2}", median(&added), median(&ratio));
    let mut total = 0.0;
    for part in [
        "start", "pack", "probe", "plan", "resolve", "fetch", "slot", "unpack", "build", "export", "seal",
        "clean", "upload", "commit", "publish", "output",
    ] {
        let spent = parts.get(part).map_or(0.0, |values| median(values));
        total += spent;
        println!("    {part:<8} {spent:>6.0}");
    }
    println!("    {:<8} {:>6.0}   (process start and end)", "rest", median(kiln) - total);
}
