//! Pushing: the image by digest, then the tags (shell).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kiln_protocol::message::{
    Answer, Committed, HeadAnswer, HeadRequest, LeaseKey, Outcome, Request, TagAnswer, TagCheck, TagSeen,
};
use kiln_protocol::result::{Failure, Phase};
use kiln_protocol::{Reason, Target};
use kiln_transport::Backoff;
use kiln_transport::crash::{self, CrashPoint};

use super::Context;
use super::hands::Remote;
use super::spool::Reporter;
use crate::agent::AgentError;
use crate::error::chain;
use crate::executor::Place;
use crate::hooks::view::TagView;
use crate::publish::{self, PublishError};
use crate::registry::push::{Candidate, DEFAULT_BUDGET, Mount, TagOutcome};
use crate::registry::{Credentials, Reference};
use crate::stop::{self, StopReason, StopSignal};

/// One question to a registry, with its repetitions.
const ASK_BUDGET: Duration = Duration::from_secs(30);
/// Pauses between two tries to move a tag.
const PAUSE: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(10));

/// Pushes for one build.
pub(super) struct Pusher {
    publisher: Box<dyn Remote>,
}

impl Pusher {
    pub(super) fn new(ctx: &Context, credentials: Credentials) -> Result<Self, Failure> {
        let unfit = |e: AgentError| Failure::new(Reason::BadRequest, Phase::Probe, chain(&e));
        Ok(Self { publisher: ctx.hands.remote(&ctx.agent, credentials).map_err(unfit)? })
    }

    /// Asks whether every target could take an image now, and what its tag shows.
    pub(super) async fn probe(&self, targets: &[Target], stop: &StopSignal) -> Result<Vec<Place>, Failure> {
        let mut places: BTreeMap<String, Vec<TagView>> = BTreeMap::new();
        for target in targets {
            let reference = reference(target)?;
            let ask = publish::Target { repository: &reference, budget: ASK_BUDGET };
            let probed = self.publisher.probe(ask, Some(target.tag()), &mut stop.clone()).await;
            let probed = probed.map_err(|e| refused(&e, Phase::Probe))?;
            let tag = TagView { name: target.tag().to_owned(), digest: probed.existing };
            places.entry(target.name()).or_default().push(tag);
        }
        Ok(places.into_iter().map(|(repository, tags)| Place { repository, tags }).collect())
    }

    /// Brings the image to every repository, by digest.
    pub(super) async fn upload(
        &self,
        targets: &[Target],
        candidate: &Candidate,
        blobs: &std::path::Path,
        stop: &StopSignal,
    ) -> Result<(), Failure> {
        let mut done: Vec<Mount> = Vec::new();
        for reference in repositories(targets)? {
            let place = publish::Target { repository: &reference, budget: DEFAULT_BUDGET };
            let uploaded = self.publisher.upload(place, candidate, (blobs, &done), &mut stop.clone()).await;
            uploaded.map_err(|e| refused(&e, Phase::Upload))?;
            crash::reach(CrashPoint::Uploaded);
            let digests: BTreeSet<_> = candidate.blobs.iter().map(|blob| blob.digest.clone()).collect();
            done.push(Mount { repository: reference, blobs: digests });
        }
        Ok(())
    }

    /// Whether some repository lost a part of the image since it was uploaded.
    pub(super) async fn is_incomplete(
        &self,
        targets: &[Target],
        candidate: &Candidate,
        stop: &StopSignal,
    ) -> Result<bool, Failure> {
        for reference in repositories(targets)? {
            let place = publish::Target { repository: &reference, budget: ASK_BUDGET };
            let missing = self.publisher.verify(place, candidate, &mut stop.clone()).await;
            if !missing.map_err(|e| refused(&e, Phase::Commit))?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves the tags that this build may move, each as soon as it can be. Ends early only when somebody else has
    /// the build or the agent shuts down: somebody will move the rest.
    pub(super) async fn move_tags(
        &self,
        ctx: &Context,
        work: Tags<'_>,
        reporter: &Reporter,
        stop: &StopSignal,
    ) {
        for target in work.open {
            let outcome = tokio::select! {
                biased;
                () = leaving(stop.clone()) => return,
                outcome = self.move_tag(ctx, &work, target, reporter) => outcome,
            };
            let Some(outcome) = outcome else { return };
            crash::reach(CrashPoint::TagPut);
            reporter.durable(|snapshot| drop(snapshot.outcomes.insert(target.to_string(), outcome)));
            crash::reach(CrashPoint::TagKept);
        }
    }

    /// None if the lease is gone.
    async fn move_tag(
        &self,
        ctx: &Context,
        work: &Tags<'_>,
        target: &Target,
        reporter: &Reporter,
    ) -> Option<Outcome> {
        let mut failures = 0;
        loop {
            let ask = Request::Head(HeadRequest { lease: work.lease, target: target.clone() });
            match ctx.authority.insist(&ask).await {
                Answer::Head(HeadAnswer::Head) => {}
                Answer::Head(HeadAnswer::Overtaken) => return Some(Outcome::Overtaken),
                _ => return None,
            }
            match self.put(work.committed, target).await {
                Ok(outcome) => return Some(outcome),
                Err(error) => tracing::warn!(%target, error, "a tag cannot be moved now"),
            }
            // Before the next one is sent, or nobody would know of this one.
            reporter.durable(|snapshot| _ = snapshot.repeated.insert(target.to_string()));
            tokio::time::sleep(PAUSE.delay(failures, crate::time::jitter())).await;
            failures += 1;
        }
    }

    async fn put(&self, committed: &Committed, target: &Target) -> Result<Outcome, String> {
        let reference = reference(target).map_err(|failure| failure.message)?;
        let place = publish::Target { repository: &reference, budget: ASK_BUDGET };
        // Nobody may stop it half-way: whether the tag moved would not be known.
        let (_stopper, mut never) = stop::channel();
        let candidate = candidate_of(committed);
        match self.publisher.put_tag(place, target.tag(), &candidate, &mut never).await {
            Ok(TagOutcome::Moved) => Ok(Outcome::Moved),
            Ok(TagOutcome::Refused(error)) => Ok(Outcome::Failed(chain(&error))),
            Err(error) => Err(chain(&error)),
        }
    }

    /// Looks at a tag that an earlier writer may have moved back, and moves it again if so.
    pub(super) async fn check(&self, ctx: &Context, check: &TagCheck) -> Result<(), String> {
        let reference = reference(&check.target).map_err(|failure| failure.message)?;
        let place = publish::Target { repository: &reference, budget: ASK_BUDGET };
        let (_stopper, mut never) = stop::channel();
        let found = self.publisher.head_tag(place, check.target.tag(), &mut never).await;
        let seen = TagSeen {
            agent: ctx.id.clone(),
            target: check.target.clone(),
            build: check.build,
            found: found.map_err(|e| chain(&e))?,
        };
        match ctx.authority.ask(&Request::Tag(seen)).await.map_err(|e| chain(&e))? {
            Answer::Tag(TagAnswer::Repair) => self.put(&check.committed, &check.target).await.map(drop),
            _ => Ok(()),
        }
    }
}

/// Tags that are to move.
pub(super) struct Tags<'a> {
    pub(super) lease: LeaseKey,
    pub(super) committed: &'a Committed,
    pub(super) open: &'a [Target],
}

/// Somebody else has the build, or this agent shuts down. Other wishes come too late after the commit.
pub(super) async fn leaving(mut stop: StopSignal) {
    let mut next = stop.stopped().await;
    while !matches!(next.reason, StopReason::Revoked | StopReason::Drain) {
        next = stop.changed().await;
    }
}

fn candidate_of(committed: &Committed) -> Candidate {
    Candidate {
        digest: committed.digest.clone(),
        media_type: committed.media_type.clone(),
        manifest: committed.manifest.clone(),
        blobs: Vec::new(),
    }
}

fn repositories(targets: &[Target]) -> Result<Vec<Reference>, Failure> {
    names(targets).iter().map(|name| parse(name)).collect()
}

/// `registry/repository` of each, once.
pub(super) fn names(targets: &[Target]) -> Vec<String> {
    targets.iter().map(Target::name).collect::<BTreeSet<_>>().into_iter().collect()
}

fn reference(target: &Target) -> Result<Reference, Failure> {
    parse(&target.to_string())
}

fn parse(text: &str) -> Result<Reference, Failure> {
    text.parse().map_err(|e| Failure::new(Reason::BadRequest, Phase::Probe, format!("{text}: {e}")))
}

fn refused(error: &PublishError, phase: Phase) -> Failure {
    let hint = error.hint().map(str::to_owned);
    Failure { hint, ..Failure::new(error.reason(), phase, chain(error)) }
}
