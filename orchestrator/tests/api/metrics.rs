//! What a server counts.

use std::collections::BTreeMap;

use kiln_orchestrator::api::{ListenError, Listener};
use kiln_protocol::Reason;
use reqwest::{Client, Method, Response, StatusCode};

use crate::scene::Scene;

async fn ask(scene: &Scene, method: Method, host: Option<&str>) -> Response {
    let client = Client::builder().no_proxy().build().unwrap();
    let request = client.request(method, &scene.metrics);
    host.into_iter().fold(request, |request, host| request.header("host", host)).send().await.unwrap()
}

async fn numbers(scene: &Scene) -> BTreeMap<String, f64> {
    let answer = ask(scene, Method::GET, None).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["content-type"], "text/plain; version=0.0.4");
    let text = answer.text().await.unwrap();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let samples = samples.map(|line| line.rsplit_once(' ').unwrap());
    samples.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

fn is(numbers: &BTreeMap<String, f64>, name: &str, value: f64) {
    let found = numbers[name];
    assert!((found - value).abs() < 1e-9, "{name} is {found}, not {value}");
}

#[tokio::test]
async fn gauges_follow_the_record_and_counters_what_was_committed() {
    let scene = Scene::new().await;
    let empty = numbers(&scene).await;
    is(&empty, "kiln_oldest_pending_timestamp_seconds", 0.0);
    is(&empty, "kiln_outbox_oldest_timestamp_seconds", 0.0);
    is(&empty, "kiln_state_transitions_total{from=\"PENDING\",to=\"BUILDING\"}", 0.0);

    for _ in 0..3 {
        scene.build().await;
    }
    let (dead, retried) = (scene.claim().await, scene.claim().await);
    let busy = numbers(&scene).await;
    is(&busy, "kiln_builds{state=\"PENDING\"}", 1.0);
    is(&busy, "kiln_builds{state=\"BUILDING\"}", 2.0);
    // Seconds since 1970, not another unit.
    assert!((1.5e9..1e11).contains(&busy["kiln_oldest_pending_timestamp_seconds"]), "{busy:?}");
    assert!((1.5e9..1e11).contains(&busy["kiln_outbox_oldest_timestamp_seconds"]), "{busy:?}");
    assert!(busy["kiln_outbox_pending"] > 2.0, "nobody takes messages here: {busy:?}");

    scene.fail(&dead, 1, Reason::HookFault).await;
    scene.fail(&retried, 1, Reason::Network).await;
    let after = numbers(&scene).await;
    is(&after, "kiln_builds{state=\"PENDING\"}", 2.0);
    is(&after, "kiln_builds{state=\"BUILDING\"}", 0.0);
    is(&after, "kiln_dead_letters", 1.0);
    is(&after, "kiln_dead_lettered_total{reason=\"hook_fault\"}", 1.0);
    is(&after, "kiln_retries_total{reason=\"network\"}", 1.0);
    is(&after, "kiln_retries_total{reason=\"hook_fault\"}", 0.0);
    is(&after, "kiln_state_transitions_total{from=\"BUILDING\",to=\"DEAD_LETTER\"}", 1.0);
    is(&after, "kiln_state_transitions_total{from=\"PENDING\",to=\"BUILDING\"}", 2.0);
    is(&after, "kiln_build_queue_duration_seconds_count", 2.0);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_gives_no_number() {
    let scene = Scene::new().await;
    scene.build().await;
    assert!(!numbers(&scene).await.is_empty());
    scene.orchestrator.store().close().await;
    let answer = ask(&scene, Method::GET, None).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    let text = answer.text().await.unwrap();
    assert_eq!(text, "the record cannot be read now; the server's own log says why\n");
}

#[tokio::test]
async fn the_port_of_the_metrics_has_nothing_else_and_is_for_this_machine() {
    let scene = Scene::new().await;
    assert_eq!(ask(&scene, Method::GET, Some("evil.example")).await.status(), StatusCode::FORBIDDEN);
    assert_eq!(ask(&scene, Method::POST, None).await.status(), StatusCode::METHOD_NOT_ALLOWED);
    let api = scene.metrics.replace("/metrics", "/api/v1/builds");
    let client = Client::builder().no_proxy().build().unwrap();
    let other = client.get(api).bearer_auth(&scene.token).send().await.unwrap();
    assert_eq!(other.status(), StatusCode::NOT_FOUND);
    let refused = Listener::metrics("0.0.0.0:0".parse().unwrap()).await.unwrap_err();
    assert!(matches!(refused, ListenError::NotLoopback(_)), "{refused}");
}
