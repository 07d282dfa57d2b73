//! What agents ask: work, more time, the permission to publish (shell).

use std::collections::{BTreeMap, BTreeSet};

use kiln_protocol::id::{AgentId, BootId};
use kiln_protocol::message::{
    BuildGrant, ClaimAnswer, ClaimRequest, CommitAnswer, CommitRequest, HeadAnswer, HeadRequest, Lane,
    PublishGrant, RenewAnswer, RenewRequest, Renewed, Standing, TagAnswer, TagCheck, TagSeen,
};
use kiln_protocol::message::{CommitRefusal, LeaseKey};
use kiln_protocol::{Reason, Target};
use kiln_transport::crash::{self, CrashPoint};

use crate::build::{Build, Lease};
use crate::core::{CoreError, Orchestrator, Situation, WINDOW, tries, undisturbed};
use crate::decide::{self, Claimant, SECOND};
use crate::store::{AgentRow, Lock, Recorded, Tx, Which};
use crate::{policy, schedule};

/// Waiting builds of each line that a claim looks at: more when the first ones are not for this agent now.
const WINDOWS: [usize; 3] = [WINDOW, 8 * WINDOW, 64 * WINDOW];
/// Builds that one claim ends because nothing remains for them to publish.
const LOOKS: usize = 100;
/// Milliseconds of the right to work without a renewal.
const TTL_MS: u64 = (decide::TTL / (SECOND / 1000)) as u64;

impl Orchestrator {
    /// Gives the best fitting work to an agent with room for it. The same claim id gets the same answer.
    pub async fn claim(&self, request: &ClaimRequest) -> Result<ClaimAnswer, CoreError> {
        undisturbed(|| self.claim_once(request)).await
    }

    async fn claim_once(&self, request: &ClaimRequest) -> Result<ClaimAnswer, CoreError> {
        let mut tx = self.store.write().await?;
        // Whoever asks the same again waits for the first answer.
        tx.lock(Lock::Agent(&request.agent)).await?;
        let earlier = earlier_answer(&mut tx, request).await?;
        if earlier.is_none() && request.lane == Lane::Build {
            tx.lock(Lock::Claims).await?;
        }
        let answer = match (self.greet(&mut tx, request, earlier.is_none()).await?, earlier) {
            (false, _) => ClaimAnswer::Nothing,
            (true, Some(answer)) => answer,
            (true, None) => match request.lane {
                Lane::Build => self.claim_build(&mut tx, request).await?,
                Lane::Publish => self.claim_publish(&mut tx, request).await?,
            },
        };
        tx.commit().await?;
        match answer {
            ClaimAnswer::Build(_) => crash::reach(CrashPoint::ClaimRecorded),
            ClaimAnswer::Publish(_) => crash::reach(CrashPoint::PublishClaimed),
            ClaimAnswer::Check(_) | ClaimAnswer::Nothing => {}
        }
        Ok(answer)
    }

    /// Notes who asks. Whoever asks for a build has a free slot at least.
    async fn greet(&self, tx: &mut Tx, request: &ClaimRequest, first: bool) -> Result<bool, CoreError> {
        let known = tx.agent(&request.agent).await?.filter(|known| known.boot == request.boot);
        let free = known.map_or(0, |known| known.free);
        let row = AgentRow {
            id: request.agent.clone(),
            boot: request.boot,
            pools: request.pools.clone(),
            policies: request.policies.clone(),
            slots: request.slots,
            free: free.max(u32::from(first && request.lane == Lane::Build)),
            seen_at: tx.now(),
        };
        self.see(tx, row).await
    }

    /// Notes an agent. A new run of it means that the leases of its earlier run are lost. Says whether this is
    /// the present run.
    async fn see(&self, tx: &mut Tx, row: AgentRow) -> Result<bool, CoreError> {
        if tx.is_retired(row.boot).await? {
            return Ok(false);
        }
        if let Some(known) = tx.agent(&row.id).await?.filter(|known| known.boot != row.boot) {
            tx.retire_boot(&row.id, known.boot).await?;
            self.release_older(tx, &row.id, row.boot).await?;
        }
        tx.see_agent(&row).await?;
        Ok(true)
    }

    async fn release_older(&self, tx: &mut Tx, agent: &AgentId, boot: BootId) -> Result<(), CoreError> {
        for found in tx.leased_by(agent).await? {
            let older = found.build.lease.as_ref().is_some_and(|lease| lease.boot != boot);
            let (tries, now) = (tries(&found), tx.now());
            if let Some(after) = older.then(|| decide::release(&found.build, tries, now)).flatten() {
                self.save(tx, &found, after).await?;
            }
        }
        Ok(())
    }

    async fn claim_build(&self, tx: &mut Tx, request: &ClaimRequest) -> Result<ClaimAnswer, CoreError> {
        for window in WINDOWS {
            let mut situation = self.situation(tx, Some(&request.pools), Which::Due, window).await?;
            if let Some(answer) = self.claim_among(tx, request, &mut situation).await? {
                return Ok(answer);
            }
            if !situation.more {
                break;
            }
        }
        Ok(ClaimAnswer::Nothing)
    }

    async fn claim_among(
        &self,
        tx: &mut Tx,
        request: &ClaimRequest,
        situation: &mut Situation,
    ) -> Result<Option<ClaimAnswer>, CoreError> {
        for _ in 0..LOOKS {
            let (waiting, now) = (&situation.waiting, situation.now);
            let (running, agents) = (&situation.running, &situation.agents);
            let limits = self.settings.limits;
            let Some(id) = schedule::pick(waiting, running, agents, limits, &request.agent, now) else {
                return Ok(None);
            };
            if let Some(found) = tx.load_free(id).await?
                && let Some(answer) = self.give(tx, &found, request).await?
            {
                return Ok(Some(answer));
            }
            // It is not to be had after all: the next one.
            situation.waiting.retain(|waiting| waiting.id != id);
        }
        // Others want to write too. Whoever asks again goes on from here.
        Ok(Some(ClaimAnswer::Nothing))
    }

    async fn give(
        &self,
        tx: &mut Tx,
        found: &Recorded,
        request: &ClaimRequest,
    ) -> Result<Option<ClaimAnswer>, CoreError> {
        if self.end_superseded(tx, found).await? {
            return Ok(None);
        }
        let repositories = found.spec.targets().map(Target::name).collect();
        let policies = policy::required(&self.settings.policies, &repositories);
        let claimant = self.claimant(request);
        match decide::claim(&found.build, claimant, Lane::Build, policies, tx.now()) {
            Ok(after) => {
                let build = self.save(tx, found, after).await?;
                tx.took_slot(&request.agent).await?;
                Ok(Some(again(&Recorded { build, spec: found.spec.clone() })))
            }
            Err(_) => Ok(None),
        }
    }

    /// A build that could publish nothing need not be built.
    async fn end_superseded(&self, tx: &mut Tx, found: &Recorded) -> Result<bool, CoreError> {
        let heads = heads(tx, &found.spec.targets().cloned().collect()).await?;
        let newer = |t: &Target| heads.get(t).is_some_and(|h| h.submit_seq > found.build.submit_seq);
        let images = found.spec.targets().count();
        if images == 0 || images < found.spec.destinations.len() || !found.spec.targets().all(newer) {
            return Ok(false);
        }
        if let Ok(after) = decide::cancel(&found.build, Reason::Superseded, tx.now()) {
            self.save(tx, found, after).await?;
        }
        Ok(true)
    }

    fn claimant(&self, request: &ClaimRequest) -> Claimant {
        Claimant {
            agent: request.agent.clone(),
            boot: request.boot,
            claim: request.claim,
            token: self.fresh_token(),
        }
    }

    async fn claim_publish(&self, tx: &mut Tx, request: &ClaimRequest) -> Result<ClaimAnswer, CoreError> {
        for pool in &request.pools {
            let Some(found) = tx.to_publish(pool).await? else { continue };
            let claimant = self.claimant(request);
            let given = decide::claim(&found.build, claimant, Lane::Publish, Vec::new(), tx.now());
            if let Ok(after) = given {
                let build = self.save(tx, &found, after).await?;
                return Ok(again(&Recorded { build, spec: found.spec }));
            }
        }
        self.give_tag_check(tx, request).await
    }

    async fn give_tag_check(&self, tx: &mut Tx, request: &ClaimRequest) -> Result<ClaimAnswer, CoreError> {
        for pool in &request.pools {
            let Some(due) = tx.due_recheck(pool).await? else { continue };
            let next = decide::next_recheck(due.rechecks, tx.now());
            tx.recheck_at(&due.target, next, due.rechecks.saturating_add(1)).await?;
            let Some(found) = tx.peek(due.build).await? else { continue };
            let Some(commit) = found.build.commit else { continue };
            let (committed, credentials) = (commit.image, found.spec.credentials);
            let check = TagCheck { target: due.target, build: due.build, committed, credentials };
            return Ok(ClaimAnswer::Check(Box::new(check)));
        }
        Ok(ClaimAnswer::Nothing)
    }

    /// Prolongs the leases of an agent.
    pub async fn renew(&self, request: &RenewRequest) -> Result<RenewAnswer, CoreError> {
        undisturbed(|| self.renew_once(request)).await
    }

    async fn renew_once(&self, request: &RenewRequest) -> Result<RenewAnswer, CoreError> {
        let mut tx = self.store.write().await?;
        tx.lock(Lock::Agent(&request.agent)).await?;
        let row = AgentRow {
            id: request.agent.clone(),
            boot: request.boot,
            pools: request.pools.clone(),
            policies: request.policies.clone(),
            slots: request.slots,
            free: request.free,
            seen_at: tx.now(),
        };
        let present = self.see(&mut tx, row).await?;
        let mut leases = vec![REVOKED; request.leases.len()];
        let mut in_order: Vec<(usize, &LeaseKey)> = request.leases.iter().enumerate().collect();
        // As everybody else who changes several.
        in_order.sort_by_key(|(_, key)| key.build);
        for (place, key) in in_order.into_iter().filter(|_| present) {
            leases[place] = self.renew_one(&mut tx, &request.agent, key).await?;
        }
        tx.commit().await?;
        crash::reach(CrashPoint::RunKnown);
        Ok(RenewAnswer { leases })
    }

    async fn renew_one(&self, tx: &mut Tx, from: &AgentId, key: &LeaseKey) -> Result<Renewed, CoreError> {
        let Some(found) = tx.load(key.build).await? else {
            return Ok(REVOKED);
        };
        let (after, renewed) = decide::renew(&found.build, from, key, tx.now());
        if let Some(after) = after {
            self.save(tx, &found, after).await?;
        }
        Ok(renewed)
    }

    /// Decides whether an agent may publish a digest.
    pub async fn commit(&self, from: &AgentId, request: &CommitRequest) -> Result<CommitAnswer, CoreError> {
        undisturbed(|| self.commit_once(from, request)).await
    }

    async fn commit_once(&self, from: &AgentId, request: &CommitRequest) -> Result<CommitAnswer, CoreError> {
        let mut tx = self.store.write().await?;
        let Some(found) = tx.load(request.lease.build).await? else {
            return Ok(CommitAnswer::Refused { reason: CommitRefusal::Revoked });
        };
        let targets: BTreeSet<Target> = found.spec.targets().cloned().collect();
        for target in &targets {
            // The row of a head cannot be locked before there is one.
            tx.lock(Lock::Target(target)).await?;
        }
        let heads = heads(&mut tx, &targets).await?;
        let change = decide::commit((&found.build, &found.spec), from, request, &heads, tx.now());
        if let Some(after) = change.build {
            let build = self.save(&mut tx, &found, after).await?;
            for target in &change.heads {
                self.take_head(&mut tx, &build, target, heads.get(target)).await?;
            }
        }
        tx.commit().await?;
        crash::reach(CrashPoint::CommitRecorded);
        Ok(change.answer)
    }

    /// Makes a build the head of a target. An earlier writer that has not answered may still move the tag.
    pub(crate) async fn take_head(
        &self,
        tx: &mut Tx,
        build: &Build,
        target: &Target,
        before: Option<&crate::build::Head>,
    ) -> Result<(), CoreError> {
        let Some(commit) = &build.commit else { return Ok(()) };
        let first = tx.now().saturating_add(decide::recheck_delay(0));
        tx.take_head(target, build.submit_seq, build.id, &commit.image.digest, first).await?;
        let Some(before) = before else { return Ok(()) };
        let earlier = tx.peek(before.build).await?;
        if earlier.is_some_and(|earlier| earlier.build.open_targets(&earlier.spec).contains(target)) {
            tx.recheck_at(target, Some(first), 0).await?;
        }
        Ok(())
    }

    /// Says whether an agent may move a tag of a build now.
    pub async fn head(&self, from: &AgentId, request: &HeadRequest) -> Result<HeadAnswer, CoreError> {
        let mut tx = self.store.read().await?;
        let Some(found) = tx.load(request.lease.build).await? else { return Ok(HeadAnswer::Revoked) };
        let head = tx.head(&request.target).await?;
        Ok(decide::is_head(&found.build, from, request, head.as_ref()))
    }

    /// Says what to do about what a tag shows.
    pub async fn tag_seen(&self, seen: &TagSeen) -> Result<TagAnswer, CoreError> {
        let mut tx = self.store.write().await?;
        let head = tx.head(&seen.target).await?.filter(|head| head.build == seen.build);
        let Some(found) = tx.peek(seen.build).await?.filter(|_| head.is_some()) else {
            return Ok(TagAnswer::Leave);
        };
        let right = found.build.commit.as_ref().map(|commit| &commit.image.digest);
        let answer = match &seen.found {
            found if found.as_ref() == right => TagAnswer::Leave,
            Some(digest) if tx.is_ours(&seen.target, digest).await? => TagAnswer::Repair,
            // A tag that was deleted is somebody's wish too.
            _ => TagAnswer::Drift,
        };
        if answer == TagAnswer::Repair {
            // Whoever repairs writes too, and who wrote last time may do so again.
            let soon = tx.now().saturating_add(decide::recheck_delay(0));
            tx.recheck_at(&seen.target, Some(soon), 0).await?;
            tx.commit().await?;
        } else if answer == TagAnswer::Drift {
            let found = seen.found.as_ref().map_or("nothing", |digest| digest.as_str());
            tracing::warn!(target = %seen.target, found, "a tag shows what Kiln did not put there");
            tx.audit(seen.agent.as_str(), "tag_drift", Some(seen.build), found).await?;
            tx.commit().await?;
        }
        Ok(answer)
    }
}

/// What nobody may renew, and nobody wants to hear of.
const REVOKED: Renewed = Renewed { standing: Standing::Revoked, last_seq: u64::MAX };

/// What the same wish was answered before. Its lease may have ended: then nobody waits for the answer.
async fn earlier_answer(tx: &mut Tx, request: &ClaimRequest) -> Result<Option<ClaimAnswer>, CoreError> {
    if let Some(found) = tx.of_claim(request.claim).await? {
        let theirs = |lease: &Lease| lease.agent == request.agent && lease.boot == request.boot;
        let own = found.build.lease.as_ref().is_some_and(theirs);
        return Ok(Some(if own { again(&found) } else { ClaimAnswer::Nothing }));
    }
    Ok(tx.is_spent(request.claim).await?.then_some(ClaimAnswer::Nothing))
}

async fn heads(
    tx: &mut Tx,
    targets: &BTreeSet<Target>,
) -> Result<BTreeMap<Target, crate::build::Head>, CoreError> {
    let mut heads = BTreeMap::new();
    for target in targets {
        if let Some(head) = tx.head(target).await? {
            heads.insert(target.clone(), head);
        }
    }
    Ok(heads)
}

/// The grant that belongs to the present lease.
fn again(found: &Recorded) -> ClaimAnswer {
    let (build, spec) = (&found.build, &found.spec);
    let (Some(lease), Some(key)) = (&build.lease, build.lease_key()) else { return ClaimAnswer::Nothing };
    match (lease.lane, &build.commit) {
        (Lane::Build, _) => ClaimAnswer::Build(Box::new(BuildGrant {
            lease: key,
            ttl_ms: TTL_MS,
            submit_seq: build.submit_seq,
            spec: spec.clone(),
            policies: build.policies.clone(),
        })),
        (Lane::Publish, Some(commit)) => ClaimAnswer::Publish(Box::new(PublishGrant {
            lease: key,
            ttl_ms: TTL_MS,
            committed: commit.image.clone(),
            open: build.open_targets(spec),
            lost: spec.destinations.iter().filter(|d| d.image().is_none()).map(ToString::to_string).collect(),
            credentials: spec.credentials.clone(),
        })),
        (Lane::Publish, None) => ClaimAnswer::Nothing,
    }
}
