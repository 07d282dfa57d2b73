//! A proxy between a client and a server that misbehaves on request (shell).
//!
//! It speaks just enough HTTP to give every request a connection of its own, so that faults can be aimed at
//! paths and counted.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::http::Head;

/// How long a connection waits for its client or server before it looks whether the proxy has ended.
const PERIOD: Duration = Duration::from_millis(20);

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answered by the proxy with this status.
    Status(u16),
    /// Answered by the proxy: too many requests, come again after this many seconds.
    Busy(u64),
    /// Forwarded after a pause.
    Delay(Duration),
    /// The answer arrives at this many bytes per second.
    Throttle(u64),
    /// The connection ends after this many bytes of the answer.
    CutAfter(u64),
    /// The connection ends after this many bytes of the request's body.
    CutBodyAfter(u64),
    /// The server's answer names another digest than it should.
    WrongDigest,
    /// Nothing is ever answered, and the connection stays open.
    BlackHole,
    /// The request arrives at the server, its answer never at the client.
    DropAnswers,
}

/// An answer in the place of the server's.
#[derive(Debug, Clone)]
pub struct Canned {
    /// HTTP status.
    pub status: u16,
    /// Whole lines, each with its end.
    pub headers: String,
    /// The body.
    pub body: String,
}

/// What stands before the server and may answer for it.
struct Guard(Box<Answers>);

type Answers = dyn Fn(&Head) -> Option<Canned> + Send + Sync;

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guard")
    }
}

#[derive(Debug)]
struct Rule {
    path: String,
    times: usize,
    fault: Fault,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    guard: Guard,
    rules: Mutex<Vec<Rule>>,
    requests: Mutex<Vec<Head>>,
    over: AtomicBool,
}

/// A running proxy.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// A proxy that forwards everything until told otherwise.
    pub fn start(upstream: SocketAddr) -> Self {
        Self::guarded(upstream, |_| None)
    }

    /// A proxy that forwards what the guard does not answer.
    pub fn guarded(
        upstream: SocketAddr,
        guard: impl Fn(&Head) -> Option<Canned> + Send + Sync + 'static,
    ) -> Self {
        let guard = Guard(Box::new(guard));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (rules, requests) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { upstream, guard, rules, requests, over: AtomicBool::new(false) });
        let theirs = Arc::clone(&shared);
        let body = move || accept(&listener, &theirs);
        let thread = std::thread::Builder::new().name("proxy".to_owned()).spawn(body).unwrap();
        Self { address, shared, thread: Some(thread) }
    }

    /// Where it listens.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Lets the next `times` requests whose path contains `path` meet a fault. Earlier rules come first.
    pub fn fault(&self, path: &str, times: usize, fault: Fault) -> &Self {
        self.shared.rules.lock().unwrap().push(Rule { path: path.to_owned(), times, fault });
        self
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Head> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// How many requests so far have a first line that contains `text`.
    pub fn count(&self, text: &str) -> usize {
        self.requests().iter().filter(|head| head.first().contains(text)).count()
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Shared) {
    std::thread::scope(|scope| {
        while let Ok((client, _)) = listener.accept() {
            if shared.over.load(Ordering::Acquire) {
                return;
            }
            scope.spawn(move || serve(&client, shared));
        }
    });
}

/// A connection that breaks is a fault like any other: there is nobody to tell.
fn serve(client: &TcpStream, shared: &Shared) {
    if client.set_read_timeout(Some(PERIOD)).is_err() {
        return;
    }
    let mut reader = BufReader::new(Patient { stream: client, over: &shared.over });
    let Some(head) = Head::read(&mut reader) else { return };
    let fault = shared.next_fault(head.first());
    shared.requests.lock().unwrap().push(head.clone());
    if let Some(canned) = shared.guard.0(&head) {
        let _ = refuse(client, &mut reader, &canned);
        let _ = client.shutdown(Shutdown::Both);
        return;
    }
    let _ = match fault {
        Some(Fault::Status(status)) => refuse(client, &mut reader, &Canned::empty(status, String::new())),
        Some(Fault::Busy(seconds)) => {
            let headers = format!("Retry-After: {seconds}\r\n");
            refuse(client, &mut reader, &Canned::empty(429, headers))
        }
        Some(Fault::BlackHole) => swallow(&mut reader),
        Some(Fault::Delay(pause)) => {
            shared.pause(pause);
            forward(&head, reader, client, shared, None)
        }
        other => forward(&head, reader, client, shared, other),
    };
    let _ = client.shutdown(Shutdown::Both);
}

impl Canned {
    fn empty(status: u16, headers: String) -> Self {
        Self { status, headers, body: String::new() }
    }
}

impl Shared {
    fn next_fault(&self, line: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|rule| rule.times > 0 && line.contains(&rule.path))?;
        rule.times -= 1;
        Some(rule.fault)
    }

    fn pause(&self, length: Duration) {
        crate::process::eventually(length, || self.over.load(Ordering::Acquire));
    }
}

/// Reads until something comes or the proxy ends.
struct Patient<'a> {
    stream: &'a TcpStream,
    over: &'a AtomicBool,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut stream = self.stream;
        loop {
            match stream.read(buffer) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if self.over.load(Ordering::Acquire) {
                        return Ok(0);
                    }
                }
                other => return other,
            }
        }
    }
}

/// The client may still be sending a body, and hears an answer only if that is read.
fn refuse(mut client: &TcpStream, rest: &mut impl Read, canned: &Canned) -> std::io::Result<()> {
    let Canned { status, headers, body } = canned;
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status} Fault\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n");
    client.write_all(head.as_bytes())?;
    client.write_all(body.as_bytes())?;
    client.shutdown(Shutdown::Write)?;
    swallow(rest)
}

fn swallow(reader: &mut impl Read) -> std::io::Result<()> {
    std::io::copy(reader, &mut std::io::sink()).map(drop)
}

/// Lets the request's body through beside the answer, however it is framed.
fn forward(
    head: &Head,
    mut body: impl Read + Send,
    client: &TcpStream,
    shared: &Shared,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    let mut server = TcpStream::connect(shared.upstream)?;
    server.set_read_timeout(Some(PERIOD))?;
    let lines = head.lines.iter().filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    let lines: Vec<&str> = lines.map(String::as_str).chain(["Connection: close", "", ""]).collect();
    server.write_all(lines.join("\r\n").as_bytes())?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(Fault::CutBodyAfter(bytes)) = fault {
                let _ = std::io::copy(&mut body.by_ref().take(bytes), &mut { &server });
                let _ = (server.shutdown(Shutdown::Both), client.shutdown(Shutdown::Both));
            } else {
                // It ends with the client, or with the answer.
                let _ = std::io::copy(&mut body, &mut { &server });
            }
        });
        let answered = answer(&server, client, shared, fault);
        let _ = client.shutdown(Shutdown::Both);
        answered
    })
}

fn answer(
    server: &TcpStream,
    mut client: &TcpStream,
    shared: &Shared,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    let mut answer = Patient { stream: server, over: &shared.over };
    match fault {
        Some(Fault::DropAnswers) => {
            std::io::copy(&mut answer, &mut std::io::sink())?;
            shared.pause(Duration::from_hours(1));
            Ok(())
        }
        Some(Fault::CutAfter(bytes)) => std::io::copy(&mut answer.take(bytes), &mut { client }).map(drop),
        Some(Fault::Throttle(rate)) => throttle(&mut answer, client, rate, shared),
        Some(Fault::WrongDigest) => {
            let mut answer = BufReader::new(answer);
            let mut head = Head::read(&mut answer).ok_or(ErrorKind::UnexpectedEof)?;
            for line in head.lines.iter_mut().filter(|line| line.starts_with("Docker-Content-Digest:")) {
                *line = format!("Docker-Content-Digest: sha256:{}", "0".repeat(64));
            }
            client.write_all(format!("{}\r\n\r\n", head.lines.join("\r\n")).as_bytes())?;
            std::io::copy(&mut answer, &mut { client }).map(drop)
        }
        _ => std::io::copy(&mut answer, &mut { client }).map(drop),
    }
}

fn throttle(
    answer: &mut impl Read,
    mut client: &TcpStream,
    rate: u64,
    shared: &Shared,
) -> std::io::Result<()> {
    // Ten portions a second.
    let mut portion = vec![0; usize::try_from(rate / 10).unwrap_or(1).max(1)];
    loop {
        let count = answer.read(&mut portion)?;
        if count == 0 {
            return Ok(());
        }
        client.write_all(&portion[..count])?;
        shared.pause(Duration::from_millis(100));
    }
}
