//! Builds share a user as far as the kernel counts: what one hoards, its neighbours must not miss.

use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::assert_none;
use nix::sys::signal::Signal;

/// Over a thousand pipes: as much buffer as the kernel gives to all unprivileged processes of a user.
const PIPES: &str = "mkdir /f && cd /f\nfor i in $(seq 160); do (\n\
    for j in 3 4 5 6 7 8 9; do mkfifo $i.$j; done\n\
    exec 3<>$i.3 4<>$i.4 5<>$i.5 6<>$i.6 7<>$i.7 8<>$i.8 9<>$i.9; touch $i; exec sleep 100\n\
    ) & done\nuntil [ $(ls | grep -vc '[.]') = 160 ]; do :; done\necho all are open\nwait\n";

#[test]
fn many_pipes_do_not_stop_a_neighbour() {
    let lab = Lab::new();
    lab.context.file("hoard", PIPES);
    std::fs::write(lab.path("hoard"), "FROM busybox:1\nCOPY hoard /\nRUN sh /hoard\n").unwrap();
    let hoarder = lab.kiln("build").arg("--network=none").arg("--file").arg(lab.path("hoard"));
    let hoarder = hoarder.arg(lab.context.path()).start();
    hoarder.expect_output("all are open");
    // More output than a small pipe holds, on both streams, and a failure with a long message.
    let talk = "seq 20000; seq 20000 >&2";
    lab.dockerfile(&format!("FROM busybox:1\nRUN {talk}\n"));
    let _ = lab.build_archive().run().expect_code(0).expect_text(&["\n20000\n"]);
    lab.dockerfile(&format!("FROM busybox:1\nRUN {talk}; exit 7 # {}\n", "x".repeat(16_000)));
    let _ = lab.build_archive().run().expect_code(1).expect_text(&["exited with code 7"]);
    let _ = hoarder.stop(Signal::SIGTERM).expect_code(130);
    assert_none(&lab.data(), CLEAN);
}
