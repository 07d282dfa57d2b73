//! `kiln up` and the commands that ask it.

use std::time::Duration;

use kiln_tests::kiln::Kiln;
use kiln_tests::process::eventually;
use kiln_tests::server::Server;
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_mins(1);

fn build(server: &Server, script: &str, tag: &str) -> Kiln {
    server.lab.dockerfile(&format!("FROM busybox:1\nRUN {script}\n"));
    server.build().args(["-t", &format!("{}/{tag}", server.lab.registry.host())])
}

#[test]
fn a_build_on_a_server_is_published_listed_shown_and_logged() {
    let server = Server::start();
    let _ = build(&server, "echo from-the-log", "app:1").run().expect_code(0).expect_text(&["from-the-log"]);
    let _ = server.list().expect_text(&["SUCCESS"]);
    let id = server.list().output();
    let id = id.split_whitespace().find(|word| word.len() == 36).unwrap().to_owned();
    let _ = server.ask("show").arg(&id).run().expect_code(0).expect_text(&["SUCCESS", "app:1"]);
    let _ = server.ask("logs").arg(&id).run().expect_code(0).expect_text(&["from-the-log"]);
}

#[test]
fn a_build_on_a_server_fails_with_its_own_exit_code() {
    let server = Server::start();
    let _ = build(&server, "exit 7", "app:1").run().expect_code(1).expect_text(&["build_failed"]);
}

#[test]
fn a_build_on_a_server_is_cancelled_by_another_client() {
    let server = Server::start();
    let build = build(&server, "echo begun; sleep 600", "app:1").start();
    build.expect_output("begun");
    let id = server.list().output();
    let id = id.split_whitespace().find(|word| word.len() == 36).unwrap().to_owned();
    let _ = server.ask("cancel").arg(&id).run().expect_code(0);
    let _ = build.wait().expect_code(130);
    let _ = server.list().expect_text(&["CANCELLED"]);
}

#[test]
fn a_killed_server_goes_on_with_what_was_recorded() {
    let mut server = Server::start();
    let build = build(&server, "echo begun; sleep 3; echo over", "app:1").start();
    build.expect_output("begun");
    let _ = server.stop(Signal::SIGKILL);
    server.up();
    assert!(
        eventually(SOON, || server.list().output().contains("SUCCESS")),
        "the build must be built by the next server: {}",
        server.list().output()
    );
    drop(build);
}
