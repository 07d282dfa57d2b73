//! `kiln up` and the commands that ask it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use kiln_tests::kiln::Kiln;
use kiln_tests::lab::Lab;
use kiln_tests::plugin;
use kiln_tests::process::eventually;
use kiln_tests::server::Server;
use kiln_transport::crash::{AT, CrashPoint};
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
    let id = first_id(&server);
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
    let id = first_id(&server);
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

/// The configuration of a plugin whose setting says how it behaves.
fn policy(mode: &str) -> String {
    let file = plugin::file("hostile");
    format!(
        "[plugins]\nallow_unstable = true\n[[plugin]]\nname = \"hostile\"\nsource = \"file:{}\"\n\
         hooks = [\"pre-build\"]\nmode = \"enforce\"\non_failure = \"closed\"\nsettings = {{ mode = \"{mode}\" }}\n",
        file.display()
    )
}

fn first_id(server: &Server) -> String {
    let list = server.list().output();
    list.split_whitespace().find(|word| word.len() == 36).unwrap().to_owned()
}

#[test]
fn a_policy_that_breaks_makes_a_dead_letter_that_passes_once_it_is_mended() {
    let mut server = Server::idle(Lab::new());
    let host = server.lab.registry.host();
    server.lab.configure(&host, &policy("trap"));
    server.up();
    let _ = build(&server, "echo made", "app:1").run().expect_code(5).expect_text(&["hook_fault", "hostile"]);
    let _ = server.list().expect_text(&["DEAD_LETTER"]);
    let id = first_id(&server);
    // Another attempt would end in the same way.
    let shown = server.request("GET", &format!("/builds/{id}"), b"").body;
    let shown: serde_json::Value = serde_json::from_slice(&shown).unwrap();
    assert_eq!(shown["attempt"], 1, "{shown}");

    let _ = server.stop(Signal::SIGTERM);
    server.lab.configure(&host, &policy("allow"));
    server.up();
    let _ = server.ask("dead replay").arg(&id).run().expect_code(0);
    assert!(eventually(SOON, || server.list().output().contains("SUCCESS")), "{}", server.list().output());
    assert!(server.lab.registry.tag("app", "1").is_some());
}

#[test]
fn blobs_lost_after_the_commit_end_the_build_and_say_so() {
    let mut server = Server::idle(Lab::new());
    server.launch(&[(AT, CrashPoint::CommitRecorded.label())]);
    assert!(eventually(SOON, || server.ask("ls").run().code == 0), "the server does not answer");
    let client = build(&server, "echo made", "app:1").start();
    let _ = server.wait().expect_code(128 + 9);
    for gone in ["blobs", "repositories/app"] {
        std::fs::remove_dir_all(server.lab.registry.storage().join("docker/registry/v2").join(gone)).unwrap();
    }
    server.up();
    assert!(eventually(SOON, || server.list().output().contains("FAILED")), "{}", server.list().output());
    let id = first_id(&server);
    let _ =
        server.ask("show").arg(&id).run().expect_text(&["partial_publish", "app:1", "MANIFEST_BLOB_UNKNOWN"]);
    assert_eq!(server.lab.registry.tag("app", "1"), None);
    drop(client);
}
