//! What agents and orchestrators say to each other (pure).
//!
//! Every message is a hint or a question: the record in the database decides, so a lost, repeated or late one
//! changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::id::{AgentId, Attempt, BootId, ClaimId, LeaseToken, Namespace, Pool, SubmitSeq};
use crate::result::{Failure, LogSummary, Phase, PhaseDuration};
use crate::spec::{BuildSpec, Destination, SecretSource};
use crate::state::State;
use crate::{BuildId, Digest, Reason, Target};

/// A build of this pool is due. Carried by `cmd.build.request.<pool>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hint {
    /// The build that the scheduler would give out.
    pub build: BuildId,
}

/// Somebody asked for the end of a build. Carried by `cmd.build.cancel.<agent>`; a renewal says the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    /// The build.
    pub build: BuildId,
    /// The attempt that is to end.
    pub attempt: Attempt,
    /// Why.
    pub reason: Reason,
}

/// The right of one agent to work on one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaseKey {
    /// The build.
    pub build: BuildId,
    /// The attempt.
    pub attempt: Attempt,
    /// The proof.
    pub token: LeaseToken,
}

/// What kind of work an agent has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Building: needs a slot.
    Build,
    /// Moving the tags of a build that is committed already: needs no slot.
    Publish,
}

/// A question of an agent. Carried by `rpc.lease`; each has exactly one kind of answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "lowercase")]
pub enum Request {
    /// Is there work for me?
    Claim(ClaimRequest),
    /// I am alive, and these are my builds.
    Renew(RenewRequest),
    /// May this digest be published?
    Commit(CommitRequest),
    /// Is this build still the newest of that tag?
    Head(HeadRequest),
    /// This is what the tag shows that I was to look at.
    Tag(TagSeen),
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "lowercase")]
pub enum Answer {
    /// To a claim.
    Claim(ClaimAnswer),
    /// To a renewal.
    Renew(RenewAnswer),
    /// To a commit.
    Commit(CommitAnswer),
    /// To a question for the head.
    Head(HeadAnswer),
    /// To what a tag shows.
    Tag(TagAnswer),
    /// The server cannot decide now; ask again.
    Unavailable {
        /// Why, for the log.
        reason: String,
    },
}

/// An agent with room for one more piece of work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRequest {
    /// Who asks. A broker's identity check overrules it.
    pub agent: AgentId,
    /// Which run of it.
    pub boot: BootId,
    /// The same id gets the same answer, so a lost answer costs nothing.
    pub claim: ClaimId,
    /// What there is room for.
    pub lane: Lane,
    /// Pools that the agent serves.
    pub pools: BTreeSet<Pool>,
    /// Policies that the agent has loaded: plugin digest and settings hash.
    pub policies: BTreeSet<PolicyKey>,
    /// Builds that it could run at once.
    pub slots: u32,
}

/// One loaded policy: which code with which settings.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyKey {
    /// Digest of the component.
    pub plugin: Digest,
    /// Digest of its settings as canonical JSON.
    pub settings: Digest,
}

/// What there is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "give", rename_all = "lowercase")]
pub enum ClaimAnswer {
    /// Nothing now.
    Nothing,
    /// Build this.
    Build(Box<BuildGrant>),
    /// Move the tags of this.
    Publish(Box<PublishGrant>),
    /// Look at this tag.
    Check(Box<TagCheck>),
}

/// A lease to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildGrant {
    /// The lease.
    pub lease: LeaseKey,
    /// It ends after this many milliseconds without a renewal.
    pub ttl_ms: u64,
    /// The order of its submission.
    pub submit_seq: SubmitSeq,
    /// What to build.
    pub spec: BuildSpec,
    /// The policies that must speak before the commit.
    pub policies: Vec<RequiredPolicy>,
}

/// A policy that the orchestrator requires for a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequiredPolicy {
    /// Its name in the configuration.
    pub name: String,
    /// Which code with which settings.
    pub key: PolicyKey,
    /// The hooks that it exports.
    pub hooks: Vec<Hook>,
    /// The repositories that it judges; empty for a build that goes nowhere, which it judges too.
    pub repositories: Vec<String>,
}

/// When a policy speaks.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// Before anything is built.
    PreBuild,
    /// When the image is in the registry by digest and no tag points at it.
    PostPush,
}

impl Hook {
    /// The name on the wire and in metric labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::PreBuild => "pre-build",
            Self::PostPush => "post-push",
        }
    }
}

/// A lease to move tags: no rebuild, no hooks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishGrant {
    /// The lease.
    pub lease: LeaseKey,
    /// It ends after this many milliseconds without a renewal.
    pub ttl_ms: u64,
    /// What was committed.
    pub committed: Committed,
    /// The targets that were not answered yet.
    pub open: Vec<Target>,
    /// Destinations that only the lost holder could reach.
    pub lost: Vec<String>,
    /// Where the credentials are.
    pub credentials: SecretSource,
}

/// A tag that an earlier writer may have moved back. Needs no lease: looking twice does no harm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagCheck {
    /// The tag.
    pub target: Target,
    /// The build that it should show.
    pub build: BuildId,
    /// Its image.
    pub committed: Committed,
    /// Where the credentials are.
    pub credentials: SecretSource,
}

/// What a tag shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagSeen {
    /// Who looked.
    pub agent: AgentId,
    /// The tag.
    pub target: Target,
    /// The build that it should show.
    pub build: BuildId,
    /// The digest that it shows; none if there is no such tag.
    pub found: Option<Digest>,
}

/// What to do about what a tag shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TagAnswer {
    /// Nothing: it is right, or a newer build owns it by now.
    Leave,
    /// Kiln put it there for an older build: put the right one.
    Repair,
    /// Somebody else put it there: leave it, and tell people.
    Drift,
}

/// What a commit record holds of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Its text, byte for byte.
    pub manifest: String,
}

/// Everything that an agent holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// Who asks.
    pub agent: AgentId,
    /// Which run of it.
    pub boot: BootId,
    /// Pools that the agent serves.
    pub pools: BTreeSet<Pool>,
    /// Policies that the agent has loaded.
    pub policies: BTreeSet<PolicyKey>,
    /// Builds that it could run at once.
    pub slots: u32,
    /// Slots without a build; 0 while it drains or lacks room.
    pub free: u32,
    /// Its leases, and reports that were not taken yet.
    pub leases: Vec<LeaseKey>,
}

/// What became of each lease, in the order of the question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewAnswer {
    /// One per lease.
    pub leases: Vec<Renewed>,
}

/// What became of one lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// Whether the agent still holds it.
    pub standing: Standing,
    /// The last report that was taken; older ones can be forgotten.
    pub last_seq: u64,
}

/// Whether a lease is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Go on.
    Held,
    /// Go on to the end as fast as possible: somebody asked for it.
    Cancel(Reason),
    /// The attempt's end is recorded.
    Finished,
    /// Somebody else has the build, or nobody: stop, and forget it.
    Revoked,
}

/// The wish to publish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRequest {
    /// The lease.
    pub lease: LeaseKey,
    /// The image.
    pub committed: Committed,
    /// What the policies said.
    pub verdicts: Vec<PolicyVerdict>,
}

/// What one policy said about one subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyVerdict {
    /// Its name in the configuration.
    pub name: String,
    /// Which code with which settings.
    pub key: PolicyKey,
    /// When it spoke.
    pub hook: Hook,
    /// The repository it spoke about.
    pub repository: String,
    /// Digest of what it saw: of the input, or of the image.
    pub subject: Digest,
    /// It allowed, or its failure was waived by its configuration.
    pub passed: bool,
    /// How its call ended, for people.
    pub outcome: String,
}

/// Whether a digest may be published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "commit", rename_all = "lowercase")]
pub enum CommitAnswer {
    /// It is the result of the build, now and for ever.
    Granted {
        /// Targets that a newer build owns already: leave them.
        overtaken: BTreeSet<Target>,
    },
    /// It is not.
    Refused {
        /// Why.
        reason: CommitRefusal,
    },
}

/// Why a commit was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CommitRefusal {
    /// The lease is not valid any more.
    Revoked,
    /// Somebody cancelled the build first.
    Cancelled,
    /// Every target belongs to a newer build.
    Superseded,
    /// Another image of this build was committed.
    OtherDigest,
    /// A required policy did not speak about this image, or did not let it pass.
    MissingVerdict {
        /// Which.
        policy: String,
    },
}

/// A tag is about to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadRequest {
    /// The lease.
    pub lease: LeaseKey,
    /// The tag.
    pub target: Target,
}

/// Whether it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadAnswer {
    /// This build is the newest of the tag.
    Head,
    /// A newer one is.
    Overtaken,
    /// The lease is not valid any more.
    Revoked,
}

/// Everything that an agent knows of an attempt. Carried by `report.<agent>`; the highest `seq` says it all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The lease.
    pub lease: LeaseKey,
    /// Number of the report within the attempt, from 1.
    pub seq: u64,
    /// What there is to know.
    pub snapshot: Snapshot,
}

/// An attempt at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    /// The running phase.
    pub phase: Option<Phase>,
    /// What was spent where, so far.
    pub phases: Vec<PhaseDuration>,
    /// The image, once it is in every registry.
    pub candidate: Option<Digest>,
    /// What the policies said.
    pub verdicts: Vec<PolicyVerdict>,
    /// What became of the destinations, so far.
    pub outcomes: BTreeMap<String, Outcome>,
    /// Targets whose tag was asked for more than once: a question without an answer may still arrive.
    pub repeated: BTreeSet<String>,
    /// The log in numbers, once it is complete.
    pub log: Option<LogSummary>,
    /// How the attempt ended.
    pub end: Option<AttemptEnd>,
}

/// What became of one destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It has the image.
    Moved,
    /// It belongs to a newer build.
    Overtaken,
    /// It was refused for good.
    Failed(String),
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttemptEnd {
    /// Every destination was answered.
    Answered,
    /// There is no image.
    Failed(Box<Failure>),
}

/// A build changed. Carried by `event.build.status.<namespace>`: the public stream, without tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusEvent {
    /// The build.
    pub build: BuildId,
    /// Whose it is.
    pub namespace: Namespace,
    /// Number of the change within the build, from 1.
    pub version: u64,
    /// Microseconds since 1970, by the clock of the database.
    pub at: i64,
    /// State after the change.
    pub state: State,
    /// The attempt.
    pub attempt: Attempt,
    /// The running phase.
    pub phase: Option<Phase>,
    /// Why it ended, or why the last attempt did.
    pub reason: Option<Reason>,
    /// The published image.
    pub digest: Option<Digest>,
    /// What became of the destinations.
    pub outcomes: BTreeMap<String, Outcome>,
}

impl Snapshot {
    /// Whether every destination has an answer.
    pub fn answers(&self, destinations: &[Destination]) -> bool {
        destinations.iter().all(|d| self.outcomes.contains_key(&d.to_string()))
    }
}
