//! The documents of buildah's store (pure).
//!
//! `overlay-layers/NAME.tar-split.gz` describes a layer's tar archive as JSON, one record a line: pieces of the
//! archive itself (headers, padding), and files whose content lies in the layer's directory.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use kiln_protocol::Digest;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ExportError;

/// More layers than any image that runs; the seal has the same bound.
const MAX_LAYERS: usize = 512;
const MANIFEST: &str = "the manifest";
const CONFIG: &str = "the config";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A stored manifest, of which only the layers change.
#[derive(Debug)]
pub(super) struct Manifest(serde_json::Map<String, Value>);

impl Manifest {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ExportError> {
        serde_json::from_slice(bytes).map(Self).map_err(|e| ExportError::malformed(MANIFEST, e))
    }

    /// The sizes that it gives its layers; buildah's own images have one for each diff id.
    pub(super) fn sizes(&self, layers: usize) -> Result<Vec<u64>, ExportError> {
        let listed = self.0.get("layers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        if listed.len() != layers {
            let reason = format!("{} layers, the config has {layers} diff ids", listed.len());
            return Err(ExportError::malformed(MANIFEST, reason));
        }
        Ok(listed.iter().map(|layer| layer["size"].as_u64().unwrap_or(0)).collect())
    }

    /// Names the plain archives: a base that is exported unchanged has compressed ones in its manifest.
    pub(super) fn set_layers(&mut self, diff_ids: &[Digest], sizes: &[u64]) {
        let oci = match self.0.get("mediaType").and_then(Value::as_str) {
            Some(kind) => kind == OCI_MANIFEST,
            // OCI lets a manifest leave its own type out.
            None => true,
        };
        let media_type = if oci {
            "application/vnd.oci.image.layer.v1.tar"
        } else {
            "application/vnd.docker.image.rootfs.diff.tar"
        };
        let layers = diff_ids.iter().zip(sizes);
        let layers = layers.map(|(d, size)| json!({"mediaType": media_type, "size": size, "digest": d}));
        self.0.insert("layers".to_owned(), layers.collect());
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, ExportError> {
        serde_json::to_vec(&self.0).map_err(|e| ExportError::malformed(MANIFEST, e))
    }
}

#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

/// The layers that a config lists, lowest first.
pub(super) fn diff_ids(config: &[u8]) -> Result<Vec<Digest>, ExportError> {
    let config: Config = serde_json::from_slice(config).map_err(|e| ExportError::malformed(CONFIG, e))?;
    let diff_ids = config.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() > MAX_LAYERS {
        let reason = format!("{} layers, the limit is {MAX_LAYERS}", diff_ids.len());
        return Err(ExportError::malformed(CONFIG, reason));
    }
    Ok(diff_ids)
}

#[derive(Deserialize)]
struct LayerRecord {
    id: String,
    #[serde(rename = "diff-digest")]
    diff_id: Option<String>,
}

/// The store's name of the layer with this diff id, from `layers.json`.
pub(super) fn layer_name(layers: &[u8], diff_id: &Digest) -> serde_json::Result<Option<String>> {
    let records: Vec<LayerRecord> = serde_json::from_slice(layers)?;
    let wanted = diff_id.to_string();
    Ok(records.into_iter().find(|r| r.diff_id.as_deref() == Some(&*wanted)).map(|r| r.id))
}

/// One part of a layer's tar archive.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The content of a file of the layer.
    File {
        /// Its path in the archive.
        name: Vec<u8>,
        /// Its length.
        size: u64,
    },
}

#[derive(Deserialize)]
struct RawPart {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(default)]
    name: String,
    /// Instead of a name that is no UTF-8.
    name_raw: Option<String>,
    #[serde(default)]
    size: u64,
    payload: Option<String>,
}

const FILE: u8 = 1;
const SEGMENT: u8 = 2;

/// Reads one record. `None` for an entry without content: links, directories, empty files.
pub(super) fn part(record: &[u8]) -> Result<Option<Part>, String> {
    let raw: RawPart = serde_json::from_slice(record).map_err(|e| e.to_string())?;
    let decode = |text: &str| BASE64.decode(text).map_err(|e| e.to_string());
    match raw.kind {
        SEGMENT => Ok(Some(Part::Bytes(decode(&raw.payload.unwrap_or_default())?))),
        FILE if raw.size == 0 => Ok(None),
        FILE => {
            let name = raw.name_raw.as_deref().map_or(Ok(raw.name.into_bytes()), decode)?;
            Ok(Some(Part::File { name, size: raw.size }))
        }
        other => Err(format!("a record of unknown type {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &[u8], size: u64) -> Part {
        Part::File { name: name.to_vec(), size }
    }

    #[test]
    fn records_are_pieces_and_files() {
        let cases: [(&str, Option<Part>); 7] = [
            (r#"{"type":2,"payload":"YWI=","position":0}"#, Some(Part::Bytes(b"ab".to_vec()))),
            (r#"{"type":2,"payload":"","position":3}"#, Some(Part::Bytes(Vec::new()))),
            (r#"{"type":1,"name":"x/","payload":null,"position":1}"#, None),
            (r#"{"type":1,"name":"a","size":7,"payload":"AA==","position":1}"#, Some(file(b"a", 7))),
            (r#"{"type":1,"name":"\u003ca\u003e","size":1,"payload":""}"#, Some(file(b"<a>", 1))),
            (r#"{"type":1,"name_raw":"/2E=","size":1,"payload":""}"#, Some(file(b"\xffa", 1))),
            (r#"{"type":1,"size":0,"payload":null}"#, None),
        ];
        for (record, expected) in cases {
            assert_eq!(part(record.as_bytes()).unwrap(), expected, "{record}");
        }
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for record in ["", "[]", r#"{"type":3}"#, r#"{"type":2,"payload":"?"}"#, r#"{"type":1,"size":-1}"#] {
            assert!(part(record.as_bytes()).is_err(), "{record}");
        }
    }

    #[test]
    fn manifests_name_plain_layers_in_their_own_format() {
        let digest: Digest = format!("sha256:{}", "ab".repeat(32)).parse().unwrap();
        let cases = [
            (r#"{"layers":[{"size":1}],"annotations":{"a":"b"}}"#, "application/vnd.oci.image.layer.v1.tar"),
            (
                r#"{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","layers":[{"size":1}]}"#,
                "application/vnd.docker.image.rootfs.diff.tar",
            ),
        ];
        for (text, expected) in cases {
            let mut manifest = Manifest::parse(text.as_bytes()).unwrap();
            assert_eq!(manifest.sizes(1).unwrap(), [1]);
            assert!(manifest.sizes(2).is_err());
            manifest.set_layers(std::slice::from_ref(&digest), &[7]);
            let written: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();
            let layer = json!({"mediaType": expected, "size": 7, "digest": digest});
            assert_eq!(written["layers"], json!([layer]));
            assert_eq!(written["annotations"].is_object(), text.contains("annotations"));
        }
    }

    #[test]
    fn too_many_layers_are_refused() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let config = |count| json!({"rootfs": {"diff_ids": vec![&digest; count]}}).to_string();
        assert_eq!(diff_ids(config(MAX_LAYERS).as_bytes()).unwrap().len(), MAX_LAYERS);
        assert!(diff_ids(config(MAX_LAYERS + 1).as_bytes()).is_err());
        assert!(diff_ids(br#"{"rootfs":{"diff_ids":null}}"#).unwrap().is_empty());
    }
}
