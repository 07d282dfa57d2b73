//! Base images made by hand: layers, configs, manifests (pure, but for reading busybox).

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// Docker's media types; the suites pull OCI images too.
const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// Media type of an index of images.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// A layer under construction. Times are zero, owners root unless said otherwise.
pub struct LayerTar(Builder<Vec<u8>>);

impl Default for LayerTar {
    fn default() -> Self {
        Self(Builder::new(Vec::new()))
    }
}

impl LayerTar {
    fn entry(mut self, kind: EntryType, path: &str, mode: u32, link: Option<&str>, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        match link {
            Some(target) => self.0.append_link(&mut header, path, target).unwrap(),
            None => self.0.append_data(&mut header, path, data).unwrap(),
        }
        self
    }

    /// Adds a directory.
    #[must_use]
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, path, mode, None, &[])
    }

    /// Adds a file.
    #[must_use]
    pub fn file(self, path: &str, mode: u32, data: &[u8]) -> Self {
        self.entry(EntryType::Regular, path, mode, None, data)
    }

    /// Adds an empty file of another owner.
    #[must_use]
    pub fn owned(mut self, path: &str, uid: u64, gid: u64) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(0);
        header.set_size(0);
        self.0.append_data(&mut header, path, &[][..]).unwrap();
        self
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, 0o777, Some(target), &[])
    }

    /// Adds a hard link to an earlier path.
    #[must_use]
    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, 0o644, Some(target), &[])
    }

    /// The finished archive.
    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// An image with everything that a registry stores of it.
#[derive(Debug, Clone)]
pub struct BaseImage {
    layers: Vec<Vec<u8>>,
    config: Value,
    architecture: &'static str,
    oci: bool,
}

/// An image in the form in which registries take it.
pub struct Packed {
    /// Media type of the manifest.
    pub kind: &'static str,
    /// The manifest.
    pub manifest: Vec<u8>,
    /// Config and layers.
    pub blobs: Vec<Vec<u8>>,
}

impl BaseImage {
    /// An image of these uncompressed layers.
    pub fn new(layers: Vec<Vec<u8>>) -> Self {
        Self {
            layers,
            config: json!({"Cmd": ["sh"], "Env": [path_variable()]}),
            architecture: native(),
            oci: false,
        }
    }

    /// A small system: busybox, users, `/tmp`.
    pub fn busybox() -> Self {
        Self::new(vec![busybox_layer()])
    }

    /// Merges keys into the image's `config` object: `User`, `Env`, `OnBuild` ….
    #[must_use]
    pub fn with(mut self, keys: Value) -> Self {
        let Value::Object(keys) = keys else { panic!("not an object: {keys}") };
        self.config.as_object_mut().unwrap().extend(keys);
        self
    }

    /// Adds a layer.
    #[must_use]
    pub fn layer(mut self, layer: LayerTar) -> Self {
        self.layers.push(layer.finish());
        self
    }

    /// OCI media types instead of Docker's.
    #[must_use]
    pub fn oci(mut self) -> Self {
        self.oci = true;
        self
    }

    /// Claims another architecture.
    #[must_use]
    pub fn architecture(mut self, name: &'static str) -> Self {
        self.architecture = name;
        self
    }

    /// The name of its architecture.
    pub fn architecture_name(&self) -> &'static str {
        self.architecture
    }

    /// Serialises it.
    pub fn pack(&self) -> Packed {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| digest(layer)).collect();
        let history: Vec<_> =
            self.layers.iter().map(|_| json!({"created": EPOCH, "created_by": "base"})).collect();
        let config = json!({
            "architecture": self.architecture, "os": "linux", "created": EPOCH, "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
        });
        let config = config.to_string().into_bytes();
        let mut blobs: Vec<Vec<u8>> = self.layers.iter().map(|layer| gzip(layer)).collect();
        let (kind, config_kind, layer_kind) =
            if self.oci { (OCI_MANIFEST, OCI_CONFIG, OCI_LAYER) } else { (MANIFEST, CONFIG, LAYER) };
        let layers: Vec<_> = blobs.iter().map(|blob| descriptor(layer_kind, blob)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind, "config": descriptor(config_kind, &config), "layers": layers,
        });
        blobs.push(config);
        Packed { kind, manifest: manifest.to_string().into_bytes(), blobs }
    }
}

const EPOCH: &str = "1970-01-01T00:00:00Z";

/// The architecture of this machine under its name in images.
pub fn native() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A descriptor of some content.
pub fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "size": bytes.len(), "digest": digest(bytes)})
}

fn path_variable() -> String {
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Where distributions put a statically linked busybox.
fn busybox_binary() -> Vec<u8> {
    let places = ["/bin/busybox", "/usr/bin/busybox", "/bin/busybox-static", "/usr/bin/busybox.static"];
    let found = places.iter().find_map(|place| std::fs::read(place).ok());
    found.unwrap_or_else(|| panic!("no static busybox in {places:?}; run scripts/setup-system.sh test"))
}

/// The programs that the suites' RUN steps use.
const APPLETS: &str = "sh ash cat chmod chown cp cut date dd df echo env false find grep gzip head hostname id ip \
    kill killall ln ls mkdir mkfifo mknod mount mv nc nohup nproc ps pwd readlink rm rmdir sed seq setsid sha256sum \
    sleep sort stat tail tar tee test touch tr true umount uname wc wget which whoami xargs yes [";

fn busybox_layer() -> Vec<u8> {
    let mut layer = LayerTar::default();
    for dir in ["bin", "etc", "root", "usr", "usr/bin", "var", "home", "proc", "dev", "sys"] {
        layer = layer.dir(dir, 0o755);
    }
    layer = layer.dir("tmp", 0o1777).file("bin/busybox", 0o755, &busybox_binary());
    for applet in APPLETS.split_whitespace() {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    let users = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    let groups = b"root:x:0:\nwheel:x:10:root\nnobody:x:65534:\n";
    layer.file("etc/passwd", 0o644, users).file("etc/group", 0o644, groups).finish()
}
