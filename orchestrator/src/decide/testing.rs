//! Builds to decide about.

use kiln_protocol::id::{AgentId, BootId, ClaimId, LeaseToken, SubmitSeq};
use kiln_protocol::message::{
    CommitRequest, Committed, Hook, Lane, LeaseKey, PolicyKey, PolicyVerdict, RequiredPolicy,
};
use kiln_protocol::request::{BuildRequest, ImageFormat, NetworkMode};
use kiln_protocol::result::Failure;
use kiln_protocol::spec::Destination;
use kiln_protocol::spec::{
    ContextRef, DEFAULT_ATTEMPTS, DEFAULT_PRIORITY, DEFAULT_QUEUE_TIMEOUT, SecretSource,
};
use kiln_protocol::{BuildId, BuildSpec, Digest, Reason};

use super::attempt::{Tries, plain};
use super::lease::{Claimant, claim};
use super::{SECOND, commit};
use crate::build::{Build, Micros};

/// Some moment.
pub(crate) const fn now() -> Micros {
    1_700_000_000 * SECOND
}

pub(crate) fn digest(byte: u8) -> Digest {
    Digest::from_sha256([byte; 32])
}

pub(crate) fn agent() -> AgentId {
    "agent-1".parse().unwrap()
}

pub(crate) fn tries() -> Tries {
    Tries { max_attempts: DEFAULT_ATTEMPTS, jitter: 1.0 }
}

pub(crate) fn fail(reason: Reason) -> Failure {
    plain(reason, "it happened".to_owned())
}

/// A build with two tags.
pub(crate) fn spec() -> BuildSpec {
    let image = |text: &str| Destination::Image(text.parse().unwrap());
    BuildSpec {
        namespace: "team-a".parse().unwrap(),
        pool: "default".parse().unwrap(),
        priority: DEFAULT_PRIORITY,
        group: None,
        requester: "somebody".to_owned(),
        request: BuildRequest {
            dockerfile: "FROM scratch\n".to_owned(),
            dockerfile_name: "Dockerfile".to_owned(),
            build_args: std::collections::BTreeMap::new(),
            labels: std::collections::BTreeMap::new(),
            target: None,
            format: ImageFormat::Docker,
            timestamp: None,
            network: NetworkMode::Isolated,
            timeout: std::time::Duration::from_hours(1),
            root_filesystem: false,
            no_cache: false,
        },
        context: ContextRef { digest: digest(0), size: 1024 },
        destinations: vec![image("r.example/app:1"), image("r.example/app:latest")],
        secrets: Vec::new(),
        credentials: SecretSource::Client,
        max_attempts: DEFAULT_ATTEMPTS,
        queue_timeout: DEFAULT_QUEUE_TIMEOUT,
    }
}

pub(crate) fn pending() -> Build {
    Build::submitted(BuildId::generate(), SubmitSeq(10), &spec(), None, now())
}

pub(crate) fn claimant() -> Claimant {
    Claimant {
        agent: agent(),
        boot: BootId::generate(),
        claim: ClaimId::generate(),
        token: LeaseToken::generate(),
    }
}

pub(crate) fn building() -> Build {
    claim(&pending(), claimant(), Lane::Build, Vec::new(), now()).unwrap()
}

pub(crate) fn key(build: &Build) -> LeaseKey {
    build.lease_key().unwrap()
}

pub(crate) fn commit_request(build: &Build) -> CommitRequest {
    let image =
        Committed { digest: digest(1), media_type: "application/json".to_owned(), manifest: "{}".to_owned() };
    CommitRequest { lease: key(build), committed: image, verdicts: Vec::new() }
}

pub(crate) fn committed() -> Build {
    let build = building();
    let request = commit_request(&build);
    commit((&build, &spec()), &agent(), &request, &std::collections::BTreeMap::new(), now()).build.unwrap()
}

fn policy_key() -> PolicyKey {
    PolicyKey { plugin: digest(5), settings: digest(6) }
}

pub(crate) fn policy() -> RequiredPolicy {
    RequiredPolicy {
        name: "tags".to_owned(),
        key: policy_key(),
        hooks: vec![Hook::PreBuild, Hook::PostPush],
        repositories: vec!["r.example/app".to_owned()],
    }
}

pub(crate) fn verdict(hook: Hook, subject: Digest, passed: bool) -> PolicyVerdict {
    PolicyVerdict {
        name: "tags".to_owned(),
        key: policy_key(),
        hook,
        repository: "r.example/app".to_owned(),
        subject,
        passed,
        outcome: "allow".to_owned(),
    }
}
