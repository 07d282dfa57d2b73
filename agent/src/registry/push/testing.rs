//! What the tests of pushing share: candidates, and a front that disturbs a real registry (test helper).

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::blobs::{BlobStore, digest_of};
use crate::registry::real::DockerRegistry;
use crate::registry::stub::{Reply, Seen, Stub};
use crate::registry::{Credentials, Limits, ProxyConfig, RegistryConfig, RegistrySection};

pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const PASSWORD: &str = "hunter2-canary";
/// Longer than everything that sockets buffer, so that a cut meets a sender.
pub(super) const LAYER_BYTES: usize = 12 << 20;

/// A store with the blobs of images.
pub(super) struct Stock {
    pub(super) store: BlobStore,
    _root: tempfile::TempDir,
}

impl Stock {
    pub(super) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        Self { store: BlobStore::open(root.path()).unwrap(), _root: root }
    }

    /// Layers of the bytes' letters, so that a stub can read them as text.
    pub(super) fn candidate(&self, letters: &[u8]) -> Candidate {
        let layers: Vec<_> = letters.iter().map(|letter| self.put(&vec![*letter; LAYER_BYTES])).collect();
        let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.digest).collect();
        let config = json!({"architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = self.put(config.to_string().as_bytes());
        let describe =
            |kind: &str, blob: &Blob| json!({"mediaType": kind, "digest": blob.digest, "size": blob.size});
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": describe("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers.iter().map(|l| describe("application/vnd.oci.image.layer.v1.tar", l)).collect::<Vec<_>>(),
        });
        let manifest = manifest.to_string();
        let blobs = layers.into_iter().chain([config]).collect();
        Candidate {
            digest: digest_of(manifest.as_bytes()),
            media_type: MANIFEST_TYPE.into(),
            manifest,
            blobs,
        }
    }

    fn put(&self, bytes: &[u8]) -> Blob {
        let stored = self.store.put(bytes).unwrap();
        Blob { digest: stored.digest, size: stored.size }
    }
}

pub(super) fn limits() -> Limits {
    Limits {
        connect: Duration::from_secs(5),
        idle: Duration::from_secs(20),
        pause: Duration::from_millis(1),
        ..Limits::default()
    }
}

pub(super) fn insecure(host: &str) -> RegistrySection {
    RegistrySection { prefix: host.to_owned(), insecure: true, ..RegistrySection::default() }
}

pub(super) fn robot() -> Credential {
    Credential::Password { username: "robot$team+ci".into(), password: PASSWORD.into() }
}

pub(super) fn registry(host: &str, credential: Option<Credential>, limits: Limits) -> Registry {
    let mut credentials = Credentials::default();
    if let Some(credential) = credential {
        credentials.insert(host, credential);
    }
    let config = RegistryConfig::new(vec![insecure(host)]).unwrap();
    Registry::new(config, credentials, ProxyConfig::default(), vec![]).with_limits(limits)
}

pub(super) fn push(registry: &Registry, host: &str, repository: &str) -> Push {
    let name = format!("{host}/{repository}").parse().unwrap();
    registry.push(&name, &[], DEFAULT_BUDGET).unwrap()
}

pub(super) fn silent() -> Sent {
    Arc::new(|_, _| ())
}

/// Everything that a person or a log sees of an error.
pub(super) fn text(error: &PushError) -> String {
    format!("{error} {error:?}")
}

/// A real registry behind a stub that passes on what nobody else answers.
pub(super) struct Front {
    pub(super) stub: Stub,
    registry: DockerRegistry,
}

impl Front {
    pub(super) async fn start(odd: impl Fn(&Seen, usize) -> Option<Reply> + Send + Sync + 'static) -> Self {
        Self::gated(|_| None, odd).await
    }

    pub(super) async fn gated(
        gate: impl Fn(&Seen) -> Option<usize> + Send + Sync + 'static,
        odd: impl Fn(&Seen, usize) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let registry = DockerRegistry::start_plain();
        let port = registry.port;
        let stub =
            Stub::gated(gate, move |seen, before| odd(seen, before).unwrap_or_else(|| forward(seen, port)))
                .await;
        Self { stub, registry }
    }

    pub(super) fn host(&self) -> String {
        self.stub.host()
    }

    pub(super) fn port(&self) -> u16 {
        self.registry.port
    }

    /// How many requests had this method and this in their path.
    pub(super) fn count(&self, method: &str, part: &str) -> usize {
        self.stub.seen().iter().filter(|seen| seen.method == method && seen.path.contains(part)).count()
    }
}

/// Sends a request on and brings the answer back, all at once: HTTP 1.0 has no chunks.
pub(super) fn forward(seen: &Seen, port: u16) -> Reply {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut head = format!("{} {} HTTP/1.0\r\n", seen.method, seen.path);
    for (name, value) in seen.headers.iter().filter(|(name, _)| name != "authorization") {
        head.extend([name.as_str(), ": ", value.as_str(), "\r\n"]);
    }
    stream.write_all(format!("{head}\r\n{}", seen.body).as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let kept = lines.filter_map(|line| line.split_once(": "));
    let kept = kept.filter(|(name, _)| !["Content-Length", "Connection"].contains(name));
    kept.fold(Reply::new(status, &answer[end..]), |reply, (name, value)| reply.header(name, value))
}

/// Answers true the first `count` times.
pub(super) fn first(count: usize) -> impl Fn() -> bool + Send + Sync {
    let asked = AtomicUsize::new(0);
    move || asked.fetch_add(1, Ordering::SeqCst) < count
}
