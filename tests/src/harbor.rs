//! A Harbor in front of a real registry: it knows one robot account, and what that may do (shell).
//!
//! Statuses, codes and sentences are those of Harbor's sources, as in the tests of pushing in the agent.

use std::net::SocketAddr;

use serde_json::json;

use crate::http::Head;
use crate::proxy::{Canned, FaultProxy};

/// The password of the robot, to search for wherever it must not be.
pub const PASSWORD: &str = "canary-robot-52c1";
/// `robot$team+ci` and [`PASSWORD`].
pub const BASIC: &str = "cm9ib3QkdGVhbStjaTpjYW5hcnktcm9ib3QtNTJjMQ==";
/// The project of the robot.
pub const PROJECT: &str = "team";
/// What Harbor says of a project that is full.
pub const QUOTA: &str = "Quota exceeded when processing the request of adding 12.0 MiB of storage resource, which \
     when updated to current usage of 90.0 MiB will exceed the configured upper limit of 100.0 MiB.";

/// The rules of the project.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rules {
    /// The robot may only pull.
    pub read_only_robot: bool,
    /// Tags that begin with `v` are immutable.
    pub immutable: bool,
    /// No blob has room any more.
    pub full: bool,
}

/// Starts one in front of a registry.
pub fn start(registry: SocketAddr, rules: Rules) -> FaultProxy {
    FaultProxy::guarded(registry, move |head| rules.answer(&Asked::of(head)))
}

/// A request, as far as Harbor looks.
struct Asked<'a> {
    head: &'a Head,
    method: &'a str,
    path: &'a str,
    query: &'a str,
}

impl<'a> Asked<'a> {
    fn of(head: &'a Head) -> Self {
        let mut words = head.first().split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Self { head, method, path, query }
    }

    fn values(&self, name: &str) -> Vec<String> {
        let pairs = self.query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| decode(value)).collect()
    }

    fn sent(&self) -> &str {
        self.head.header("authorization").unwrap_or_default()
    }

    fn knows_password(&self) -> bool {
        self.sent().strip_prefix("Basic ") == Some(BASIC)
    }
}

impl Rules {
    /// `Some` for everything but what a permitted request gets from the registry behind.
    fn answer(self, asked: &Asked<'_>) -> Option<Canned> {
        match asked.path {
            "/service/token" => return Some(self.token(asked)),
            path if path.starts_with("/api/v2.0/") => return Some(self.tags(asked)),
            _ => {}
        }
        let repository = asked.path.strip_prefix("/v2/")?;
        let repository = repository.split("/manifests").next()?.split("/blobs").next()?;
        let action = if matches!(asked.method, "GET" | "HEAD") { "pull" } else { "push" };
        if !self.permits(asked, repository, action) {
            return Some(unauthorized(asked, repository, action));
        }
        self.refuses(asked)
    }

    /// What a robot with every right meets.
    fn refuses(self, asked: &Asked<'_>) -> Option<Canned> {
        if asked.method != "PUT" {
            return None;
        }
        if self.full && asked.path.contains("/blobs/uploads/") {
            return Some(refusal(403, "DENIED", QUOTA));
        }
        let tag = asked.path.split_once("/manifests/")?.1;
        let message = format!("Failed to process request due to 'app:{tag}' configured as immutable.");
        (self.immutable && tag.starts_with('v')).then(|| refusal(412, "PRECONDITION", &message))
    }

    /// A token says what it allows, and is cut down to what the robot may do.
    fn token(self, asked: &Asked<'_>) -> Canned {
        assert_eq!(asked.values("service"), ["harbor-registry"]);
        if !asked.knows_password() {
            return refusal(401, "UNAUTHORIZED", "unauthorized");
        }
        let granted: Vec<String> = asked.values("scope").iter().map(|scope| self.grant(scope)).collect();
        answer(200, &json!({"token": granted.join("|"), "expires_in": 1800}))
    }

    fn grant(self, scope: &str) -> String {
        let mut parts = scope.split(':');
        assert_eq!(parts.next(), Some("repository"), "{scope}");
        let (repository, actions) = (parts.next().unwrap(), parts.next().unwrap());
        let allowed = actions.split(',').filter(|action| self.may(repository, action));
        format!("{repository}={}", allowed.collect::<Vec<_>>().join(","))
    }

    fn may(self, repository: &str, action: &str) -> bool {
        repository.split('/').next() == Some(PROJECT) && (action == "pull" || !self.read_only_robot)
    }

    fn permits(self, asked: &Asked<'_>, repository: &str, action: &str) -> bool {
        if asked.knows_password() {
            return self.may(repository, action);
        }
        let Some(token) = asked.sent().strip_prefix("Bearer ") else { return false };
        let mut grants = token.split('|').filter_map(|grant| grant.split_once('='));
        grants.any(|(name, actions)| name == repository && actions.split(',').any(|a| a == action))
    }

    /// The list of an artifact's tags.
    fn tags(self, asked: &Asked<'_>) -> Canned {
        if !asked.knows_password() {
            return refusal(401, "UNAUTHORIZED", "unauthorized");
        }
        let asked_for = asked.path.strip_suffix("/tags").and_then(|path| path.rsplit('/').next()).unwrap();
        let told = asked.values("with_immutable_status") == ["true"];
        let immutable = told && self.immutable && asked_for.starts_with('v');
        answer(200, &json!([{"id": 1, "name": asked_for, "immutable": immutable}]))
    }
}

fn unauthorized(asked: &Asked<'_>, repository: &str, action: &str) -> Canned {
    let host = asked.head.header("host").unwrap();
    let challenge = if asked.sent().is_empty() {
        format!(
            "Bearer realm=\"http://{host}/service/token\",service=\"harbor-registry\",\
             scope=\"repository:{repository}:{action}\""
        )
    } else {
        "Basic realm=\"harbor\"".to_owned()
    };
    let message = format!("unauthorized to access repository: {repository}, action: {action}");
    let refused = refusal(401, "UNAUTHORIZED", &message);
    Canned { headers: format!("{}WWW-Authenticate: {challenge}\r\n", refused.headers), ..refused }
}

fn refusal(status: u16, code: &str, message: &str) -> Canned {
    answer(status, &json!({"errors": [{"code": code, "message": message}]}))
}

fn answer(status: u16, body: &serde_json::Value) -> Canned {
    Canned { status, headers: "Content-Type: application/json\r\n".to_owned(), body: body.to_string() }
}

/// Undoes the escapes of a query.
fn decode(value: &str) -> String {
    let mut parts = value.split('%');
    let mut decoded = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (hex, rest) = part.split_at(2);
        decoded.push(char::from(u8::from_str_radix(hex, 16).unwrap()));
        decoded.push_str(rest);
    }
    decoded
}
