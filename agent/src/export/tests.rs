//! A store made by hand, as it should be and as a hostile build leaves it. That what is assembled equals what buildah
//! pushes is shown end to end: every sealed layer has the digest that buildah wrote into the config.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::error::chain;
use crate::seal::testing::{digest, gzip, tar_of};

const CONTENT: &[u8] = b"content\n";
const DOCKER: &str = "application/vnd.docker.distribution.manifest.v2+json";

struct Place {
    store: TempDir,
    out: TempDir,
    image: Digest,
}

impl Place {
    /// An image with one layer for each name, a file with [`CONTENT`].
    fn new(names: &[&str]) -> Self {
        let (store, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let place = Self { store, out, image: digest(b"") };
        let tars: Vec<_> = names.iter().map(|name| tar_of(name, CONTENT)).collect();
        let diff_ids: Vec<_> = tars.iter().map(|tar| digest(tar)).collect();
        let mut index = Vec::new();
        for ((name, tar), diff_id) in names.iter().zip(&tars).zip(&diff_ids) {
            let id = format!("id-of-{name}");
            place.put(&format!("overlay/{id}/diff/{name}"), CONTENT);
            place.describe(&id, tar, name);
            index.push(json!({"id": id, "diff-digest": diff_id, "diff-size": tar.len()}));
        }
        place.put("overlay-layers/layers.json", json!(index).to_string().as_bytes());
        place.with_image(&diff_ids)
    }

    fn with_image(mut self, diff_ids: &[Digest]) -> Self {
        let config = json!({"os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string();
        self.image = digest(config.as_bytes());
        let layers: Vec<Value> = diff_ids.iter().map(|_| json!({"size": 1, "digest": self.image})).collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": DOCKER, "config": {}, "layers": layers});
        let directory = format!("overlay-images/{}", self.image.hex());
        self.put(&format!("{directory}/manifest"), manifest.to_string().as_bytes());
        let name = BASE64.encode(self.image.to_string());
        self.put(&format!("{directory}/={name}"), config.as_bytes());
        self
    }

    /// Header, file, padding: what tar-split writes for an archive with one file.
    fn describe(&self, id: &str, tar: &[u8], name: &str) {
        let lines = [
            json!({"type": 2, "payload": BASE64.encode(&tar[..512]), "position": 0}),
            json!({"type": 1, "name": name, "size": CONTENT.len(), "payload": "AAAAAAAAAAA=", "position": 1}),
            json!({"type": 2, "payload": BASE64.encode(&tar[512 + CONTENT.len()..]), "position": 2}),
        ];
        let text = lines.map(|line| line.to_string() + "\n").concat();
        self.put(&format!("overlay-layers/{id}.tar-split.gz"), &gzip(text.as_bytes()));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.store.path().join(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), bytes).unwrap();
    }

    fn export(&self, present: &[Digest]) -> Result<(), ExportError> {
        let (store, out) = (File::open(self.store.path()).unwrap(), File::open(self.out.path()).unwrap());
        let empty = TempDir::new().unwrap();
        let empty = File::open(empty.path()).unwrap();
        let order = Order { image: self.image.clone(), present: present.iter().cloned().collect() };
        export(&[empty.as_fd(), store.as_fd()], out.as_fd(), &order)
    }

    fn exported(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.out.path().join(name)).ok()
    }

    /// The export fails, in these words.
    #[track_caller]
    fn refused(&self, words: &str) {
        let error = self.export(&[]).unwrap_err();
        assert!(error.is_the_stores_fault(), "{error:?}");
        assert!(chain(&error).contains(words), "{}", chain(&error));
        assert!(self.exported("manifest.json").is_none());
    }
}

#[test]
fn layers_are_assembled_as_they_were() {
    let place = Place::new(&["a", "b"]);
    place.export(&[]).unwrap();
    for name in ["a", "b"] {
        let tar = tar_of(name, CONTENT);
        assert_eq!(place.exported(digest(&tar).hex()), Some(tar));
    }
    let config = place.exported(place.image.hex()).unwrap();
    assert_eq!(digest(&config), place.image);
}

#[test]
fn layers_that_are_present_are_not_even_looked_for() {
    let place = Place::new(&["a", "b"]);
    let (old, new) = (digest(&tar_of("a", CONTENT)), digest(&tar_of("b", CONTENT)));
    fs::remove_dir_all(place.path("overlay/id-of-a")).unwrap();
    fs::remove_file(place.path("overlay-layers/id-of-a.tar-split.gz")).unwrap();
    place.export(std::slice::from_ref(&old)).unwrap();
    assert!(place.exported(old.hex()).is_none());
    let manifest: Value = serde_json::from_slice(&place.exported("manifest.json").unwrap()).unwrap();
    assert_eq!(manifest["layers"][0]["digest"], json!(old));
    let written = place.exported(new.hex()).unwrap().len();
    assert_eq!(manifest["layers"][1]["size"], json!(written));
}

#[test]
fn a_layer_that_is_stacked_twice_is_written_once() {
    let layer = digest(&tar_of("a", CONTENT));
    let place = Place::new(&["a"]).with_image(&[layer.clone(), layer.clone()]);
    place.export(&[]).unwrap();
    let manifest: Value = serde_json::from_slice(&place.exported("manifest.json").unwrap()).unwrap();
    assert_eq!(manifest["layers"][0], manifest["layers"][1]);
    assert_eq!(fs::read_dir(place.out.path()).unwrap().count(), 3);
}

#[test]
fn what_is_missing_is_named() {
    let mut place = Place::new(&["a"]);
    place.put("overlay-layers/layers.json", b"[]");
    place.refused("no store has layer sha256:");
    place.image = digest(b"another");
    place.refused("no store has image sha256:");
}

#[test]
fn links_and_pipes_are_not_followed_and_not_waited_for() {
    let secret = TempDir::new().unwrap();
    fs::write(secret.path().join("a"), CONTENT).unwrap();
    let image = Place::new(&["a"]).image;
    let manifest = format!("overlay-images/{}/manifest", image.hex());
    let names = [
        "overlay/id-of-a/diff/a",
        "overlay-layers/id-of-a.tar-split.gz",
        "overlay-layers/layers.json",
        manifest.as_str(),
    ];
    for name in names {
        let place = Place::new(&["a"]);
        let moved = place.path("moved");
        fs::rename(place.path(name), &moved).unwrap();
        symlink(&moved, place.path(name)).unwrap();
        place.refused(name.rsplit('/').next().unwrap());
        let place = Place::new(&["a"]);
        fs::remove_file(place.path(name)).unwrap();
        mknodat(CWD, place.path(name), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        place.refused(name.rsplit('/').next().unwrap());
    }
    let place = Place::new(&["a"]);
    fs::remove_dir_all(place.path("overlay/id-of-a/diff")).unwrap();
    symlink(secret.path(), place.path("overlay/id-of-a/diff")).unwrap();
    place.refused("overlay/id-of-a/diff");
}

#[test]
fn names_do_not_leave_the_layer() {
    for name in ["../secret", "x/../../secret", "/../secret"] {
        let place = Place::new(&["a"]);
        place.put("overlay/id-of-a/secret", CONTENT);
        place.put("overlay/id-of-a/diff/x/y", b"");
        place.describe("id-of-a", &tar_of("a", CONTENT), name);
        place.refused("cannot be read as a plain file");
    }
    let place = Place::new(&["a"]);
    place.describe("id-of-a", &tar_of("a", CONTENT), "/a");
    place.export(&[]).unwrap();
    // As a store's name of a layer.
    let place = Place::new(&["a"]);
    let layer = digest(&tar_of("a", CONTENT));
    let index = json!([{"id": "../../etc", "diff-digest": layer}]);
    place.put("overlay-layers/layers.json", index.to_string().as_bytes());
    place.refused("cannot be read as a plain file");
}

#[test]
fn a_file_of_another_length_is_refused() {
    let place = Place::new(&["a"]);
    place.put("overlay/id-of-a/diff/a", b"longer than described");
    place.refused("21 bytes, not 8 as described");
}

#[test]
fn descriptions_are_bounded_and_whole() {
    let bomb = gzip(&vec![b'0'; 17 << 20]);
    let half = &gzip(b"{\"type\":2,\"payload\":\"\"}\n")[..20];
    let cases: [(&[u8], &str); 5] = [
        (&bomb, "cut off or too long"),
        (half, "cannot be read"),
        (b"no gzip", "cannot be read"),
        (&gzip(b"{\"type\":2"), "cut off or too long"),
        (&gzip(b"{\"type\":9}\n"), "unknown type 9"),
    ];
    for (description, words) in cases {
        let place = Place::new(&["a"]);
        place.put("overlay-layers/id-of-a.tar-split.gz", description);
        place.refused(words);
    }
}

#[test]
fn documents_are_bounded() {
    let place = Place::new(&["a"]);
    let path = place.path(&format!("overlay-images/{}/manifest", place.image.hex()));
    let mut file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(1 << 40)).unwrap();
    file.write_all(b"}").unwrap();
    place.refused("has more than 4194304 bytes");
}

#[test]
fn nothing_in_the_way_is_written_over() {
    let place = Place::new(&["a"]);
    symlink("/etc/passwd", place.out.path().join("manifest.json")).unwrap();
    let error = place.export(&[]).unwrap_err();
    assert!(matches!(error, ExportError::Write(_)), "{error:?}");
}
