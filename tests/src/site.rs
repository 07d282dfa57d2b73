//! A small web server that counts who came (shell).
//!
//! It listens where its maker is: a socket belongs to the network namespace of the thread that opened it.

use std::io::{BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::http::Head;

/// A client that says nothing for this long is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Accepts connections in a thread of its own until it is dropped.
#[derive(Debug)]
pub struct Listening {
    address: SocketAddr,
    /// Closed to end the thread, wherever its socket is.
    stop: Option<std::io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Listening {
    /// Calls `serve` for every connection, each in a thread of its own.
    pub fn start(address: SocketAddr, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(address).unwrap_or_else(|e| panic!("listen on {address}: {e}"));
        let address = listener.local_addr().unwrap();
        let (ended, stop) = std::io::pipe().unwrap();
        let body = move || accept(&listener, &ended, &serve);
        let thread = std::thread::Builder::new().name("listening".to_owned()).spawn(body).unwrap();
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, ended: &std::io::PipeReader, serve: &(impl Fn(TcpStream) + Send + Sync)) {
    std::thread::scope(|scope| {
        loop {
            if !wait(listener.as_fd(), ended) {
                return;
            }
            if let Ok((client, _)) = listener.accept() {
                let _ = client.set_read_timeout(Some(PATIENCE));
                let _ = client.set_write_timeout(Some(PATIENCE));
                scope.spawn(move || serve(client));
            }
        }
    });
}

/// Waits until there is something to read; false if it is time to end.
pub(crate) fn wait(socket: BorrowedFd<'_>, ended: &std::io::PipeReader) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
    // A signal may end the wait before anything happened.
    while poll(&mut fds, PollTimeout::NONE).is_err() {}
    !fds[1].any().unwrap_or(true)
}

/// A web server that answers every path with `content of PATH`.
#[derive(Debug)]
pub struct Site {
    listening: Listening,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Site {
    /// Listens on a free port of `address`.
    pub fn start(address: impl Into<IpAddr>) -> Self {
        Self::on(SocketAddr::new(address.into(), 0))
    }

    /// Listens on that address and port.
    pub fn on(address: SocketAddr) -> Self {
        let requests = Arc::default();
        let theirs = Arc::clone(&requests);
        let listening = Listening::start(address, move |client| answer(&client, &theirs));
        Self { listening, requests }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address().port()
    }

    /// The path of every request so far; a connection without one counts as `-`.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// What a site answers.
pub fn content(path: &str) -> String {
    format!("content of {path}\n")
}

fn answer(mut client: &TcpStream, requests: &Mutex<Vec<String>>) {
    let head = Head::read(&mut BufReader::new(client));
    let path = head.as_ref().and_then(|head| head.first().split(' ').nth(1)).unwrap_or("-").to_owned();
    let body = content(&path);
    requests.lock().unwrap().push(path);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    // A client that left early is no reason to end.
    let _ = client.write_all(head.as_bytes()).and_then(|()| client.write_all(body.as_bytes()));
}
