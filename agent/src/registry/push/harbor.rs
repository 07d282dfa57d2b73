//! Pushes to a strict fake of Harbor, and to registries with a token service.
//!
//! Statuses, codes and sentences are those of Harbor's sources (goharbor/harbor): `src/lib/http/error.go` maps
//! codes to statuses, `src/server/middleware/v2auth/auth.go` refuses robots (401 `UNAUTHORIZED`, "unauthorized
//! to access repository: …, action: push", with a Basic challenge once a token was sent),
//! `src/server/middleware/immutable` answers 412 `PRECONDITION`, `src/controller/quota/controller.go` 403
//! `DENIED` (also issue 17390: the quota speaks at the PUT of a blob).

use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_protocol::Reason;
use serde_json::json;

use super::testing::{Front, PASSWORD, Stock, limits, push, registry, robot, silent, text};
use super::*;
use crate::registry::stub::{Reply, Seen};

fn refusal(status: u16, code: &str, message: &str) -> Reply {
    Reply::new(status, json!({"errors": [{"code": code, "message": message}]}).to_string())
}

fn query(seen: &Seen, name: &str) -> Vec<String> {
    let url = reqwest::Url::parse(&format!("http://h{}", seen.path)).unwrap();
    url.query_pairs().filter(|(key, _)| key == name).map(|(_, value)| value.into_owned()).collect()
}

/// What the robot may do in which project.
#[derive(Debug, Clone, Copy)]
struct Robot {
    project: &'static str,
    push: bool,
    reads_artifacts: bool,
}

const ROBOT: Robot = Robot { project: "team", push: true, reads_artifacts: true };

/// A Harbor in front of a real registry. Its tokens say what they allow.
struct Harbor {
    robot: Robot,
    issued: AtomicUsize,
}

impl Harbor {
    fn new(robot: Robot) -> Self {
        Self { robot, issued: AtomicUsize::new(0) }
    }

    fn password() -> String {
        use base64::Engine as _;
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("robot$team+ci:{PASSWORD}"));
        format!("Basic {encoded}")
    }

    /// `Some` for everything but what a permitted request gets from the registry behind.
    fn answer(&self, seen: &Seen) -> Option<Reply> {
        let path = seen.path.split('?').next().unwrap_or_default();
        if path == "/service/token" {
            return Some(self.token(seen));
        }
        if path.starts_with("/api/v2.0/") {
            return Some(self.api(seen, path));
        }
        let repository = path.strip_prefix("/v2/")?;
        let repository = repository.split("/manifests").next()?.split("/blobs").next()?;
        let wanted = if matches!(seen.method.as_str(), "GET" | "HEAD") { "pull" } else { "push" };
        (!self.permits(seen, repository, wanted)).then(|| Self::unauthorized(seen, repository, wanted))
    }

    fn token(&self, seen: &Seen) -> Reply {
        assert_eq!(query(seen, "service"), ["harbor-registry"]);
        if seen.header("authorization") != Some(&Self::password()) {
            return refusal(401, "UNAUTHORIZED", "unauthorized");
        }
        let number = self.issued.fetch_add(1, Ordering::SeqCst);
        let granted: Vec<String> = query(seen, "scope").iter().map(|scope| self.grant(scope)).collect();
        let token = format!("{number}|{}", granted.join("|"));
        Reply::new(200, json!({"token": token, "expires_in": 1800}).to_string())
    }

    /// Harbor's tokens are cut down to what the account may do.
    fn grant(&self, scope: &str) -> String {
        let mut parts = scope.split(':');
        assert_eq!(parts.next(), Some("repository"), "{scope}");
        let repository = parts.next().unwrap();
        let own = repository.split('/').next() == Some(self.robot.project);
        let actions = parts.next().unwrap().split(',');
        let allowed = actions.filter(|action| own && (*action == "pull" || self.robot.push));
        format!("{repository}={}", allowed.collect::<Vec<_>>().join(","))
    }

    fn permits(&self, seen: &Seen, repository: &str, action: &str) -> bool {
        let Some(sent) = seen.header("authorization") else { return false };
        if sent == Self::password() {
            let own = repository.split('/').next() == Some(self.robot.project);
            return own && (action == "pull" || self.robot.push);
        }
        let Some(token) = sent.strip_prefix("Bearer ") else { return false };
        let grants = token.split('|').filter_map(|grant| grant.split_once('='));
        grants
            .filter(|(name, _)| *name == repository)
            .any(|(_, actions)| actions.split(',').any(|a| a == action))
    }

    fn unauthorized(seen: &Seen, repository: &str, action: &str) -> Reply {
        let host = seen.header("host").unwrap();
        let challenge = match seen.header("authorization") {
            Some(_) => "Basic realm=\"harbor\"".to_owned(),
            None => format!(
                "Bearer realm=\"http://{host}/service/token\",service=\"harbor-registry\",\
                 scope=\"repository:{repository}:{action}\""
            ),
        };
        let message = format!("unauthorized to access repository: {repository}, action: {action}");
        refusal(401, "UNAUTHORIZED", &message).header("WWW-Authenticate", &challenge)
    }

    /// The list of an artifact's tags. The rule: tags that begin with `v` are immutable.
    fn api(&self, seen: &Seen, path: &str) -> Reply {
        if seen.header("authorization") != Some(&Self::password()) {
            return refusal(401, "UNAUTHORIZED", "unauthorized");
        }
        if !self.robot.reads_artifacts {
            return refusal(403, "FORBIDDEN", "forbidden");
        }
        let expected = "/api/v2.0/projects/team/repositories/group%252Fapp/artifacts/";
        let rest = path.strip_prefix(expected).unwrap_or_else(|| panic!("{path}"));
        let asked = rest.strip_suffix("/tags").unwrap();
        let with = query(seen, "with_immutable_status") == ["true"];
        let tag = |name: &str| json!({"id": 1, "name": name, "immutable": with && name.starts_with('v')});
        Reply::new(200, json!([tag("v0"), tag("other"), tag(asked)]).to_string())
    }
}

const REPOSITORY: &str = "team/group/app";

async fn harbor(robot: Robot, odd: impl Fn(&Seen) -> Option<Reply> + Send + Sync + 'static) -> Front {
    let harbor = Harbor::new(robot);
    Front::start(move |seen, _| harbor.answer(seen).or_else(|| odd(seen))).await
}

async fn publish(front: &Front, tag: &str) -> Result<TagOutcome, PushError> {
    let stock = Stock::new();
    let candidate = stock.candidate(b"a");
    let registry = registry(&front.host(), Some(robot()), limits());
    let push = push(&registry, &front.host(), REPOSITORY);
    push.upload_candidate(&candidate, &stock.store, &silent()).await?;
    push.put_tag(tag, candidate.manifest.as_bytes(), &candidate.media_type).await
}

async fn probe(front: &Front, repository: &str, tag: &str) -> Result<Probe, PushError> {
    let registry = registry(&front.host(), Some(robot()), limits());
    push(&registry, &front.host(), repository).probe(Some(tag)).await
}

#[tokio::test]
async fn a_robot_pushes_with_one_token_for_pull_and_push() {
    let front = harbor(ROBOT, |_| None).await;
    assert_eq!(publish(&front, "1").await.unwrap(), TagOutcome::Moved);
    let tokens = front.stub.seen().into_iter().filter(|seen| seen.path.starts_with("/service/token"));
    let scopes: Vec<_> = tokens.flat_map(|seen| query(&seen, "scope")).collect();
    assert_eq!(scopes, [format!("repository:{REPOSITORY}:pull,push")]);
}

#[tokio::test]
async fn a_token_may_be_asked_for_several_scopes() {
    let front = harbor(ROBOT, |_| None).await;
    let host = front.host();
    let registry = registry(&host, Some(robot()), limits());
    let stock = Stock::new();
    let candidate = stock.candidate(b"");
    push(&registry, &host, "team/base").upload_candidate(&candidate, &stock.store, &silent()).await.unwrap();
    let blobs: BTreeSet<_> = candidate.blobs.iter().map(|blob| blob.digest.clone()).collect();
    let mount = |repository: &str| Mount {
        repository: format!("{host}/{repository}").parse().unwrap(),
        blobs: blobs.clone(),
    };
    let name = format!("{host}/{REPOSITORY}").parse().unwrap();
    let push = registry.push(&name, &[mount("team/base")], DEFAULT_BUDGET).unwrap();
    let uploaded = push.upload_candidate(&candidate, &stock.store, &silent()).await.unwrap();
    assert_eq!((uploaded.mounted, uploaded.sent), (1, 0));
    let last = front.stub.seen().into_iter().rfind(|seen| seen.path.starts_with("/service/token")).unwrap();
    let expected = [format!("repository:{REPOSITORY}:pull,push"), "repository:team/base:pull".into()];
    assert_eq!(query(&last, "scope"), expected);
}

#[tokio::test]
async fn a_token_that_ends_in_the_middle_is_renewed() {
    let harbor = Harbor::new(ROBOT);
    let front = Front::start(move |seen, _| {
        let ended = seen.header("authorization").is_some_and(|sent| sent.starts_with("Bearer 0|"));
        if ended && seen.method == "PUT" {
            // Distribution's own challenge; Harbor would take the password from now on.
            let host = seen.header("host").unwrap();
            let challenge =
                format!("Bearer realm=\"http://{host}/service/token\",service=\"harbor-registry\",error=\"invalid_token\"");
            return Some(refusal(401, "UNAUTHORIZED", "expired").header("WWW-Authenticate", &challenge));
        }
        harbor.answer(seen)
    })
    .await;
    assert_eq!(publish(&front, "1").await.unwrap(), TagOutcome::Moved);
    assert_eq!(front.count("GET", "/service/token"), 2);

    let ended = Arc::new(AtomicUsize::new(0));
    let harbor = Harbor::new(ROBOT);
    let counted = Arc::clone(&ended);
    let front = Front::start(move |seen, _| {
        let bearer = seen.header("authorization").is_some_and(|sent| sent.starts_with("Bearer "));
        if bearer && seen.method == "PUT" {
            counted.fetch_add(1, Ordering::SeqCst);
            return Some(Harbor::unauthorized(seen, REPOSITORY, "push"));
        }
        harbor.answer(seen)
    })
    .await;
    assert_eq!(publish(&front, "1").await.unwrap(), TagOutcome::Moved);
    assert!(ended.load(Ordering::SeqCst) >= 1);
}

#[tokio::test]
async fn an_immutable_tag_is_known_before_the_build_and_refused_after_it() {
    let immutable = |seen: &Seen| {
        let tag = seen.path.rsplit('/').next().unwrap_or_default();
        (seen.method == "PUT" && seen.path.contains("/manifests/v")).then(|| {
            let message =
                format!("Failed to process request due to 'group/app:{tag}' configured as immutable.");
            refusal(412, "PRECONDITION", &message)
        })
    };
    let front = harbor(ROBOT, immutable).await;
    // As it came to be: pushed before the rule.
    assert_eq!(publish(&front, "1").await.unwrap(), TagOutcome::Moved);
    let TagOutcome::Refused(error) = publish(&front, "v1").await.unwrap() else { panic!("v1 moved") };
    assert_eq!((error.kind, error.reason, error.status), (Kind::ImmutableTag, Reason::BadRequest, Some(412)));
    assert_eq!(error.code.as_deref(), Some("PRECONDITION"));
    assert!(error.answer.as_ref().unwrap().contains("configured as immutable"), "{error}");
    assert!(error.hint.as_ref().unwrap().contains("another tag"));

    let mutable = probe(&front, REPOSITORY, "1").await.unwrap();
    assert_eq!(mutable.rule, TagRule::Mutable);
    assert_eq!(probe(&front, REPOSITORY, "v1").await.unwrap().rule, TagRule::Free);
    let stock = Stock::new();
    let manifest = stock.candidate(b"a").manifest;
    // Behind Harbor's back.
    let mut request = front.stub.seen().into_iter().rfind(|s| s.path.ends_with("/manifests/v1")).unwrap();
    (request.method, request.body) = ("PUT".into(), manifest);
    request.headers.retain(|(name, _)| name == "host");
    request.headers.push(("content-type".into(), super::testing::MANIFEST_TYPE.into()));
    request.headers.push(("content-length".into(), request.body.len().to_string()));
    let _ = super::testing::forward(&request, front.port());
    let error = probe(&front, REPOSITORY, "v1").await.unwrap_err();
    assert_eq!(
        (error.kind, error.reason, error.tag.as_deref()),
        (Kind::ImmutableTag, Reason::BadRequest, Some("v1"))
    );
    assert!(error.to_string().contains("makes it immutable"), "{error}");
}

#[tokio::test]
async fn a_robot_that_may_not_list_tags_leaves_the_rule_open() {
    let robot = Robot { reads_artifacts: false, ..ROBOT };
    let front = harbor(robot, |_| None).await;
    assert_eq!(publish(&front, "1").await.unwrap(), TagOutcome::Moved);
    let found = probe(&front, REPOSITORY, "1").await.unwrap();
    assert_eq!((found.existing.is_some(), found.rule), (true, TagRule::Unknown));
}

#[tokio::test]
async fn a_full_project_is_no_question_of_rights() {
    let message = "Quota exceeded when processing the request of adding 12.0 MiB of storage resource, which when \
                   updated to current usage of 90.0 MiB will exceed the configured upper limit of 100.0 MiB.";
    let front = harbor(ROBOT, move |seen| {
        let full = seen.method == "PUT" && seen.path.contains("/blobs/uploads/");
        full.then(|| refusal(403, "DENIED", message))
    })
    .await;
    let error = publish(&front, "1").await.unwrap_err();
    assert_eq!((error.kind, error.reason, error.status), (Kind::Quota, Reason::BadRequest, Some(403)));
    assert_eq!(error.answer.as_deref(), Some(message));
    assert!(error.hint.as_ref().unwrap().contains("larger quota"));
    assert!(front.count("POST", "/blobs/uploads/") <= 2, "a quota is not asked again");
}

#[tokio::test]
async fn a_robot_without_the_right_is_told_which() {
    let reader = harbor(Robot { push: false, ..ROBOT }, |_| None).await;
    let stranger = harbor(Robot { project: "other", ..ROBOT }, |_| None).await;
    for front in [reader, stranger] {
        let error = probe(&front, REPOSITORY, "1").await.unwrap_err();
        assert_eq!(
            (error.kind, error.reason, error.status),
            (Kind::Unauthorized, Reason::Unauthorized, Some(401))
        );
        let words = format!("unauthorized to access repository: {REPOSITORY}, action: push");
        assert_eq!(error.answer.as_deref(), Some(words.as_str()));
        assert!(error.hint.as_ref().unwrap().contains("robot account"), "{error:?}");
        assert!(!text(&error).contains(PASSWORD));
    }
    let readonly = harbor(ROBOT, |seen| {
        let message = "The system is in read only mode. Any modification is prohibited.";
        (seen.method == "POST").then(|| refusal(403, "DENIED", message))
    })
    .await;
    let error = probe(&readonly, REPOSITORY, "1").await.unwrap_err();
    assert!(error.to_string().contains("read only mode"), "{error}");
}

#[tokio::test]
async fn secrets_that_a_registry_repeats_are_not_passed_on() {
    let front = harbor(ROBOT, |seen| {
        let sent = seen.header("authorization")?.split(' ').nth(1)?.to_owned();
        let message = format!("the token {sent} or the password {PASSWORD} is not enough");
        (seen.method == "POST").then(|| refusal(403, "DENIED", &message))
    })
    .await;
    let error = probe(&front, REPOSITORY, "1").await.unwrap_err();
    assert_eq!((error.code.as_deref(), error.answer.as_deref()), (Some("DENIED"), None));
    assert!(!text(&error).contains(PASSWORD) && !text(&error).contains("0|"), "{error:?}");
}
