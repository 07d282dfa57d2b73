//! Runs the `kiln` command that this workspace builds (shell).

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::process::{Outcome, Process, Running, descendants, eventually, run};

/// No build of the suites takes this long; one that does hangs.
pub const HARD_LIMIT: Duration = Duration::from_mins(2);
/// Compiling it from nothing on two busy cores.
const COMPILE_LIMIT: Duration = Duration::from_mins(30);
/// A slot starts in 100 ms; a busy machine takes longer.
const START: Duration = Duration::from_mins(1);
/// Its command line, as the slot's processes have it.
const SHIM: &str = "kiln-slot";

/// The binary: `$KILN_BIN`, or what cargo makes of this workspace.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| std::env::var_os("KILN_BIN").map_or_else(compiled, PathBuf::from))
}

fn compiled() -> PathBuf {
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--quiet", "--package=kiln", "--bin=kiln"]);
    let _ = run(command.current_dir(env!("CARGO_MANIFEST_DIR")), COMPILE_LIMIT).expect_code(0);
    // Test binaries lie in target/debug/deps.
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("kiln")
}

/// One call of `kiln`. The environment is empty but for what is set here.
#[derive(Debug)]
pub struct Kiln(Command);

impl Kiln {
    /// `kiln SUBCOMMAND`, which may be two words, with a data directory and a configuration of its own.
    pub fn new(subcommand: &str, data: &Path, config: &Path, home: &Path) -> Self {
        let mut command = Command::new(binary());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", home);
        command.args(subcommand.split(' ')).arg("--data").arg(data).arg("--config").arg(config);
        Self(command)
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.0.arg(argument);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<T: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.0.args(arguments);
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Starts it with something on standard input, which is a file as far as `kiln` can see.
    pub fn run_with_input(mut self, input: &str) -> Outcome {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(input.as_bytes()).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        Running::start_with_input(&mut self.0, file).wait(HARD_LIMIT)
    }

    /// Starts it.
    pub fn start(mut self) -> Build {
        Build { running: Running::start(&mut self.0) }
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Outcome {
        run(&mut self.0, HARD_LIMIT)
    }
}

/// A `kiln build` that is under way.
#[derive(Debug)]
pub struct Build {
    /// The process.
    pub running: Running,
}

impl Build {
    /// Waits until the output contains `needle`, or fails the test.
    pub fn expect_output(&self, needle: &str) -> &Self {
        self.running.expect_output(needle, START);
        self
    }

    /// Every process of the build but `kiln` itself.
    pub fn family(&self) -> Vec<Process> {
        descendants(self.running.pid())
    }

    /// The shim of the slot that runs now, or fails the test.
    pub fn shim(&self) -> Process {
        self.slot_process(1)
    }

    /// PID 1 of the step that runs now: the innermost PID 1 of the slot.
    pub fn init(&self) -> Process {
        self.slot_process(3)
    }

    /// The first process of the slot that many PID namespaces deep, counted from `kiln`'s own as 1.
    fn slot_process(&self, depth: usize) -> Process {
        let own = crate::process::depth(self.running.pid());
        let find = || {
            let mut found = self.family().into_iter().filter(|p| p.command.contains(SHIM));
            found.find(|p| {
                let ids = p.namespace_ids();
                ids.len() + 1 == own + depth && (depth == 1 || ids.last() == Some(&1))
            })
        };
        assert!(
            eventually(START, || find().is_some()),
            "no slot process at depth {depth}: {:#?}",
            self.family()
        );
        find().unwrap()
    }

    /// Sends `kiln` a signal.
    pub fn signal(&self, signal: Signal) -> &Self {
        self.running.signal(signal);
        self
    }

    /// Sends `kiln` a signal and waits for its end, or fails the test.
    pub fn stop(self, signal: Signal) -> Outcome {
        self.running.signal(signal);
        self.wait()
    }

    /// Waits for the end, or fails the test.
    pub fn wait(self) -> Outcome {
        self.running.wait(HARD_LIMIT)
    }
}
