//! `kiln up` and the commands that ask it.

use std::time::Duration;

use kiln_tests::kiln::{Build, Kiln};
use kiln_tests::lab::Lab;
use kiln_tests::process::{Outcome, eventually};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_mins(1);

/// A server of a lab.
struct Server {
    lab: Lab,
    process: Option<Build>,
}

impl Server {
    fn start() -> Self {
        let mut server = Self { lab: Lab::new(), process: None };
        server.up();
        server
    }

    fn up(&mut self) {
        let process = self.lab.kiln("up").start();
        process.expect_output("listening on");
        self.process = Some(process);
    }

    fn socket(&self) -> String {
        format!("unix:{}", self.lab.data().join("api/kiln.sock").display())
    }

    fn ask(&self, command: &str) -> Kiln {
        self.lab.kiln(command).arg("--server").arg(self.socket())
    }

    fn build(&self, script: &str, tag: &str) -> Kiln {
        self.lab.dockerfile(&format!("FROM busybox:1\nRUN {script}\n"));
        self.ask("build")
            .arg("--file")
            .arg(self.lab.path("Dockerfile"))
            .args(["-t", &format!("{}/{tag}", self.lab.registry.host())])
            .arg(self.lab.context.path())
    }

    fn list(&self) -> Outcome {
        self.ask("ls").run().expect_code(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.stop(Signal::SIGTERM);
        }
    }
}

#[test]
fn a_build_on_a_server_is_published_listed_shown_and_logged() {
    let server = Server::start();
    let _ = server.build("echo from-the-log", "app:1").run().expect_code(0).expect_text(&["from-the-log"]);
    let _ = server.list().expect_text(&["SUCCESS"]);
    let id = server.list().output();
    let id = id.split_whitespace().find(|word| word.len() == 36).unwrap().to_owned();
    let _ = server.ask("show").arg(&id).run().expect_code(0).expect_text(&["SUCCESS", "app:1"]);
    let _ = server.ask("logs").arg(&id).run().expect_code(0).expect_text(&["from-the-log"]);
}

#[test]
fn a_build_on_a_server_fails_with_its_own_exit_code() {
    let server = Server::start();
    let _ = server.build("exit 7", "app:1").run().expect_code(1).expect_text(&["build_failed"]);
}

#[test]
fn a_build_on_a_server_is_cancelled_by_another_client() {
    let server = Server::start();
    let build = server.build("echo begun; sleep 600", "app:1").start();
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
    let build = server.build("echo begun; sleep 3; echo over", "app:1").start();
    build.expect_output("begun");
    let killed = server.process.take().unwrap().stop(Signal::SIGKILL);
    drop(killed);
    server.up();
    assert!(
        eventually(SOON, || server.list().output().contains("SUCCESS")),
        "the build must be built by the next server: {}",
        server.list().output()
    );
    drop(build);
}
