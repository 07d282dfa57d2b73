//! One attempt, from its lease to the end of its tags (shell).

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_protocol::message::{
    Answer, AttemptEnd, BuildGrant, CommitAnswer, CommitRefusal, CommitRequest, Committed, Outcome, Request,
};
use kiln_protocol::result::{Failure, Phase, PhaseDuration};
use kiln_protocol::verdict::Verdict;
use kiln_protocol::{Reason, Target};
use kiln_transport::crash::{self, CrashPoint};
use tokio::sync::mpsc;

use super::Context;
use super::publish::{Pusher, Tags, leaving, names};
use super::spool::Reporter;
use super::supplies::Ended;
use crate::error::chain;
use crate::executor::{self, Event, Finished, Order, Place, Policies};
use crate::hooks::view::ImageView;
use crate::layers::{LayerCache, LayerKey, Reuse};
use crate::registry::Platform;
use crate::registry::push::Candidate;
use crate::stop::{self, StopReason, StopSignal, Stopper};

/// Events between the executor and whoever watches.
const EVENT_BUFFER: usize = 1024;
/// A watcher of a stopped build gets this long for what is left to show.
const SHOW_AFTER_STOP: Duration = Duration::from_secs(1);
/// An agent that shuts down waits this long for an answer that decides over a build.
const LAST_ANSWER: Duration = Duration::from_secs(10);

/// An attempt in progress.
pub(super) struct Work {
    ctx: Arc<Context>,
    grant: BuildGrant,
    reporter: Reporter,
    stop: StopSignal,
    watcher: mpsc::Sender<Event>,
    targets: Vec<Target>,
    phases: Vec<PhaseDuration>,
    phase: Phase,
    began: Instant,
}

impl Work {
    pub(super) fn new(ctx: Arc<Context>, grant: BuildGrant, stop: StopSignal) -> Self {
        let reporter = ctx.spool.reporter(grant.lease);
        let watcher = ctx.supplies.watcher(grant.lease.build);
        let targets = grant.spec.targets().cloned().collect();
        let (phases, phase, began) = (Vec::new(), Phase::Start, Instant::now());
        Self { ctx, grant, reporter, stop, watcher, targets, phases, phase, began }
    }

    /// Runs the attempt. When this returns, its last report is in the spool.
    pub(super) async fn run(mut self) {
        let (stopper, signal) = stop::channel();
        let mut outside = std::mem::replace(&mut self.stop, signal);
        let limit = self.grant.spec.request.timeout;
        let running = self.ctx.agent.metrics.begun();
        let mut finished = None;
        let result = tokio::select! {
            result = self.until_commit(&mut finished) => result,
            never = pass_on(&mut outside, &stopper, Some(limit)) => match never {},
        };
        // Nothing but its own end ends a build that is committed.
        if let (Ok((pusher, committed)), Some(finished)) = (&result, &finished) {
            tokio::select! {
                () = self.after_commit(pusher, committed, finished) => {}
                never = pass_on(&mut outside, &stopper, None) => match never {},
            }
        }
        self.close_phase();
        let failure = result.err();
        let end = match &failure {
            Some(failure) => AttemptEnd::Failed(Box::new(failure.clone())),
            None => AttemptEnd::Answered,
        };
        let log = finished.as_ref().map(|f: &Finished| f.result.log.clone());
        let phases = self.phases.clone();
        let metrics = &self.ctx.agent.metrics;
        metrics.ended(&running, failure.as_ref().map(|failure| failure.reason), &phases);
        if let Some(log) = &log {
            metrics.logged(log);
        }
        let ended = Ended { finished: finished.as_ref(), failure: failure.as_ref(), phases: &phases };
        self.ctx.supplies.ended(self.grant.lease.build, ended).await;
        self.reporter.durable(|snapshot| {
            snapshot.phases.clone_from(&phases);
            snapshot.log = log;
            snapshot.phase = None;
            snapshot.end = Some(end);
        });
        crash::reach(CrashPoint::EndKept);
        drop(finished);
        crash::reach(CrashPoint::JobDeleted);
    }

    async fn until_commit(&mut self, kept: &mut Option<Finished>) -> Result<(Pusher, Committed), Failure> {
        let inputs = self.ctx.supplies.inputs(&self.grant).await?;
        let state = &self.ctx.agent.state;
        let job = state.require_free(self.ctx.agent.config.data.min_free);
        let job = job.and_then(|()| state.create_job(&self.grant.lease.build.to_string()));
        let job = job.map_err(|e| self.fail(e.reason(), chain(&e)))?;
        crash::reach(CrashPoint::JobMade);
        let places = self.probe().await?;
        crash::reach(CrashPoint::Probed);
        let order = self.order(job, inputs, places);
        let finished = self.execute(order).await?;
        let finished = kept.insert(finished);
        if let Err(failure) = &finished.result.outcome {
            return Err(failure.clone());
        }
        self.commit_candidate(finished).await
    }

    /// A build of many minutes must not end at a tag that could have been refused at its start.
    async fn probe(&mut self) -> Result<Vec<Place>, Failure> {
        if self.targets.is_empty() {
            return Ok(Vec::new());
        }
        self.enter(Phase::Probe).await;
        let pusher = self.pusher().await?;
        let places = pusher.probe(&self.targets, &self.stop).await;
        places.map_err(|failure| self.or_stopped(failure))
    }

    async fn pusher(&self) -> Result<Pusher, Failure> {
        let (build, source) = (self.grant.lease.build, &self.grant.spec.credentials);
        let credentials = self.ctx.supplies.push_credentials(build, source, names(&self.targets)).await?;
        Pusher::new(&self.ctx, credentials)
    }

    fn order(&self, job: crate::state::Job, inputs: executor::BuildInputs, places: Vec<Place>) -> Order {
        let (lease, spec) = (&self.grant.lease, &self.grant.spec);
        let policies = self.ctx.hooks.as_ref().map(|host| Policies {
            host: Arc::clone(host),
            requester: spec.requester.clone(),
            context: spec.context.digest.clone(),
            places,
        });
        let key = LayerKey {
            namespace: spec.namespace.to_string(),
            repository: self.targets.first().map(Target::name).unwrap_or_default(),
            target: spec.request.target.clone().unwrap_or_default(),
            trust: "local".to_owned(),
        };
        let reuse = if spec.request.no_cache { Reuse::Nothing } else { Reuse::Cached };
        let layers = Some(LayerCache { key, reuse });
        Order {
            build: lease.build,
            attempt: lease.attempt,
            job,
            request: spec.request.clone(),
            inputs,
            layers,
            policies,
        }
    }

    async fn execute(&mut self, order: Order) -> Result<Finished, Failure> {
        self.close_phase();
        let finished = self.execute_and_forward(order).await?;
        self.phases.extend(&finished.result.phases);
        self.began = Instant::now();
        self.phase = Phase::Clean;
        Ok(finished)
    }

    async fn execute_and_forward(&self, order: Order) -> Result<Finished, Failure> {
        let (events, mut received) = mpsc::channel(EVENT_BUFFER);
        let running = self.ctx.hands.build(Arc::clone(&self.ctx.agent), order, events, self.stop.clone());
        let forwarding = async {
            while let Some(event) = received.recv().await {
                if let Event::Phase(phase) = &event {
                    self.reporter.progress(|snapshot| snapshot.phase = Some(*phase));
                }
                self.tell(event).await;
            }
        };
        tokio::pin!(running, forwarding);
        let finished = tokio::select! {
            biased;
            finished = &mut running => finished,
            // It ends with the events, and these with the build.
            () = &mut forwarding => return running.await.map_err(|e| self.fail(e.reason(), chain(&e))),
        };
        let finished = finished.map_err(|e| self.fail(e.reason(), chain(&e)))?;
        if was_stopped(&finished) {
            // Whoever does not read by then does not want to.
            let _ = tokio::time::timeout(SHOW_AFTER_STOP, forwarding).await;
        } else {
            forwarding.await;
        }
        Ok(finished)
    }

    async fn commit_candidate(&mut self, finished: &Finished) -> Result<(Pusher, Committed), Failure> {
        let Some(sealed) = &finished.image else {
            return Err(self.fail(Reason::Unknown, "the build succeeded without an image".to_owned()));
        };
        let candidate = Candidate::of(sealed);
        let corrupt = "the manifest of the image is no text".to_owned();
        let candidate = candidate.ok_or_else(|| self.fail(Reason::CandidateCorrupt, corrupt))?;
        let pusher = self.pusher().await?;
        self.upload(&pusher, &candidate, finished).await?;
        let mut verdicts = finished.verdicts.clone();
        verdicts.extend(self.ask_about_image(finished).await?);
        let committed = Committed {
            digest: candidate.digest.clone(),
            media_type: candidate.media_type.clone(),
            manifest: candidate.manifest.clone(),
        };
        self.commit(&pusher, &candidate, finished, &committed, &verdicts).await?;
        Ok((pusher, committed))
    }

    async fn after_commit(&mut self, pusher: &Pusher, committed: &Committed, finished: &Finished) {
        self.enter(Phase::Publish).await;
        let open: Vec<Target> = self.open_targets();
        let tags = Tags { lease: self.grant.lease, committed, open: &open };
        pusher.move_tags(&self.ctx, tags, &self.reporter, &self.stop).await;
        self.deliver(finished).await;
    }

    async fn upload(
        &mut self,
        pusher: &Pusher,
        candidate: &Candidate,
        finished: &Finished,
    ) -> Result<(), Failure> {
        if !self.targets.is_empty() {
            self.enter(Phase::Upload).await;
            let uploaded = pusher.upload(&self.targets, candidate, finished.blobs.root(), &self.stop).await;
            uploaded.map_err(|failure| self.or_stopped(failure))?;
        }
        self.reporter.durable(|snapshot| snapshot.candidate = Some(candidate.digest.clone()));
        crash::reach(CrashPoint::CandidateKept);
        Ok(())
    }

    async fn ask_about_image(&mut self, finished: &Finished) -> Result<Vec<Verdict>, Failure> {
        let (Some(host), Some(sealed)) = (self.ctx.hooks.clone(), &finished.image) else {
            return Ok(Vec::new());
        };
        self.enter(Phase::PostPush).await;
        let platform = Platform::host().to_string();
        let mut verdicts = Vec::new();
        for view in &finished.views {
            let image = ImageView::of_sealed(Arc::clone(view), platform.clone(), sealed, &finished.blobs);
            let image = image.map_err(|e| self.fail(Reason::CandidateCorrupt, chain(&e)))?;
            let spoke = host.post_push(Arc::new(image), &self.stop).await;
            self.ctx.agent.metrics.asked(&spoke);
            for line in spoke.iter().flat_map(executor::verdict_lines) {
                self.tell(Event::Note(line)).await;
            }
            verdicts.extend(spoke);
        }
        let judged = executor::judged(&verdicts);
        judged.map_err(|failure| self.or_stopped(Failure { phase: Phase::PostPush, ..failure }))?;
        Ok(verdicts)
    }

    async fn commit(
        &mut self,
        pusher: &Pusher,
        candidate: &Candidate,
        finished: &Finished,
        committed: &Committed,
        verdicts: &[Verdict],
    ) -> Result<(), Failure> {
        self.enter(Phase::Commit).await;
        let incomplete = pusher.is_incomplete(&self.targets, candidate, &self.stop).await;
        if incomplete.map_err(|failure| self.or_stopped(failure))? {
            self.upload(pusher, candidate, finished).await?;
        }
        let briefs: Vec<_> = verdicts.iter().map(Verdict::brief).collect();
        self.reporter.durable(|snapshot| snapshot.verdicts.clone_from(&briefs));
        crash::reach(CrashPoint::VerdictsKept);
        let (lease, committed) = (self.grant.lease, committed.clone());
        let request = Request::Commit(CommitRequest { lease, committed, verdicts: briefs });
        // Only the record says whether a cancel or the commit was first, so the answer is waited for.
        let answer = tokio::select! {
            biased;
            answer = self.ctx.authority.insist(&request) => answer,
            () = gone(self.stop.clone()) => {
                return Err(self.or_stopped(self.fail(Reason::AgentDrain, "stopped".to_owned())));
            }
        };
        match answer {
            Answer::Commit(CommitAnswer::Granted { overtaken }) => {
                crash::reach(CrashPoint::CommitHeard);
                self.reporter.durable(|snapshot| {
                    let outcomes = overtaken.iter().map(|t| (t.to_string(), Outcome::Overtaken));
                    snapshot.outcomes.extend(outcomes);
                });
                Ok(())
            }
            Answer::Commit(CommitAnswer::Refused { reason }) => Err(self.not_granted(&reason)),
            _ => Err(self.fail(Reason::Unknown, "the answer to a commit is none".to_owned())),
        }
    }

    fn not_granted(&self, refusal: &CommitRefusal) -> Failure {
        match refusal {
            CommitRefusal::Revoked => self.fail(Reason::AgentLost, "somebody else has it".to_owned()),
            CommitRefusal::Cancelled => {
                self.fail(Reason::Cancelled, "somebody asked for it to stop".to_owned())
            }
            CommitRefusal::Superseded => {
                self.fail(Reason::Superseded, "every target belongs to a newer build".to_owned())
            }
            CommitRefusal::OtherDigest => {
                self.fail(Reason::CandidateCorrupt, "another image of it was committed".to_owned())
            }
            CommitRefusal::MissingVerdict { policy } => self
                .fail(Reason::HookFault, format!("the required policy {policy} did not let this image pass")),
        }
    }

    fn open_targets(&self) -> Vec<Target> {
        let answered = self.reporter.outcomes();
        self.targets.iter().filter(|target| !answered.contains_key(&target.to_string())).cloned().collect()
    }

    async fn deliver(&mut self, finished: &Finished) {
        let files = self.grant.spec.destinations.len() > self.targets.len();
        if files {
            self.enter(Phase::Output).await;
            let outcomes = self.ctx.supplies.deliver(&self.grant, finished).await;
            self.reporter.durable(|snapshot| snapshot.outcomes.extend(outcomes));
        }
    }

    async fn enter(&mut self, phase: Phase) {
        self.close_phase();
        self.phase = phase;
        self.reporter.progress(|snapshot| snapshot.phase = Some(phase));
        self.tell(Event::Phase(phase)).await;
    }

    /// A watcher that is gone, or that does not read when the build is to stop, holds nothing up.
    async fn tell(&self, event: Event) {
        let mut stop = self.stop.clone();
        tokio::select! {
            biased;
            _ = self.watcher.send(event) => {}
            _ = stop.stopped() => {}
        }
    }

    fn close_phase(&mut self) {
        let milliseconds = crate::time::millis(self.began.elapsed());
        self.phases.push(PhaseDuration { phase: self.phase, milliseconds });
        self.began = Instant::now();
    }

    fn fail(&self, reason: Reason, message: String) -> Failure {
        Failure::new(reason, self.phase, message)
    }

    /// A stop decides the reason, whatever the interrupted step said.
    fn or_stopped(&self, failure: Failure) -> Failure {
        let Some(stop) = self.stop.current() else { return failure };
        Failure {
            reason: stop.reason.reason(),
            message: stop.reason.message().to_owned(),
            hint: None,
            ..failure
        }
    }
}

/// Passes requests to stop on, and makes one when the time of an attempt is over.
async fn pass_on(
    outside: &mut StopSignal,
    stopper: &Stopper,
    limit: Option<Duration>,
) -> std::convert::Infallible {
    let expired = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(expired);
    let mut over = false;
    loop {
        tokio::select! {
            // An earlier request counts too: this handle has not seen it yet.
            stop = outside.changed() => {
                stopper.request(stop.reason);
                if stop.force {
                    stopper.request(stop.reason);
                }
            }
            () = &mut expired, if !over => {
                over = true;
                stopper.request(StopReason::Timeout);
            }
        }
    }
}

/// By a person, a server or its own time limit.
fn was_stopped(finished: &Finished) -> bool {
    let reason = finished.result.outcome.as_ref().err().map(|failure| failure.reason);
    matches!(
        reason,
        Some(
            Reason::Timeout | Reason::Cancelled | Reason::ClientGone | Reason::AgentDrain | Reason::AgentLost
        )
    )
}

/// Nobody needs the answer any more, or it does not come before this agent has to be gone.
async fn gone(stop: StopSignal) {
    leaving(stop.clone()).await;
    if stop.current().is_some_and(|stop| stop.reason == StopReason::Drain) {
        tokio::time::sleep(LAST_ANSWER).await;
    }
}
