//! Generated files that buildah reads inside a slot (pure).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::BaseRecord;
use crate::plan;
use crate::slot::wire::SlotFile;

/// The index of names for one build: buildah reads it as one more read-only image store.
pub fn names_index(names: &[(String, &BaseRecord)]) -> Vec<SlotFile> {
    let mut images: BTreeMap<String, (Value, Vec<&str>)> = BTreeMap::new();
    for (name, record) in names {
        let id = record.config.hex().to_owned();
        images.entry(id).or_insert_with(|| (record.image.clone(), Vec::new())).1.push(name);
    }
    let images: Vec<Value> = images
        .into_values()
        .map(|(mut image, names)| {
            image["names"] = json!(names);
            image
        })
        .collect();
    let dir = plan::path::NAMES;
    let file =
        |path: &str, contents: Vec<u8>| SlotFile { path: format!("{dir}/{path}"), contents, mode: 0o644 };
    vec![
        file("overlay-images/images.json", Value::Array(images).to_string().into_bytes()),
        file("overlay-images/images.lock", Vec::new()),
        file("overlay-layers/layers.json", b"[]".to_vec()),
        file("overlay-layers/layers.lock", Vec::new()),
        file("overlay/.keep", Vec::new()),
    ]
}

/// Files that every slot with buildah in it needs: no host configuration reaches it.
pub fn container_files() -> Vec<SlotFile> {
    let file = |path: &str, contents: &str| SlotFile {
        path: path.to_owned(),
        contents: contents.as_bytes().to_vec(),
        mode: 0o644,
    };
    vec![
        file("/etc/containers/policy.json", r#"{"default":[{"type":"insecureAcceptAnything"}]}"#),
        file("/etc/containers/registries.conf", "unqualified-search-registries = [\"docker.io\"]\n"),
        file(
            "/etc/containers/storage.conf",
            "[storage]\ndriver = \"overlay\"\nrunroot = \"/job/run/containers\"\ngraphroot = \"/job/root\"\n",
        ),
        file("/etc/containers/containers.conf", ""),
        file("/etc/passwd", "root:x:0:0:root:/job/home:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        file("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        file("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        file("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ]
}
