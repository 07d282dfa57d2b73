//! One connection to the broker and what it says of itself (shell).

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use lapin::tcp::{AMQPUriTcpExt as _, AsyncTcpStream, RustlsConnector, RustlsConnectorConfig};
use lapin::uri::AMQPScheme;
use lapin::{Connection, ConnectionProperties, Event};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::sync::watch;

use super::settings::AmqpSettings;

/// How long a connection may take to say goodbye. Its sockets are cut afterwards.
const GOODBYE: Duration = Duration::from_secs(2);
/// How often a connection is looked at beside its events.
const LOOK: Duration = Duration::from_secs(1);

/// Ends a socket whatever the client library waits for: a handshake that gets no answer has no other end.
#[derive(Debug, Clone, Default)]
struct Fuse(Arc<Mutex<Option<TcpStream>>>);

impl Fuse {
    fn guard(&self, socket: TcpStream) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
    }

    fn blow(&self) {
        if let Some(socket) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It fails if the socket has ended by itself, which is what we want.
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

/// Cuts the socket of a connection that is no longer wanted.
#[derive(Debug)]
struct Cut(Fuse);

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.blow();
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    blocked: watch::Receiver<bool>,
    cut: Cut,
}

/// What a connection says of itself, to be watched by whoever owns it.
pub(super) struct Vitals {
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    blocked: watch::Sender<bool>,
}

impl Link {
    /// Connects once. `purpose` is what operators see in the broker's list of connections.
    pub(super) async fn open(settings: &AmqpSettings, purpose: &str) -> Result<(Self, Vitals), String> {
        let uri = settings.uri().await.map_err(|error| error.to_string())?;
        let authorities = settings.authorities().await.map_err(|error| error.to_string())?;
        let fuse = Fuse::default();
        let cut = Cut(fuse.clone());
        // We reconnect ourselves. The library's own attempts would go on after we have given up.
        let properties = ConnectionProperties::default()
            .with_connection_name(format!("{} {purpose}", settings.identity()).into())
            .configure_backoff(|backoff| backoff.with_max_times(0));
        let tls = authorities.map(|pem| tls(&pem)).transpose()?;
        let limit = settings.timing.connect;
        let connect = async move |uri: lapin::uri::AMQPUri, _| {
            // The same runtime once more, because its type has a name only here.
            let runtime = lapin::runtime::default_runtime()?;
            let plain = lapin::uri::AMQPUri { scheme: AMQPScheme::AMQP, ..uri.clone() };
            let dial = async {
                let stream = plain.connect_async(&runtime).await?;
                if let AsyncTcpStream::Plain(socket) = &stream {
                    fuse.guard(TcpStream::from(socket.get_ref().as_fd().try_clone_to_owned()?));
                }
                match &tls {
                    Some(connector) => stream.into_rustls(connector, &uri.authority.host).await,
                    None => Ok(stream),
                }
            };
            match tokio::time::timeout(limit, dial).await {
                Ok(dialled) => dialled.map_err(lapin::Error::from),
                Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
            }
        };
        let runtime = lapin::runtime::default_runtime().map_err(|error| error.to_string())?;
        let opening = Connection::connector(uri, runtime, connect, properties);
        let connection = match tokio::time::timeout(limit, opening).await {
            Ok(opened) => opened.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("no answer within {limit:?}")),
        };
        let events = Box::pin(connection.events_listener());
        let (told, blocked) = watch::channel(connection.status().blocked());
        Ok((Self { connection, blocked, cut }, Vitals { events, blocked: told }))
    }

    /// Whether it can be used.
    pub(super) fn alive(&self) -> bool {
        self.connection.status().connected()
    }

    /// Whether the broker takes no messages from it now.
    pub(super) fn blocked(&self) -> bool {
        *self.blocked.borrow()
    }

    /// Waits until the broker takes messages from it; false if it does not within `limit`.
    pub(super) async fn unblocked(&self, limit: Duration) -> bool {
        let mut blocked = self.blocked.clone();
        let open = blocked.wait_for(|blocked| !blocked);
        // Nobody watches any more: whoever publishes now hears what has happened to the connection.
        tokio::time::timeout(limit, open).await.is_ok()
    }

    /// Says goodbye, and ends it either way.
    pub(super) async fn close(&self) {
        let goodbye = self.connection.close(200, "bye".into());
        drop(tokio::time::timeout(GOODBYE, goodbye).await);
        self.cut.0.blow();
    }
}

/// TLS that trusts these authorities and nobody else. The library's own way to TLS is not taken: built without a
/// store of authorities, it sends what it should encrypt as it is.
fn tls(pem: &str) -> Result<RustlsConnector, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let certificates = certificates.map_err(|error| format!("the CA file is not PEM: {error}"))?;
    if certificates.is_empty() {
        return Err("there is no certificate in the CA file".to_owned());
    }
    let mut config = RustlsConnectorConfig::default();
    config.add_parsable_certificates(certificates);
    config.connector_with_no_client_auth().map_err(|error| error.to_string())
}

impl Vitals {
    /// Watches the connection until its end; says why it ended.
    pub(super) async fn watch(mut self, alive: impl Fn() -> bool) -> String {
        let mut trouble = None;
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                event = self.events.next() => match event {
                    Some(Event::ConnectionBlocked(_)) => drop(self.blocked.send_replace(true)),
                    Some(Event::ConnectionUnblocked) => drop(self.blocked.send_replace(false)),
                    Some(Event::Error(error)) => trouble = Some(error.to_string()),
                    Some(_) => {}
                    None => return trouble.unwrap_or_else(ended),
                },
                _ = look.tick() => {}
            }
            if !alive() {
                return trouble.unwrap_or_else(ended);
            }
        }
    }
}

fn ended() -> String {
    "the connection ended".to_owned()
}
