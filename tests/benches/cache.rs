//! What the layer cache saves: all steps run, none does, or those behind a changed source.
//!
//! `make bench` runs it with the release binary.
#![expect(clippy::print_stdout, reason = "a benchmark reports by printing")]

use std::time::Instant;

use kiln_tests::lab::Lab;

const ROUNDS: usize = 7;
/// A step that takes as long as a small download or compilation, then the sources and a short step.
const DOCKERFILE: &str = "FROM busybox:1\nRUN i=0; while [ $i -lt 2000000 ]; do i=$((i+1)); done; echo $i > /made\n\
    ENV A=b\nCOPY . /src\nRUN cat /src/* > /all\nRUN echo done > /done\n";

fn main() {
    let lab = Lab::new();
    lab.dockerfile(DOCKERFILE);
    for index in 0..20 {
        lab.context.file(&format!("file-{index}"), vec![b'x'; 10_000]);
    }
    let build = |flags: &[&str]| {
        let began = Instant::now();
        let _ = lab.build_archive().args(flags).run().expect_code(0);
        began.elapsed().as_secs_f64() * 1000.0
    };
    // Fetches and imports the base.
    build(&[]);
    let mut rows =
        [("all steps run (--no-cache)", vec![]), ("nothing changed", vec![]), ("a source changed", vec![])];
    for round in 0..ROUNDS {
        rows[0].1.push(build(&["--no-cache"]));
        rows[1].1.push(build(&[]));
        lab.context.file("file-0", format!("round {round}"));
        rows[2].1.push(build(&[]));
    }
    println!("medians of {ROUNDS}, milliseconds");
    for (name, mut values) in rows {
        values.sort_by(f64::total_cmp);
        println!("  {name:<28} {:>6.0}", values[ROUNDS / 2]);
    }
}
