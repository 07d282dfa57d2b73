//! Reads images in every form that Kiln writes, and verifies their digests (shell).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde_json::Value;
use tar::{Archive, EntryType};

use crate::base::digest;
use crate::lab::CONTEXT_TIME;

/// One path of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Regular file, directory, link ….
    pub kind: EntryType,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Target of a link.
    pub link: String,
    /// Digest of the content of a regular file.
    pub content: String,
    /// Modification time in seconds.
    pub mtime: u64,
}

/// One layer: path to entry.
pub type Layer = BTreeMap<String, Entry>;

/// An image as its reader sees it.
#[derive(Debug, Clone)]
pub struct Image {
    /// The config document.
    pub config: Value,
    /// Its digest: the image id.
    pub id: String,
    /// The manifest, in forms that have one.
    pub manifest: Value,
    /// Digest of the manifest.
    pub digest: String,
    /// From the base upwards.
    pub layers: Vec<Layer>,
    /// Names that the archive carries.
    pub tags: Vec<String>,
}

impl Image {
    /// Reads the archive of `docker save`.
    pub fn docker_archive(file: &Path) -> Self {
        let files = unpack(file);
        let manifest: Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
        let item = &manifest[0];
        let config = &files[item["Config"].as_str().unwrap()];
        let layers = item["Layers"].as_array().unwrap().iter();
        let layers = layers.map(|name| files[name.as_str().unwrap()].clone()).collect();
        let tags = item["RepoTags"].as_array().into_iter().flatten();
        let tags = tags.map(|t| t.as_str().unwrap().to_owned()).collect();
        Self { tags, ..Self::assemble(config, Value::Null, String::new(), layers) }
    }

    /// Reads an OCI layout in a directory.
    pub fn oci(dir: &Path) -> Self {
        Self::oci_blobs(&|name| std::fs::read(dir.join(name)).unwrap())
    }

    /// Reads an OCI layout in an archive.
    pub fn oci_archive(file: &Path) -> Self {
        let files = unpack(file);
        Self::oci_blobs(&|name| files[name].clone())
    }

    fn oci_blobs(read: &dyn Fn(&str) -> Vec<u8>) -> Self {
        let layout: Value = serde_json::from_slice(&read("oci-layout")).unwrap();
        assert_eq!(layout["imageLayoutVersion"], "1.0.0");
        let index: Value = serde_json::from_slice(&read("index.json")).unwrap();
        let descriptor = &index["manifests"][0];
        Self::from_manifest(descriptor["digest"].as_str().unwrap(), &|wanted| {
            let bytes = read(&format!("blobs/{}", wanted.replace(':', "/")));
            assert_eq!(digest(&bytes), wanted, "a blob has another digest than its name says");
            bytes
        })
    }

    /// Reads a `dir:` layout.
    pub fn dir(dir: &Path) -> Self {
        let manifest = std::fs::read(dir.join("manifest.json")).unwrap();
        let name = digest(&manifest);
        Self::from_manifest(&name, &|wanted| {
            if wanted == name {
                return manifest.clone();
            }
            let bytes = std::fs::read(dir.join(wanted.trim_start_matches("sha256:"))).unwrap();
            assert_eq!(digest(&bytes), wanted, "a blob has another digest than its name says");
            bytes
        })
    }

    fn from_manifest(name: &str, blob: &dyn Fn(&str) -> Vec<u8>) -> Self {
        let manifest: Value = serde_json::from_slice(&blob(name)).unwrap();
        let content = |descriptor: &Value| {
            let bytes = blob(descriptor["digest"].as_str().unwrap());
            assert_eq!(descriptor["size"], bytes.len(), "a descriptor has the wrong size");
            bytes
        };
        let config = content(&manifest["config"]);
        let layers = manifest["layers"].as_array().unwrap().iter().map(content).collect();
        Self::assemble(&config, manifest.clone(), name.to_owned(), layers)
    }

    fn assemble(config_bytes: &[u8], manifest: Value, digest_text: String, layers: Vec<Vec<u8>>) -> Self {
        let config: Value = serde_json::from_slice(config_bytes).unwrap();
        let layers: Vec<Vec<u8>> = layers.into_iter().map(inflate).collect();
        let wanted: Vec<_> = layers.iter().map(|layer| Value::from(digest(layer))).collect();
        assert_eq!(config["rootfs"]["diff_ids"], Value::from(wanted), "diff ids do not match the layers");
        let layers = layers.iter().map(|layer| read_layer(layer)).collect();
        Self { config, id: digest(config_bytes), manifest, digest: digest_text, layers, tags: Vec::new() }
    }

    /// The image's own layers, without those of its base.
    pub fn own_layers(&self, base_layers: usize) -> &[Layer] {
        &self.layers[base_layers..]
    }

    /// Digests of the layers: the same for the same input and a fixed time. The id of a docker image is not,
    /// because buildah writes the name of its working container into the config.
    pub fn diff_ids(&self) -> &Value {
        &self.config["rootfs"]["diff_ids"]
    }

    /// A path of the topmost layer that has it.
    pub fn entry(&self, path: &str) -> Option<&Entry> {
        self.layers.iter().rev().find_map(|layer| layer.get(path))
    }

    /// Everything of config and layers' names as text, to search for what must not be there.
    pub fn text(&self) -> String {
        format!("{}\n{}\n{:?}", self.config, self.manifest, self.layers)
    }
}

/// Files of an archive; symbolic links stand for their targets, as `docker save` uses them.
fn unpack(file: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut archive = Archive::new(std::fs::File::open(file).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        if entry.header().entry_type() == EntryType::Symlink {
            let target = entry.link_name().unwrap().unwrap().to_str().unwrap().to_owned();
            bytes = files.get(target.trim_start_matches("../")).cloned().unwrap_or_default();
        }
        files.insert(name, bytes);
    }
    files
}

fn inflate(bytes: Vec<u8>) -> Vec<u8> {
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return bytes;
    }
    let mut plain = Vec::new();
    GzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).unwrap();
    plain
}

fn read_layer(bytes: &[u8]) -> Layer {
    let mut layer = Layer::new();
    for entry in Archive::new(bytes).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = String::from_utf8_lossy(&entry.path_bytes()).trim_end_matches('/').to_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let header = entry.header();
        let kind = header.entry_type();
        let link =
            entry.link_name_bytes().map(|l| String::from_utf8_lossy(&l).into_owned()).unwrap_or_default();
        let value = Entry {
            kind,
            mode: header.mode().unwrap() & 0o7777,
            uid: header.uid().unwrap(),
            gid: header.gid().unwrap(),
            link,
            content: if kind.is_file() { digest(&content) } else { String::new() },
            mtime: header.mtime().unwrap(),
        };
        layer.insert(path, value);
    }
    equal_hard_links(layer)
}

/// Which name of a file comes first in a layer depends on the order of a directory: every name gets the
/// content, and the first name in alphabetical order as its link.
fn equal_hard_links(mut layer: Layer) -> Layer {
    let links: Vec<_> = layer.iter().filter(|(_, entry)| entry.kind == EntryType::Link).collect();
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, entry) in links {
        groups.entry(entry.link.clone()).or_default().push(path.clone());
    }
    for (target, mut names) in groups {
        names.push(target.clone());
        names.sort();
        let first = names[0].clone();
        let content = layer[&target].clone();
        for name in names {
            layer.insert(name, Entry { link: first.clone(), ..content.clone() });
        }
    }
    layer
}

/// Fails the test unless both images are the same but for what cannot be: times, container names, and
/// digests that depend on them. Times of the context are compared, all others only if `times` says that they
/// are fixed.
pub fn assert_same(kiln: &Image, plain: &Image, times: bool) {
    let difference = config_difference(kiln, plain).or_else(|| layer_difference(kiln, plain, times));
    if let Some(difference) = difference {
        panic!("Kiln's image differs from plain buildah's:\n{difference}");
    }
}

/// The first difference of the configs.
pub fn config_difference(kiln: &Image, plain: &Image) -> Option<String> {
    let mut lines = Vec::new();
    differences("config", &comparable(&kiln.config), &comparable(&plain.config), &mut lines);
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// A word of a history entry without what depends on more than the build: the name of a base is the one in
/// the Dockerfile or the full one; a stage is named by its id, which covers times; the digest of what was
/// copied covers the name that the machine's user database gives to group 0 (the content is compared in the
/// layers).
fn comparable_word(word: &str) -> &str {
    let is_hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    match word.split_once(':') {
        Some((kind @ ("file" | "dir" | "multi"), hash)) if hash.len() == 64 && is_hex(hash) => kind,
        None if word.len() == 12 && is_hex(word) => "STAGE",
        _ => {
            let word = word.strip_prefix("docker.io/").unwrap_or(word);
            word.strip_prefix("library/").unwrap_or(word)
        }
    }
}

fn differences(path: &str, kiln: &Value, plain: &Value, lines: &mut Vec<String>) {
    match (kiln, plain) {
        (Value::Object(k), Value::Object(p)) => {
            for key in k.keys().chain(p.keys().filter(|key| !k.contains_key(*key))) {
                let (k, p) = (k.get(key).unwrap_or(&Value::Null), p.get(key).unwrap_or(&Value::Null));
                differences(&format!("{path}.{key}"), k, p, lines);
            }
        }
        (Value::Array(k), Value::Array(p)) if k.len() == p.len() => {
            for (index, (k, p)) in k.iter().zip(p).enumerate() {
                differences(&format!("{path}[{index}]"), k, p, lines);
            }
        }
        _ if kiln == plain => {}
        _ => lines.push(format!("{path}\nkiln:  {kiln}\nplain: {plain}")),
    }
}

fn comparable(config: &Value) -> Value {
    let mut config = config.clone();
    let top = config.as_object_mut().unwrap();
    for key in ["created", "container", "id", "parent", "rootfs"] {
        top.remove(key);
    }
    for key in ["config", "container_config"] {
        if let Some(Value::Object(inner)) = top.get_mut(key) {
            inner.remove("Hostname");
            inner.remove("Image");
        }
    }
    for item in top.get_mut("history").and_then(Value::as_array_mut).into_iter().flatten() {
        let item = item.as_object_mut().unwrap();
        item.remove("created");
        for key in ["comment", "created_by"] {
            if let Some(Value::String(text)) = item.get_mut(key) {
                *text = text.split(' ').map(comparable_word).collect::<Vec<_>>().join(" ");
            }
        }
    }
    config
}

/// The first difference of the layers.
pub fn layer_difference(kiln: &Image, plain: &Image, times: bool) -> Option<String> {
    if kiln.layers.len() != plain.layers.len() {
        return Some(format!("layers: kiln {}, plain {}", kiln.layers.len(), plain.layers.len()));
    }
    let mut pairs = kiln.layers.iter().zip(&plain.layers).enumerate();
    pairs.find_map(|(index, (k, p))| one_layer_difference(index, k, p, times))
}

fn one_layer_difference(index: usize, kiln: &Layer, plain: &Layer, times: bool) -> Option<String> {
    let paths: std::collections::BTreeSet<_> = kiln.keys().chain(plain.keys()).collect();
    let from_context =
        |path: &str| plain.get(path).is_some_and(|e| i64::try_from(e.mtime) == Ok(CONTEXT_TIME));
    let view = |layer: &Layer, path: &str| {
        let compared = times || from_context(path);
        layer.get(path).map(|entry| Entry { mtime: if compared { entry.mtime } else { 0 }, ..entry.clone() })
    };
    paths.into_iter().find_map(|path| {
        let (k, p) = (view(kiln, path), view(plain, path));
        (k != p).then(|| format!("layer {index}, {path}\nkiln:  {k:?}\nplain: {p:?}"))
    })
}
