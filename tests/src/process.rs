//! Child processes that end with their owner, and what `/proc` says about the others (shell).

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often a predicate about the outside world is looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// Looks until `probe` is true; false if it was not within `limit`.
pub fn eventually(limit: Duration, mut probe: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if probe() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::park_timeout(PERIOD);
    }
}

/// What a stream has said so far.
#[derive(Debug, Clone)]
pub struct Capture(Arc<(Mutex<Captured>, Condvar)>);

#[derive(Debug, Default)]
struct Captured {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    /// Reads the stream to its end in a thread of its own.
    pub fn of(mut stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Captured::default()), Condvar::new()));
        let writer = Arc::clone(&shared);
        let body = move || {
            let mut buffer = [0; 8192];
            loop {
                let count = stream.read(&mut buffer).unwrap_or(0);
                let mut captured = writer.0.lock().unwrap();
                captured.bytes.extend_from_slice(&buffer[..count]);
                captured.ended = count == 0;
                writer.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("capture".to_owned()).spawn(body).unwrap();
        Self(shared)
    }

    /// Everything so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap().bytes).into_owned()
    }

    /// Waits until the stream contains `needle`; false at its end or after `limit`.
    pub fn wait_for(&self, needle: &str, limit: Duration) -> bool {
        let found = |c: &Captured| c.bytes.windows(needle.len()).any(|w| w == needle.as_bytes());
        let guard = self.0.0.lock().unwrap();
        let (guard, _) = self.0.1.wait_timeout_while(guard, limit, |c| !found(c) && !c.ended).unwrap();
        found(&guard)
    }

    /// Waits until nobody holds the other end any more; false after `limit`.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        let guard = self.0.0.lock().unwrap();
        self.0.1.wait_timeout_while(guard, limit, |c| !c.ended).unwrap().0.ended
    }
}

/// How a process ended and what it said.
#[derive(Debug, Clone)]
#[must_use]
pub struct Outcome {
    /// Exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
}

impl Outcome {
    /// Both streams, for searching and for messages.
    pub fn output(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }

    /// Fails the test unless the exit code is `code`.
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "unexpected exit code after {:?}:\n{}", self.elapsed, self.output());
        self
    }

    /// Fails the test unless the output contains every one of `texts`.
    pub fn expect_text(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.output().contains(text), "`{text}` is missing in:\n{}", self.output());
        }
        self
    }
}

/// A child process that ends, at the latest, when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    started: Instant,
    /// Its standard output.
    pub stdout: Capture,
    /// Its standard error.
    pub stderr: Capture,
}

/// The exit code as a shell would tell it.
fn code_of(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(-1)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the harness owns its children: each is killed and reaped on drop"
)]
fn spawn(command: &mut Command) -> Child {
    command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"))
}

impl Running {
    /// Starts a command with both streams captured and nothing on its standard input.
    pub fn start(command: &mut Command) -> Self {
        Self::start_with_input(command, Stdio::null())
    }

    /// Starts a command with both streams captured.
    pub fn start_with_input(command: &mut Command, input: impl Into<Stdio>) -> Self {
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = spawn(command);
        let stdout = Capture::of(child.stdout.take().unwrap());
        let stderr = Capture::of(child.stderr.take().unwrap());
        Self { child, started, stdout, stderr }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal; a process that has ended meanwhile gets none.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(pid(self.pid()), signal);
    }

    /// Waits until its output contains `needle`, or fails the test.
    pub fn expect_output(&self, needle: &str, limit: Duration) {
        let both = || self.stdout.text().contains(needle) || self.stderr.text().contains(needle);
        let said = || format!("{}\n{}", self.stdout.text(), self.stderr.text());
        assert!(eventually(limit, both), "`{needle}` did not appear within {limit:?}:\n{}", said());
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits for its end, or fails the test after `limit`.
    pub fn wait(mut self, limit: Duration) -> Outcome {
        let in_time = eventually(limit, || self.ended());
        if !in_time {
            self.signal(Signal::SIGKILL);
        }
        let code = code_of(self.child.wait().unwrap());
        let elapsed = self.started.elapsed();
        // A grandchild that holds a stream must not hold the test.
        self.stdout.wait_for_end(Duration::from_secs(1));
        self.stderr.wait_for_end(Duration::from_secs(1));
        let outcome = Outcome { code, stdout: self.stdout.text(), stderr: self.stderr.text(), elapsed };
        assert!(in_time, "still running after {limit:?}:\n{}", outcome.output());
        outcome
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server that the kernel ends with the test process, even if that one is killed: a shell waits for the
/// end of the lifeline and kills it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    lifeline: Option<ChildStdin>,
    /// Both streams of the server.
    pub output: Capture,
}

impl Server {
    /// Starts `program` with `arguments`.
    pub fn start(program: &str, arguments: &[&str]) -> Self {
        let script = r#""$@" 2>&1 & server=$!; cat >/dev/null; kill -9 "$server"; wait"#;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "server", program]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = spawn(&mut command);
        let output = Capture::of(child.stdout.take().unwrap());
        Self { lifeline: child.stdin.take(), child, output }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _ = self.child.wait();
    }
}

/// Runs a command to its end, or fails the test after `limit`.
pub fn run(command: &mut Command, limit: Duration) -> Outcome {
    Running::start(command).wait(limit)
}

/// A process that cannot be mistaken for a later one with the same id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    start: u64,
    parent: u32,
    /// Arguments, separated by spaces.
    pub command: String,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        if matches!(*fields.first()?, "Z" | "X") {
            return None;
        }
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        Some(Self {
            pid,
            start: fields.get(19)?.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            command,
        })
    }

    /// Whether it still runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.start == self.start)
    }

    /// Sends a signal if it is still the same process.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(pid(self.pid), signal);
        }
    }

    /// The ids that it has in its PID namespaces, from the outermost to its own.
    pub fn namespace_ids(&self) -> Vec<u32> {
        namespace_ids(self.pid)
    }
}

fn namespace_ids(pid: u32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap_or_default();
    line.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

/// How many PID namespaces deep a process lives.
pub fn depth(pid: u32) -> usize {
    namespace_ids(pid).len()
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap())
}

/// Every living process.
pub fn processes() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter_map(Process::read).collect()
}

/// Living descendants of a process, without itself.
pub fn descendants(ancestor: u32) -> Vec<Process> {
    let mut children: HashMap<u32, Vec<Process>> = HashMap::new();
    for process in processes() {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut open = vec![ancestor];
    while let Some(parent) = open.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            open.push(child.pid);
            found.push(child);
        }
    }
    found
}

/// Living processes whose arguments contain `marker`.
pub fn with_argument(marker: &str) -> Vec<Process> {
    processes().into_iter().filter(|p| p.command.contains(marker)).collect()
}
