//! What a server refuses, as an exit of the command (edge).

use kiln_agent::error::chain;
use kiln_protocol::api::{Code, Problem};

use crate::app::{Exit, SYSTEM, USAGE};

/// Exit code of a command that was not let in.
const UNAUTHORIZED: u8 = 4;

/// A server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// Nobody answers.
    #[error("the server at {address} does not answer")]
    Silent {
        /// Its address.
        address: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It took too long.
    #[error("the server at {address} did not answer within {seconds} s")]
    Slow {
        /// Its address.
        address: String,
        /// How long we waited.
        seconds: u64,
    },
    /// It refused, and says why.
    #[error("the server refused: {}", .0.detail)]
    Refused(Problem),
    /// It answered something that we do not understand.
    #[error("the server at {address} answered {what}; is it Kiln, and of this version?")]
    Strange {
        /// Its address.
        address: String,
        /// What it answered.
        what: String,
    },
}

impl ServerError {
    /// Whether asking again later may help.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Silent { .. } | Self::Slow { .. } => true,
            Self::Refused(problem) => problem.status >= 500,
            Self::Strange { .. } => false,
        }
    }

    /// Whether it was refused for this reason.
    pub(crate) fn is(&self, code: Code) -> bool {
        matches!(self, Self::Refused(problem) if problem.is(code))
    }
}

impl From<ServerError> for Exit {
    fn from(error: ServerError) -> Self {
        let message = chain(&error);
        let exit = |code| Self { code, message, hint: None };
        match &error {
            ServerError::Refused(problem) if problem.status == 401 => exit(UNAUTHORIZED)
                .with_hint("name the file with its token: --token-file FILE or KILN_TOKEN_FILE"),
            ServerError::Refused(problem) if problem.status < 500 => exit(USAGE),
            ServerError::Silent { .. } => {
                exit(SYSTEM).with_hint("start it with `kiln up`, or name another one with --server")
            }
            _ => exit(SYSTEM),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_say_whose_fault_it_is() {
        let code = |code| Exit::from(ServerError::Refused(Problem::new(code, "why"))).code;
        assert_eq!(code(Code::Unauthorized), 4);
        assert_eq!(code(Code::BuildMissing), 2);
        assert_eq!(code(Code::InvalidSpec), 2);
        assert_eq!(code(Code::Unavailable), 5);
        let strange = ServerError::Strange { address: "x".to_owned(), what: "y".to_owned() };
        assert_eq!(Exit::from(strange).code, 5);
    }
}
