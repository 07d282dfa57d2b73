//! Builds through the API.

use kiln_protocol::api::{BuildDetail, BuildSummary, Code, Page};
use kiln_protocol::result::Phase;
use kiln_protocol::spec::{Destination, SecretRef, SecretSource};
use kiln_protocol::{BuildSpec, Reason, State};
use reqwest::{Method, StatusCode};

use crate::scene::{Scene, body, digest, parsed, problem, spec};

#[tokio::test]
async fn a_build_is_recorded_once_and_shown_without_proofs() {
    let scene = Scene::new().await;
    let wish = spec(scene.upload(b"files").await);
    let submit = async || scene.submission(&wish).header("idempotency-key", "one").send().await.unwrap();
    let first = submit().await;
    let location = first.headers()["location"].to_str().unwrap().to_owned();
    let first = body(first, StatusCode::ACCEPTED).await;
    let again = body(submit().await, StatusCode::ACCEPTED).await;
    assert_eq!((&first["id"], &first["repeated"]), (&again["id"], &false.into()));
    assert_eq!(again["repeated"], true);
    assert_eq!(location, format!("/api/v1/builds/{}", first["id"].as_str().unwrap()));

    let other = BuildSpec { priority: 6, ..wish.clone() };
    let reused = scene.submission(&other).header("idempotency-key", "one").send().await.unwrap();
    assert!(problem(reused).await.is(Code::KeyReused));

    let grant = scene.claim().await;
    scene.phase(&grant, 1, Phase::Fetch).await;
    let path = location.strip_prefix("/api/v1").unwrap();
    let shown = scene.get(path).send().await.unwrap().text().await.unwrap();
    assert!(!shown.contains(&grant.lease.token.to_string()), "{shown}");
    let shown: BuildDetail = serde_json::from_str(&shown).unwrap();
    assert_eq!((shown.summary.state, shown.summary.phase), (State::Building, Some(Phase::Fetch)));
    assert_eq!(shown.summary.agent.unwrap().as_str(), "agent-1");
    assert_eq!(shown.spec, wish);
}

#[tokio::test]
async fn what_cannot_be_built_is_not_recorded() {
    let scene = Scene::new().await;
    let context = scene.upload(b"files").await;
    let refused = async |wish: &BuildSpec| problem(scene.submission(wish).send().await.unwrap()).await;
    let with = |change: fn(&mut BuildSpec)| {
        let mut wish = spec(context.clone());
        change(&mut wish);
        wish
    };
    let missing = refused(&with(|wish| wish.context.digest = digest(b"other"))).await;
    assert!(missing.is(Code::ContextMissing) && missing.status == 409, "{missing:?}");
    for wish in [
        with(|wish| wish.context.size += 1),
        with(|wish| wish.priority = 10),
        with(|wish| wish.destinations.push(Destination::File("oci:out".to_owned()))),
        with(|wish| wish.credentials = SecretSource::Client),
        with(|wish| {
            wish.secrets.push(SecretRef { id: "npm".to_owned(), source: SecretSource::Client });
        }),
    ] {
        let problem = refused(&wish).await;
        assert!(problem.is(Code::InvalidSpec), "{problem:?}");
    }
    let long = scene.submission(&spec(context.clone())).header("idempotency-key", "x".repeat(200));
    assert!(problem(long.send().await.unwrap()).await.is(Code::BadRequest));
    let post = |kind: &'static str, text: String| {
        scene.ask(Method::POST, "/builds").header("content-type", kind).body(text).send()
    };
    assert!(problem(post("text/plain", "{}".to_owned()).await.unwrap()).await.is(Code::NotJson));
    assert!(problem(post("application/json", "{".to_owned()).await.unwrap()).await.is(Code::BadRequest));
    let huge = post("application/json", format!("\"{}\"", "x".repeat(2 << 20))).await.unwrap();
    assert!(problem(huge).await.is(Code::TooLarge));
    assert_eq!(scene.json("/builds").await["items"].as_array().unwrap().len(), 0);
}

#[tokio::test]
async fn pages_neither_repeat_nor_skip_while_builds_come() {
    let scene = Scene::new().await;
    let mut ids = Vec::new();
    for _ in 0..7 {
        ids.push(scene.build().await);
    }
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let answer = scene.get(&format!("/builds?limit=3{cursor}")).send().await.unwrap();
        let page: Page<BuildSummary> = parsed(answer, StatusCode::OK).await;
        seen.extend(page.items.iter().map(|build| build.id));
        scene.build().await;
        let Some(next) = page.next_cursor else { break };
        cursor = format!("&cursor={next}");
    }
    ids.reverse();
    assert_eq!(seen, ids);
    let pending = scene.json("/builds?state=PENDING").await;
    assert_eq!(pending["items"].as_array().unwrap().len(), 10);
    assert_eq!(pending["next_cursor"], serde_json::Value::Null);
    assert_eq!(scene.json("/builds?state=SUCCESS").await["items"].as_array().unwrap().len(), 0);
}

#[tokio::test]
async fn a_pool_that_is_not_configured_is_refused_and_one_without_an_agent_waits() {
    let scene = Scene::of_pool("default").await;
    let wish = spec(scene.upload(b"files").await);
    let other = BuildSpec { pool: "gpu".parse().unwrap(), ..wish.clone() };
    let refused = problem(scene.submission(&other).send().await.unwrap()).await;
    assert!(refused.is(Code::PoolUnknown), "{refused:?}");
    assert_eq!(refused.status, 422);
    for part in ["pool is gpu", "only the pool default", "submit with that one"] {
        assert!(refused.detail.contains(part), "{refused:?}");
    }
    let id = scene.submit(&wish).await;
    let queue = scene.json("/queue").await;
    assert_eq!(queue["items"][0]["id"], id.to_string());
    assert_eq!(queue["items"][0]["why"], "no agent serves the pool default now");

    let open = Scene::new().await;
    let context = open.upload(b"files").await;
    open.submit(&BuildSpec { pool: "gpu".parse().unwrap(), ..spec(context) }).await;
}

#[tokio::test]
async fn the_queue_says_why_a_build_waits() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    let queue = scene.json("/queue").await;
    assert_eq!(queue["items"][0]["id"], id.to_string());
    assert!(queue["items"][0]["why"].as_str().unwrap().contains("default"), "{queue}");
    scene.claim().await;
    assert_eq!(scene.json("/queue").await["items"].as_array().unwrap().len(), 0);
}

#[tokio::test]
async fn a_cancelled_build_can_be_retried_and_one_that_runs_cannot() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    let early = problem(scene.ask(Method::POST, &format!("/builds/{id}/retry")).send().await.unwrap()).await;
    assert!(early.is(Code::NotOver));
    let cancelled = scene.post(&format!("/builds/{id}/cancel"), StatusCode::OK).await;
    assert_eq!(cancelled["state"], "CANCELLED");
    let twice = scene.post(&format!("/builds/{id}/cancel"), StatusCode::OK).await;
    assert_eq!(twice, cancelled, "asking again changes nothing");

    let path = format!("/builds/{id}/retry");
    let retry =
        async || scene.ask(Method::POST, &path).header("idempotency-key", "again").send().await.unwrap();
    let first = body(retry().await, StatusCode::ACCEPTED).await;
    assert_eq!(body(retry().await, StatusCode::ACCEPTED).await["id"], first["id"]);
    let shown = scene.json(&format!("/builds/{}", first["id"].as_str().unwrap())).await;
    assert_eq!(shown["retry_of"], id.to_string());

    let nobody = uuid::Uuid::nil();
    for action in ["cancel", "retry", "replay", "discard"] {
        let path = format!("/builds/{nobody}/{action}");
        let missing = problem(scene.ask(Method::POST, &path).send().await.unwrap()).await;
        assert!(missing.is(Code::BuildMissing), "{action}: {missing:?}");
    }
}

#[tokio::test]
async fn a_dead_letter_is_listed_replayed_and_discarded() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    for action in ["replay", "discard"] {
        let early = scene.ask(Method::POST, &format!("/builds/{id}/{action}")).send().await.unwrap();
        assert_eq!(early.status(), StatusCode::CONFLICT);
    }
    let grant = scene.claim().await;
    scene.fail(&grant, 1, Reason::HookFault).await;
    let dead = scene.json("/dead").await;
    assert_eq!(
        (&dead["items"][0]["id"], &dead["items"][0]["reason"]),
        (&id.to_string().into(), &"hook_fault".into())
    );
    let shown = scene.json(&format!("/builds/{id}")).await;
    assert_eq!(
        (&shown["attempts"][0]["agent"], &shown["attempts"][0]["reason"]),
        (&"agent-1".into(), &"hook_fault".into())
    );
    let replayed = scene.post(&format!("/builds/{id}/replay?take_head=true"), StatusCode::OK).await;
    assert_eq!(replayed["state"], "PENDING");
    let grant = scene.claim().await;
    scene.fail(&grant, 1, Reason::HookFault).await;
    let discarded = scene.post(&format!("/builds/{id}/discard"), StatusCode::OK).await;
    assert_eq!(discarded["state"], "FAILED");
    assert_eq!(scene.json("/dead").await["items"].as_array().unwrap().len(), 0);
}

#[tokio::test]
async fn a_committed_build_cannot_be_cancelled() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    let grant = scene.claim().await;
    scene.commit(&grant).await;
    let late = scene.ask(Method::POST, &format!("/builds/{id}/cancel")).send().await.unwrap();
    let late = problem(late).await;
    assert!(late.is(Code::CancelRefused) && late.detail.contains("committed"), "{late:?}");
    let shown = scene.json(&format!("/builds/{id}")).await;
    assert_eq!(shown["digest"], digest(b"manifest").to_string());
}

#[tokio::test]
async fn messages_that_nobody_could_read_are_shown() {
    let scene = Scene::new().await;
    let mut tx = scene.orchestrator.store().write().await.unwrap();
    tx.keep_bad("dead.reports", "it is no envelope", &[0xff; 10_000]).await.unwrap();
    tx.commit().await.unwrap();
    let bad = scene.json("/bad-messages").await;
    assert_eq!(
        (&bad["items"][0]["bytes"], &bad["items"][0]["queue"]),
        (&10_000.into(), &"dead.reports".into())
    );
}
