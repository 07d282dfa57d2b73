//! Registry credentials of one build, found by the longest matching name (pure).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::config::DOCKER_HUB;

/// Names under which tools have stored Docker Hub credentials over the years.
const DOCKER_HUB_ALIASES: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];

/// What proves who pulls or pushes. Serialised only into the pipe of a publish process.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Credential {
    /// Sent to the registry, or to the token service that the registry names.
    Password {
        /// The account.
        username: String,
        /// Its password or access token.
        password: String,
    },
    /// An OAuth refresh token, sent to the token service only.
    IdentityToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(redacted)",
            Self::IdentityToken(_) => "IdentityToken(redacted)",
        })
    }
}

impl Credential {
    /// What must not be seen.
    pub(crate) fn secret(&self) -> &str {
        match self {
            Self::Password { password, .. } => password,
            Self::IdentityToken(token) => token,
        }
    }
}

/// Credentials by `host[:port][/path]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Credentials {
    by_key: BTreeMap<String, Credential>,
}

impl Credentials {
    /// Adds one, unless the same name has one already. Names may be written as in any of the usual
    /// credential files.
    pub fn insert(&mut self, key: &str, credential: Credential) {
        self.by_key.entry(normalise_key(key)).or_insert(credential);
    }

    /// The credential with the longest name that `host[:port]/repository` starts with.
    pub fn lookup(&self, name: &str) -> Option<&Credential> {
        self.find(name).map(|(_, credential)| credential)
    }

    fn find<'a>(&self, name: &'a str) -> Option<(&'a str, &Credential)> {
        let mut prefix = name;
        loop {
            if let Some(credential) = self.by_key.get(prefix) {
                return Some((prefix, credential));
            }
            prefix = prefix.rsplit_once('/')?.0;
        }
    }

    /// Those that [`Credentials::lookup`] finds for one of the names, and no others.
    #[must_use]
    pub fn only_for<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let found = names.into_iter().filter_map(|name| self.find(name));
        Self { by_key: found.map(|(key, credential)| (key.to_owned(), credential.clone())).collect() }
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// The secret values, for the redaction of logs.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        self.by_key.values().map(Credential::secret)
    }
}

/// The one spelling of a credential key. Old files hold URLs such as `https://index.docker.io/v1/`, whose
/// path says nothing about repositories.
pub fn normalise_key(key: &str) -> String {
    let name = match key.split_once("://") {
        Some((_, rest)) => rest.split('/').next().unwrap_or_default(),
        None => key.trim_end_matches('/'),
    };
    let (host, path) = name.split_at(name.find('/').unwrap_or(name.len()));
    let host = host.to_ascii_lowercase();
    // `docker.io/v1` was written by tools that stripped only the scheme.
    let path = if matches!(path, "/v1" | "/v2") { "" } else { path };
    if DOCKER_HUB_ALIASES.contains(&host.as_str()) { format!("{DOCKER_HUB}{path}") } else { host + path }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(text: &str) -> Credential {
        Credential::Password { username: "user".into(), password: text.into() }
    }

    #[test]
    fn every_spelling_of_docker_hub_is_one() {
        for key in [
            "docker.io",
            "index.docker.io",
            "https://index.docker.io/v1/",
            "Docker.io/",
            "index.docker.io/v1",
        ] {
            assert_eq!(normalise_key(key), "docker.io", "{key}");
        }
        assert_eq!(normalise_key("https://reg.corp:5000/v2/"), "reg.corp:5000");
        assert_eq!(normalise_key("reg.corp/team/"), "reg.corp/team");
    }

    #[test]
    fn the_longest_name_wins_at_component_borders() {
        let mut credentials = Credentials::default();
        credentials.insert("reg.corp", password("host"));
        credentials.insert("reg.corp/team", password("team"));
        credentials.insert("reg.corp/team/app", password("app"));
        credentials.insert("reg.corp/team/app", password("later entries do not replace"));
        for (name, expected) in [
            ("reg.corp/team/app", "app"),
            ("reg.corp/team/application", "team"),
            ("reg.corp/teams/app", "host"),
            ("reg.corp/x", "host"),
        ] {
            assert_eq!(credentials.lookup(name), Some(&password(expected)), "{name}");
        }
        assert_eq!(credentials.only_for(["reg.corp/x", "other/x"]).by_key.len(), 1);
        assert_eq!(credentials.only_for(["reg.corp/x"]).lookup("reg.corp/team/app"), Some(&password("host")));
        assert_eq!(credentials.lookup("reg.corp:5000/x"), None);
        assert_eq!(credentials.lookup("evil-reg.corp/x"), None);
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let mut credentials = Credentials::default();
        credentials.insert("a", password("hunter2"));
        credentials.insert("b", Credential::IdentityToken("hunter2".into()));
        assert!(!format!("{credentials:?}").contains("hunter2"));
        assert_eq!(credentials.secrets().count(), 2);
    }
}
