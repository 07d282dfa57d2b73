//! A way to the broker that loses what it is told to lose.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// `basic.deliver`.
const DELIVER: [u8; 4] = [0, 60, 0, 60];
/// Kinds of frames: a method, and the header and body of a message.
const METHOD: u8 = 1;
const CONTENT: [u8; 2] = [2, 3];

#[derive(Debug, Default)]
struct Faults {
    swallow: AtomicBool,
    deliveries: AtomicBool,
}

/// A running proxy; it ends with its last handle.
pub(crate) struct Proxy {
    address: SocketAddr,
    faults: Arc<Faults>,
    _task: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let faults = Arc::new(Faults::default());
        let mut task = JoinSet::new();
        task.spawn(accept(listener, upstream, Arc::clone(&faults)));
        Self { address, faults, _task: task }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether everything in both directions is lost, and no connection ends.
    pub(crate) fn swallow(&self, on: bool) {
        self.faults.swallow.store(on, Ordering::SeqCst);
    }

    /// Whether deliveries to consumers are lost, and nothing else.
    pub(crate) fn drop_deliveries(&self, on: bool) {
        self.faults.deliveries.store(on, Ordering::SeqCst);
    }
}

async fn accept(listener: TcpListener, upstream: SocketAddr, faults: Arc<Faults>) {
    let mut pumps = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = TcpStream::connect(upstream).await else { continue };
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        pumps.spawn(requests(from_client, to_server, Arc::clone(&faults)));
        pumps.spawn(answers(from_server, to_client, Arc::clone(&faults)));
    }
}

async fn requests(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, faults: Arc<Faults>) {
    let mut buffer = [0; 8192];
    while let Ok(count) = from.read(&mut buffer).await {
        let lost = faults.swallow.load(Ordering::SeqCst);
        if count == 0 || (!lost && to.write_all(&buffer[..count]).await.is_err()) {
            return;
        }
    }
}

/// Frame by frame: one kind, a channel, a length, what it carries and an end.
async fn answers(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, faults: Arc<Faults>) {
    let mut dropping = None;
    let mut head = [0; 7];
    while from.read_exact(&mut head).await.is_ok() {
        let length = u32::from_be_bytes(head[3..].try_into().unwrap()) as usize + 1;
        let mut rest = vec![0; length];
        if from.read_exact(&mut rest).await.is_err() {
            return;
        }
        let channel = [head[1], head[2]];
        if head[0] == METHOD {
            let lost = faults.deliveries.load(Ordering::SeqCst) && rest.starts_with(&DELIVER);
            dropping = lost.then_some(channel).or(dropping.filter(|other| *other != channel));
        }
        let lost = dropping == Some(channel) && (rest.starts_with(&DELIVER) || CONTENT.contains(&head[0]));
        if lost || faults.swallow.load(Ordering::SeqCst) {
            continue;
        }
        if to.write_all(&head).await.is_err() || to.write_all(&rest).await.is_err() {
            return;
        }
    }
}
