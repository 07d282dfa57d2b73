//! Which files make up each form of an image (pure).

use std::collections::BTreeSet;

use kiln_protocol::Digest;
use serde_json::{Value, json};

use crate::seal::{Sealed, SealedLayer};

/// Annotation with the name of an image in a layout's index.
const NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// First bytes of the file that marks a `dir:` layout.
pub(super) const DIR_VERSION_PREFIX: &str = "Directory Transport Version: ";
/// The version that has every layer as a file of its own name.
const DIR_VERSION: &str = "1.1";

/// One file or directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Relative path.
    pub(super) name: String,
    pub(super) source: Source,
}

/// Where its content comes from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// It is a directory.
    Directory,
    /// These bytes.
    Bytes(Vec<u8>),
    /// A blob of the store.
    Blob { digest: Digest, size: u64 },
    /// The plain content of a layer.
    PlainLayer(SealedLayer),
}

fn entry(name: impl Into<String>, source: Source) -> Entry {
    Entry { name: name.into(), source }
}

fn document(name: &str, value: &Value) -> Entry {
    entry(name, Source::Bytes(value.to_string().into_bytes()))
}

/// Config and layers, each once, in order of their digests.
fn blobs(sealed: &Sealed) -> BTreeSet<(Digest, u64)> {
    let layers = sealed.layers.iter().map(|layer| &layer.descriptor);
    layers.chain([&sealed.config]).map(|blob| (blob.digest.clone(), blob.size)).collect()
}

/// An OCI image layout.
pub(super) fn oci(sealed: &Sealed, reference: Option<&str>) -> Vec<Entry> {
    let mut manifest = json!(sealed.descriptor());
    if let Some(name) = reference {
        manifest["annotations"] = json!({ NAME_ANNOTATION: name });
    }
    let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
    let mut entries = vec![
        document("oci-layout", &json!({"imageLayoutVersion": "1.0.0"})),
        document(
            "index.json",
            &json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [manifest]}),
        ),
        entry("blobs", Source::Directory),
        entry("blobs/sha256", Source::Directory),
        entry(path(&sealed.image.manifest_digest), Source::Bytes(sealed.manifest.clone())),
    ];
    let blobs = blobs(sealed).into_iter();
    entries.extend(blobs.map(|(digest, size)| entry(path(&digest), Source::Blob { digest, size })));
    entries
}

/// skopeo's `dir:` layout.
pub(super) fn dir(sealed: &Sealed) -> Vec<Entry> {
    let version = format!("{DIR_VERSION_PREFIX}{DIR_VERSION}\n");
    let mut entries = vec![
        entry("version", Source::Bytes(version.into_bytes())),
        entry("manifest.json", Source::Bytes(sealed.manifest.clone())),
    ];
    let blobs = blobs(sealed).into_iter();
    entries.extend(blobs.map(|(digest, size)| entry(digest.hex().to_owned(), Source::Blob { digest, size })));
    entries
}

/// What `docker save` writes: layers without compression, named by their diff ids.
pub(super) fn docker_archive(sealed: &Sealed, reference: Option<&str>) -> Vec<Entry> {
    let config = format!("{}.json", sealed.config.digest.hex());
    let layer_name = |layer: &SealedLayer| format!("{}.tar", layer.diff_id.hex());
    let names: Vec<_> = sealed.layers.iter().map(layer_name).collect();
    let tags: Vec<_> = reference.into_iter().collect();
    let manifest = json!([{"Config": config, "RepoTags": tags, "Layers": names}]);
    let (digest, size) = (sealed.config.digest.clone(), sealed.config.size);
    let mut entries =
        vec![document("manifest.json", &manifest), entry(config, Source::Blob { digest, size })];
    let mut seen = BTreeSet::new();
    let layers = sealed.layers.iter().filter(|layer| seen.insert(&layer.diff_id));
    entries.extend(layers.map(|layer| entry(layer_name(layer), Source::PlainLayer(layer.clone()))));
    entries
}

#[cfg(test)]
mod tests {
    use kiln_protocol::request::ImageFormat;
    use kiln_protocol::result::SealedImage;

    use super::*;
    use crate::seal::manifest::Descriptor;

    fn sealed() -> Sealed {
        let digest = |byte| Digest::from_sha256([byte; 32]);
        let descriptor =
            |byte| Descriptor { media_type: String::new(), size: u64::from(byte), digest: digest(byte) };
        let layer =
            |blob, diff| SealedLayer { descriptor: descriptor(blob), diff_id: digest(diff), unpacked: None };
        Sealed {
            image: SealedImage {
                manifest_digest: digest(1),
                config_digest: digest(2),
                format: ImageFormat::Oci,
                size: 0,
            },
            manifest: b"m".to_vec(),
            config: descriptor(2),
            layers: vec![layer(9, 19), layer(3, 13), layer(9, 19)],
        }
    }

    fn names(entries: &[Entry]) -> Vec<String> {
        let short = |name: &str| name.replace(&"0".repeat(2), "");
        entries.iter().map(|e| short(&e.name).chars().take(17).collect()).collect()
    }

    #[test]
    fn a_blob_that_is_used_twice_is_written_once() {
        assert_eq!(oci(&sealed(), None).len(), 5 + 3);
        assert_eq!(dir(&sealed()).len(), 2 + 3);
        assert_eq!(docker_archive(&sealed(), None).len(), 2 + 2);
    }

    #[test]
    fn documents_come_before_the_blobs() {
        assert_eq!(names(&oci(&sealed(), None))[..4], ["oci-layout", "index.json", "blobs", "blobs/sha256"]);
        assert_eq!(names(&dir(&sealed()))[..2], ["version", "manifest.json"]);
        assert_eq!(names(&docker_archive(&sealed(), None))[0], "manifest.json");
    }

    #[test]
    fn a_name_is_written_where_there_is_one() {
        let text =
            |entries: &[Entry], name: &str| match &entries.iter().find(|e| e.name == name).unwrap().source {
                Source::Bytes(bytes) => String::from_utf8(bytes.clone()).unwrap(),
                other => panic!("{other:?}"),
            };
        assert!(
            text(&oci(&sealed(), Some("v1")), "index.json")
                .contains(r#"{"org.opencontainers.image.ref.name":"v1"}"#)
        );
        assert!(!text(&oci(&sealed(), None), "index.json").contains("annotations"));
        let archive = text(&docker_archive(&sealed(), Some("app:1")), "manifest.json");
        assert!(archive.contains(r#""RepoTags":["app:1"]"#), "{archive}");
        assert_eq!(archive.matches(".tar").count(), 3, "a layer that is stacked twice is listed twice");
    }
}
