//! The `[[registry]]` sections and which endpoints a reference leads to (pure).
//!
//! The rules are those of containers-registries.conf(5): the longest prefix wins, its mirrors are asked in
//! order, its location comes last.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use oci_spec::distribution::Reference;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The name that references carry for Docker Hub.
pub(crate) const DOCKER_HUB: &str = "docker.io";
/// The host that serves Docker Hub's images; `docker.io` itself is a web site.
const DOCKER_HUB_SERVER: &str = "registry-1.docker.io";
/// Starts a prefix that stands for every subdomain.
const WILDCARD: &str = "*.";

/// One `[[registry]]` section.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistrySection {
    /// `host[:port][/path]` that references start with, or `*.domain`.
    pub prefix: String,
    /// What replaces the prefix; the prefix itself if missing.
    pub location: Option<String>,
    /// Plain HTTP and unverified TLS are accepted.
    #[serde(default)]
    pub insecure: bool,
    /// Nothing may be pulled from here or pushed to it.
    #[serde(default)]
    pub blocked: bool,
    /// PEM file with certificates that are trusted besides the system's.
    pub ca: Option<PathBuf>,
    /// Asked in this order before the location.
    #[serde(default)]
    pub mirror: Vec<MirrorSection>,
}

/// One `[[registry.mirror]]` section.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorSection {
    /// What replaces the prefix.
    pub location: String,
    /// Plain HTTP and unverified TLS are accepted.
    #[serde(default)]
    pub insecure: bool,
    /// PEM file with certificates that are trusted besides the system's.
    pub ca: Option<PathBuf>,
}

/// The `[build.proxy]` section, as far as registries are concerned.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProxyConfig {
    /// URL of the proxy for `http:` addresses.
    pub http: Option<String>,
    /// URL of the proxy for `https:` addresses.
    pub https: Option<String>,
    /// Hosts, domains and networks that are reached without a proxy, separated by commas.
    pub no_proxy: Option<String>,
}

impl fmt::Debug for ProxyConfig {
    /// Proxy URLs may carry passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = |value: &Option<String>| if value.is_some() { "set" } else { "unset" };
        f.debug_struct("ProxyConfig")
            .field("http", &set(&self.http))
            .field("https", &set(&self.https))
            .field("no_proxy", &self.no_proxy)
            .finish()
    }
}

/// A section that makes no sense, or a reference that a section forbids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryConfigError {
    /// The value is not a registry name.
    #[error(
        "[[registry]] {key} = \"{value}\" is not `host[:port][/path]` without scheme, tag and upper case"
    )]
    Name {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// Two sections have the same prefix.
    #[error("[[registry]] prefix = \"{0}\" appears twice")]
    Duplicate(String),
    /// A subdomain wildcard cannot be rewritten.
    #[error("[[registry]] prefix = \"{0}\" has a wildcard, so it cannot have a location or a mirror")]
    RewrittenWildcard(String),
    /// The prefix is the whole name, and its location has no path.
    #[error("[[registry]] location = \"{location}\" leaves no repository for {name}; add a path to it")]
    NoRepository {
        /// The location of the section or of its mirror.
        location: String,
        /// The name that was asked for.
        name: String,
    },
    /// An operator forbids this registry.
    #[error("the registry is blocked by [[registry]] prefix = \"{prefix}\": blocked = true")]
    Blocked {
        /// The prefix of the section that matches.
        prefix: String,
    },
}

/// One place that may have the image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// `host[:port]` as in names and credential files: `docker.io` for Docker Hub.
    pub host: String,
    /// The repository on that host.
    pub repository: String,
    /// Plain HTTP and unverified TLS are accepted.
    pub insecure: bool,
    /// Trusted besides the system's certificates.
    pub ca: Option<PathBuf>,
}

impl Endpoint {
    fn new(name: &str, insecure: bool, ca: Option<&PathBuf>) -> Option<Self> {
        let (host, repository) = name.split_once('/')?;
        let (host, repository) = (host.to_owned(), repository.to_owned());
        Some(Self { host, repository, insecure, ca: ca.cloned() })
    }

    /// The name under which credentials are looked up: this endpoint's own host and repository, also where
    /// it is a mirror of another.
    pub fn credential_key(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// `host[:port]` to connect to.
    pub fn address(&self) -> &str {
        if self.host == DOCKER_HUB { DOCKER_HUB_SERVER } else { &self.host }
    }
}

/// Checked sections.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    sections: Vec<RegistrySection>,
}

impl RegistryConfig {
    /// Checks the sections of a configuration file.
    pub fn new(sections: Vec<RegistrySection>) -> Result<Self, RegistryConfigError> {
        match Self::problem(&sections) {
            Some((_, error)) => Err(error),
            None => Ok(Self { sections }),
        }
    }

    /// The first section that makes no sense, by its place.
    pub fn problem(sections: &[RegistrySection]) -> Option<(usize, RegistryConfigError)> {
        let mut seen = HashSet::new();
        let mut check = |section: &RegistrySection| match check_section(section) {
            Ok(()) if seen.insert(section.prefix.clone()) => None,
            Ok(()) => Some(RegistryConfigError::Duplicate(section.prefix.clone())),
            Err(error) => Some(error),
        };
        sections.iter().enumerate().find_map(|(index, section)| Some((index, check(section)?)))
    }

    /// Where to ask for a reference, in order; never empty.
    pub fn endpoints(&self, reference: &Reference) -> Result<Vec<Endpoint>, RegistryConfigError> {
        let name = name(reference);
        let Some(section) = self.section(&name) else {
            return Ok(Endpoint::new(&name, false, None).into_iter().collect());
        };
        if section.blocked {
            return Err(RegistryConfigError::Blocked { prefix: section.prefix.clone() });
        }
        let own = section.location.as_deref().unwrap_or(&section.prefix);
        let mirrors = section.mirror.iter().map(|m| (m.location.as_str(), m.insecure, m.ca.as_ref()));
        let places = mirrors.chain([(own, section.insecure, section.ca.as_ref())]);
        places.map(|(location, insecure, ca)| rewrite(section, location, &name, insecure, ca)).collect()
    }

    /// Where to push to: the location. A mirror is a copy, whatever is pushed there is lost for others.
    pub fn location(&self, reference: &Reference) -> Result<Endpoint, RegistryConfigError> {
        let mut endpoints = self.endpoints(reference)?;
        endpoints.pop().ok_or_else(|| RegistryConfigError::NoRepository {
            location: reference.registry().to_owned(),
            name: name(reference),
        })
    }

    fn section(&self, name: &str) -> Option<&RegistrySection> {
        let matching = self.sections.iter().filter(|section| matches(&section.prefix, name));
        matching.max_by_key(|section| section.prefix.len())
    }
}

/// Host and repository without tag and digest; hosts compare without regard to case.
fn name(reference: &Reference) -> String {
    format!("{}/{}", reference.registry().to_ascii_lowercase(), reference.repository())
}

fn matches(prefix: &str, name: &str) -> bool {
    match prefix.strip_prefix('*') {
        Some(domain) => name.split('/').next().is_some_and(|host| host.ends_with(domain)),
        None => name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
    }
}

fn rewrite(
    section: &RegistrySection,
    location: &str,
    name: &str,
    insecure: bool,
    ca: Option<&PathBuf>,
) -> Result<Endpoint, RegistryConfigError> {
    let rewritten = match name.strip_prefix(&section.prefix) {
        Some(rest) => format!("{location}{rest}"),
        None => name.to_owned(),
    };
    Endpoint::new(&rewritten, insecure, ca).ok_or_else(|| RegistryConfigError::NoRepository {
        location: location.to_owned(),
        name: name.to_owned(),
    })
}

fn check_section(section: &RegistrySection) -> Result<(), RegistryConfigError> {
    let domain = section.prefix.strip_prefix(WILDCARD);
    if domain.is_some() && (section.location.is_some() || !section.mirror.is_empty()) {
        return Err(RegistryConfigError::RewrittenWildcard(section.prefix.clone()));
    }
    match domain {
        Some(domain) if domain.contains('/') => return Err(bad("prefix", &section.prefix)),
        Some(domain) => check_name("prefix", domain)?,
        None => check_name("prefix", &section.prefix)?,
    }
    section.location.iter().try_for_each(|location| check_name("location", location))?;
    section.mirror.iter().try_for_each(|mirror| check_name("mirror.location", &mirror.location))
}

fn bad(key: &'static str, value: &str) -> RegistryConfigError {
    RegistryConfigError::Name { key, value: value.to_owned() }
}

fn check_name(key: &'static str, value: &str) -> Result<(), RegistryConfigError> {
    let mut parts = value.split('/');
    let host = parts.next().is_some_and(is_host);
    if host && parts.all(is_component) { Ok(()) } else { Err(bad(key, value)) }
}

fn is_host(text: &str) -> bool {
    let (name, port) = text.split_once(':').unwrap_or((text, "443"));
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' || c == '-';
    !name.is_empty() && name.chars().all(plain) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

fn is_component(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-');
    text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) && text.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        registry: Vec<RegistrySection>,
    }

    fn config(text: &str) -> Result<RegistryConfig, RegistryConfigError> {
        RegistryConfig::new(toml::from_str::<File>(text).unwrap().registry)
    }

    fn keys(config: &RegistryConfig, reference: &str) -> Vec<String> {
        let endpoints = config.endpoints(&reference.parse().unwrap()).unwrap();
        endpoints.iter().map(Endpoint::credential_key).collect()
    }

    const EXAMPLE: &str = r#"
        [[registry]]
        prefix = "docker.io"
        ca = "/etc/hub.pem"
        [[registry.mirror]]
        location = "mirror.corp:5000/hub"
        insecure = true
        [[registry.mirror]]
        location = "second.corp"

        [[registry]]
        prefix = "docker.io/secret"
        blocked = true

        [[registry]]
        prefix = "old.corp/team"
        location = "new.corp/group/team"

        [[registry]]
        prefix = "*.internal.corp"
        insecure = true
    "#;

    #[test]
    fn names_lead_to_mirrors_then_to_the_location() {
        let config = config(EXAMPLE).unwrap();
        for (reference, expected) in [
            (
                "alpine",
                vec![
                    "mirror.corp:5000/hub/library/alpine",
                    "second.corp/library/alpine",
                    "docker.io/library/alpine",
                ],
            ),
            ("old.corp/team/app:1", vec!["new.corp/group/team/app"]),
            ("old.corp/team", vec!["new.corp/group/team"]),
            ("old.corp/teams/app", vec!["old.corp/teams/app"]),
            ("docker.io:5000/a", vec!["docker.io:5000/a"]),
            ("A.Internal.corp/x", vec!["a.internal.corp/x"]),
            ("quay.io/a/b", vec!["quay.io/a/b"]),
        ] {
            assert_eq!(keys(&config, reference), expected, "{reference}");
        }
    }

    #[test]
    fn options_belong_to_the_place_that_has_them() {
        let config = config(EXAMPLE).unwrap();
        let endpoints = config.endpoints(&"alpine".parse().unwrap()).unwrap();
        assert_eq!(config.location(&"alpine".parse().unwrap()).unwrap(), endpoints[2]);
        assert!(config.location(&"secret/x".parse().unwrap()).is_err());
        let insecure: Vec<_> = endpoints.iter().map(|e| e.insecure).collect();
        assert_eq!(insecure, [true, false, false]);
        assert_eq!(endpoints[0].ca, None);
        assert_eq!(endpoints[2].ca, Some("/etc/hub.pem".into()));
        assert_eq!(endpoints[2].address(), "registry-1.docker.io");
        let sub = config.endpoints(&"a.internal.corp/x".parse().unwrap()).unwrap();
        assert!(sub[0].insecure);
        assert!(!config.endpoints(&"internal.corp/x".parse().unwrap()).unwrap()[0].insecure);
    }

    #[test]
    fn the_longest_prefix_decides_and_names_the_key() {
        let error = config(EXAMPLE).unwrap().endpoints(&"secret/x".parse().unwrap()).unwrap_err();
        assert_eq!(error, RegistryConfigError::Blocked { prefix: "docker.io/secret".into() });
        assert!(error.to_string().contains("blocked = true"));
    }

    #[test]
    fn a_location_without_path_cannot_replace_a_whole_name() {
        let config = config("[[registry]]\nprefix = \"a.corp/app\"\nlocation = \"b.corp\"").unwrap();
        let error = config.endpoints(&"a.corp/app".parse().unwrap()).unwrap_err();
        assert!(matches!(error, RegistryConfigError::NoRepository { .. }));
        assert_eq!(keys(&config, "a.corp/app/x"), ["b.corp/x"]);
    }

    #[test]
    fn sections_that_make_no_sense_are_refused() {
        for text in [
            "prefix = \"https://a.corp\"",
            "prefix = \"a.corp/\"",
            "prefix = \"a.corp/x:1\"",
            "prefix = \"\"",
            "prefix = \"a.corp:0\"",
            "prefix = \"a.corp\"\nlocation = \"user@b.corp\"",
            "prefix = \"a.corp\"\nlocation = \"b.corp/../c\"",
            "prefix = \"*.a.corp/x\"",
            "prefix = \"*.a.corp\"\nlocation = \"b.corp\"",
            "prefix = \"a.corp\"\n[[registry]]\nprefix = \"a.corp\"",
            "prefix = \"a.corp\"\n[[registry.mirror]]\nlocation = \"http://m\"",
        ] {
            assert!(config(&format!("[[registry]]\n{text}")).is_err(), "{text}");
        }
        assert!(toml::from_str::<File>("[[registry]]\nprefix = \"a\"\nsearch = true").is_err());
    }

    #[test]
    fn proxy_passwords_are_not_printed() {
        let proxy = ProxyConfig { https: Some("http://u:hunter2@p:1".into()), ..ProxyConfig::default() };
        assert!(!format!("{proxy:?}").contains("hunter2"));
    }
}
