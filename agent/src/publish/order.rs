//! What the agent and its publish process say to each other (pure).
//!
//! One line of JSON each way, progress apart. Both ends are the same program; the bounds only keep a bug from
//! eating the memory of the other side.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use kiln_protocol::Digest;
use serde::{Deserialize, Serialize};

use crate::registry::push::{Blob, Candidate, Probe, PushError, TagOutcome, Uploaded};
use crate::registry::{Credentials, ProxyConfig, RegistrySection};

/// A manifest of 4 MiB with its quotes escaped, certificates, and the rest.
pub(super) const ORDER_BYTES: u64 = 32 * 1024 * 1024;
/// The longest answer lists missing blobs.
pub(super) const ANSWER_BYTES: usize = 1024 * 1024;

/// Everything that one publish process knows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// `[[registry]]`.
    pub(super) registries: Vec<RegistrySection>,
    /// `[build.proxy]`.
    pub(super) proxy: ProxyConfig,
    /// PEM text of certificates that are trusted everywhere.
    pub(super) ca: Vec<String>,
    /// Those of the target, no others.
    pub(super) credentials: Credentials,
    /// The repository, without tag.
    pub(super) repository: String,
    /// For all of it, with repetitions.
    pub(super) budget: Duration,
    /// What to do.
    pub(super) task: Task,
}

/// What a publish process does.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Task {
    /// Find out whether a push can succeed.
    Probe {
        /// The tag that is to move.
        tag: Option<String>,
    },
    /// Bring a candidate there, by digest.
    Upload {
        /// What to bring.
        candidate: Candidate,
        /// Root of the blob store that has its blobs.
        blobs: PathBuf,
        /// Repositories that are known to have blobs, with those.
        mounts: Vec<(String, BTreeSet<Digest>)>,
    },
    /// Find out whether a candidate is still there.
    Verify {
        /// What to look for.
        candidate: Candidate,
    },
    /// Move one tag.
    Tag {
        /// The tag.
        tag: String,
        /// The manifest, byte for byte.
        manifest: String,
        /// Its media type.
        media_type: String,
    },
    /// Find out what a tag points to.
    Head {
        /// The tag.
        tag: String,
    },
}

/// A line of the publish process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// So many bytes of a blob were sent.
    Sent(Blob, u64),
    /// The last line.
    Answer(Result<Answer, PushError>),
}

/// How the task ended.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// Of [`Task::Probe`].
    Probed(Probe),
    /// Of [`Task::Upload`].
    Uploaded(Uploaded),
    /// Of [`Task::Verify`]: what is missing.
    Verified(Vec<Digest>),
    /// Of [`Task::Tag`].
    Tagged(TagOutcome),
    /// Of [`Task::Head`].
    Head(Option<Digest>),
}
