//! Identifiers (pure, except for the named constructors that draw time and randomness).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuids {
    ($($(#[doc = $doc:literal])+ $name:ident = $draw:ident;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh one.
            pub fn generate() -> Self {
                Self(Uuid::$draw())
            }

            /// From raw bits, for stores and for seeded tests.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The raw bits, for stores.
            pub const fn as_uuid(&self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::try_parse(text).map(Self)
            }
        }
    )+};
}

uuids! {
    /// One build: what the user asked for. A `UUIDv7`, so ids sort by the time of their creation.
    BuildId = now_v7;
    /// One run of an agent process: a new one after every start.
    BootId = new_v4;
    /// One wish of an agent for work. Asking again with the same id gets the same answer.
    ClaimId = new_v4;
    /// Proof that its bearer holds the lease of one attempt. Drawn at random; not for logs.
    LeaseToken = new_v4;
    /// One message, for deduplication and for finding it again.
    MessageId = now_v7;
}

/// Longest name, so that every name fits into a routing key (255 bytes) and a file name.
pub const MAX_NAME_BYTES: usize = 63;

/// The text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a valid {kind}; use 1 to {MAX_NAME_BYTES} of a-z, 0-9 and -, beginning and ending with a letter or digit"
)]
pub struct InvalidName {
    /// What the name is for.
    pub kind: &'static str,
    /// The refused text.
    pub text: String,
}

/// A label of DNS: it needs no quoting in a routing key, a path, a URL or a metric.
fn is_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=MAX_NAME_BYTES).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

macro_rules! names {
    ($($(#[doc = $doc:literal])+ $name:ident = $kind:literal;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::try_from(text.to_owned())
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                if is_name(&text) { Ok(Self(text)) } else { Err(InvalidName { kind: $kind, text }) }
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    )+};
}

names! {
    /// One agent, over all its boots.
    AgentId = "agent id";
    /// Whose builds these are: the unit of fairness, limits and permissions.
    Namespace = "namespace";
    /// A set of agents that take the same builds.
    Pool = "pool";
    /// Builds of one group run one at a time.
    Group = "concurrency group";
}

/// Number of a try at a build, from 1. It only grows: the fencing token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Attempt(u32);

impl Attempt {
    /// The first try.
    pub const FIRST: Self = Self(1);

    /// From a store; 0 is no attempt.
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 { None } else { Some(Self(number)) }
    }

    /// The try after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Place of a build in the order of submission, drawn from one sequence: every order is by this, never by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SubmitSeq(pub i64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels_of_dns() {
        for good in ["a", "team-a", "0", &"x".repeat(MAX_NAME_BYTES)] {
            assert_eq!(good.parse::<Pool>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "*", "#", "a\n", &"x".repeat(MAX_NAME_BYTES + 1)] {
            let error = bad.parse::<Pool>().unwrap_err();
            assert_eq!(error.text, bad);
            assert!(serde_json::from_value::<Pool>(serde_json::json!(bad)).is_err());
        }
    }

    #[test]
    fn attempts_count_from_one() {
        assert_eq!(Attempt::new(0), None);
        assert_eq!(Attempt::FIRST.next().get(), 2);
        assert_eq!(Attempt::new(u32::MAX).unwrap().next().get(), u32::MAX);
    }
}
