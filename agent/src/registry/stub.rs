//! A registry for tests that answers as it is told (test helper).

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// First byte of a TLS connection.
const TLS_HANDSHAKE: u8 = 0x16;

/// A request as it came.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) method: String,
    /// With its query.
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// How an answer ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Whole,
    /// The connection closes after this many bytes of the body.
    CutAt(usize),
    /// Nothing more comes after this many bytes of the body, and the connection stays open.
    StallAt(usize),
}

/// What to answer.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    end: End,
    silent: bool,
}

impl Reply {
    pub(super) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: vec![], body: body.into(), end: End::Whole, silent: false }
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(super) fn cut_at(mut self, bytes: usize) -> Self {
        self.end = End::CutAt(bytes);
        self
    }

    pub(super) fn stall_at(mut self, bytes: usize) -> Self {
        self.end = End::StallAt(bytes);
        self
    }

    /// Not even a status line.
    pub(super) fn silence() -> Self {
        Self { silent: true, ..Self::new(200, "") }
    }
}

type Handler = Arc<dyn Fn(&Seen, usize) -> Reply + Send + Sync>;
type Gate = Arc<dyn Fn(&Seen) -> Option<usize> + Send + Sync>;

/// A listening server; it ends when it is dropped.
pub(super) struct Stub {
    pub(super) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    _tasks: JoinSet<()>,
}

impl Stub {
    /// `handler` gets the request and how often the same method and path came before.
    pub(super) async fn start(handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::gated(|_| None, handler).await
    }

    /// `gate` sees a request without its body. If it names a number, the connection ends after so many bytes
    /// of the body, and the handler never sees the request.
    pub(super) async fn gated(
        gate: impl Fn(&Seen) -> Option<usize> + Send + Sync + 'static,
        handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::new(gate), Arc::new(handler), Arc::clone(&seen)));
        Self { address, seen, _tasks: tasks }
    }

    pub(super) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// `GET /path` of every request, without queries.
    pub(super) fn paths(&self) -> Vec<String> {
        let path = |seen: &Seen| seen.path.split('?').next().unwrap_or_default().to_owned();
        self.seen().iter().map(|seen| format!("{} {}", seen.method, path(seen))).collect()
    }
}

async fn accept(listener: TcpListener, gate: Gate, handler: Handler, seen: Arc<Mutex<Vec<Seen>>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (gate, handler, seen) = (Arc::clone(&gate), Arc::clone(&handler), Arc::clone(&seen));
        connections.spawn(async move {
            // A client that goes away is part of the tests.
            let _ = serve(stream, &gate, &handler, &seen).await;
        });
    }
}

async fn serve(
    mut stream: TcpStream,
    gate: &Gate,
    handler: &Handler,
    seen: &Mutex<Vec<Seen>>,
) -> io::Result<()> {
    let Some(request) = read_request(&mut stream, gate).await? else { return Ok(()) };
    let reply = {
        let mut seen = seen.lock().unwrap();
        let same = |other: &&Seen| (&other.method, &other.path) == (&request.method, &request.path);
        let before = seen.iter().filter(same).count();
        seen.push(request.clone());
        handler(&request, before)
    };
    write_reply(&mut stream, &request, &reply).await
}

async fn read_request(stream: &mut TcpStream, gate: &Gate) -> io::Result<Option<Seen>> {
    let mut bytes = Vec::new();
    let end = loop {
        if stream.read_buf(&mut bytes).await? == 0 || bytes[0] == TLS_HANDSHAKE {
            return Ok(None);
        }
        if let Some(position) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break position + 4;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let mut request = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, path) = (request.next().unwrap(), request.next().unwrap());
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers.iter().find(|(name, _)| name == "content-length");
    let length: usize = length.map_or(0, |(_, value)| value.parse().unwrap());
    let mut seen = Seen { method, path, headers, body: String::new() };
    let cut = gate(&seen);
    while bytes.len() < end + cut.unwrap_or(length).min(length) {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
    if cut.is_some() {
        return Ok(None);
    }
    seen.body = String::from_utf8(bytes[end..].to_vec()).unwrap();
    Ok(Some(seen))
}

async fn write_reply(stream: &mut TcpStream, request: &Seen, reply: &Reply) -> io::Result<()> {
    if reply.silent {
        std::future::pending::<()>().await;
    }
    let length = reply.body.len();
    let lines = reply.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n"));
    let headers: String = lines.collect();
    let status = reply.status;
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}");
    stream.write_all(format!("{head}\r\n").as_bytes()).await?;
    if request.method == "HEAD" {
        return stream.shutdown().await;
    }
    let sent = match reply.end {
        End::Whole => length,
        End::CutAt(bytes) | End::StallAt(bytes) => bytes,
    };
    stream.write_all(&reply.body[..sent]).await?;
    if let End::StallAt(_) = reply.end {
        std::future::pending::<()>().await;
    }
    stream.shutdown().await
}
