//! What an error of the client library means to us (pure).

use std::time::Duration;

use lapin::{Error, ErrorKind};

use crate::BusError;

/// AMQP reply codes that close a channel.
const ACCESS_REFUSED: u16 = 403;
const NOT_FOUND: u16 = 404;
const RESOURCE_LOCKED: u16 = 405;
const PRECONDITION_FAILED: u16 = 406;

/// What an error means, without knowing what was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// A queue or an exchange does not exist.
    Missing,
    /// The queue is exclusive to another connection.
    Locked,
    /// It exists with other settings.
    Differs,
    /// The broker's user may not do this.
    Denied,
    /// No further channel on this connection.
    NoChannel,
    /// The connection is of no use any more.
    Lost(String),
    /// Something else, in the broker's or the library's words.
    Other(String),
}

/// Reads an error.
pub(super) fn classify(error: &Error) -> Failure {
    match error.kind() {
        ErrorKind::ProtocolError(_) if error.is_amqp_hard_error() => Failure::Lost(error.to_string()),
        ErrorKind::ProtocolError(reply) => match reply.get_id() {
            NOT_FOUND => Failure::Missing,
            RESOURCE_LOCKED => Failure::Locked,
            PRECONDITION_FAILED => Failure::Differs,
            ACCESS_REFUSED => Failure::Denied,
            _ => Failure::Other(error.to_string()),
        },
        ErrorKind::ChannelsLimitReached => Failure::NoChannel,
        ErrorKind::InvalidConnectionState(_)
        | ErrorKind::IOError(_)
        | ErrorKind::RuntimeShutdownError(_)
        | ErrorKind::MissingHeartbeatError => Failure::Lost(error.to_string()),
        _ => Failure::Other(error.to_string()),
    }
}

/// Whether the missing thing is an exchange. The broker has one code for both and says which in words.
pub(super) fn names_exchange(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(reply) if reply.get_message().as_str().contains("no exchange"))
}

/// One try of something with a limit.
#[derive(Debug)]
pub(super) enum Attempt {
    /// The broker or the library said no.
    Failed(Error),
    /// Nobody said anything.
    Silent { action: &'static str, limit: Duration },
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Attempt {
    /// Waits for an answer of the broker, but not longer than `limit`.
    pub(super) async fn within<T>(
        action: &'static str,
        limit: Duration,
        operation: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Self> {
        match tokio::time::timeout(limit, operation).await {
            Ok(answer) => answer.map_err(Self::Failed),
            Err(_) => Err(Self::Silent { action, limit }),
        }
    }
}

/// What was tried, on what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) identity: &'a str,
    pub(super) action: &'static str,
    /// `queue` or `exchange`.
    pub(super) what: &'static str,
    pub(super) name: &'a str,
}

impl Subject<'_> {
    /// The error as users of a bus know it.
    pub(super) fn error(self, attempt: &Attempt) -> BusError {
        let (identity, name) = (self.identity.to_owned(), self.name.to_owned());
        let failed = match attempt {
            Attempt::Silent { action, limit } => return BusError::Timeout { action, limit: *limit },
            Attempt::Failed(error) => classify(error),
        };
        match failed {
            Failure::Missing if self.what == "exchange" => BusError::NoExchange { name },
            Failure::Missing => BusError::NoQueue { name },
            Failure::Locked => BusError::Locked { name },
            Failure::Differs => BusError::Conflict { what: self.what, name },
            Failure::Denied => BusError::Denied { identity, action: self.action, what: self.what, name },
            Failure::NoChannel => BusError::TooMany { what: "channels", limit: usize::from(u16::MAX) },
            Failure::Lost(_) => BusError::Down { identity },
            Failure::Other(reason) => BusError::Unexpected { action: self.action, reason },
        }
    }
}
