//! The commit: what may be published, now and for ever (pure).

use std::collections::{BTreeMap, BTreeSet};

use kiln_protocol::id::AgentId;
use kiln_protocol::message::{
    CommitAnswer, CommitRefusal, CommitRequest, HeadAnswer, HeadRequest, Hook, Outcome, PolicyVerdict,
    RequiredPolicy,
};
use kiln_protocol::state::Event;
use kiln_protocol::{BuildSpec, Digest, Reason, Target};

use super::attempt::plain;
use crate::build::{Build, Commit, Head, Micros};

/// What a commit changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitChange {
    /// The build after it; none if nothing changes.
    pub build: Option<Build>,
    /// Targets of which this build becomes the head, in order.
    pub heads: Vec<Target>,
    /// What the agent hears.
    pub answer: CommitAnswer,
}

impl CommitChange {
    fn refused(reason: CommitRefusal) -> Self {
        Self { build: None, heads: Vec::new(), answer: CommitAnswer::Refused { reason } }
    }
}

/// Decides over the wish to publish. `heads` has the newest build of each target that has one.
pub fn commit(
    (build, spec): (&Build, &BuildSpec),
    from: &AgentId,
    request: &CommitRequest,
    heads: &BTreeMap<Target, Head>,
    now: Micros,
) -> CommitChange {
    if build.held_by(from, &request.lease).is_none() {
        return CommitChange::refused(CommitRefusal::Revoked);
    }
    if let Some(record) = &build.commit {
        return repeated(record, spec, request);
    }
    if build.cancel.is_some() {
        return CommitChange::refused(CommitRefusal::Cancelled);
    }
    let digest = &request.committed.digest;
    if let Some(policy) = missing(&build.policies, &request.verdicts, digest) {
        return CommitChange::refused(CommitRefusal::MissingVerdict { policy });
    }
    let newer = |target: &&Target| heads.get(*target).is_some_and(|head| head.submit_seq > build.submit_seq);
    let overtaken: BTreeSet<Target> = spec.targets().filter(newer).cloned().collect();
    if !overtaken.is_empty() && overtaken.len() == spec.destinations.len() {
        return superseded(build, now);
    }
    let mut after = build.clone();
    if after.enter(Event::Committed, now).is_err() {
        return CommitChange::refused(CommitRefusal::Revoked);
    }
    after.commit = Some(Commit {
        image: request.committed.clone(),
        verdicts: request.verdicts.clone(),
        at: now,
        outcomes: overtaken.iter().map(|target| (target.to_string(), Outcome::Overtaken)).collect(),
    });
    let mut owned: Vec<Target> = spec.targets().filter(|t| !overtaken.contains(*t)).cloned().collect();
    owned.sort();
    CommitChange { build: Some(after), heads: owned, answer: CommitAnswer::Granted { overtaken } }
}

/// The same wish gets the same answer; its first answer may be lost.
fn repeated(record: &Commit, spec: &BuildSpec, request: &CommitRequest) -> CommitChange {
    if record.image != request.committed {
        return CommitChange::refused(CommitRefusal::OtherDigest);
    }
    let gone = |t: &&Target| record.outcomes.get(&t.to_string()) == Some(&Outcome::Overtaken);
    let overtaken = spec.targets().filter(gone).cloned().collect();
    CommitChange { build: None, heads: Vec::new(), answer: CommitAnswer::Granted { overtaken } }
}

fn superseded(build: &Build, now: Micros) -> CommitChange {
    let refused = CommitChange::refused(CommitRefusal::Superseded);
    let mut after = build.clone();
    after.finished = build.lease_key();
    after.lease = None;
    after.reason = Some(Reason::Superseded);
    after.failure = Some(plain(Reason::Superseded, "every target belongs to a newer build".to_owned()));
    match after.enter(Event::Cancelled, now) {
        Ok(()) => CommitChange { build: Some(after), ..refused },
        Err(_) => refused,
    }
}

/// The first required policy that did not let this image pass.
fn missing(required: &[RequiredPolicy], verdicts: &[PolicyVerdict], digest: &Digest) -> Option<String> {
    let lacking = required
        .iter()
        .find(|policy| !policy.hooks.iter().all(|hook| spoke(policy, *hook, verdicts, digest)));
    lacking.map(|policy| policy.name.clone())
}

fn spoke(policy: &RequiredPolicy, hook: Hook, verdicts: &[PolicyVerdict], digest: &Digest) -> bool {
    let fits = |v: &&PolicyVerdict| {
        v.name == policy.name
            && v.key == policy.key
            && v.hook == hook
            && (hook == Hook::PreBuild || v.subject == *digest)
    };
    let mine: Vec<&PolicyVerdict> = verdicts.iter().filter(fits).collect();
    let about = |repository: &String| mine.iter().any(|v| v.repository == *repository);
    !mine.is_empty() && mine.iter().all(|v| v.passed) && policy.repositories.iter().all(about)
}

/// Whether this build may move a tag now. `head` is the newest committed build of the target.
pub fn is_head(build: &Build, from: &AgentId, request: &HeadRequest, head: Option<&Head>) -> HeadAnswer {
    if build.held_by(from, &request.lease).is_none() || build.commit.is_none() {
        return HeadAnswer::Revoked;
    }
    match head {
        Some(head) if head.build == build.id => HeadAnswer::Head,
        _ => HeadAnswer::Overtaken,
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::id::SubmitSeq;
    use kiln_protocol::{BuildId, State};

    use super::super::lease::cancel;
    use super::super::testing::{agent, building, commit_request, digest, now, policy, spec, verdict};
    use super::*;

    fn try_commit(build: &Build, request: &CommitRequest, heads: &BTreeMap<Target, Head>) -> CommitChange {
        commit((build, &spec()), &agent(), request, heads, now())
    }

    fn head(submit_seq: i64) -> Head {
        Head { submit_seq: SubmitSeq(submit_seq), build: BuildId::generate() }
    }

    #[test]
    fn a_commit_is_granted_once_and_again_to_who_asks_again() {
        let build = building();
        let request = commit_request(&build);
        let change = try_commit(&build, &request, &BTreeMap::new());
        let after = change.build.unwrap();
        assert_eq!(after.state, State::Pushing);
        assert_eq!(change.heads.len(), 2);
        let again = try_commit(&after, &request, &BTreeMap::new());
        assert_eq!((again.build, &again.answer), (None, &change.answer));
        let mut other = request;
        other.committed.digest = digest(9);
        assert_eq!(
            try_commit(&after, &other, &BTreeMap::new()),
            CommitChange::refused(CommitRefusal::OtherDigest)
        );
    }

    #[test]
    fn who_lost_the_lease_or_was_cancelled_cannot_commit() {
        let build = building();
        let request = commit_request(&build);
        let later = Build { attempt: build.attempt.next(), ..build.clone() };
        assert_eq!(
            try_commit(&later, &request, &BTreeMap::new()),
            CommitChange::refused(CommitRefusal::Revoked)
        );
        let cancelled = cancel(&build, Reason::Cancelled, now()).unwrap();
        let refused = try_commit(&cancelled, &request, &BTreeMap::new());
        assert_eq!(refused, CommitChange::refused(CommitRefusal::Cancelled));
    }

    #[test]
    fn a_target_of_a_newer_build_is_left_alone() {
        let build = building();
        let targets: Vec<Target> = spec().targets().cloned().collect();
        let one = BTreeMap::from([(targets[0].clone(), head(build.submit_seq.0 + 1))]);
        let change = try_commit(&build, &commit_request(&build), &one);
        assert_eq!(change.heads, [targets[1].clone()]);
        assert_eq!(change.answer, CommitAnswer::Granted { overtaken: BTreeSet::from([targets[0].clone()]) });

        let both = targets.iter().map(|t| (t.clone(), head(build.submit_seq.0 + 1))).collect();
        let change = try_commit(&build, &commit_request(&build), &both);
        let after = change.build.unwrap();
        assert_eq!((after.state, after.reason), (State::Cancelled, Some(Reason::Superseded)));

        let older = targets.iter().map(|t| (t.clone(), head(build.submit_seq.0 - 1))).collect();
        assert_eq!(try_commit(&build, &commit_request(&build), &older).heads.len(), 2);
    }

    #[test]
    fn every_required_policy_must_have_spoken_about_this_image() {
        let build = Build { policies: vec![policy()], ..building() };
        let good = commit_request(&build);
        let with = |change: &dyn Fn(&mut Vec<PolicyVerdict>)| {
            let mut request = good.clone();
            request.verdicts =
                vec![verdict(Hook::PreBuild, digest(7), true), verdict(Hook::PostPush, digest(1), true)];
            change(&mut request.verdicts);
            try_commit(&build, &request, &BTreeMap::new()).answer
        };
        let missing =
            CommitAnswer::Refused { reason: CommitRefusal::MissingVerdict { policy: "tags".to_owned() } };
        assert!(matches!(with(&|_| {}), CommitAnswer::Granted { .. }));
        assert_eq!(with(&|v| v.clear()), missing);
        assert_eq!(with(&|v| drop(v.pop())), missing);
        assert_eq!(with(&|v| v[1].subject = digest(2)), missing, "about another image");
        assert_eq!(with(&|v| v[0].passed = false), missing, "denied");
        assert_eq!(with(&|v| v[1].key.settings = digest(3)), missing, "other settings");
        assert_eq!(with(&|v| v[1].repository = "r.example/other".to_owned()), missing, "another repository");
    }

    #[test]
    fn only_the_head_moves_a_tag() {
        let build = building();
        let request = commit_request(&build);
        let committed = try_commit(&build, &request, &BTreeMap::new()).build.unwrap();
        let target = spec().targets().next().unwrap().clone();
        let ask = HeadRequest { lease: request.lease, target };
        let mine = Head { submit_seq: build.submit_seq, build: build.id };
        assert_eq!(is_head(&committed, &agent(), &ask, Some(&mine)), HeadAnswer::Head);
        assert_eq!(is_head(&committed, &agent(), &ask, Some(&head(99))), HeadAnswer::Overtaken);
        assert_eq!(
            is_head(&build, &agent(), &ask, Some(&mine)),
            HeadAnswer::Revoked,
            "nothing moves before the commit"
        );
    }
}
