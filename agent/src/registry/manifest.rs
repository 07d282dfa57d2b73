//! Reads manifests and indexes (pure).
//!
//! What a document is comes from the bytes that its digest covers, never from an HTTP header, so the same
//! digest always means the same thing.

use kiln_protocol::Digest;
use serde::Deserialize;

use super::platform::Platform;

/// Bytes of the largest manifest or index; registries themselves refuse larger ones.
pub(crate) const MANIFEST_LIMIT: u64 = 4 * 1024 * 1024;
/// Bytes of the largest image config; those in the wild stay below 100 KiB.
pub(crate) const CONFIG_LIMIT: u64 = 4 * 1024 * 1024;
/// How many platforms an error lists, and how much of a foreign word it repeats.
const LISTED_PLATFORMS: usize = 20;
const QUOTED_CHARACTERS: usize = 80;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1";
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// The `Accept` header for manifests. Without it registries convert to schema 1.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Names a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// Why a document cannot be used as a base image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not the JSON of a manifest. The parser's own message is left out, it quotes the document.
    #[error("the answer is not a manifest (line {line}, column {column})")]
    Json {
        /// Line of the first problem.
        line: usize,
        /// Its column.
        column: usize,
    },
    /// The format that registries gave up in 2017.
    #[error("the image has the obsolete manifest schema 1")]
    Schema1,
    /// A document that says it is something else.
    #[error("`{0}` is not an image manifest")]
    MediaType(String),
    /// Two readers could take it for two different images.
    #[error("the manifest is an image and an index at once")]
    Ambiguous,
    /// An index where an image was expected.
    #[error("the index points to another index")]
    NestedIndex,
    /// For example a Helm chart.
    #[error("the artifact is not a container image, its config is `{0}`")]
    NotAnImage(String),
    /// A layer that may not be distributed, or in a format that buildah does not read.
    #[error("layer {digest} has the media type `{media_type}`, which cannot be pulled")]
    LayerType {
        /// The layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// A digest that is not sha256.
    #[error("`{0}` is not a sha256 digest")]
    Digest(String),
    /// The config is larger than any image needs.
    #[error("the image config has {size} bytes, the limit is {CONFIG_LIMIT}")]
    ConfigSize {
        /// Its length in bytes.
        size: u64,
    },
    /// No entry fits.
    #[error("the image has no {wanted} variant, only {available}")]
    NoPlatform {
        /// The platform of this build.
        wanted: String,
        /// What the index offers.
        available: String,
    },
}

/// A manifest or an index.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) media_type: String,
    pub(crate) content: Content,
}

#[derive(Debug)]
pub(crate) enum Content {
    Index(Vec<IndexEntry>),
    Image { config: Descriptor, layers: Vec<Descriptor> },
}

#[derive(Debug, Deserialize)]
pub(crate) struct IndexEntry {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u64,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<IndexEntry>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
}

impl RawDescriptor {
    fn check(self) -> Result<Descriptor, ManifestError> {
        let digest = parse_digest(&self.digest)?;
        Ok(Descriptor { media_type: self.media_type, digest, size: self.size })
    }
}

/// Reads a manifest or an index.
pub(crate) fn parse(bytes: &[u8]) -> Result<Document, ManifestError> {
    let raw: RawDocument = serde_json::from_slice(bytes)
        .map_err(|error| ManifestError::Json { line: error.line(), column: error.column() })?;
    let declared = raw.media_type.as_deref().unwrap_or_default();
    if raw.schema_version == 1 || declared.starts_with(DOCKER_SCHEMA1) {
        return Err(ManifestError::Schema1);
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(entries), None, None) => {
            let media_type = known(declared, [OCI_INDEX, DOCKER_INDEX])?;
            Ok(Document { media_type, content: Content::Index(entries) })
        }
        (None, Some(config), layers) => {
            let media_type = known(declared, [OCI_MANIFEST, DOCKER_MANIFEST])?;
            let content = image(config, layers.unwrap_or_default())?;
            Ok(Document { media_type, content })
        }
        (Some(_), _, _) => Err(ManifestError::Ambiguous),
        (None, None, _) => Err(ManifestError::MediaType(quote(declared))),
    }
}

/// The declared media type if it fits the shape. Only OCI documents may leave it out.
fn known(declared: &str, [oci, docker]: [&str; 2]) -> Result<String, ManifestError> {
    match declared {
        "" => Ok(oci.to_owned()),
        _ if declared == oci || declared == docker => Ok(declared.to_owned()),
        _ => Err(ManifestError::MediaType(quote(declared))),
    }
}

fn image(config: RawDescriptor, layers: Vec<RawDescriptor>) -> Result<Content, ManifestError> {
    let config = config.check()?;
    if !CONFIGS.contains(&config.media_type.as_str()) {
        return Err(ManifestError::NotAnImage(quote(&config.media_type)));
    }
    if config.size > CONFIG_LIMIT {
        return Err(ManifestError::ConfigSize { size: config.size });
    }
    let layers = layers.into_iter().map(|layer| check_layer(layer.check()?));
    Ok(Content::Image { config, layers: layers.collect::<Result<_, _>>()? })
}

fn check_layer(layer: Descriptor) -> Result<Descriptor, ManifestError> {
    if LAYERS.contains(&layer.media_type.as_str()) {
        return Ok(layer);
    }
    Err(ManifestError::LayerType { media_type: quote(&layer.media_type), digest: layer.digest })
}

/// The digest of the entry that fits best; the first of several that fit equally.
pub(crate) fn select(entries: &[IndexEntry], wanted: &Platform) -> Result<Digest, ManifestError> {
    let fitting = entries.iter().filter_map(|entry| {
        let distance = wanted.distance_to(entry.platform.as_ref()?)?;
        Some((distance, entry))
    });
    match fitting.min_by_key(|(distance, _)| *distance) {
        Some((_, entry)) => parse_digest(&entry.digest),
        None => Err(no_platform(entries, wanted)),
    }
}

fn no_platform(entries: &[IndexEntry], wanted: &Platform) -> ManifestError {
    let mut offered: Vec<_> = entries
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        // Attestations are filed under this name.
        .filter(|platform| platform.os != "unknown")
        .map(|platform| quote(&platform.to_string()))
        .collect();
    let more = if offered.len() > LISTED_PLATFORMS { ", …" } else { "" };
    offered.truncate(LISTED_PLATFORMS);
    let available = if offered.is_empty() { "entries without a platform".into() } else { offered.join(", ") };
    ManifestError::NoPlatform { wanted: wanted.to_string(), available: available + more }
}

pub(crate) fn parse_digest(text: &str) -> Result<Digest, ManifestError> {
    text.parse().map_err(|_| ManifestError::Digest(quote(text)))
}

/// A word from outside, fit for a message.
fn quote(text: &str) -> String {
    let mut quoted: String = text.chars().filter(char::is_ascii_graphic).take(QUOTED_CHARACTERS).collect();
    if text.len() > quoted.len() {
        quoted.push('…');
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn digest(character: char) -> String {
        format!("sha256:{}", character.to_string().repeat(64))
    }

    fn image_json(media_type: &str, layer_type: &str) -> Value {
        json!({
            "schemaVersion": 2, "mediaType": media_type,
            "config": {"mediaType": CONFIGS[1], "digest": digest('a'), "size": 7},
            "layers": [{"mediaType": layer_type, "digest": digest('b'), "size": 9}],
        })
    }

    fn read(value: &Value) -> Result<Document, ManifestError> {
        parse(value.to_string().as_bytes())
    }

    #[test]
    fn every_layer_format_of_docker_and_oci_is_read() {
        for layer in LAYERS {
            let document = read(&image_json(DOCKER_MANIFEST, layer)).unwrap();
            assert_eq!(document.media_type, DOCKER_MANIFEST);
            let Content::Image { config, layers } = document.content else { panic!("{layer}") };
            assert_eq!((config.size, layers[0].size), (7, 9));
            assert_eq!(layers[0].digest.as_str(), digest('b'));
        }
        let mut untyped = image_json("", LAYERS[0]);
        untyped.as_object_mut().unwrap().remove("mediaType");
        assert_eq!(read(&untyped).unwrap().media_type, OCI_MANIFEST);
    }

    #[test]
    fn what_is_not_an_image_is_refused_by_name() {
        let ok = || image_json(OCI_MANIFEST, LAYERS[1]);
        let with = |pointer: &str, value: Value| {
            let mut document = ok();
            *document.pointer_mut(pointer).unwrap() = value;
            read(&document).unwrap_err()
        };
        assert_eq!(with("/schemaVersion", json!(1)), ManifestError::Schema1);
        assert_eq!(with("/mediaType", json!(format!("{DOCKER_SCHEMA1}+prettyjws"))), ManifestError::Schema1);
        assert!(matches!(with("/mediaType", json!(OCI_INDEX)), ManifestError::MediaType(_)));
        assert!(matches!(with("/config/mediaType", json!("application/helm")), ManifestError::NotAnImage(_)));
        assert!(matches!(with("/config/size", json!(CONFIG_LIMIT + 1)), ManifestError::ConfigSize { .. }));
        assert!(matches!(with("/config/size", json!(-1)), ManifestError::Json { .. }));
        assert!(matches!(with("/layers/0/digest", json!("sha512:00")), ManifestError::Digest(_)));
        assert!(matches!(
            with("/layers/0/digest", json!("sha256:../../etc/passwd")),
            ManifestError::Digest(_)
        ));
        for foreign in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "",
        ] {
            let error = with("/layers/0/mediaType", json!(foreign));
            assert!(matches!(error, ManifestError::LayerType { .. }), "{foreign}");
        }
        let mut both = ok();
        both["manifests"] = json!([]);
        assert_eq!(read(&both).unwrap_err(), ManifestError::Ambiguous);
        assert!(matches!(read(&json!({"schemaVersion": 2})), Err(ManifestError::MediaType(_))));
        assert!(matches!(parse(b"<html>secret</html>"), Err(ManifestError::Json { line: 1, .. })));
    }

    fn index(platforms: &[&str]) -> Vec<IndexEntry> {
        let entries = platforms.iter().zip('a'..).map(|(platform, character)| {
            let mut parts = platform.split('/');
            json!({"mediaType": OCI_MANIFEST, "digest": digest(character), "size": 1, "platform":
                {"os": parts.next(), "architecture": parts.next(), "variant": parts.next()}})
        });
        let document = json!({"schemaVersion": 2, "mediaType": DOCKER_INDEX,
            "manifests": entries.collect::<Vec<_>>()});
        let Content::Index(entries) = read(&document).unwrap().content else { panic!("not an index") };
        entries
    }

    #[test]
    fn the_closest_platform_is_selected() {
        let amd64 = "linux/amd64".parse().unwrap();
        let entries = index(&["unknown/unknown", "linux/amd64/v2", "linux/amd64", "linux/amd64"]);
        assert_eq!(select(&entries, &amd64).unwrap().as_str(), digest('c'));
        let arm = "linux/arm/v7".parse().unwrap();
        let entries = index(&["linux/arm/v5", "linux/arm/v6", "linux/arm/v8"]);
        assert_eq!(select(&entries, &arm).unwrap().as_str(), digest('b'));
    }

    #[test]
    fn a_missing_platform_lists_what_there_is() {
        let wanted = "linux/riscv64".parse().unwrap();
        let error = select(&index(&["linux/amd64", "linux/arm/v7", "unknown/unknown"]), &wanted).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the image has no linux/riscv64 variant, only linux/amd64, linux/arm/v7"
        );
        let entries: Vec<IndexEntry> = serde_json::from_value(json!([{"digest": digest('a')}])).unwrap();
        assert!(select(&entries, &wanted).unwrap_err().to_string().contains("without a platform"));
    }

    #[test]
    fn quoted_words_are_short_and_printable() {
        assert_eq!(quote("a\u{1b}[31m\nb"), "a[31mb…");
        assert_eq!(quote(&"x".repeat(1000)).chars().count(), QUOTED_CHARACTERS + 1);
    }
}
