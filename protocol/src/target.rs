//! Where an image is published (pure).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest tag that registries accept (OCI distribution specification, "Pulling manifests").
const MAX_TAG_BYTES: usize = 128;
/// Longest `host/repository` that registries accept (same place).
const MAX_NAME_BYTES: usize = 255;
/// What a name without a tag means, as everywhere else.
const DEFAULT_TAG: &str = "latest";

/// A tag in a repository of a registry: `registry/repository:tag`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Target {
    registry: String,
    repository: String,
    tag: String,
}

/// The text does not name a place to publish to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTarget {
    /// Nothing says which registry.
    #[error("`{0}` names no registry; write the host too, as in registry.example/team/app:1.0")]
    NoRegistry(String),
    /// The host has characters that no host has.
    #[error("`{0}` begins with a host that is none; expected a name or address, perhaps with :port")]
    Registry(String),
    /// The repository breaks the rules of registries.
    #[error(
        "`{0}` has a repository that registries refuse; use a-z, 0-9 and single . _ - between them, parts separated by /"
    )]
    Repository(String),
    /// The tag breaks the rules of registries.
    #[error(
        "`{0}` has a tag that registries refuse; use 1 to {MAX_TAG_BYTES} of A-Z, a-z, 0-9, _ . - and do not begin with the last two"
    )]
    Tag(String),
    /// A digest is what comes out, not where it goes.
    #[error("`{0}` names a digest; an image is published under a tag")]
    Digest(String),
}

impl Target {
    /// Host, perhaps with a port.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Path inside the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Tag.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.registry, self.repository, self.tag)
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

impl TryFrom<String> for Target {
    type Error = InvalidTarget;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let owned = || text.to_owned();
        if text.contains('@') {
            return Err(InvalidTarget::Digest(owned()));
        }
        let (registry, path) = text.split_once('/').ok_or_else(|| InvalidTarget::NoRegistry(owned()))?;
        // The rule by which Docker tells a host from the first part of a path.
        if !registry.contains(['.', ':']) && registry != "localhost" {
            return Err(InvalidTarget::NoRegistry(owned()));
        }
        if !is_host(registry) {
            return Err(InvalidTarget::Registry(owned()));
        }
        let (repository, tag) = path.split_once(':').unwrap_or((path, DEFAULT_TAG));
        let whole = registry.len() + 1 + repository.len();
        if whole > MAX_NAME_BYTES || !repository.split('/').all(is_path_part) {
            return Err(InvalidTarget::Repository(owned()));
        }
        if !is_tag(tag) {
            return Err(InvalidTarget::Tag(owned()));
        }
        Ok(Self { registry: registry.to_owned(), repository: repository.to_owned(), tag: tag.to_owned() })
    }
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            let address = address.parse::<std::net::Ipv6Addr>().is_ok();
            return address && (rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port));
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    let label = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    name.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(port: &str) -> bool {
    port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` of the OCI distribution specification.
fn is_path_part(part: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let separator = |text: &str| matches!(text, "." | "_" | "__") || text.bytes().all(|b| b == b'-');
    let mut words = part.split(|c: char| c.is_ascii() && plain(c as u8)).filter(|s| !s.is_empty());
    !part.is_empty()
        && part.is_ascii()
        && part.starts_with(|c: char| plain(c as u8))
        && part.ends_with(|c: char| plain(c as u8))
        && words.all(separator)
}

fn is_tag(tag: &str) -> bool {
    (1..=MAX_TAG_BYTES).contains(&tag.len())
        && !tag.starts_with(['.', '-'])
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_three_parts() {
        for (text, registry, repository, tag) in [
            ("registry.example/app:1.0", "registry.example", "app", "1.0"),
            ("localhost/app", "localhost", "app", "latest"),
            ("localhost:5000/a/b-c/d__e:x_Y.z-1", "localhost:5000", "a/b-c/d__e", "x_Y.z-1"),
            ("127.0.0.1:5000/app:v1", "127.0.0.1:5000", "app", "v1"),
            ("[::1]:5000/app:v1", "[::1]:5000", "app", "v1"),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!((target.registry(), target.repository(), target.tag()), (registry, repository, tag));
            assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
        }
    }

    #[test]
    fn what_registries_refuse_is_refused_first() {
        type Is = fn(&InvalidTarget) -> bool;
        let no_registry: Is = |e| matches!(e, InvalidTarget::NoRegistry(_));
        let registry: Is = |e| matches!(e, InvalidTarget::Registry(_));
        let repository: Is = |e| matches!(e, InvalidTarget::Repository(_));
        let tag: Is = |e| matches!(e, InvalidTarget::Tag(_));
        let digest: Is = |e| matches!(e, InvalidTarget::Digest(_));
        for (text, expected) in [
            ("", no_registry),
            ("app", no_registry),
            ("app:1", no_registry),
            ("team/app:1", no_registry),
            ("a_b.example/app", registry),
            ("-a.example/app", registry),
            ("r.example:/app", registry),
            ("r.example:70000/app", registry),
            ("r.example:0/app", registry),
            ("[::g]:1/app", registry),
            ("r.example/", repository),
            ("r.example/App", repository),
            ("r.example//app", repository),
            ("r.example/a..b", repository),
            ("r.example/a___b", repository),
            ("r.example/.a", repository),
            ("r.example/a-", repository),
            ("r.example/ä", repository),
            ("r.example/../x", repository),
            ("r.example/app:", tag),
            ("r.example/app:.x", tag),
            ("r.example/app:a b", tag),
            ("r.example/app:a:b", tag),
            ("r.example/app@sha256:00", digest),
        ] {
            let error = text.parse::<Target>().unwrap_err();
            assert!(expected(&error), "{text}: {error}");
        }
        assert!(format!("r.example/{}", "a".repeat(300)).parse::<Target>().is_err());
        assert!(format!("r.example/a:{}", "a".repeat(129)).parse::<Target>().is_err());
    }
}
