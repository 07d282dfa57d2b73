//! Pulls from registries that misbehave.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_protocol::Reason;
use serde_json::{Value, json};

use super::stub::{Reply, Seen, Stub};
use super::*;
use crate::blobs::{BlobStore, digest_of};

const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Longer than a batch, so that a transfer has several steps.
const LAYER_LENGTH: usize = 2_500_000;
const PASSWORD: &str = "hunter2-canary";
const DEADLINE: Duration = Duration::from_secs(20);

/// An image as a registry serves it.
#[derive(Clone)]
struct Image {
    manifest: Vec<u8>,
    config: Vec<u8>,
    layers: Vec<Vec<u8>>,
}

impl Image {
    fn new() -> Self {
        let layers: Vec<Vec<u8>> =
            (1..=4_u8).map(|seed| vec![seed; LAYER_LENGTH / usize::from(seed)]).collect();
        let config = br#"{"architecture":"amd64","os":"linux"}"#.to_vec();
        let describe = |media_type: &str, bytes: &[u8]| json!({"mediaType": media_type, "digest": digest_of(bytes), "size": bytes.len()});
        let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": describe("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers.iter().map(|bytes| describe(layer, bytes)).collect::<Vec<_>>(),
        });
        // Spaces that no serialiser writes: the raw bytes count.
        let manifest = manifest.to_string().replace(',', " ,\n ").into_bytes();
        Self { manifest, config, layers }
    }

    fn index(&self) -> Vec<u8> {
        let entry = |platform: Value, digest: Value| json!({"mediaType": OCI_MANIFEST, "size": 1, "digest": digest, "platform": platform});
        let other = json!(digest_of(b"other"));
        let index = json!({"schemaVersion": 2, "mediaType": DOCKER_INDEX, "manifests": [
            entry(json!({"os": "unknown", "architecture": "unknown"}), other.clone()),
            entry(json!({"os": "linux", "architecture": "arm64", "variant": "v8"}), other),
            entry(json!({"os": "linux", "architecture": "amd64"}), json!(digest_of(&self.manifest))),
        ]});
        index.to_string().into_bytes()
    }

    /// Tag `1` is the image, tag `index` the index.
    fn serve(&self, seen: &Seen) -> Reply {
        // A proxy gets the whole address.
        let path = seen.path.split_once("/v2/base/app/").unwrap_or_default().1;
        let index = self.index();
        let by_digest = [&self.manifest, &self.config, &index].into_iter().chain(&self.layers);
        let found = match path.split_once('/') {
            Some(("manifests", "1")) => Some(&self.manifest),
            Some(("manifests", "index")) => Some(&index),
            Some(("manifests" | "blobs", digest)) => {
                by_digest.into_iter().find(|bytes| digest_of(bytes).as_str() == digest)
            }
            _ => None,
        };
        match found {
            Some(bytes) => {
                Reply::new(200, bytes.clone()).header("Docker-Content-Digest", digest_of(bytes).as_str())
            }
            None => not_found(),
        }
    }

    fn layer_path(&self, index: usize) -> String {
        format!("/v2/base/app/blobs/{}", digest_of(&self.layers[index]))
    }
}

fn not_found() -> Reply {
    Reply::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"m"}]}"#)
}

fn limits() -> Limits {
    Limits {
        connect: Duration::from_secs(5),
        idle: DEADLINE,
        pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(1500),
        ..Limits::default()
    }
}

/// Anything that a test needs to pull from stubs.
struct Puller {
    registry: Registry,
    reference: Reference,
    store: BlobStore,
    _root: tempfile::TempDir,
}

impl Puller {
    fn new(host: &str, tag: &str) -> Self {
        Self::with(host, tag, vec![insecure(host)], Credentials::default(), limits())
    }

    fn logged_in(host: &str, credential: Credential) -> Self {
        let mut credentials = Credentials::default();
        credentials.insert(host, credential);
        Self::with(host, "1", vec![insecure(host)], credentials, limits())
    }

    fn with(
        host: &str,
        tag: &str,
        sections: Vec<RegistrySection>,
        credentials: Credentials,
        limits: Limits,
    ) -> Self {
        let root = tempfile::tempdir().unwrap();
        let config = RegistryConfig::new(sections).unwrap();
        let registry = Registry::new(config, credentials, ProxyConfig::default(), vec![]).with_limits(limits);
        Self {
            registry,
            reference: format!("{host}/base/app:{tag}").parse().unwrap(),
            store: BlobStore::open(root.path()).unwrap(),
            _root: root,
        }
    }

    async fn resolve(&self) -> Result<ResolvedImage, RegistryError> {
        let platform = "linux/amd64".parse().unwrap();
        self.registry.resolve(&self.reference, &platform, &self.store).await
    }

    async fn pull(&self) -> Result<ResolvedImage, RegistryError> {
        let image = self.resolve().await?;
        self.registry.fetch(&image, &self.store, &|_, _| ()).await?;
        Ok(image)
    }

    fn assert_complete(&self, image: &Image) {
        for bytes in image.layers.iter().chain([&image.config, &image.manifest]) {
            let digest = digest_of(bytes);
            assert_eq!(&self.store.read_verified(&digest, u64::MAX).unwrap().unwrap(), bytes);
        }
    }

    fn has_unfinished(&self) -> bool {
        self.files().iter().any(|name| name.starts_with('.'))
    }

    fn files(&self) -> Vec<String> {
        let directory = self.store.path(&digest_of(b""));
        let entries = std::fs::read_dir(directory.parent().unwrap()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn insecure(host: &str) -> RegistrySection {
    RegistrySection { prefix: host.to_owned(), insecure: true, ..RegistrySection::default() }
}

fn password() -> Credential {
    Credential::Password { username: "user".into(), password: PASSWORD.into() }
}

/// A stub that serves an image, except for what `odd` answers.
async fn stub(odd: impl Fn(&Seen, usize) -> Option<Reply> + Send + Sync + 'static) -> (Stub, Image) {
    let image = Image::new();
    let served = image.clone();
    (Stub::start(move |seen, before| odd(seen, before).unwrap_or_else(|| served.serve(seen))).await, image)
}

fn text(error: &RegistryError) -> String {
    format!("{} {:?} {:?}", crate::error::chain(error), error, error.hint())
}

#[tokio::test]
async fn an_image_arrives_whole_and_raw_and_only_once() {
    let (stub, image) = stub(|_, _| None).await;
    let puller = Puller::new(&stub.host(), "1");
    let resolved = puller.resolve().await.unwrap();
    assert_eq!(resolved.manifest, image.manifest);
    assert_eq!(resolved.manifest_digest, digest_of(&image.manifest));
    assert_eq!((resolved.media_type.as_str(), resolved.index_digest.as_ref()), (OCI_MANIFEST, None));
    let steps = AtomicUsize::new(0);
    let progress = |blob: &Descriptor, received: u64| {
        assert!(received <= blob.size);
        steps.fetch_add(1, Ordering::Relaxed);
    };
    puller.registry.fetch(&resolved, &puller.store, &progress).await.unwrap();
    puller.assert_complete(&image);
    // Five blobs, of which two are longer than a batch.
    assert!(steps.load(Ordering::Relaxed) >= 7, "{steps:?}");
    let before = stub.seen().len();
    assert_eq!(puller.pull().await.unwrap().manifest, image.manifest);
    assert_eq!(stub.paths()[before..], ["HEAD /v2/base/app/manifests/1"]);
}

#[tokio::test]
async fn an_index_leads_to_the_manifest_of_the_platform() {
    let (stub, image) = stub(|_, _| None).await;
    let puller = Puller::new(&stub.host(), "index");
    let resolved = puller.pull().await.unwrap();
    assert_eq!(resolved.index_digest, Some(digest_of(&image.index())));
    assert_eq!(resolved.manifest_digest, digest_of(&image.manifest));
    puller.assert_complete(&image);
    let before = stub.seen().len();
    puller.pull().await.unwrap();
    assert_eq!(stub.paths()[before..], ["HEAD /v2/base/app/manifests/index"]);
    let s390x = "linux/s390x".parse().unwrap();
    let error = puller.registry.resolve(&puller.reference, &s390x, &puller.store).await.unwrap_err();
    assert_eq!(error.reason(), Reason::BadRequest);
    assert!(text(&error).contains("only linux/arm64/v8, linux/amd64"), "{}", text(&error));
}

#[tokio::test]
async fn a_reference_with_a_digest_is_held_to_it() {
    let (honest, image) = stub(|_, _| None).await;
    let mut puller = Puller::new(&honest.host(), "1");
    let name = format!("{}/base/app:ignored@{}", honest.host(), digest_of(&image.manifest));
    puller.reference = name.parse().unwrap();
    puller.pull().await.unwrap();
    assert_eq!(honest.paths()[0], format!("GET /v2/base/app/manifests/{}", digest_of(&image.manifest)));
    let before = honest.seen().len();
    puller.pull().await.unwrap();
    assert_eq!(honest.seen()[before..].len(), 1);

    let (liar, _) =
        stub(|seen, _| seen.path.contains("sha256").then(|| Reply::new(200, Image::new().index()))).await;
    let mut puller = Puller::new(&liar.host(), "1");
    puller.reference = format!("{}/base/app@{}", liar.host(), digest_of(&image.manifest)).parse().unwrap();
    let error = puller.resolve().await.unwrap_err();
    assert!(matches!(*error.cause, Cause::Mismatch { .. }), "{error:?}");
    assert_eq!(error.reason(), Reason::RegistryUnavailable);
}

/// Answers like a registry with a token service of its own; tokens count up.
fn with_tokens(seen: &Seen, valid: &str, host: &str, issued: &AtomicUsize) -> Option<Reply> {
    if seen.path.starts_with("/token") {
        let number = issued.fetch_add(1, Ordering::SeqCst);
        return Some(Reply::new(200, format!(r#"{{"token":"token-{number}","expires_in":1}}"#)));
    }
    let challenge =
        format!(r#"Bearer realm="http://{host}/token",service="the service",scope="repository:other:push""#);
    let refused =
        Reply::new(401, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#).header("WWW-Authenticate", &challenge);
    (seen.header("authorization") != Some(valid)).then_some(refused)
}

#[tokio::test]
async fn a_token_is_asked_for_once_and_again_when_it_ends() {
    let image = Image::new();
    let (issued, served) = (AtomicUsize::new(0), image.clone());
    let stub = Stub::start(move |seen, _| {
        // The first token ends as soon as the manifest is known.
        let valid = if seen.path.contains("/blobs/") { "Bearer token-1" } else { "Bearer token-0" };
        let host = seen.header("host").unwrap().to_owned();
        with_tokens(seen, valid, &host, &issued).unwrap_or_else(|| served.serve(seen))
    })
    .await;
    let puller = Puller::logged_in(&stub.host(), password());
    puller.pull().await.unwrap();
    puller.assert_complete(&image);
    let tokens: Vec<_> = stub.seen().into_iter().filter(|seen| seen.path.starts_with("/token")).collect();
    assert_eq!(tokens.len(), 2);
    let expected = "/token?account=user&service=the+service&scope=repository%3Abase%2Fapp%3Apull";
    assert_eq!(tokens[0].path, expected);
    let basic = format!("Basic {}", STANDARD.encode(format!("user:{PASSWORD}")));
    assert_eq!(tokens[0].header("authorization"), Some(basic.as_str()));
}

#[tokio::test]
async fn an_identity_token_is_posted() {
    let (issued, image) = (AtomicUsize::new(0), Image::new());
    let stub = Stub::start(move |seen, _| {
        let host = seen.header("host").unwrap().to_owned();
        with_tokens(seen, "Bearer token-0", &host, &issued).unwrap_or_else(|| image.serve(seen))
    })
    .await;
    let puller = Puller::logged_in(&stub.host(), Credential::IdentityToken("a+b&c".into()));
    puller.resolve().await.unwrap();
    let token = stub.seen().into_iter().find(|seen| seen.path.starts_with("/token")).unwrap();
    assert_eq!((token.method.as_str(), token.path.as_str()), ("POST", "/token"));
    assert!(token.body.starts_with("grant_type=refresh_token&client_id=kiln&refresh_token=a%2Bb%26c&"));
    assert_eq!(token.header("authorization"), None);
}

#[tokio::test]
async fn a_refused_credential_is_tried_once_and_not_printed() {
    let (stub, _) = stub(|seen, _| {
        let host = seen.header("host")?.to_owned();
        if seen.path.starts_with("/token") {
            return Some(Reply::new(401, format!(r#"{{"errors":[{{"code":"{PASSWORD}"}}]}}"#)));
        }
        Some(
            Reply::new(401, "")
                .header("WWW-Authenticate", &format!(r#"Bearer realm="http://{host}/token?x={PASSWORD}""#)),
        )
    })
    .await;
    let error = Puller::logged_in(&stub.host(), password()).resolve().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Unauthorized);
    assert_eq!(stub.paths().len(), 2);
    assert!(!text(&error).contains(PASSWORD), "{}", text(&error));
    assert!(error.hint().unwrap().contains("is refused"));
}

#[tokio::test]
async fn basic_authentication_is_answered_with_a_password_only() {
    let (stub, image) = stub(|seen, _| {
        let refused = Reply::new(401, "").header("WWW-Authenticate", r#"Basic realm="r""#);
        seen.header("authorization").is_none().then_some(refused)
    })
    .await;
    let puller = Puller::logged_in(&stub.host(), password());
    puller.pull().await.unwrap();
    puller.assert_complete(&image);
    let before = stub.seen().len();
    let error = Puller::new(&stub.host(), "1").resolve().await.unwrap_err();
    assert!(matches!(*error.cause, Cause::Unauthorized { credential: false, .. }), "{error:?}");
    assert_eq!(stub.seen().len() - before, 1);
    let error = Puller::logged_in(&stub.host(), Credential::IdentityToken("t".into())).resolve().await;
    assert_eq!(error.unwrap_err().reason(), Reason::Unauthorized);
}

#[tokio::test]
async fn errors_500_pass_and_end_after_three_repetitions() {
    let (recovering, image) = stub(|_, before| (before < 2).then(|| Reply::new(500, "oops"))).await;
    let puller = Puller::new(&recovering.host(), "1");
    puller.pull().await.unwrap();
    puller.assert_complete(&image);
    let (broken, _) = stub(|_, _| Some(Reply::new(503, r#"{"errors":[{"code":"UNAVAILABLE"}]}"#))).await;
    let error = Puller::new(&broken.host(), "1").resolve().await.unwrap_err();
    assert_eq!(error.reason(), Reason::RegistryUnavailable);
    assert_eq!(broken.paths(), vec!["HEAD /v2/base/app/manifests/1"; 4]);
}

#[tokio::test]
async fn retry_after_is_waited_for_or_given_up() {
    let limited = |seconds: &'static str| {
        move |_: &Seen, before: usize| {
            (before == 0).then(|| Reply::new(429, "").header("Retry-After", seconds))
        }
    };
    let (polite, _) = stub(limited("1")).await;
    let start = Instant::now();
    Puller::new(&polite.host(), "1").resolve().await.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    let (long, _) = stub(limited("3600")).await;
    let error = Puller::new(&long.host(), "1").resolve().await.unwrap_err();
    assert!(matches!(*error.cause, Cause::Unavailable { status: 429, .. }), "{error:?}");
    assert_eq!(long.seen().len(), 1);
}

fn impatient(host: &str) -> Puller {
    let limits = Limits { idle: Duration::from_millis(300), ..limits() };
    Puller::with(host, "1", vec![insecure(host)], Credentials::default(), limits)
}

#[tokio::test]
async fn a_registry_that_hangs_is_cut_off() {
    for path in ["/manifests/", "/blobs/"] {
        let (silent, _) = stub(move |seen, _| seen.path.contains(path).then(Reply::silence)).await;
        let pull = impatient(&silent.host());
        let error = tokio::time::timeout(DEADLINE, pull.pull()).await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::Network, "{error:?}");
        assert!(text(&error).contains("took longer than 300ms"), "{}", text(&error));
    }
    let (stalling, image) = stub(stalls).await;
    let puller = impatient(&stalling.host());
    assert_eq!(puller.pull().await.unwrap_err().reason(), Reason::Network);
    assert!(!puller.store.has(&digest_of(&image.layers[0])));
    empties(&puller).await;
}

#[tokio::test]
async fn a_registry_that_trickles_meets_the_total_limit() {
    let (silent, _) = stub(|_, _| Some(Reply::silence())).await;
    let host = silent.host();
    let limits = Limits { resolve: Duration::from_millis(200), ..limits() };
    let puller = Puller::with(&host, "1", vec![insecure(&host)], Credentials::default(), limits);
    let error = puller.resolve().await.unwrap_err();
    assert!(text(&error).contains("resolving the image took longer"), "{}", text(&error));
}

/// Sends the first half of the lowest layer and then nothing.
fn stalls(seen: &Seen, _: usize) -> Option<Reply> {
    let image = Image::new();
    let half = || Reply::new(200, image.layers[0].clone()).stall_at(LAYER_LENGTH / 2);
    (seen.path == image.layer_path(0)).then(half)
}

/// Waits until no unfinished file is left.
async fn empties(puller: &Puller) {
    let start = Instant::now();
    while puller.has_unfinished() {
        assert!(start.elapsed() < DEADLINE, "{:?}", puller.files());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn cut_blobs_are_fetched_again_and_wrong_ones_are_not_kept() {
    let (cutting, image) = stub(|seen, before| {
        (seen.path.contains("/blobs/") && before < 2).then(|| Reply::new(200, vec![1; 37]).cut_at(20))
    })
    .await;
    let puller = Puller::new(&cutting.host(), "1");
    puller.pull().await.unwrap();
    puller.assert_complete(&image);

    let wrong = Image::new().layer_path(0);
    let (lying, image) =
        stub(move |seen, _| (seen.path == wrong).then(|| Reply::new(200, vec![9; LAYER_LENGTH]))).await;
    let puller = Puller::new(&lying.host(), "1");
    let error = puller.pull().await.unwrap_err();
    assert!(matches!(*error.cause, Cause::Mismatch { .. }), "{error:?}");
    assert_eq!(error.reason(), Reason::RegistryUnavailable);
    assert!(!puller.store.has(&digest_of(&image.layers[0])));
    assert!(!puller.store.has(&digest_of(&image.manifest)));
    empties(&puller).await;

    let layer = Image::new().layer_path(0);
    let longer = layer.clone();
    let (long, _) =
        stub(move |seen, _| (seen.path == longer).then(|| Reply::new(200, vec![1; LAYER_LENGTH * 2]))).await;
    let error = Puller::new(&long.host(), "1").pull().await.unwrap_err();
    let early = |actual: u64| actual < LAYER_LENGTH as u64 * 2;
    assert!(matches!(*error.cause, Cause::Length { actual, .. } if early(actual)), "{error:?}");
    assert_eq!(long.paths().iter().filter(|path| path.contains(&layer)).count(), 1);
}

#[tokio::test]
async fn a_damaged_blob_in_the_store_is_replaced() {
    let (stub, image) = stub(|_, _| None).await;
    let puller = Puller::new(&stub.host(), "1");
    puller.pull().await.unwrap();
    let path = puller.store.path(&digest_of(&image.layers[1]));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"short").unwrap();
    puller.pull().await.unwrap();
    puller.assert_complete(&image);
}

#[tokio::test]
async fn a_redirect_is_followed_without_the_credential() {
    let image = Image::new();
    let served = image.clone();
    let cdn = Stub::start(move |seen, _| {
        let digest = seen.path.split(['/', '?']).nth(2).unwrap_or_default().to_owned();
        let bytes =
            served.layers.iter().chain([&served.config]).find(|bytes| digest_of(bytes).hex() == digest);
        bytes.map_or_else(|| Reply::new(404, ""), |bytes| Reply::new(200, bytes.clone()))
    })
    .await;
    let target = cdn.host();
    let (stub, _) = stub(move |seen, _| {
        let refused = Reply::new(401, "").header("WWW-Authenticate", "Basic");
        if seen.header("authorization").is_none() {
            return Some(refused);
        }
        let digest = seen.path.rsplit_once("sha256:").filter(|_| seen.path.contains("/blobs/"))?.1;
        let location = format!("http://user:x@{target}/cdn/{digest}?signature={PASSWORD}");
        Some(Reply::new(307, "").header("Location", &location))
    })
    .await;
    let puller = Puller::logged_in(&stub.host(), password());
    puller.pull().await.unwrap();
    puller.assert_complete(&image);
    assert_eq!(cdn.seen().len(), 5);
    assert!(cdn.seen().iter().all(|seen| seen.header("authorization").is_none()));
    assert!(stub.seen().iter().any(|seen| seen.header("authorization").is_some()));
}

#[tokio::test]
async fn what_a_redirect_leads_to_is_not_the_registry() {
    let cdn = Stub::start(|_, _| Reply::new(403, "<Error>expired</Error>")).await;
    let target = format!("http://{}/x?signature={PASSWORD}", cdn.host());
    let (stub, _) = stub(move |seen, _| {
        seen.path.contains("/blobs/").then(|| Reply::new(302, "").header("Location", &target))
    })
    .await;
    let error = Puller::new(&stub.host(), "1").pull().await.unwrap_err();
    assert_eq!(error.reason(), Reason::RegistryUnavailable, "{error:?}");
    assert!(text(&error).contains(&format!("{} answered 403", cdn.host())), "{}", text(&error));
    assert!(!text(&error).contains(PASSWORD), "{}", text(&error));

    let closed = Stub::start(|_, _| Reply::new(200, "")).await.host();
    let (lost, _) = self::stub(move |_, _| {
        let target = format!("http://{closed}/x?signature={PASSWORD}");
        Some(Reply::new(302, "").header("Location", &target))
    })
    .await;
    let error = Puller::new(&lost.host(), "1").resolve().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Network);
    assert!(!text(&error).contains(PASSWORD), "{}", text(&error));

    let (looping, _) = self::stub(|seen, _| Some(Reply::new(302, "").header("Location", &seen.path))).await;
    let error = Puller::new(&looping.host(), "1").resolve().await.unwrap_err();
    assert!(matches!(*error.cause, Cause::Redirect(_)), "{error:?}");
    assert_eq!(looping.seen().len(), 6);
}

#[tokio::test]
async fn documents_that_are_no_image_have_their_reason() {
    let big = vec![b' '; usize::try_from(manifest::MANIFEST_LIMIT).unwrap() + 1];
    for (body, reason, words) in [
        (br#"{"schemaVersion":1,"name":"x"}"#.to_vec(), Reason::BadRequest, "schema 1"),
        (b"<html>login</html>".to_vec(), Reason::BadRequest, "not a manifest"),
        (big, Reason::BadRequest, "the manifest is larger than 4194304 bytes"),
    ] {
        let (stub, _) = stub(move |_, _| Some(Reply::new(200, body.clone()))).await;
        let error = Puller::new(&stub.host(), "1").resolve().await.unwrap_err();
        assert_eq!(error.reason(), reason);
        assert!(text(&error).contains(words), "{}", text(&error));
    }
}

#[tokio::test]
async fn answers_have_their_reasons() {
    for (status, reason) in [
        (400, Reason::BadRequest),
        (401, Reason::Unauthorized),
        (403, Reason::Unauthorized),
        (404, Reason::NotFound),
        (405, Reason::BadRequest),
        (429, Reason::RegistryUnavailable),
        (500, Reason::RegistryUnavailable),
        (503, Reason::RegistryUnavailable),
    ] {
        let (stub, _) = stub(move |_, _| Some(Reply::new(status, "x"))).await;
        let error = Puller::new(&stub.host(), "1").resolve().await.unwrap_err();
        assert_eq!(error.reason(), reason, "{status}: {error:?}");
        assert!(error.to_string().contains(&stub.host()));
    }
    let closed = Stub::start(|_, _| Reply::new(200, "")).await.host();
    let error = Puller::new(&closed, "1").resolve().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Network, "{error:?}");
}

#[tokio::test]
async fn plain_http_needs_the_key() {
    let (stub, _) = stub(|_, _| None).await;
    let host = stub.host();
    let puller = Puller::with(&host, "1", vec![], Credentials::default(), limits());
    let error = puller.resolve().await.unwrap_err();
    assert!(stub.seen().is_empty());
    assert_eq!(error.reason(), Reason::Network, "{error:?}");
    let section = RegistrySection { prefix: host.clone(), blocked: true, ..RegistrySection::default() };
    let puller = Puller::with(&host, "1", vec![section], Credentials::default(), limits());
    let error = puller.resolve().await.unwrap_err();
    assert_eq!(error.reason(), Reason::BadRequest);
    assert!(text(&error).contains("blocked = true"));
    assert!(stub.seen().is_empty());
}

#[tokio::test]
async fn mirrors_come_first_and_fall_through() {
    let (empty, _) = stub(|_, _| Some(not_found())).await;
    let (refusing, _) = stub(|_, _| Some(Reply::new(401, "").header("WWW-Authenticate", "Basic"))).await;
    let (failing, _) = stub(|_, _| Some(Reply::new(500, ""))).await;
    let (partial, image) = stub(|seen, _| seen.path.contains("/blobs/").then(not_found)).await;
    let (upstream, _) = stub(|_, _| None).await;
    let closed = Stub::start(|_, _| Reply::new(200, "")).await.host();
    let hosts = [closed, empty.host(), refusing.host(), failing.host(), partial.host()];
    let mirror = |host: &String| MirrorSection { location: host.clone(), insecure: true, ca: None };
    let section = RegistrySection {
        prefix: "docker.io".into(),
        location: Some(upstream.host()),
        mirror: hosts.iter().map(mirror).collect(),
        ..insecure("")
    };
    let mut credentials = Credentials::default();
    credentials.insert("docker.io", password());
    let puller = Puller::with("docker.io", "1", vec![section], credentials, limits());
    puller.pull().await.unwrap();
    puller.assert_complete(&image);
    // Another endpoint is left, so nothing is repeated.
    assert_eq!(failing.seen().len(), 1);
    assert!(upstream.paths().iter().all(|path| path.contains("/blobs/")));
    // The credential of the name is not that of the mirror.
    assert!(refusing.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn the_last_answer_counts_and_mirrors_are_mentioned() {
    let (refusing, _) = stub(|_, _| Some(Reply::new(403, ""))).await;
    let (empty, _) = stub(|_, _| Some(not_found())).await;
    let mirror = MirrorSection { location: refusing.host(), insecure: true, ca: None };
    let section = RegistrySection { mirror: vec![mirror], ..insecure(&empty.host()) };
    let puller = Puller::with(&empty.host(), "1", vec![section], Credentials::default(), limits());
    let error = puller.resolve().await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound);
    assert!(text(&error).contains("answered 403"), "{}", text(&error));
}

#[tokio::test]
async fn a_dropped_fetch_leaves_nothing_unfinished() {
    let (stub, image) = stub(stalls).await;
    let host = stub.host();
    let puller = Puller::new(&host, "1");
    let resolved = puller.resolve().await.unwrap();
    let lowest = digest_of(&image.layers[0]);
    let (sender, mut steps) = tokio::sync::mpsc::unbounded_channel();
    let progress = |blob: &Descriptor, _: u64| {
        if blob.digest == lowest {
            sender.send(puller.has_unfinished()).unwrap();
        }
    };
    let fetch = puller.registry.fetch(&resolved, &puller.store, &progress);
    tokio::select! {
        result = fetch => panic!("the fetch ended: {result:?}"),
        unfinished = steps.recv() => assert!(unfinished.unwrap()),
    }
    empties(&puller).await;
    assert!(!puller.store.has(&lowest));
    assert!(!puller.store.has(&resolved.manifest_digest));
}

#[tokio::test]
async fn a_proxy_is_used_except_where_it_is_not_wanted() {
    let (proxy, image) = stub(|_, _| None).await;
    let host = "registry.invalid:5000";
    let pull = |no_proxy: &str| {
        let mut puller = Puller::new(host, "1");
        let config = RegistryConfig::new(vec![insecure(host)]).unwrap();
        let proxy = ProxyConfig {
            http: Some(format!("http://proxy-user:{PASSWORD}@{}", proxy.host())),
            https: None,
            no_proxy: Some(no_proxy.to_owned()),
        };
        puller.registry = Registry::new(config, Credentials::default(), proxy, vec![]).with_limits(limits());
        puller
    };
    let through = pull("other.invalid");
    through.pull().await.unwrap();
    through.assert_complete(&image);
    let seen = proxy.seen();
    assert!(seen.iter().all(|seen| seen.header("proxy-authorization").is_some()));
    assert!(seen.iter().all(|seen| seen.header("host") == Some(host)));
    let error = pull(".invalid").resolve().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Network);
    assert_eq!(proxy.seen().len(), seen.len());
    assert!(!text(&error).contains(PASSWORD), "{}", text(&error));
}

#[tokio::test]
async fn certificates_that_cannot_be_read_name_their_file() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("ca.pem");
    std::fs::write(&file, "not a certificate").unwrap();
    for ca in [file, root.path().join("absent.pem")] {
        let section = RegistrySection { ca: Some(ca.clone()), prefix: "localhost:1".into(), ..insecure("") };
        let puller = Puller::with("localhost:1", "1", vec![section], Credentials::default(), limits());
        let error = puller.resolve().await.unwrap_err();
        assert_eq!(error.reason(), Reason::BadRequest);
        assert!(text(&error).contains(ca.to_str().unwrap()), "{}", text(&error));
    }
}

#[test]
fn futures_can_move_between_threads() {
    fn check<T: Send>(_: T) {}
    let puller = Puller::new("localhost:1", "1");
    let platform = Platform::host();
    check(puller.registry.resolve(&puller.reference, &platform, &puller.store));
    check(async {
        let image = puller.resolve().await.unwrap();
        puller.registry.fetch(&image, &puller.store, &|_, _| ()).await.unwrap();
    });
}
