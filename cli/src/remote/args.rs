//! Arguments of the commands that ask a server (edge).

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand};
use kiln_protocol::id::Attempt;
use kiln_protocol::{BuildId, State};

use crate::args::Places;

/// The socket of a server on this data directory.
pub(crate) fn default_socket(data: &Path) -> PathBuf {
    data.join("api/kiln.sock")
}

/// The token for its port.
pub(crate) fn default_token(data: &Path) -> PathBuf {
    data.join("api/token")
}

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServerAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// A URL without a path.
    Http(String),
}

impl FromStr for ServerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let url = text.trim_end_matches('/');
        let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        if host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '?', '#', '@'])) {
            return Ok(Self::Http(url.to_owned()));
        }
        Err("write unix:PATH or http://127.0.0.1:PORT".to_owned())
    }
}

/// Which server.
#[derive(Debug, Clone, Args)]
pub(crate) struct Whom {
    /// Server: unix:PATH or `http://127.0.0.1:PORT` [default: the socket in the data directory]
    #[arg(long, value_name = "ADDRESS", env = "KILN_SERVER")]
    pub(crate) server: Option<ServerAddress>,
    #[command(flatten)]
    pub(crate) access: Access,
    #[command(flatten)]
    pub(crate) places: Places,
}

/// How a server lets us in.
#[derive(Debug, Clone, Args)]
pub(crate) struct Access {
    /// File with the token for a server with a port [default: the one in the data directory]
    #[arg(long, value_name = "FILE", env = "KILN_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Shape {
    /// Print JSON, one document per line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only builds in this state, as PENDING or `DEAD_LETTER`
    #[arg(long, value_name = "STATE", value_parser = state)]
    pub(crate) state: Option<State>,
    /// Show at most this many
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 20)]
    pub(crate) limit: usize,
    #[command(flatten)]
    pub(crate) shape: Shape,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

fn state(text: &str) -> Result<State, String> {
    let labels = || State::ALL.iter().map(|state| state.label()).collect::<Vec<_>>().join(", ");
    State::from_label(&text.to_uppercase()).ok_or_else(|| format!("use one of {}", labels()))
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Build
    pub(crate) id: BuildId,
    #[command(flatten)]
    pub(crate) shape: Shape,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Build
    pub(crate) id: BuildId,
    /// Go on until the build is over
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Attempt [default: the last one; with --follow: from the first one on]
    #[arg(long, value_name = "NUMBER", value_parser = attempt)]
    pub(crate) attempt: Option<Attempt>,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

fn attempt(text: &str) -> Result<Attempt, String> {
    let number = text.parse().ok().and_then(Attempt::new);
    number.ok_or_else(|| "attempts are counted from 1".to_owned())
}

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Builds
    #[arg(required = true)]
    pub(crate) ids: Vec<BuildId>,
    #[command(flatten)]
    pub(crate) shape: Shape,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Debug, Args)]
pub(crate) struct RetryArgs {
    /// Build that is over
    pub(crate) id: BuildId,
    #[command(flatten)]
    pub(crate) shape: Shape,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Debug, Args)]
pub(crate) struct QueueArgs {
    #[command(flatten)]
    pub(crate) shape: Shape,
    #[command(flatten)]
    pub(crate) whom: Whom,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeadCommand {
    /// List the builds that were given up
    Ls(QueueArgs),
    /// Show one of them
    Show(ShowArgs),
    /// Try them again
    Replay(ReplayArgs),
    /// End them for good
    Discard(CancelArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// Count as the newest builds of their targets, over those that published meanwhile
    #[arg(long)]
    pub(crate) take_head: bool,
    #[command(flatten)]
    pub(crate) which: CancelArgs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_socket_or_a_url_without_a_path() {
        let unix = "unix:/run/kiln.sock".parse();
        assert_eq!(unix, Ok(ServerAddress::Unix("/run/kiln.sock".into())));
        let http = "http://127.0.0.1:8000/".parse();
        assert_eq!(http, Ok(ServerAddress::Http("http://127.0.0.1:8000".to_owned())));
        for bad in ["", "unix:", "localhost:80", "http://", "http://a/b", "http://u:p@a", "ftp://a"] {
            assert!(bad.parse::<ServerAddress>().is_err(), "{bad}");
        }
        assert_eq!(state("dead_letter"), Ok(State::DeadLetter));
        assert!(state("x").unwrap_err().contains("PENDING"));
    }
}
