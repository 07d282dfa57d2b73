//! What is recorded of a build when it is submitted (pure).

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{Group, Namespace, Pool};
use crate::request::BuildRequest;
use crate::{Digest, Target};

/// Most attempts that a build may ask for.
pub const MAX_ATTEMPTS: u32 = 20;
/// Attempts of a build that asks for none.
pub const DEFAULT_ATTEMPTS: u32 = 4;
/// A build that waits longer than this ends, unless it asks for another limit.
pub const DEFAULT_QUEUE_TIMEOUT: Duration = Duration::from_hours(24);
/// Highest priority; the default is the middle.
pub const MAX_PRIORITY: u8 = 9;
/// Priority of a build that asks for none.
pub const DEFAULT_PRIORITY: u8 = 5;
/// Most places that one build may publish to: each costs an upload and a question before its tag moves.
pub const MAX_TARGETS: usize = 32;
/// Largest encoded spec: it travels inside a claim answer, whose envelope is bounded.
pub const MAX_SPEC_BYTES: usize = 192 * 1024;

/// One place where the result goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Destination {
    /// A tag in a registry.
    Image(Target),
    /// A file or directory of the client that waits, in the words of `--output`.
    File(String),
}

impl Destination {
    /// The tag, if it is one.
    pub const fn image(&self) -> Option<&Target> {
        match self {
            Self::Image(target) => Some(target),
            Self::File(_) => None,
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(target) => target.fmt(f),
            Self::File(output) => f.write_str(output),
        }
    }
}

/// The packed context, by content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextRef {
    /// sha256 of the archive.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// Where a secret value is found when an agent needs it. The value itself is in no record and no message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecretSource {
    /// In the memory of the client that waits for the build.
    Client,
    /// On the server under this name: a file of its secrets directory or a variable of its environment.
    Server(String),
}

/// A value that RUN may mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretRef {
    /// Its name in the Dockerfile.
    pub id: String,
    /// Where its value is.
    pub source: SecretSource,
}

/// Everything that the record keeps of the wish for a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildSpec {
    /// Whose build it is.
    pub namespace: Namespace,
    /// Which agents may take it.
    pub pool: Pool,
    /// 0 to [`MAX_PRIORITY`]; higher goes first.
    pub priority: u8,
    /// Builds of one group run one at a time.
    pub group: Option<Group>,
    /// Who asked, for people and policies.
    pub requester: String,
    /// How to build.
    pub request: BuildRequest,
    /// The files to build from.
    pub context: ContextRef,
    /// Where the result goes, without repetition.
    pub destinations: Vec<Destination>,
    /// Values for RUN.
    pub secrets: Vec<SecretRef>,
    /// A `auth.json` document with the credentials for registries.
    pub credentials: SecretSource,
    /// Attempts before the system gives up.
    pub max_attempts: u32,
    /// The sum of the times that it may wait for an agent.
    pub queue_timeout: Duration,
}

/// The spec breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSpec {
    /// Priority.
    #[error("priority is {0}; the highest is {MAX_PRIORITY}")]
    Priority(u8),
    /// Attempts.
    #[error("max_attempts is {0}; use 1 to {MAX_ATTEMPTS}")]
    Attempts(u32),
    /// Destinations.
    #[error("the build has {0} targets; the most is {MAX_TARGETS}, so split it")]
    TooManyTargets(usize),
    /// The same place twice.
    #[error("the target {0} is named twice")]
    RepeatedTarget(String),
    /// Too large to travel.
    #[error(
        "the build description has {0} bytes; the most is {MAX_SPEC_BYTES}, so move text from the Dockerfile or the build arguments into files of the context"
    )]
    TooLarge(usize),
    /// It has no JSON form.
    #[error("the build description cannot be written as JSON: {0}")]
    Encoding(String),
}

impl BuildSpec {
    /// The tags that are to move.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        self.destinations.iter().filter_map(Destination::image)
    }

    /// Checks what types cannot say.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        if self.priority > MAX_PRIORITY {
            return Err(InvalidSpec::Priority(self.priority));
        }
        if !(1..=MAX_ATTEMPTS).contains(&self.max_attempts) {
            return Err(InvalidSpec::Attempts(self.max_attempts));
        }
        if self.destinations.len() > MAX_TARGETS {
            return Err(InvalidSpec::TooManyTargets(self.destinations.len()));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = self.destinations.iter().find(|d| !seen.insert(*d)) {
            return Err(InvalidSpec::RepeatedTarget(twice.to_string()));
        }
        let encoded = serde_json::to_vec(self).map_err(|e| InvalidSpec::Encoding(e.to_string()))?;
        if encoded.len() > MAX_SPEC_BYTES { Err(InvalidSpec::TooLarge(encoded.len())) } else { Ok(()) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::request::{ImageFormat, NetworkMode};

    pub(crate) fn spec() -> BuildSpec {
        BuildSpec {
            namespace: "team-a".parse().unwrap(),
            pool: "default".parse().unwrap(),
            priority: DEFAULT_PRIORITY,
            group: None,
            requester: "somebody".to_owned(),
            request: BuildRequest {
                dockerfile: "FROM scratch\n".to_owned(),
                dockerfile_name: "Dockerfile".to_owned(),
                build_args: BTreeMap::new(),
                labels: BTreeMap::new(),
                target: None,
                format: ImageFormat::Docker,
                timestamp: None,
                network: NetworkMode::Isolated,
                timeout: Duration::from_hours(1),
                root_filesystem: false,
                no_cache: false,
            },
            context: ContextRef { digest: Digest::from_sha256([0; 32]), size: 1024 },
            destinations: vec![Destination::Image("r.example/app:1".parse().unwrap())],
            secrets: Vec::new(),
            credentials: SecretSource::Client,
            max_attempts: DEFAULT_ATTEMPTS,
            queue_timeout: DEFAULT_QUEUE_TIMEOUT,
        }
    }

    #[test]
    fn a_spec_survives_json_and_its_rules_name_the_limit() {
        let good = spec();
        good.validate().unwrap();
        let json = serde_json::to_string(&good).unwrap();
        assert_eq!(serde_json::from_str::<BuildSpec>(&json).unwrap(), good);

        let with = |change: fn(&mut BuildSpec)| {
            let mut spec = spec();
            change(&mut spec);
            spec.validate().unwrap_err().to_string()
        };
        assert!(with(|s| s.priority = 10).contains("highest is 9"));
        assert!(with(|s| s.max_attempts = 0).contains("1 to 20"));
        assert!(with(|s| s.destinations.push(s.destinations[0].clone())).contains("named twice"));
        assert!(with(|s| s.request.dockerfile = "#".repeat(MAX_SPEC_BYTES)).contains("most is 196608"));
        let many = with(|s| {
            let target = |i| Destination::Image(format!("r.example/app:{i}").parse().unwrap());
            s.destinations = (0..=MAX_TARGETS).map(target).collect();
        });
        assert!(many.contains("33 targets"));
    }
}
