//! Streams: nothing is lost, nothing comes twice.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use futures_util::StreamExt as _;
use kiln_protocol::api::Code;
use kiln_protocol::result::Phase;
use kiln_protocol::{BuildId, Reason};
use reqwest::{Response, StatusCode};
use tokio::time::timeout;

use crate::scene::{PATIENCE, Scene, problem};

/// Reads the events of a stream.
struct Events {
    bytes: futures_util::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    text: String,
}

#[derive(Debug, Clone)]
struct Event {
    name: String,
    id: Option<String>,
    data: serde_json::Value,
}

impl Events {
    fn of(response: Response) -> Self {
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { bytes: response.bytes_stream().boxed(), text: String::new() }
    }

    /// The next event; none at the end.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.text = rest;
                if event.starts_with("event:") {
                    return Some(parse(&event));
                }
                continue;
            }
            let more = timeout(PATIENCE, self.bytes.next()).await.unwrap()?;
            self.text += std::str::from_utf8(&more.unwrap()).unwrap();
        }
    }

    async fn rest(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

fn parse(text: &str) -> Event {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    let data = serde_json::from_str(&field("data: ").unwrap()).unwrap();
    Event { name: field("event: ").unwrap(), id: field("id: "), data }
}

async fn open(scene: &Scene, path: &str, last: Option<&str>) -> Response {
    let mut request = scene.get(path);
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    request.send().await.unwrap()
}

fn states(events: &[Event]) -> Vec<(&str, &str)> {
    events.iter().map(|e| (e.name.as_str(), e.data["state"].as_str().unwrap())).collect()
}

fn text(events: &[Event]) -> String {
    events.iter().filter(|e| e.name == "log").map(|e| e.data["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn changes_come_as_they_happen_and_end_with_the_build() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    let mut events = Events::of(open(&scene, &format!("/builds/{id}/events"), None).await);
    assert_eq!(events.next().await.unwrap().data["state"], "PENDING");
    let grant = scene.claim().await;
    assert_eq!(events.next().await.unwrap().data["state"], "BUILDING");
    scene.phase(&grant, 1, Phase::Build).await;
    assert_eq!(events.next().await.unwrap().data["phase"], "build");
    scene.fail(&grant, 2, Reason::BuildFailed).await;
    assert_eq!(states(&events.rest().await), [("status", "FAILED"), ("end", "FAILED")]);
}

/// Cut after every number of events: what comes with `Last-Event-ID` is exactly the rest.
#[tokio::test]
async fn a_stream_that_was_cut_goes_on_where_it_was() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    let grant = scene.claim().await;
    for (seq, phase) in [Phase::Plan, Phase::Fetch, Phase::Build, Phase::Seal].into_iter().enumerate() {
        scene.phase(&grant, seq as u64 + 1, phase).await;
    }
    scene.fail(&grant, 9, Reason::BuildFailed).await;
    let path = format!("/builds/{id}/events");
    let all = Events::of(open(&scene, &path, None).await).rest().await;
    assert_eq!(all.len(), 8);
    for cut in 0..all.len() - 2 {
        let last = all[cut].id.as_deref();
        let rest = Events::of(open(&scene, &path, last).await).rest().await;
        let ids: Vec<_> = rest.iter().map(|event| event.id.clone()).collect();
        let expected: Vec<_> = all[cut + 1..].iter().map(|event| event.id.clone()).collect();
        assert_eq!(ids, expected);
    }
    let last = all[all.len() - 2].id.as_deref();
    assert_eq!(open(&scene, &path, last).await.status(), StatusCode::NO_CONTENT, "a browser stays away");
    assert!(problem(open(&scene, &path, Some("x")).await).await.is(Code::BadRequest));
}

#[tokio::test]
async fn a_stream_survives_the_server() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    let path = format!("/builds/{id}/events");
    let mut before = Events::of(open(&scene, &path, None).await);
    let first = before.next().await.unwrap();
    let folder = scene.stop().await;
    assert!(before.rest().await.is_empty(), "a server that stops cuts its streams, without an end");
    let scene = Scene::within(folder).await;
    scene.orchestrator.cancel(id, Reason::Cancelled, "test").await.unwrap();
    let after = Events::of(open(&scene, &path, first.id.as_deref()).await).rest().await;
    assert_eq!(states(&after), [("status", "CANCELLED"), ("end", "CANCELLED")]);
}

#[tokio::test]
async fn a_log_is_followed_through_every_attempt() {
    let scene = Scene::new().await;
    let id = scene.build().await;
    let mut events = Events::of(open(&scene, &format!("/builds/{id}/log/follow"), None).await);
    let grant = scene.claim().await;
    scene.print(id, 1, "one\ntwo\nhal");
    let first = events.next().await.unwrap();
    assert_eq!(
        (first.id.as_deref(), text(std::slice::from_ref(&first)).as_str()),
        (Some("1-8"), "one\ntwo\n")
    );
    scene.print(id, 1, "f\nlast words");
    assert_eq!(events.next().await.unwrap().data["text"], "half\n");
    scene.fail(&grant, 1, Reason::AgentDrain).await;
    let rest = events.next().await.unwrap();
    assert_eq!((rest.id.as_deref(), &rest.data["text"]), (Some("1-23"), &"last words".into()));
    scene.print(id, 2, "again\n");
    let second = events.next().await.unwrap();
    assert_eq!((second.id.as_deref(), &second.data["attempt"]), (Some("2-6"), &2.into()));
    scene.orchestrator.cancel(id, Reason::Cancelled, "test").await.unwrap();
    assert_eq!(states(&events.rest().await), [("end", "CANCELLED")]);
}

async fn with_log(scene: &Scene, log: &str) -> BuildId {
    let id = scene.build().await;
    let grant = scene.claim().await;
    scene.print(id, 1, log);
    scene.fail(&grant, 1, Reason::BuildFailed).await;
    id
}

#[tokio::test]
async fn a_log_goes_on_at_every_byte_without_loss_or_repetition() {
    let scene = Scene::new().await;
    let lines: Vec<_> = (0..20_000).map(|n| format!("line {n} ä\n")).collect();
    let log = lines.concat();
    let id = with_log(&scene, &log).await;
    let path = format!("/builds/{id}/log/follow");
    let all = Events::of(open(&scene, &path, None).await).rest().await;
    assert_eq!(text(&all), log);
    assert!(all.len() > 3, "it comes in parts");
    for cut in &all[..all.len() - 1] {
        let last = cut.id.as_deref().unwrap();
        let behind: usize = last.strip_prefix("1-").unwrap().parse().unwrap();
        let answer = open(&scene, &path, Some(last)).await;
        if behind == log.len() {
            assert_eq!(answer.status(), StatusCode::NO_CONTENT);
        } else {
            assert_eq!(text(&Events::of(answer).rest().await), log[behind..]);
        }
    }
    let read = |offset: usize| scene.get(&format!("/builds/{id}/log?attempt=1&offset={offset}")).send();
    let whole = read(0).await.unwrap();
    assert_eq!(whole.headers()["kiln-log-attempt"], "1");
    assert_eq!(whole.text().await.unwrap(), log);
    assert_eq!(read(log.len() - 9).await.unwrap().text().await.unwrap(), log[log.len() - 9..]);
    assert!(problem(read(log.len() + 1).await.unwrap()).await.is(Code::BadRequest));
    let missing = scene.get(&format!("/builds/{id}/log?attempt=7")).send().await.unwrap();
    assert!(problem(missing).await.is(Code::LogMissing));
}

#[tokio::test]
async fn a_log_that_was_cut_off_shows_a_gap() {
    let scene = Scene::new().await;
    let id = with_log(&scene, "short\n").await;
    let path = format!("/builds/{id}/log/follow");
    let events = Events::of(open(&scene, &path, Some("1-100")).await).rest().await;
    let names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(names, ["gap", "end"]);
    assert_eq!((&events[0].data["from"], &events[0].data["to"]), (&6.into(), &100.into()));
}

/// Clients that open a long log and never read it.
#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_hold_nobody_up() {
    let scene = Scene::new().await;
    let log = "x".repeat(99) + "\n";
    let id = with_log(&scene, &log.repeat(100_000)).await;
    let slow: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = UnixStream::connect(scene.socket()).unwrap();
            write!(stream, "GET /api/v1/builds/{id}/log/follow HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
            let mut first = [0; 12];
            stream.read_exact(&mut first).unwrap();
            assert_eq!(&first, b"HTTP/1.1 200");
            stream
        })
        .collect();
    let all = Events::of(open(&scene, &format!("/builds/{id}/log/follow"), None).await).rest().await;
    assert_eq!(text(&all).len(), 10_000_000);
    scene.build().await;
    drop(slow);
    scene.stop().await;
}
