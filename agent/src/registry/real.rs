//! Pulls from Debian's docker-registry, over TLS and with a password.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_protocol::Reason;

use super::*;
use crate::blobs::{BlobStore, digest_of};

const DEADLINE: Duration = Duration::from_secs(30);
pub(super) const PASSWORD: &str = "hunter2-canary";
/// bcrypt of that password at the lowest cost.
const HTPASSWD: &str = "user:$2b$04$abcdefghijklmnopqrstuueDgTPARBGtTsYrBJNzof.Gi/.G0Y41q\n";

/// A running registry with its files. It ends when it is dropped.
pub(super) struct DockerRegistry {
    child: Child,
    pub(super) port: u16,
    pub(super) root: tempfile::TempDir,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl DockerRegistry {
    /// With TLS and a password.
    pub(super) fn start() -> Self {
        Self::start_with(configuration)
    }

    /// Plain HTTP for everybody, to have something in between.
    pub(super) fn start_plain() -> Self {
        Self::start_with(|root, port| {
            let root = root.display();
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root}/data}}}}\n\
                 http: {{addr: 127.0.0.1:{port}}}\n"
            )
        })
    }

    fn start_with(configuration: impl Fn(&Path, u16) -> String) -> Self {
        let root = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        make_certificate(root.path());
        fs::write(root.path().join("htpasswd"), HTPASSWD).unwrap();
        let config = root.path().join("config.yml");
        fs::write(&config, configuration(root.path(), port)).unwrap();
        let child = start_server(&config);
        let registry = Self { child, port, root };
        registry.wait();
        registry
    }

    fn wait(&self) {
        let start = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(start.elapsed() < DEADLINE, "docker-registry does not listen");
            std::thread::yield_now();
        }
    }

    pub(super) fn ca(&self) -> PathBuf {
        self.root.path().join("cert.pem")
    }

    fn name(&self) -> String {
        format!("127.0.0.1:{}/base/app:1", self.port)
    }

    /// Pushes an OCI layout with one layer.
    fn push(&self) {
        let layout = self.root.path().join("layout");
        write_layout(&layout);
        run(Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false", "--dest-creds"])
            .arg(format!("user:{PASSWORD}"))
            .arg(format!("oci:{}:1", layout.display()))
            .arg(format!("docker://{}", self.name())));
    }

    pub(super) fn registry(&self, section: RegistrySection, password: &str) -> Registry {
        let host = format!("127.0.0.1:{}", self.port);
        let section = RegistrySection { prefix: host.clone(), ..section };
        let mut credentials = Credentials::default();
        let (username, password) = ("user".to_owned(), password.to_owned());
        credentials.insert(&host, Credential::Password { username, password });
        let config = RegistryConfig::new(vec![section]).unwrap();
        Registry::new(config, credentials, ProxyConfig::default(), vec![])
    }
}

#[expect(clippy::disallowed_methods, reason = "a server of this test, ended by the guard that owns it")]
fn start_server(config: &Path) -> Child {
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("this test needs Debian's package docker-registry")
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn make_certificate(root: &Path) {
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=kiln test", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
        .arg(root.join("key.pem"))
        .arg("-out")
        .arg(root.join("cert.pem")));
}

fn configuration(root: &Path, port: u16) -> String {
    let root = root.display();
    format!(
        "version: 0.1\n\
         log: {{level: error}}\n\
         storage: {{filesystem: {{rootdirectory: {root}/data}}}}\n\
         auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n\
         http:\n  addr: 127.0.0.1:{port}\n  tls: {{certificate: {root}/cert.pem, key: {root}/key.pem}}\n"
    )
}

fn write_layout(layout: &Path) {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], media_type: &str| {
        let digest = digest_of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let layer = vec![0; 10 * 512];
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(&layer)]}});
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json"),
        "layers": [put(&layer, "application/vnd.oci.image.layer.v1.tar")],
    });
    let mut entry = put(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
    entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "1"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

#[tokio::test]
async fn debians_registry_is_pulled_from() {
    let server = DockerRegistry::start();
    server.push();
    let reference: Reference = server.name().parse().unwrap();
    let platform = "linux/amd64".parse().unwrap();
    let root = tempfile::tempdir().unwrap();
    let store = BlobStore::open(root.path()).unwrap();
    let with_ca = || RegistrySection { ca: Some(server.ca()), ..RegistrySection::default() };

    let registry = server.registry(with_ca(), PASSWORD);
    let image = registry.resolve(&reference, &platform, &store).await.unwrap();
    registry.fetch(&image, &store, &|_, _| ()).await.unwrap();
    assert_eq!(digest_of(&image.manifest), image.manifest_digest);
    assert_eq!(image.layers.len(), 1);
    assert!([&image.config, &image.layers[0]].iter().all(|blob| store.has(&blob.digest)));

    let insecure = RegistrySection { insecure: true, ..RegistrySection::default() };
    server.registry(insecure, PASSWORD).resolve(&reference, &platform, &store).await.unwrap();

    // Everything is in the store, and still nobody else may use it.
    let error = server.registry(with_ca(), "wrong").resolve(&reference, &platform, &store).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Unauthorized, "{error:?}");

    let untrusted = server.registry(RegistrySection::default(), PASSWORD);
    let error = untrusted.resolve(&reference, &platform, &store).await.unwrap_err();
    assert!(matches!(*error.cause, Cause::Certificate(_)), "{error:?}");
    assert_eq!(error.reason(), Reason::BadRequest);
    assert!(error.hint().unwrap().contains("as ca"));

    let gone: Reference = server.name().replace("app:1", "app:2").parse().unwrap();
    let registry = server.registry(with_ca(), PASSWORD);
    let error = registry.resolve(&gone, &platform, &store).await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound);
    let text = crate::error::chain(&error);
    assert!(text.contains("MANIFEST_UNKNOWN"), "{text}");
}
