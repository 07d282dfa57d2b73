//! Manifest and config of an image: what is accepted, and the manifest that is written instead (pure).

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use kiln_protocol::Digest;
use kiln_protocol::request::ImageFormat;
use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Longest piece of untrusted text that an error message repeats.
const EXCERPT_CHARS: usize = 100;
/// The one version of both manifest formats that has digests.
const SCHEMA_VERSION: u64 = 2;

/// How the bytes of a layer are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar archive.
    None,
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames.
    Zstd,
}

/// Every layer type that is accepted. Docker's schema 2 has none for zstd.
const LAYER_TYPES: [(ImageFormat, Compression, &str); 5] = [
    (ImageFormat::Docker, Compression::None, "application/vnd.docker.image.rootfs.diff.tar"),
    (ImageFormat::Docker, Compression::Gzip, "application/vnd.docker.image.rootfs.diff.tar.gzip"),
    (ImageFormat::Oci, Compression::None, "application/vnd.oci.image.layer.v1.tar"),
    (ImageFormat::Oci, Compression::Gzip, "application/vnd.oci.image.layer.v1.tar+gzip"),
    (ImageFormat::Oci, Compression::Zstd, "application/vnd.oci.image.layer.v1.tar+zstd"),
];

impl Compression {
    /// The compression that a layer type of either format stands for.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        LAYER_TYPES.iter().find(|(_, _, name)| *name == media_type).map(|(_, compression, _)| *compression)
    }

    /// The name of such a layer in a manifest of this format, if the format has one.
    pub fn media_type(self, format: ImageFormat) -> Option<&'static str> {
        LAYER_TYPES.iter().find(|(f, c, _)| *f == format && *c == self).map(|(_, _, name)| *name)
    }
}

/// The media type of a manifest.
pub const fn manifest_type(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        ImageFormat::Oci => "application/vnd.oci.image.manifest.v1+json",
    }
}

/// The media type of a config.
pub const fn config_type(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Docker => "application/vnd.docker.container.image.v1+json",
        ImageFormat::Oci => "application/vnd.oci.image.config.v1+json",
    }
}

/// A blob as a manifest names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the bytes are.
    pub media_type: String,
    /// Number of bytes.
    pub size: u64,
    /// sha256 of the bytes.
    pub digest: Digest,
}

/// Why a manifest or config is refused. Text from the file is shortened and escaped.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not JSON, or JSON without the needed fields.
    #[error("{document} cannot be read: {message}")]
    Syntax {
        /// `manifest` or `config`.
        document: &'static str,
        /// What the parser says.
        message: String,
    },
    /// A manifest that says another schema version.
    #[error("manifest has schema version {found}; only version {SCHEMA_VERSION} is accepted")]
    SchemaVersion {
        /// The version that it says.
        found: u64,
    },
    /// Manifest, config or layer of a type that was not asked for or is not known.
    #[error("{what} has type `{found}`; accepted here: {accepted}")]
    MediaType {
        /// `manifest`, `config` or `layer N`.
        what: String,
        /// The type that it says.
        found: String,
        /// The accepted ones.
        accepted: String,
    },
    /// A layer that is to be fetched from elsewhere.
    #[error("layer {layer} names foreign URLs; every layer must be part of the export")]
    ForeignUrls {
        /// Counted from 0.
        layer: usize,
    },
    /// Manifest and config disagree.
    #[error("manifest has {layers} layers, config has {diff_ids} diff ids")]
    LayerCount {
        /// Layers of the manifest.
        layers: usize,
        /// Diff ids of the config.
        diff_ids: usize,
    },
    /// A root filesystem that is not made of layers.
    #[error("config has a root filesystem of type `{found}`; only `layers` is accepted")]
    RootFilesystem {
        /// The type that it says.
        found: String,
    },
}

/// Untrusted text, fit for a message: escaped, on one line, short.
pub fn excerpt(text: &str) -> String {
    let mut shown: String = text.chars().take(EXCERPT_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(EXCERPT_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    media_type: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: u64,
    config: RawDescriptor,
    layers: Vec<RawDescriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: String,
    size: u64,
    digest: Digest,
    #[serde(default)]
    urls: Vec<String>,
}

impl RawDescriptor {
    fn checked(self) -> Descriptor {
        Descriptor { media_type: self.media_type, size: self.size, digest: self.digest }
    }
}

/// A manifest of known format whose config and layers are of known types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Docker schema 2 or OCI.
    pub format: ImageFormat,
    /// The config.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// Annotations of the manifest itself; always empty in Docker's format.
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Reads a manifest and refuses every type but those of `format`.
    pub fn parse(bytes: &[u8], format: ImageFormat) -> Result<Self, FormatError> {
        let kind: Kind = parse_json("manifest", bytes)?;
        check_kind(kind.media_type.as_deref(), format)?;
        let raw: RawManifest = parse_json("manifest", bytes)?;
        if raw.schema_version != SCHEMA_VERSION {
            return Err(FormatError::SchemaVersion { found: raw.schema_version });
        }
        expect_type("config".to_owned(), &raw.config.media_type, config_type(format))?;
        let layers = raw.layers.into_iter().enumerate().map(|(i, l)| check_layer(i, l, format));
        let annotations = if format == ImageFormat::Oci { raw.annotations } else { BTreeMap::new() };
        Ok(Self {
            format,
            config: raw.config.checked(),
            layers: layers.collect::<Result<_, _>>()?,
            annotations,
        })
    }

    /// The bytes of this manifest: always the same for the same content.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(&Rendered {
            schema_version: SCHEMA_VERSION,
            media_type: manifest_type(self.format),
            config: &self.config,
            layers: &self.layers,
            annotations: &self.annotations,
        })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rendered<'a> {
    schema_version: u64,
    media_type: &'static str,
    config: &'a Descriptor,
    layers: &'a [Descriptor],
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

/// An OCI manifest may leave its own type out; Docker's must not.
fn check_kind(found: Option<&str>, format: ImageFormat) -> Result<(), FormatError> {
    match (found, format) {
        (None, ImageFormat::Oci) => Ok(()),
        (found, _) => expect_type("manifest".to_owned(), found.unwrap_or_default(), manifest_type(format)),
    }
}

fn expect_type(what: String, found: &str, accepted: &str) -> Result<(), FormatError> {
    if found == accepted {
        return Ok(());
    }
    Err(FormatError::MediaType { what, found: excerpt(found), accepted: accepted.to_owned() })
}

fn check_layer(layer: usize, raw: RawDescriptor, format: ImageFormat) -> Result<Descriptor, FormatError> {
    if !raw.urls.is_empty() {
        return Err(FormatError::ForeignUrls { layer });
    }
    let accepted: Vec<_> =
        LAYER_TYPES.iter().filter(|(f, _, _)| *f == format).map(|(_, _, name)| *name).collect();
    if !accepted.contains(&raw.media_type.as_str()) {
        let (what, found) = (format!("layer {layer}"), excerpt(&raw.media_type));
        return Err(FormatError::MediaType { what, found, accepted: accepted.join(", ") });
    }
    Ok(raw.checked())
}

#[derive(Deserialize)]
struct RawConfig {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: String,
    diff_ids: Vec<Digest>,
}

/// The objects of a config that readers decode into fields.
#[derive(Deserialize)]
struct ConfigObjects {
    #[serde(rename = "rootfs")]
    _rootfs: PlainObject,
    #[serde(rename = "config")]
    _config: Option<PlainObject>,
}

/// The diff ids of a config, lowest layer first.
pub fn parse_config(bytes: &[u8]) -> Result<Vec<Digest>, FormatError> {
    let _: PlainObject = parse_json("config", bytes)?;
    let _: ConfigObjects = parse_json("config", bytes)?;
    let config: RawConfig = parse_json("config", bytes)?;
    if config.rootfs.kind != "layers" {
        return Err(FormatError::RootFilesystem { found: excerpt(&config.rootfs.kind) });
    }
    Ok(config.rootfs.diff_ids)
}

/// An object that no two readers understand differently.
///
/// Docker's own reader matches field names without regard to case and lets the last one win, so
/// `{"User":"nobody","user":"root"}` would show a hook one user and run as another.
struct PlainObject;

impl<'de> Deserialize<'de> for PlainObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PlainObject)
    }
}

impl<'de> Visitor<'de> for PlainObject {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut seen = HashSet::new();
        while let Some((key, IgnoredAny)) = map.next_entry::<String, _>()? {
            // Upper case first: some letters reach their plain form only that way (U+017F, U+212A).
            if !seen.insert(key.to_uppercase().to_lowercase()) {
                return Err(A::Error::custom(format!("field `{key}` appears more than once, in any case")));
            }
        }
        Ok(self)
    }
}

fn parse_json<T: DeserializeOwned>(document: &'static str, bytes: &[u8]) -> Result<T, FormatError> {
    serde_json::from_slice(bytes)
        .map_err(|error| FormatError::Syntax { document, message: excerpt(&error.to_string()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: u8) -> String {
        Digest::from_sha256([byte; 32]).to_string()
    }

    fn oci(layer_type: &str, extra: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{}","size":2,"digest":"{}"}},
            "layers":[{{"mediaType":"{layer_type}","size":3,"digest":"{}"{extra}}}]}}"#,
            config_type(ImageFormat::Oci),
            digest(1),
            digest(2)
        )
    }

    #[test]
    fn a_manifest_is_read_and_written_the_same_way_every_time() {
        let text = oci("application/vnd.oci.image.layer.v1.tar+gzip", r#","unknown":1"#);
        let manifest = Manifest::parse(text.as_bytes(), ImageFormat::Oci).unwrap();
        let bytes = manifest.to_bytes().unwrap();
        let again = Manifest::parse(&bytes, ImageFormat::Oci).unwrap();
        assert_eq!(again, manifest);
        assert_eq!(again.to_bytes().unwrap(), bytes);
        assert!(
            bytes.starts_with(
                br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","#
            )
        );
        assert!(!String::from_utf8(bytes).unwrap().contains("unknown"));
    }

    #[test]
    fn refused_manifests() {
        let good = "application/vnd.oci.image.layer.v1.tar";
        let rows = [
            (oci("application/vnd.oci.image.layer.nondistributable.v1.tar", ""), "layer 0 has type"),
            (oci("application/vnd.docker.image.rootfs.diff.tar.gzip", ""), "layer 0 has type"),
            (oci(good, r#","urls":["http://x/"]"#), "foreign URLs"),
            (oci(good, "").replace(&digest(2), "../../etc/passwd"), "is not a digest"),
            (oci(good, "").replace(":3,", ":-3,"), "invalid value"),
            (oci(good, "").replace(":3,", ":3,\"size\":4,"), "duplicate field"),
            (oci(good, "").replace("Version\":2", "Version\":1"), "schema version 1"),
            (oci(good, "").replace("image.config", "image.secret"), "config has type"),
            (
                r#"{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#.into(),
                "manifest has type",
            ),
            (oci(good, "").replacen('{', r#"{"mediaType":"x\u001b[31m","#, 1), r"`x\u{1b}[31m`"),
            ("[".repeat(100_000), "cannot be read"),
            (String::new(), "cannot be read"),
            ("null".into(), "cannot be read"),
        ];
        for (text, expected) in rows {
            let error = Manifest::parse(text.as_bytes(), ImageFormat::Oci).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
            assert!(error.len() < 1000, "{error}");
        }
        let error = Manifest::parse(oci(good, "").as_bytes(), ImageFormat::Docker).unwrap_err();
        assert!(error.to_string().contains("manifest has type ``"), "{error}");
    }

    #[test]
    fn a_config_gives_its_diff_ids() {
        let text = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["{}"]}},"config":null}}"#, digest(3));
        assert_eq!(parse_config(text.as_bytes()).unwrap(), [Digest::from_sha256([3; 32])]);
    }

    #[test]
    fn refused_configs() {
        let rows = [
            (r#"{"rootfs":{"type":"tree","diff_ids":[]}}"#, "of type `tree`"),
            (r#"{"rootfs":{"type":"layers","diff_ids":["md5:0"]}}"#, "is not a digest"),
            (r#"{"rootfs":{"type":"layers","diff_ids":[]},"RootFS":{}}"#, "more than once"),
            (r#"{"rootfs":{"type":"layers","diff_ids":[],"Diff_IDs":[]}}"#, "more than once"),
            (
                r#"{"rootfs":{"type":"layers","diff_ids":[]},"config":{"User":"a","user":"root"}}"#,
                "more than once",
            ),
            (
                r#"{"rootfs":{"type":"layers","diff_ids":[]},"config":{"User":"a","u\u017fer":""}}"#,
                "more than once",
            ),
            ("{}", "missing field"),
            ("[]", "cannot be read"),
        ];
        for (text, expected) in rows {
            let error = parse_config(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
    }

    #[test]
    fn layer_types_convert_between_formats_where_both_have_one() {
        for (from, to, expected) in [
            ("application/vnd.oci.image.layer.v1.tar+gzip", ImageFormat::Docker, Some(LAYER_TYPES[1].2)),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", ImageFormat::Oci, Some(LAYER_TYPES[3].2)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", ImageFormat::Docker, None),
            ("application/vnd.oci.image.layer.v1.tar+encrypted", ImageFormat::Oci, None),
        ] {
            let found = Compression::of_media_type(from).and_then(|c| c.media_type(to));
            assert_eq!(found, expected, "{from}");
        }
    }
}
