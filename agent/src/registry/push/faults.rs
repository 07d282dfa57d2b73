//! Pushes through a front that disturbs a real registry.

use std::sync::Mutex;
use std::time::Instant;

use kiln_protocol::Reason;

use super::testing::{Front, LAYER_BYTES, Stock, first, insecure, limits, push, registry, silent, text};
use super::*;
use crate::blobs::digest_of;
use crate::registry::stub::{Reply, Seen, Stub};
use crate::registry::{Credentials, Limits, MirrorSection, ProxyConfig, RegistryConfig, RegistrySection};

const LONG: Duration = Duration::from_secs(20);

fn is_post(seen: &Seen) -> bool {
    seen.method == "POST" && seen.path.contains("/blobs/uploads/")
}

fn is_blob(seen: &Seen) -> bool {
    seen.method == "PUT" && seen.path.contains("/blobs/uploads/")
}

fn is_manifest(seen: &Seen) -> bool {
    seen.method == "PUT" && seen.path.contains("/manifests/")
}

async fn upload(front: &Front, stock: &Stock, letters: &[u8]) -> Result<Uploaded, PushError> {
    let registry = registry(&front.host(), None, limits());
    let candidate = stock.candidate(letters);
    let push = push(&registry, &front.host(), "team/app");
    let uploaded = push.upload_candidate(&candidate, &stock.store, &silent()).await?;
    assert_eq!(push.verify_candidate(&candidate).await.unwrap(), []);
    Ok(uploaded)
}

#[tokio::test]
async fn errors_500_and_broken_connections_pass() {
    let (posts, blobs, manifests) = (first(2), first(1), first(2));
    let front = Front::start(move |seen, _| match seen {
        seen if is_post(seen) && posts() => Some(Reply::new(500, "")),
        seen if is_blob(seen) && blobs() => Some(Reply::new(502, "<html>")),
        seen if is_manifest(seen) && manifests() => Some(Reply::new(503, "").cut_at(0)),
        _ => None,
    })
    .await;
    assert_eq!(upload(&front, &Stock::new(), b"a").await.unwrap().sent, 2);
}

#[tokio::test]
async fn a_rate_limit_is_waited_for() {
    let times = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&times);
    let front = Front::start(move |seen, _| {
        if !is_manifest(seen) {
            return None;
        }
        let mut noted = noted.lock().unwrap();
        noted.push(Instant::now());
        (noted.len() == 1).then(|| Reply::new(429, "").header("Retry-After", "1"))
    })
    .await;
    upload(&front, &Stock::new(), b"a").await.unwrap();
    let times = times.lock().unwrap();
    assert_eq!(times.len(), 2);
    assert!(times[1] - times[0] >= Duration::from_secs(1), "{times:?}");
}

#[tokio::test]
async fn a_registry_that_hangs_is_asked_again_until_the_time_is_over() {
    let short = Limits { idle: Duration::from_millis(300), ..limits() };
    let once = first(1);
    let front = Front::start(move |seen, _| (is_post(seen) && once()).then(Reply::silence)).await;
    let again = registry(&front.host(), None, short.clone());
    push(&again, &front.host(), "team/app").probe(None).await.unwrap();

    let mute = Front::start(|seen, _| is_post(seen).then(Reply::silence)).await;
    let registry = registry(&mute.host(), None, short);
    let name = format!("{}/team/app", mute.host()).parse().unwrap();
    let start = Instant::now();
    let push = registry.push(&name, &[], Duration::from_secs(2)).unwrap();
    let error = push.probe(None).await.unwrap_err();
    assert_eq!((error.kind, error.reason), (Kind::Transient, Reason::Network), "{error:?}");
    assert!(start.elapsed() < LONG);
    assert!(mute.count("POST", "uploads") > 1);
    assert!(error.hint.unwrap().contains(&mute.host()));
}

#[tokio::test]
async fn a_registry_that_stops_reading_a_blob_is_noticed_and_a_slow_one_is_not() {
    let short = Limits { idle: Duration::from_millis(300), store: Duration::from_millis(300), ..limits() };
    let stock = Stock::new();
    let candidate = stock.candidate(b"a");
    let (once, store) = (first(1), &stock.store);
    let front = Front::start(move |seen, _| (is_blob(seen) && once()).then(Reply::silence)).await;
    let registry = registry(&front.host(), None, short);
    let push = push(&registry, &front.host(), "team/app");
    let uploaded = push.upload_candidate(&candidate, store, &silent()).await.unwrap();
    assert_eq!(uploaded.sent, 2);
    assert_eq!(front.count("PUT", "uploads"), 3, "one blob was sent twice");
}

#[tokio::test]
async fn a_blob_that_is_cut_starts_again() {
    let once = first(1);
    let large = |seen: &Seen| seen.header("content-length").is_some_and(|l| l == LAYER_BYTES.to_string());
    let gate = move |seen: &Seen| (is_blob(seen) && large(seen) && once()).then_some(LAYER_BYTES / 4);
    let front = Front::gated(gate, |_, _| None).await;
    let stock = Stock::new();
    let candidate = stock.candidate(b"a");
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&steps);
    let sent: Sent = Arc::new(move |blob: &Blob, sent| seen.lock().unwrap().push((blob.size, sent)));
    let registry = registry(&front.host(), None, limits());
    let push = push(&registry, &front.host(), "team/app");
    let uploaded = push.upload_candidate(&candidate, &stock.store, &sent).await.unwrap();
    assert_eq!((uploaded.sent, uploaded.bytes), (2, candidate.blobs.iter().map(|b| b.size).sum()));
    assert_eq!(push.verify_candidate(&candidate).await.unwrap(), []);
    let steps = steps.lock().unwrap();
    let starts = steps.iter().filter(|(size, sent)| *size == LAYER_BYTES as u64 && *sent == 256 * 1024);
    assert_eq!(starts.count(), 2, "{steps:?}");
    assert_eq!(front.count("POST", "uploads"), 3, "a session of its own for each try");
}

#[tokio::test]
async fn a_session_that_is_lost_is_opened_again_a_few_times() {
    let lost = || Reply::new(404, r#"{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN","message":"gone"}]}"#);
    let once = first(1);
    let front = Front::start(move |seen, _| (is_blob(seen) && once()).then(lost)).await;
    upload(&front, &Stock::new(), b"").await.unwrap();
    let front = Front::start(move |seen, _| is_blob(seen).then(lost)).await;
    let error = upload(&front, &Stock::new(), b"").await.unwrap_err();
    assert_eq!(front.count("PUT", "uploads"), 4);
    assert_eq!((error.kind, error.code.as_deref()), (Kind::NotFound, Some("BLOB_UPLOAD_UNKNOWN")));
}

#[tokio::test]
async fn another_digest_is_never_taken() {
    let other = digest_of(b"other");
    let lie = |is: fn(&Seen) -> bool| {
        let other = other.clone();
        move |seen: &Seen, _: usize| {
            is(seen).then(|| Reply::new(201, "").header("Docker-Content-Digest", other.as_str()))
        }
    };
    for is in [is_blob, is_manifest] {
        let front = Front::start(lie(is)).await;
        let error = upload(&front, &Stock::new(), b"").await.unwrap_err();
        assert_eq!((error.kind, error.reason), (Kind::OtherDigest, Reason::CandidateCorrupt), "{error:?}");
        assert!(text(&error).contains(&format!("the registry answered another digest: {other}")));
    }
    let stock = Stock::new();
    let candidate = stock.candidate(b"");
    let front = Front::start(lie(|seen| seen.path.ends_with("/manifests/1"))).await;
    let registry = registry(&front.host(), None, limits());
    let push = push(&registry, &front.host(), "team/app");
    push.upload_candidate(&candidate, &stock.store, &silent()).await.unwrap();
    let error = push.put_tag("1", candidate.manifest.as_bytes(), &candidate.media_type).await.unwrap_err();
    assert_eq!((error.kind, error.tag.as_deref()), (Kind::OtherDigest, Some("1")));
}

#[tokio::test]
async fn a_registry_that_names_no_digest_is_asked_for_it() {
    let stock = Stock::new();
    let candidate = stock.candidate(b"");
    let bytes = candidate.manifest.clone();
    let stub = Stub::start(move |seen, _| match seen.method.as_str() {
        "PUT" => Reply::new(201, ""),
        "HEAD" => Reply::new(405, ""),
        _ if seen.path.ends_with("/2") => Reply::new(200, "other bytes"),
        _ => Reply::new(200, bytes.clone()),
    })
    .await;
    let registry = registry(&stub.host(), None, limits());
    let push = push(&registry, &stub.host(), "team/app");
    let manifest = candidate.manifest.as_bytes();
    assert_eq!(push.put_tag("1", manifest, &candidate.media_type).await.unwrap(), TagOutcome::Moved);
    let error = push.put_tag("2", manifest, &candidate.media_type).await.unwrap_err();
    assert_eq!(error.kind, Kind::OtherDigest);
}

#[tokio::test]
async fn a_tag_is_sent_once() {
    let stock = Stock::new();
    let candidate = stock.candidate(b"");
    for (status, kind) in [(500, Kind::Transient), (408, Kind::Transient), (425, Kind::Transient)] {
        let stub = Stub::start(move |_, _| Reply::new(status, "")).await;
        let registry = registry(&stub.host(), None, limits());
        let push = push(&registry, &stub.host(), "team/app");
        let put = push.put_tag("1", candidate.manifest.as_bytes(), &candidate.media_type).await;
        let error = put.unwrap_err();
        assert_eq!((error.kind, error.status), (kind, Some(status)));
        assert_eq!(stub.seen().len(), 1);
        assert_eq!(error.reason, Reason::RegistryUnavailable);
    }
    for status in [400, 401, 403, 404, 405, 409, 412, 413] {
        let stub = Stub::start(move |_, _| Reply::new(status, "")).await;
        let registry = registry(&stub.host(), None, limits());
        let push = push(&registry, &stub.host(), "team/app");
        let put = push.put_tag("1", candidate.manifest.as_bytes(), &candidate.media_type).await;
        let TagOutcome::Refused(error) = put.unwrap() else { panic!("{status} is a refusal") };
        assert_eq!((error.status, stub.seen().len()), (Some(status), 1));
    }
}

#[tokio::test]
async fn blobs_that_are_lost_or_damaged_never_arrive() {
    let front = Front::start(|_, _| None).await;
    let stock = Stock::new();
    let candidate = stock.candidate(b"a");
    let layer = &candidate.blobs[0];
    let path = stock.store.path(&layer.digest);
    let registry = registry(&front.host(), None, limits());
    let push = push(&registry, &front.host(), "team/app");
    std::fs::remove_file(&path).unwrap();
    for (contents, words) in [
        (None, "cannot open"),
        (Some(vec![b'b'; LAYER_BYTES]), "has digest"),
        (Some(vec![b'a'; LAYER_BYTES - 1]), "its descriptor says"),
        (Some(vec![]), "its descriptor says"),
    ] {
        if let Some(contents) = &contents {
            std::fs::write(&path, contents).unwrap();
        }
        let error = push.upload_candidate(&candidate, &stock.store, &silent()).await.unwrap_err();
        assert_eq!((error.kind, error.reason), (Kind::Candidate, Reason::CandidateCorrupt), "{error:?}");
        assert!(text(&error).contains(words), "{error}");
    }
    let missing = push.verify_candidate(&candidate).await.unwrap();
    assert!(missing.contains(&layer.digest) && missing.contains(&candidate.digest));
}

#[tokio::test]
async fn uploads_go_where_the_registry_says_without_its_credential() {
    let storage =
        Stub::start(|seen, _| Reply::new(if seen.path.contains("signature") { 201 } else { 400 }, "")).await;
    let address = format!("http://{}/bucket?signature=x", storage.host());
    let stub = Stub::start(move |seen, _| match seen.header("authorization") {
        None => Reply::new(401, "").header("WWW-Authenticate", "Basic"),
        Some(_) if is_post(seen) => Reply::new(202, "").header("Location", &address),
        Some(_) if is_manifest(seen) => {
            Reply::new(201, "").header("Docker-Content-Digest", digest_of(seen.body.as_bytes()).as_str())
        }
        Some(_) => Reply::new(404, ""),
    })
    .await;
    let stock = Stock::new();
    let candidate = stock.candidate(b"");
    let registry = registry(&stub.host(), Some(super::testing::robot()), limits());
    let push = push(&registry, &stub.host(), "team/app");
    push.upload_candidate(&candidate, &stock.store, &silent()).await.unwrap();
    let stored = storage.seen();
    assert_eq!(stored.len(), 1);
    assert!(stored[0].path.ends_with(&format!("&digest=sha256%3A{}", candidate.blobs[0].digest.hex())));
    assert_eq!(stored[0].header("authorization"), None);
}

#[tokio::test]
async fn mirrors_get_nothing_and_blocked_registries_neither() {
    let mirror = Stub::start(|_, _| Reply::new(500, "")).await;
    let front = Front::start(|_, _| None).await;
    let host = front.host();
    let section = RegistrySection {
        mirror: vec![MirrorSection { location: mirror.host(), insecure: true, ca: None }],
        ..insecure(&host)
    };
    let with = |section: RegistrySection| {
        let config = RegistryConfig::new(vec![section]).unwrap();
        Registry::new(config, Credentials::default(), ProxyConfig::default(), vec![]).with_limits(limits())
    };
    push(&with(section.clone()), &host, "team/app").probe(Some("1")).await.unwrap();
    assert!(mirror.seen().is_empty());
    let blocked = with(RegistrySection { blocked: true, ..section });
    let name = format!("{host}/team/app").parse().unwrap();
    let error = blocked.push(&name, &[], DEFAULT_BUDGET).unwrap_err();
    assert_eq!((error.kind, error.reason), (Kind::Setup, Reason::BadRequest));
    assert!(error.to_string().contains("blocked = true"), "{error}");
}

#[test]
fn futures_can_move_between_threads() {
    fn check<T: Send>(_: T) {}
    let stock = Stock::new();
    let candidate = stock.candidate(b"");
    let registry = registry("localhost:1", None, limits());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _within = runtime.enter();
    let push = push(&registry, "localhost:1", "team/app");
    check(push.upload_candidate(&candidate, &stock.store, &silent()));
    check(push.verify_candidate(&candidate));
    check(push.probe(None));
    check(push.put_tag("1", b"", "x"));
}
