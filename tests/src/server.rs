//! `kiln up` in a lab, and whoever asks it (shell).

use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::http::{Response, request_unix};
use crate::kiln::{Build, Kiln};
use crate::lab::Lab;
use crate::process::Outcome;

/// A server of a lab.
#[derive(Debug)]
pub struct Server {
    /// Its place.
    pub lab: Lab,
    process: Option<Build>,
}

impl Default for Server {
    fn default() -> Self {
        Self::start()
    }
}

impl Server {
    /// A server in a lab of its own that listens.
    pub fn start() -> Self {
        let mut server = Self::idle(Lab::new());
        server.up();
        server
    }

    /// A server that is not started yet.
    pub fn idle(lab: Lab) -> Self {
        Self { lab, process: None }
    }

    /// Starts it, and waits until it listens.
    pub fn up(&mut self) {
        self.launch(&[]);
        self.process.as_ref().unwrap().expect_output("listening on");
    }

    /// Starts it with variables, for one build at a time.
    pub fn launch(&mut self, variables: &[(&str, &str)]) {
        let up = self.lab.kiln("up").arg("--slots=1");
        let up = variables.iter().fold(up, |up, (name, value)| up.env(name, value));
        self.process = Some(up.start());
    }

    /// Ends it, and says how it ended.
    pub fn stop(&mut self, signal: Signal) -> Outcome {
        self.process.take().unwrap().stop(signal)
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> Outcome {
        self.process.take().unwrap().wait()
    }

    fn socket(&self) -> PathBuf {
        self.lab.data().join("api/kiln.sock")
    }

    /// `kiln COMMAND` that asks it.
    pub fn ask(&self, command: &str) -> Kiln {
        self.lab.kiln(command).arg("--server").arg(format!("unix:{}", self.socket().display()))
    }

    /// `kiln build` of the lab's Dockerfile and context on it, without a tag yet.
    pub fn build(&self) -> Kiln {
        self.ask("build").arg("--file").arg(self.lab.path("Dockerfile")).arg(self.lab.context.path())
    }

    /// `kiln ls`.
    pub fn list(&self) -> Outcome {
        self.ask("ls").run().expect_code(0)
    }

    /// One request to its interface, below the prefix.
    pub fn request(&self, method: &str, path: &str, body: &[u8]) -> Response {
        request_unix(&self.socket(), method, &format!("/api/v1{path}"), "application/json", body)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.stop(Signal::SIGTERM);
        }
    }
}
