//! Sockets that a server listens on (edge).

use std::fs::{DirBuilder, File, Permissions, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

use super::guard::Door;
use super::token::Token;

/// Only the owner passes the folder, so the socket is safe even before it gets a mode of its own.
const FOLDER_MODE: u32 = 0o700;
const SOCKET_MODE: u32 = 0o600;
/// `sun_path` of unix(7), without its terminating zero.
const MAX_SOCKET_PATH: usize = 107;

/// A server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The system refused.
    #[error("{doing} {place}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With what.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel has no room for the name.
    #[error("the socket path {} has more than {MAX_SOCKET_PATH} bytes; use a shorter data directory", path.display())]
    LongPath {
        /// The path.
        path: PathBuf,
    },
    /// Another server lives there.
    #[error("another server listens on {}; stop it, or use another data directory", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// Others may enter the folder.
    #[error("the folder {} has mode {mode:o}, so others can reach the socket in it; `chmod 700` it", path.display())]
    OpenFolder {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Anybody could connect.
    #[error("{0} is not a loopback address; use 127.0.0.1 or [::1]")]
    NotLoopback(SocketAddr),
}

/// A socket that accepts connections.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: Socket,
    pub(super) door: Door,
}

#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixSocket),
    Tcp(TcpListener),
}

/// Removes the socket when it is dropped.
#[derive(Debug)]
pub(super) struct UnixSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Says that somebody listens; the kernel frees it with the process.
    _lock: File,
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // What stays is replaced by the next server.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Listener {
    /// Listens on a Unix socket in a folder that only its owner enters, made if it is missing. A socket that a
    /// killed server left is replaced.
    pub fn unix(path: &Path) -> Result<Self, ListenError> {
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(ListenError::LongPath { path: path.to_owned() });
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        private_folder(folder)?;
        let lock = lock(&path.with_extension("lock"), path)?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove the old socket", path)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed("listen on", path))?;
        let socket = UnixSocket { listener, path: path.to_owned(), _lock: lock };
        std::fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))
            .map_err(failed("protect", path))?;
        Ok(Self { socket: Socket::Unix(socket), door: Door::Unix })
    }

    /// Listens on a port of loopback for whoever has the token.
    pub async fn loopback(address: SocketAddr, token: Token) -> Result<Self, ListenError> {
        let (socket, port) = tcp(address).await?;
        Ok(Self { socket, door: Door::Loopback { port, token } })
    }

    /// Listens on a port of loopback for whoever wants the metrics, and serves nothing else.
    pub async fn metrics(address: SocketAddr) -> Result<Self, ListenError> {
        let (socket, port) = tcp(address).await?;
        Ok(Self { socket, door: Door::Metrics { port } })
    }

    /// What a server says of it when it starts.
    pub fn announcement(&self) -> String {
        match self.door {
            Door::Metrics { .. } => format!("metrics on {}/metrics", self.address()),
            _ => format!("listening on {}", self.address()),
        }
    }

    /// The address for clients: `unix:PATH` or `http://ADDRESS`.
    pub fn address(&self) -> String {
        match &self.socket {
            Socket::Unix(socket) => format!("unix:{}", socket.path.display()),
            Socket::Tcp(listener) => {
                listener.local_addr().map_or_else(|e| e.to_string(), |address| format!("http://{address}"))
            }
        }
    }
}

async fn tcp(address: SocketAddr) -> Result<(Socket, u16), ListenError> {
    if !address.ip().is_loopback() {
        return Err(ListenError::NotLoopback(address));
    }
    let failed = |source| ListenError::Io { doing: "listen on", place: address.to_string(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    Ok((Socket::Tcp(listener), port))
}

fn failed(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> ListenError {
    let place = path.display().to_string();
    move |source| ListenError::Io { doing, place: place.clone(), source }
}

fn private_folder(folder: &Path) -> Result<(), ListenError> {
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(folder)
        .map_err(failed("create the folder", folder))?;
    let mode = std::fs::metadata(folder).map_err(failed("look at", folder))?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(ListenError::OpenFolder { path: folder.to_owned(), mode });
    }
    Ok(())
}

fn lock(lock: &Path, socket: &Path) -> Result<File, ListenError> {
    let opened = File::options().write(true).create(true).truncate(false).open(lock);
    let file = opened.map_err(failed("open the lock", lock))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ListenError::Taken { path: socket.to_owned() }),
        Err(TryLockError::Error(error)) => Err(failed("lock", lock)(error)),
    }
}
