//! What came out of a build (pure).

use serde::{Deserialize, Serialize};

use crate::request::ImageFormat;
use crate::{BuildId, Digest, Reason};

/// A phase of a build, in the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Open the data directory and clean up what killed builds left.
    Start,
    /// Pack the context, in the client.
    Pack,
    /// Ask the registries of the targets whether the image may go there.
    Probe,
    /// Read the request and the Dockerfile.
    Plan,
    /// Resolve base images to digests.
    Resolve,
    /// Ask the policies about the build.
    PreBuild,
    /// Fetch base images.
    Fetch,
    /// Start the sealed slot.
    Slot,
    /// Unpack the context inside the slot.
    Unpack,
    /// Run `buildah build`.
    Build,
    /// Write the image layout.
    Export,
    /// Hash what was exported into the agent's blob store.
    Seal,
    /// End the slot and delete its files.
    Clean,
    /// Bring the image to its registries, by digest.
    Upload,
    /// Ask the policies about the image.
    PostPush,
    /// Ask for the right to publish.
    Commit,
    /// Move the tags.
    Publish,
    /// Write what the user asked for.
    Output,
}

impl Phase {
    /// Every phase, in the order of a build.
    pub const ALL: &'static [Self] = &[
        Self::Start,
        Self::Pack,
        Self::Probe,
        Self::Plan,
        Self::Resolve,
        Self::PreBuild,
        Self::Fetch,
        Self::Slot,
        Self::Unpack,
        Self::Build,
        Self::Export,
        Self::Seal,
        Self::Clean,
        Self::Upload,
        Self::PostPush,
        Self::Commit,
        Self::Publish,
        Self::Output,
    ];

    /// The name on the wire, in messages and in metric labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pack => "pack",
            Self::Probe => "probe",
            Self::Plan => "plan",
            Self::Resolve => "resolve",
            Self::PreBuild => "pre-build",
            Self::Fetch => "fetch",
            Self::Slot => "slot",
            Self::Unpack => "unpack",
            Self::Build => "build",
            Self::Export => "export",
            Self::Seal => "seal",
            Self::Clean => "clean",
            Self::Upload => "upload",
            Self::PostPush => "post-push",
            Self::Commit => "commit",
            Self::Publish => "publish",
            Self::Output => "output",
        }
    }
}

/// A resource of the slot that ran out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitReport {
    /// `disk`, `pids`, `memory` or `file-size`.
    pub resource: String,
    /// The limit, in bytes or processes.
    pub limit: u64,
    /// The highest value that was seen, in the same unit.
    pub peak: u64,
    /// The configuration key that raises the limit.
    pub key: String,
}

/// Where in the Dockerfile something happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// Line, counted from 1.
    pub line: u32,
    /// Text of that line.
    pub text: String,
}

/// Why a build did not succeed, in words for the person who reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The class of the failure.
    pub reason: Reason,
    /// Where it happened.
    pub phase: Phase,
    /// One sentence, lower case, without the class.
    pub message: String,
    /// The Dockerfile line, where one is known.
    pub location: Option<Location>,
    /// What to do about it.
    pub hint: Option<String>,
    /// The limit, if one was hit.
    pub limit: Option<LimitReport>,
    /// Exit code of the RUN command, if that is what failed.
    pub run_exit_code: Option<i32>,
}

impl Failure {
    /// A failure without a place in the Dockerfile.
    pub const fn new(reason: Reason, phase: Phase, message: String) -> Self {
        Self { reason, phase, message, location: None, hint: None, limit: None, run_exit_code: None }
    }
}

/// How much the build printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSummary {
    /// Lines received.
    pub lines: u64,
    /// Bytes received, after redaction.
    pub bytes: u64,
    /// Bytes dropped from the middle because the log passed its cap.
    pub dropped_bytes: u64,
    /// sha256 of every byte received, after redaction.
    pub sha256: Digest,
}

/// How much of a build was taken over from earlier ones.
///
/// Counted from what buildah prints, where a RUN can print the same: for people, not for decisions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// Instructions whose result was found in the layer cache.
    pub cached: u32,
    /// Instructions without FROM.
    pub total: u32,
}

/// An image whose bytes lie hashed in the agent's blob store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedImage {
    /// Digest of the manifest: what hooks see and registries answer.
    pub manifest_digest: Digest,
    /// Digest of the config: the image id.
    pub config_digest: Digest,
    /// Format of manifest and config.
    pub format: ImageFormat,
    /// Sum of manifest, config and layers in bytes.
    pub size: u64,
}

/// Milliseconds spent in one phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseDuration {
    /// The phase.
    pub phase: Phase,
    /// Its duration in milliseconds.
    pub milliseconds: u64,
}

/// The end of one attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildResult {
    /// The build.
    pub build_id: BuildId,
    /// The image, or why there is none.
    pub outcome: Result<SealedImage, Failure>,
    /// What was spent where.
    pub phases: Vec<PhaseDuration>,
    /// The log in numbers.
    pub log: LogSummary,
    /// What came from the layer cache, if there was one.
    pub steps: Option<Steps>,
}
