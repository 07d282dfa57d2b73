//! Connections of a server: accepted, bounded, ended (edge).

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::guard::{Door, guard};
use super::listen::{Listener, Socket};
use super::patient::Patient;
use super::{Api, Served, metrics, router};

/// Connections of one listener; more wait in the kernel. Streams are most of them.
const MAX_CONNECTIONS: usize = 256;
/// A client sends the whole head of a request within this time, also on a connection that it keeps.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that reads nothing for this long is cut off; streams resume.
const WRITE_PATIENCE: Duration = Duration::from_mins(1);
/// No connection lives longer, whatever it does; streams resume.
pub(super) const MAX_LIFE: Duration = Duration::from_hours(4);
/// Heads of requests are small; this bounds what a connection holds.
const MAX_BUFFER: usize = 64 * 1024;
/// Running requests end within this time when the server stops.
const DRAIN: Duration = Duration::from_secs(10);
/// Pause when the system has no descriptors left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Whether the server stops.
#[derive(Debug, Clone)]
pub(super) struct Closing(watch::Receiver<bool>);

impl Closing {
    /// Whether it has begun to.
    pub(super) fn has_begun(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it does.
    pub(super) async fn begun(&self) {
        // The other end goes last of all, and only with the server.
        let _ = self.0.clone().wait_for(|&closing| closing).await;
    }
}

/// Serves the API on these sockets until `shutdown` ends; then running requests end, streams first.
pub async fn serve(api: Api, listeners: Vec<Listener>, shutdown: impl Future<Output = ()> + Send) {
    let (close, closing) = watch::channel(false);
    let closing = Closing(closing);
    let numbers = metrics::router(api.clone(), closing.clone());
    let router = router(Served { api, closing: closing.clone() });
    let mut accepting = JoinSet::new();
    for Listener { socket, door } in listeners {
        let router = if matches!(door, Door::Metrics { .. }) { &numbers } else { &router };
        let router = router.clone().layer(from_fn_with_state(door, guard));
        accepting.spawn(accept(socket, router, closing.clone()));
    }
    shutdown.await;
    // Every receiver may be gone.
    let _ = close.send(true);
    while let Some(ended) = accepting.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a listener broke");
        }
    }
}

/// Accepts until the server closes; returns when every connection has ended.
async fn accept(socket: Socket, router: Router, closing: Closing) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            // Never closed.
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            Some((socket.accept().await, place))
        };
        tokio::select! {
            biased;
            () = closing.begun() => break,
            Some(_) = connections.join_next() => {}
            Some((accepted, place)) = next => match accepted {
                Ok(stream) => drop(connections.spawn(converse(stream, router.clone(), closing.clone(), place))),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
        }
    }
    drop(socket);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        tracing::info!("requests that did not end in time were cut off");
    }
    connections.shutdown().await;
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Socket {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Unix(socket) => Box::new(socket.listener.accept().await?.0),
            Self::Tcp(listener) => {
                let stream = listener.accept().await?.0;
                // Events are small and wanted at once.
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        })
    }
}

/// One connection to its end.
async fn converse(stream: Box<dyn Stream>, router: Router, closing: Closing, _place: OwnedSemaphorePermit) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_BUFFER)
        .serve_connection(
            TokioIo::new(Patient::new(stream, WRITE_PATIENCE)),
            TowerToHyperService::new(router),
        );
    let mut connection = pin!(connection);
    let life = async {
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = closing.begun() => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    };
    match tokio::time::timeout(MAX_LIFE, life).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection broke"),
        Err(_) => tracing::debug!("a connection lived too long"),
    }
}
