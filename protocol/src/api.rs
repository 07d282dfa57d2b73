//! What servers and clients say to each other over HTTP, below `/api/v1` (pure).

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{AgentId, Attempt, Group, Namespace, Pool};
use crate::message::{Lane, Outcome, PolicyVerdict, RequiredPolicy};
use crate::result::{Failure, LogSummary, Phase, PhaseDuration};
use crate::{BuildId, BuildSpec, Digest, Reason, State};

/// Where the API lies below the address of a server.
pub const PREFIX: &str = "/api/v1";
/// Rows that one answer holds at most, and unless a question asks for fewer.
pub const PAGE: u32 = 200;
/// Says where the text of a log answer begins, in bytes of the whole log.
pub const OFFSET_HEADER: &str = "kiln-log-offset";
/// Says which attempt printed the log.
pub const ATTEMPT_HEADER: &str = "kiln-log-attempt";
/// Makes a repeated submission harmless.
pub const IDEMPOTENCY_HEADER: &str = "idempotency-key";

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal, $status:literal;)+) => {
        /// Why a request was refused. Names stay; new ones may come.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The name on the wire.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label),+ }
            }

            /// The status of HTTP that goes with it.
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status),+ }
            }
        }
    };
}

codes! {
    /// A part of the request cannot be read.
    BadRequest = "bad_request", 400;
    /// The token is missing or wrong.
    Unauthorized = "unauthorized", 401;
    /// The request was not made to this server's own address.
    HostRefused = "host_refused", 403;
    /// Another site's page made the request.
    OriginRefused = "origin_refused", 403;
    /// There is nothing at this path.
    NotFound = "not_found", 404;
    /// There is no such build.
    BuildMissing = "build_missing", 404;
    /// The attempt has no log, or it was deleted.
    LogMissing = "log_missing", 404;
    /// The path knows other methods.
    MethodNotAllowed = "method_not_allowed", 405;
    /// The context has to be uploaded first.
    ContextMissing = "context_missing", 409;
    /// Only a build that is over can be retried.
    NotOver = "not_over", 409;
    /// The build is over, or committed.
    CancelRefused = "cancel_refused", 409;
    /// The build is no dead letter, or a newer one published meanwhile.
    ReplayRefused = "replay_refused", 409;
    /// The build is no dead letter.
    DiscardRefused = "discard_refused", 409;
    /// Somebody else changed the build at the same time.
    Changed = "changed", 409;
    /// The body is longer than the limit.
    TooLarge = "too_large", 413;
    /// The body is no JSON.
    NotJson = "not_json", 415;
    /// The bytes are not those of the digest.
    DigestMismatch = "digest_mismatch", 422;
    /// No agent of this server can ever serve the pool.
    PoolUnknown = "pool_unknown", 422;
    /// The build description breaks a rule.
    InvalidSpec = "invalid_spec", 422;
    /// The idempotency key belongs to another request.
    KeyReused = "key_reused", 422;
    /// Something broke on the server.
    Internal = "internal", 500;
    /// The record or a store does not answer now.
    Unavailable = "unavailable", 503;
    /// The request took too long.
    Timeout = "timeout", 504;
    /// The disk of the server is full.
    DiskFull = "disk_full", 507;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// A refusal, as `application/problem+json` (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `urn:kiln:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status of HTTP.
    pub status: u16,
    /// The name of a [`Code`]; text, because a newer server may know more of them.
    pub code: String,
    /// What is wrong with this request, for people.
    pub detail: String,
}

impl Problem {
    /// A refusal.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let kind = format!("urn:kiln:problem:{code}");
        Self { kind, status: code.status(), code: code.label().to_owned(), detail: detail.into() }
    }

    /// Whether it has this code.
    pub fn is(&self, code: Code) -> bool {
        self.code == code.label()
    }
}

/// A build in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildSummary {
    /// Its id.
    pub id: BuildId,
    /// Whose it is.
    pub namespace: Namespace,
    /// Who may take it.
    pub pool: Pool,
    /// Builds of one group run one at a time.
    pub group: Option<Group>,
    /// Higher goes first.
    pub priority: u8,
    /// Who asked.
    pub requester: String,
    /// Its state.
    pub state: State,
    /// The running attempt, or the next one.
    pub attempt: Attempt,
    /// The running phase.
    pub phase: Option<Phase>,
    /// Who works on it.
    pub agent: Option<AgentId>,
    /// Why it, or its last attempt, did not succeed.
    pub reason: Option<Reason>,
    /// The same in words.
    pub failure: Option<Failure>,
    /// Somebody asked for the end, for this reason.
    pub cancel: Option<Reason>,
    /// When it was recorded.
    pub submitted_at: Timestamp,
    /// Not before this time, while it waits.
    pub not_before: Option<Timestamp>,
    /// When it was over.
    pub ended_at: Option<Timestamp>,
    /// Where the result goes.
    pub destinations: Vec<String>,
    /// The published image.
    pub digest: Option<Digest>,
    /// What became of the destinations.
    pub outcomes: BTreeMap<String, Outcome>,
    /// The build of which this is a new try by a person.
    pub retry_of: Option<BuildId>,
}

/// Everything about a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildDetail {
    /// What a list says of it.
    #[serde(flatten)]
    pub summary: BuildSummary,
    /// What it was submitted as. Secrets are references.
    pub spec: BuildSpec,
    /// Seconds that it waited for agents.
    pub waited_seconds: u64,
    /// What was spent where, in the running attempt or the last one.
    pub phases: Vec<PhaseDuration>,
    /// The log of that attempt in numbers.
    pub log: Option<LogSummary>,
    /// Everything that agents did for it and ended, in order.
    pub attempts: Vec<EndedAttempt>,
    /// What must speak before the commit.
    pub policies: Vec<RequiredPolicy>,
    /// What spoke.
    pub verdicts: Vec<PolicyVerdict>,
}

/// A lease that ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedAttempt {
    /// Its number. Moving the tags of a committed build goes on under the number of the attempt that built it.
    pub attempt: Attempt,
    /// What was done.
    pub lane: Lane,
    /// Who did it.
    pub agent: AgentId,
    /// When it began.
    pub began_at: Timestamp,
    /// When it ended.
    pub ended_at: Timestamp,
    /// Why it was not the last one, or why there is no image; none for what ended well.
    pub reason: Option<Reason>,
    /// The same in words.
    pub failure: Option<Failure>,
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<T> {
    /// Its rows.
    pub items: Vec<T>,
    /// Asks for the rows after these; none if there are no more.
    pub next_cursor: Option<String>,
}

/// A build was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Its id.
    pub id: BuildId,
    /// The same submission was recorded before.
    pub repeated: bool,
}

/// A build was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Its id.
    pub id: BuildId,
    /// Its state now.
    pub state: State,
}

/// A context was stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Its name.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// A build that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The build.
    #[serde(flatten)]
    pub build: BuildSummary,
    /// Why it waits, in words.
    pub why: String,
}

/// A message that nobody could read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadMessage {
    /// Its row.
    pub id: i64,
    /// When it came.
    pub at: Timestamp,
    /// Where it came from.
    pub queue: String,
    /// What is wrong with it.
    pub error: String,
    /// How it begins; what is no UTF-8 is replaced.
    pub body: String,
    /// Its whole length in bytes.
    pub bytes: u64,
}

/// The end of a stream of events: nothing follows unless a person replays the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The state at the end.
    pub state: State,
}

/// A part of a log: whole lines with their line feeds, or a part of a line that is very long or has no end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPart {
    /// The attempt that printed it.
    pub attempt: Attempt,
    /// Where it begins, in bytes of the whole log.
    pub offset: u64,
    /// The text; what is no UTF-8 is replaced.
    pub text: String,
}

/// A log was cut off, as when its disk was full, and goes on from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogGap {
    /// The attempt that printed it.
    pub attempt: Attempt,
    /// Where it was cut off, in bytes of the whole log; the next part begins here.
    pub from: u64,
    /// How far it was read before.
    pub to: u64,
}

/// The names of events in streams.
pub mod event {
    /// A change of the build: a [`StatusEvent`](crate::message::StatusEvent).
    pub const STATUS: &str = "status";
    /// A [`LogPart`](super::LogPart).
    pub const LOG: &str = "log";
    /// A [`LogGap`](super::LogGap).
    pub const GAP: &str = "gap";
    /// An [`End`](super::End), and the last event.
    pub const END: &str = "end";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_a_problem_says_its_own() {
        let mut labels: Vec<_> = Code::ALL.iter().map(|code| code.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), Code::ALL.len());
        for &code in Code::ALL {
            let problem = Problem::new(code, "so it is");
            let json = serde_json::to_value(&problem).unwrap();
            assert_eq!(json["code"], code.label());
            assert_eq!(json["status"], code.status());
            assert!(serde_json::from_value::<Problem>(json).unwrap().is(code));
        }
    }
}
