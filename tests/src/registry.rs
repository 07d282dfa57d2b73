//! A real registry on a port of its own, filled over its own interface (shell).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::base::{BaseImage, INDEX, Packed, descriptor, digest};
use crate::http::request;
use crate::process::{Server, run};

/// A registry is ready in 20 ms; a busy machine takes longer.
const START: Duration = Duration::from_secs(20);
/// Who may pull from a registry with a password.
pub const USER: &str = "canary-user";
/// See [`USER`]. Unique, so that it can be searched for wherever it must not be.
pub const PASSWORD: &str = "canary-password-7f3a";
/// bcrypt of [`PASSWORD`]: the only form that the registry takes.
const PASSWORD_HASH: &str = "$2y$05$abcdefghijklmnopqrstuu6cbYMfa6EN8.blYjs65ner4vgNdR21q";

/// How clients have to speak to a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Plain HTTP, no password.
    Open,
    /// Plain HTTP, [`USER`] and [`PASSWORD`].
    Password,
    /// TLS with a certificate of an authority that nobody trusts yet.
    Tls,
}

/// A running registry with storage of its own.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    /// Where images are pushed to: the same storage without password and TLS.
    door: Option<Box<Registry>>,
    storage: PathBuf,
    ca: Option<PathBuf>,
    _server: Server,
    _dir: Option<TempDir>,
}

impl Registry {
    /// An empty registry.
    pub fn start(access: Access) -> Self {
        let dir = tempfile::Builder::new().prefix("kiln-registry-").tempdir().unwrap();
        let storage = dir.path().join("storage");
        let (address, server) = serve(dir.path(), &storage, access);
        let door = (access != Access::Open).then(|| Box::new(Self::on_storage(&storage, dir.path())));
        let ca = (access == Access::Tls).then(|| dir.path().join("ca.pem"));
        Self { address, door, storage, ca, _server: server, _dir: Some(dir) }
    }

    fn on_storage(storage: &Path, dir: &Path) -> Self {
        let inner = dir.join("door");
        std::fs::create_dir(&inner).unwrap();
        let (address, server) = serve(&inner, storage, Access::Open);
        Self { address, door: None, storage: storage.to_owned(), ca: None, _server: server, _dir: None }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The authority that signed its certificate.
    pub fn ca(&self) -> Option<&Path> {
        self.ca.as_deref()
    }

    /// Its files.
    pub fn storage(&self) -> &Path {
        &self.storage
    }

    fn push_address(&self) -> SocketAddr {
        self.door.as_ref().map_or(self.address, |door| door.address)
    }

    /// The digest that a tag points to, as the registry has it on disk.
    pub fn tag(&self, repository: &str, tag: &str) -> Option<String> {
        let link = format!("docker/registry/v2/repositories/{repository}/_manifests/tags/{tag}/current/link");
        std::fs::read_to_string(self.storage().join(link)).ok()
    }

    /// Stores an image under a tag and returns the digest of its manifest.
    pub fn push(&self, repository: &str, tag: &str, image: &BaseImage) -> String {
        let packed = image.pack();
        self.push_manifest(repository, tag, &packed)
    }

    /// Stores images as an index, one per architecture, and returns its digest.
    pub fn push_index(&self, repository: &str, tag: &str, images: &[BaseImage]) -> String {
        let entries: Vec<Value> = images.iter().map(|image| self.push_member(repository, image)).collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        let packed = Packed { kind: INDEX, manifest: index.to_string().into_bytes(), blobs: Vec::new() };
        self.push_manifest(repository, tag, &packed)
    }

    fn push_member(&self, repository: &str, image: &BaseImage) -> Value {
        let packed = image.pack();
        self.push_manifest(repository, &digest(&packed.manifest), &packed);
        let mut entry = descriptor(packed.kind, &packed.manifest);
        entry["platform"] = json!({"os": "linux", "architecture": image.architecture_name()});
        entry
    }

    fn push_manifest(&self, repository: &str, reference: &str, packed: &Packed) -> String {
        for blob in &packed.blobs {
            self.push_blob(repository, blob);
        }
        let path = format!("/v2/{repository}/manifests/{reference}");
        let answer = request(self.push_address(), "PUT", &path, packed.kind, &packed.manifest);
        assert_eq!(answer.status, 201, "{}", String::from_utf8_lossy(&answer.body));
        digest(&packed.manifest)
    }

    fn push_blob(&self, repository: &str, blob: &[u8]) {
        let to = self.push_address();
        let opened = request(to, "POST", &format!("/v2/{repository}/blobs/uploads/"), "", &[]);
        assert_eq!(opened.status, 202, "{opened:?}");
        let location = opened.head.header("Location").unwrap();
        let path = location.strip_prefix(&format!("http://{to}")).unwrap_or(location);
        let path = format!("{path}&digest={}", digest(blob));
        let answer = request(to, "PUT", &path, "application/octet-stream", blob);
        assert_eq!(answer.status, 201, "{}", String::from_utf8_lossy(&answer.body));
    }
}

fn serve(dir: &Path, storage: &Path, access: Access) -> (SocketAddr, Server) {
    let mut config = format!(
        "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: 127.0.0.1:0\n  secret: shared\n",
        storage.display()
    );
    match access {
        Access::Open => {}
        Access::Password => config.push_str(&password(dir)),
        Access::Tls => config.push_str(&certificates(dir)),
    }
    let file = dir.join("registry.yml");
    std::fs::write(&file, config).unwrap();
    let server = Server::start("docker-registry", &["serve", file.to_str().unwrap()]);
    let ready = server.output.wait_for("listening on", START);
    let said = server.output.text();
    assert!(ready, "docker-registry did not start; run scripts/setup-system.sh test\n{said}");
    let address = said.split("listening on ").nth(1).unwrap().split(['"', ',', ' ']).next().unwrap();
    (address.parse().unwrap(), server)
}

fn password(dir: &Path) -> String {
    let file = dir.join("htpasswd");
    std::fs::write(&file, format!("{USER}:{PASSWORD_HASH}\n")).unwrap();
    format!("auth: {{htpasswd: {{realm: kiln, path: {}}}}}\n", file.display())
}

/// Makes `ca.pem`, and `server.pem` with `server.key` for 127.0.0.1.
pub fn make_certificates(dir: &Path) {
    let script = "set -e\n\
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=kiln-test-ca -keyout ca.key -out ca.pem\n\
        openssl req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -keyout server.key -out server.csr\n\
        printf 'subjectAltName=IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > server.ext\n\
        openssl x509 -req -days 2 -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial \
          -extfile server.ext -out server.pem\n";
    let mut command = Command::new("/bin/sh");
    let _ = run(command.args(["-c", script]).current_dir(dir), START).expect_code(0);
}

fn certificates(dir: &Path) -> String {
    make_certificates(dir);
    let (certificate, key) = (dir.join("server.pem"), dir.join("server.key"));
    format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display())
}
