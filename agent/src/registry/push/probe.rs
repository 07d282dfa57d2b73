//! What can be known about a target before anything is built (shell).
//!
//! Opening an upload needs the right to push and stores nothing; it is cancelled at once. Whether a tag may
//! move is asked only where the registry has a question for it that changes nothing: Harbor's list of an
//! artifact's tags says for each one whether a rule makes it immutable (REST API v2.0,
//! `with_immutable_status`). Elsewhere, the PUT is the only way to know.

use kiln_protocol::Digest;
use reqwest::header::AUTHORIZATION;
use reqwest::{Method, Url};
use serde::{Deserialize, Serialize};

use super::{Failed, Push, PushError};
use crate::registry::error::Cause;
use crate::registry::remote::Call;
use crate::registry::token;

/// What Harbor's challenge names as the service of its tokens, in every version with immutability rules.
const HARBOR_SERVICE: &str = "harbor-registry";
/// Harbor's largest page. An artifact with more tags than that may hide ours.
const HARBOR_PAGE: &str = "100";
/// Bytes of a full page, with room.
const HARBOR_LIMIT: u64 = 1024 * 1024;

/// What is known about a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What the tag points to now; `None` also if this credential may push and not pull.
    pub existing: Option<Digest>,
    /// Whether it may move.
    pub rule: TagRule,
}

/// Whether a registry lets a tag move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TagRule {
    /// There is nothing to move.
    Free,
    /// The registry says that it may.
    Mutable,
    /// The registry cannot be asked.
    Unknown,
}

#[derive(Deserialize)]
struct HarborTag {
    name: String,
    #[serde(default)]
    immutable: bool,
}

impl Push {
    /// Whether this credential may push here, and whether it is known that the tag may not move.
    pub async fn probe(&self, tag: Option<&str>) -> Result<Probe, PushError> {
        self.within(self.ask(tag)).await.map_err(|failed| self.error(tag, failed))
    }

    async fn ask(&self, tag: Option<&str>) -> Result<Probe, Failed> {
        let mut patience = self.patience();
        loop {
            match self.ask_once(tag).await {
                Ok(probe) => return Ok(probe),
                Err(failed) => patience.wait(failed).await?,
            }
        }
    }

    async fn ask_once(&self, tag: Option<&str>) -> Result<Probe, Failed> {
        if let Some(session) = self.open_session().await? {
            self.cancel(session).await;
        }
        let Some(tag) = tag else { return Ok(Probe { existing: None, rule: TagRule::Free }) };
        let existing = match self.named(tag).await {
            Err(Failed::Client(Cause::Unauthorized { .. })) => None,
            other => other?,
        };
        let Some(existing) = existing else { return Ok(Probe { existing: None, rule: TagRule::Free }) };
        match self.harbor_rule(tag).await {
            Some(true) => Err(Failed::ImmutableTag { existing }),
            Some(false) => Ok(Probe { existing: Some(existing), rule: TagRule::Mutable }),
            None => Ok(Probe { existing: Some(existing), rule: TagRule::Unknown }),
        }
    }

    /// Registries forget sessions by themselves; this only spares them the wait.
    async fn cancel(&self, session: Url) {
        let ended = self.remote.call(&Call::new(Method::DELETE, session)).await;
        match ended {
            Ok(response) if response.status().is_success() => {}
            Ok(response) => tracing::debug!(status = %response.status(), "the upload was not cancelled"),
            Err(error) => tracing::debug!(%error, "the upload was not cancelled"),
        }
    }

    /// Whether a Harbor calls the tag immutable; `None` if this is none, or if it does not tell us.
    async fn harbor_rule(&self, tag: &str) -> Option<bool> {
        if self.remote.service() != Some(HARBOR_SERVICE) {
            return None;
        }
        match self.harbor_tags(tag).await {
            Ok(tags) => tags.iter().find(|known| known.name == tag).map(|known| known.immutable),
            Err(error) => {
                tracing::debug!(%error, tag, "Harbor did not say whether the tag is immutable");
                None
            }
        }
    }

    async fn harbor_tags(&self, tag: &str) -> Result<Vec<HarborTag>, Cause> {
        let Some((username, password)) = self.password() else { return Ok(Vec::new()) };
        let url = harbor_url(self.remote.url("").await?, &self.remote.endpoint.repository, tag);
        let header = token::basic(&self.remote, username, password)?;
        let request = self.remote.client.get(url.ok_or(Cause::Redirect("to nowhere"))?);
        // Not followed if it redirects: the password is for this host only.
        let sending = request.header(AUTHORIZATION, header).send();
        let mut response = self.remote.timed("waiting for an answer", sending).await?;
        if !response.status().is_success() {
            return Err(self.remote.failure(response).await);
        }
        let body = self.remote.body(&mut response, HARBOR_LIMIT, "the list of tags").await?;
        Ok(serde_json::from_slice(&body).unwrap_or_default())
    }
}

/// The first component of a repository is its project; slashes in the rest are escaped twice.
fn harbor_url(mut url: Url, repository: &str, tag: &str) -> Option<Url> {
    let (project, name) = repository.split_once('/')?;
    let name = name.replace('/', "%2F");
    url.set_path("/api/v2.0/projects");
    url.path_segments_mut().ok()?.extend([project, "repositories", &name, "artifacts", tag, "tags"]);
    url.query_pairs_mut().append_pair("with_immutable_status", "true").append_pair("page_size", HARBOR_PAGE);
    Some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_of_a_name_are_escaped_twice() {
        let url = |repository| {
            harbor_url("https://h:1/v2/x/".parse().unwrap(), repository, "1.0").map(String::from)
        };
        let tail = "artifacts/1.0/tags?with_immutable_status=true&page_size=100";
        let expected = format!("https://h:1/api/v2.0/projects/p/repositories/a%252Fb/{tail}");
        assert_eq!(url("p/a/b"), Some(expected));
        assert_eq!(url("p"), None);
    }
}
