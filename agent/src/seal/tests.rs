//! Honest and hostile exports (shell).

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_protocol::Reason;
use serde_json::json;

use super::manifest::{config_type, manifest_type};
use super::testing::*;
use super::*;

const FORMATS: [ImageFormat; 2] = [ImageFormat::Docker, ImageFormat::Oci];

fn contents() -> Vec<Vec<u8>> {
    vec![tar_of("a", b"first"), tar_of("b", &vec![b'b'; 400_000])]
}

/// Decompressed content of a sealed layer.
fn content(store: &Store, layer: &SealedLayer) -> Vec<u8> {
    let bytes = store.read(&layer.descriptor.digest);
    let mut plain = Vec::new();
    match Compression::of_media_type(&layer.descriptor.media_type).unwrap() {
        Compression::None => plain = bytes,
        Compression::Zstd => plain = zstd::decode_all(bytes.as_slice()).unwrap(),
        Compression::Gzip => {
            flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).unwrap();
        }
    }
    plain
}

fn assert_consistent(store: &Store, sealed: &Sealed) {
    assert_eq!(digest(&sealed.manifest), sealed.image.manifest_digest);
    assert_eq!(store.read(&sealed.image.manifest_digest), sealed.manifest);
    assert_eq!(digest(&store.read(&sealed.config.digest)), sealed.image.config_digest);
    for layer in &sealed.layers {
        let bytes = store.read(&layer.descriptor.digest);
        assert_eq!(
            (digest(&bytes), bytes.len() as u64),
            (layer.descriptor.digest.clone(), layer.descriptor.size)
        );
        assert_eq!(digest(&content(store, layer)), layer.diff_id);
    }
    let blobs = sealed.layers.iter().map(|l| l.descriptor.size).sum::<u64>();
    assert_eq!(sealed.image.size, sealed.manifest.len() as u64 + sealed.config.size + blobs);
}

#[test]
fn what_buildah_exports_is_sealed_with_the_same_image_id() {
    let zstd = ["--compression-format", "zstd"];
    for (format, flags) in [
        (ImageFormat::Docker, &["-D"][..]),
        (ImageFormat::Docker, &[]),
        (ImageFormat::Oci, &["--disable-compression"]),
        (ImageFormat::Oci, &zstd),
    ] {
        let (export, image_id) = Export::by_buildah(format, flags);
        let store = Store::new();
        let sealed = export.seal(&[], &store).unwrap();
        assert_eq!(sealed.image.config_digest, image_id, "{format:?} {flags:?}");
        assert_eq!(sealed.layers.len(), 2, "{format:?} {flags:?}");
        assert_consistent(&store, &sealed);
        let (names, uncompressed) = (sealed.manifest.clone(), flags.len() == 1);
        let kept = export.manifest()["layers"][0]["digest"] == json!(sealed.layers[0].descriptor.digest);
        assert_eq!(kept, !uncompressed, "{}", String::from_utf8_lossy(&names));
        let second = Store::new();
        assert_eq!(export.seal(&[], &second).unwrap(), sealed);
    }
}

#[test]
fn every_compression_is_sealed_and_plain_layers_become_gzip() {
    for (format, compression) in [
        (ImageFormat::Docker, Compression::None),
        (ImageFormat::Docker, Compression::Gzip),
        (ImageFormat::Oci, Compression::None),
        (ImageFormat::Oci, Compression::Gzip),
        (ImageFormat::Oci, Compression::Zstd),
    ] {
        let (export, store) = (Export::by_hand(format, compression, &contents()), Store::new());
        let sealed = export.seal(&[], &store).unwrap();
        assert_consistent(&store, &sealed);
        let expected = if compression == Compression::Zstd { Compression::Zstd } else { Compression::Gzip };
        for (layer, plain) in sealed.layers.iter().zip(contents()) {
            assert_eq!(Some(layer.descriptor.media_type.as_str()), expected.media_type(format));
            assert_eq!(layer.unpacked, Some(plain.len() as u64));
        }
    }
}

#[test]
fn a_gzip_header_names_neither_time_nor_system_and_the_level_matters() {
    let export = Export::by_hand(ImageFormat::Docker, Compression::None, &contents());
    let seal_at = |gzip_level| {
        let store = Store::new();
        let options = SealOptions { gzip_level, ..options(ImageFormat::Docker) };
        let sealed = seal(export.fd(), &[], &store.blobs, &options).unwrap();
        assert_eq!(
            store.read(&sealed.layers[1].descriptor.digest)[3..10],
            [0, 0, 0, 0, 0, sealed_xfl(gzip_level), 255]
        );
        sealed.layers[1].descriptor.size
    };
    assert!(seal_at(9) < seal_at(0));
}

/// The byte of the gzip header that tells the fastest and the best level.
fn sealed_xfl(level: u32) -> u8 {
    match level {
        9 => 2,
        0 | 1 => 4,
        _ => 0,
    }
}

#[test]
fn the_same_layer_twice_is_sealed_once() {
    let twice = [contents()[0].clone(), contents()[0].clone()];
    let (export, store) = (Export::by_hand(ImageFormat::Oci, Compression::None, &twice), Store::new());
    let sealed = export.seal(&[], &store).unwrap();
    assert_eq!(sealed.layers[0], sealed.layers[1]);
    assert_eq!(store.files(), 3, "manifest, config, one layer");
}

fn base(store: &Store, media_type: &str, blob: &[u8]) -> BaseLayer {
    let (digest, size) = (store.put(blob), blob.len() as u64);
    BaseLayer { diff_id: super::testing::digest(&contents()[0]), digest, size, media_type: media_type.into() }
}

#[test]
fn a_base_layer_keeps_the_bases_own_blob_and_the_export_is_not_read() {
    let blob = [gzip(&contents()[0]), gzip(b"")].concat();
    let gzip_types = FORMATS.map(|format| Compression::Gzip.media_type(format).unwrap());
    for format in FORMATS {
        for media_type in gzip_types {
            let (export, store) = (Export::by_hand(format, Compression::None, &contents()), Store::new());
            let base = base(&store, media_type, &blob);
            fs::remove_file(export.layer(0)).unwrap();
            let sealed = export.seal(std::slice::from_ref(&base), &store).unwrap();
            let descriptor = &sealed.layers[0].descriptor;
            assert_eq!(descriptor.digest, base.digest);
            assert_eq!(Some(descriptor.media_type.as_str()), Compression::Gzip.media_type(format));
            assert_eq!(sealed.layers[0].unpacked, None);
            assert_ne!(sealed.layers[1].descriptor.digest, base.digest);
        }
    }
}

#[test]
fn a_base_blob_that_the_format_cannot_name_or_the_store_lacks_is_not_used() {
    let zstd_type = Compression::Zstd.media_type(ImageFormat::Oci).unwrap();
    let frame = zstd(&contents()[0]);
    let cases = [
        (ImageFormat::Docker, zstd_type, true, false),
        (ImageFormat::Oci, zstd_type, true, true),
        (ImageFormat::Oci, zstd_type, false, false),
        (ImageFormat::Oci, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted", true, false),
    ];
    for (format, media_type, present, used) in cases {
        let (export, store) = (Export::by_hand(format, Compression::None, &contents()), Store::new());
        let elsewhere = Store::new();
        let base = base(if present { &store } else { &elsewhere }, media_type, &frame);
        let sealed = export.seal(std::slice::from_ref(&base), &store).unwrap();
        assert_eq!(sealed.layers[0].descriptor.digest == base.digest, used, "{format:?} {media_type}");
        assert_consistent(&store, &sealed);
    }
}

/// Seals an export that was damaged by `damage` and expects `candidate_corrupt` with this message.
fn refuse(name: &str, compression: Compression, expected: &str, damage: impl FnOnce(&Export)) {
    let (export, store) = (Export::by_hand(ImageFormat::Oci, compression, &contents()), Store::new());
    damage(&export);
    let error = export.seal(&[], &store).expect_err(name);
    assert_eq!(error.reason(), Reason::CandidateCorrupt, "{name}: {error}");
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    let message = format!("{error}: {source}");
    assert!(message.contains(expected), "{name}: {message:?} should contain {expected:?}");
    assert!(message.len() < 1000, "{name}: {message}");
}

/// Puts a link to a copy of the file in its place.
fn link_instead(path: &std::path::Path) {
    let copy = path.with_extension("copy");
    fs::rename(path, &copy).unwrap();
    symlink(copy, path).unwrap();
}

fn fifo_instead(path: &std::path::Path) {
    fs::remove_file(path).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

#[test]
fn other_things_than_plain_files_are_refused_and_nothing_hangs() {
    let plain = Compression::None;
    refuse("link as manifest", plain, "symbolic link", |e| link_instead(&e.path("manifest.json")));
    refuse("link as layer", plain, "symbolic link", |e| link_instead(&e.layer(1)));
    refuse("link to outside", plain, "symbolic link", |e| {
        fs::remove_file(e.layer(0)).unwrap();
        symlink("/etc/passwd", e.path("x")).unwrap();
        fs::rename(e.path("x"), e.layer(0)).unwrap();
    });
    refuse("pipe as manifest", plain, "is not a plain file", |e| fifo_instead(&e.path("manifest.json")));
    refuse("pipe as layer", plain, "is not a plain file", |e| fifo_instead(&e.layer(0)));
    refuse("pipe as config", plain, "is not a plain file", |e| {
        let config = e.manifest()["config"]["digest"].as_str().unwrap().replace("sha256:", "");
        fifo_instead(&e.path(&config));
    });
    refuse("directory", plain, "is not a plain file", |e| {
        fs::remove_file(e.layer(0)).unwrap_or_default();
        fs::create_dir(e.layer(0)).unwrap();
    });
    refuse("socket", plain, "cannot be opened", |e| {
        fs::remove_file(e.path("manifest.json")).unwrap();
        UnixListener::bind(e.path("manifest.json")).unwrap();
    });
    refuse("missing manifest", plain, "manifest.json", |e| fs::remove_file(e.path("manifest.json")).unwrap());
    refuse("missing layer", plain, "No such file", |e| fs::remove_file(e.layer(1)).unwrap());
}

#[test]
fn names_that_lead_out_are_not_opened() {
    let directory = Export::by_hand(ImageFormat::Oci, Compression::None, &[]);
    fs::create_dir(directory.path("below")).unwrap();
    fs::write(directory.path("below/file"), "x").unwrap();
    symlink("below", directory.path("link")).unwrap();
    assert!(export::open(directory.fd(), "below/file").is_ok());
    for name in ["../../../../etc/passwd", "/etc/passwd", "link/file", "/proc/self/fd/0", "below/../.."] {
        assert!(matches!(export::open(directory.fd(), name), Err(SealError::Open { .. })), "{name}");
    }
}

#[test]
fn manifests_that_lie_are_refused() {
    let plain = Compression::None;
    let set = |pointer: &'static str, value: serde_json::Value| {
        move |e: &Export| {
            e.edit(|mut manifest| {
                *manifest.pointer_mut(pointer).unwrap() = value;
                manifest
            });
        }
    };
    refuse("path as digest", plain, "is not a digest", set("/layers/0/digest", json!("../../etc/passwd")));
    refuse(
        "path after sha256",
        plain,
        "is not a digest",
        set("/config/digest", json!("sha256:../../etc/passwd")),
    );
    refuse("size too small", plain, "its descriptor says 7", set("/layers/0/size", json!(7)));
    refuse("config size", plain, "config has", set("/config/size", json!(1)));
    refuse("config not there", plain, "No such file", set("/config/digest", json!(digest(b"other"))));
    refuse("unknown type", plain, "layer 1 has type", set("/layers/1/mediaType", json!("text/plain")));
    refuse(
        "other format",
        plain,
        "manifest has type",
        set("/mediaType", json!(manifest_type(ImageFormat::Docker))),
    );
    refuse("no layers", plain, "0 layers, config has 2 diff ids", set("/layers", json!([])));
    refuse("gzip that is none", plain, "does not decompress", |e| {
        let gzip_type = Compression::Gzip.media_type(ImageFormat::Oci);
        set("/layers/0/mediaType", json!(gzip_type))(e);
    });
    refuse("tar that is gzip", Compression::Gzip, "content of layer 0 is", |e| {
        let plain_type = Compression::None.media_type(ImageFormat::Oci);
        set("/layers/0/mediaType", json!(plain_type))(e);
    });
    refuse("foreign", plain, "foreign URLs", |e| {
        e.edit(|mut m| {
            m["layers"][0]["urls"] = json!(["https://elsewhere/"]);
            m
        });
    });
    refuse("huge manifest", plain, "document_bytes", |e| {
        fs::File::create(e.path("manifest.json")).unwrap().set_len(1 << 40).unwrap();
    });
    refuse("swapped order", plain, "content of layer 0", |e| {
        e.edit(|mut m| {
            m["layers"].as_array_mut().unwrap().reverse();
            m
        });
    });
}

#[test]
fn too_much_is_refused() {
    let plain = Compression::None;
    refuse("one layer", plain, "layer_bytes raises it", |e| {
        let path = e.layer(0);
        fs::File::options().write(true).open(path).unwrap().set_len(9 << 20).unwrap();
    });
    refuse("all layers", plain, "total_bytes raises it", |e| {
        let layers: Vec<_> = [1, 2, 3].map(|byte| vec![byte; 7 << 20]).into();
        let diff_ids: Vec<_> = layers.iter().map(|l| digest(l)).collect();
        let plain_type = Compression::None.media_type(ImageFormat::Oci).unwrap();
        e.write(&layers.iter().map(|l| e.put(plain_type, l)).collect::<Vec<_>>(), &diff_ids);
    });
    refuse("many layers", plain, "the limit is 512", |e| {
        let layer = contents()[0].clone();
        let descriptor = e.put(Compression::None.media_type(ImageFormat::Oci).unwrap(), &layer);
        e.write_many(&descriptor, &digest(&layer), 513);
    });
    for compression in [Compression::Gzip, Compression::Zstd] {
        refuse("bomb", compression, "unpacked_bytes raises it", |e| {
            let zeros = vec![0; 64 << 20];
            let bomb = if compression == Compression::Gzip { gzip(&zeros) } else { zstd(&zeros) };
            assert!(bomb.len() < 1 << 20);
            let descriptor = e.put(compression.media_type(ImageFormat::Oci).unwrap(), &bomb);
            e.write(&[descriptor], &[digest(&zeros)]);
        });
    }
}

#[test]
fn compressed_bytes_have_to_be_whole_and_alone() {
    for compression in [Compression::Gzip, Compression::Zstd] {
        let honest = contents()[0].clone();
        let pack = |bytes: &[u8]| if compression == Compression::Gzip { gzip(bytes) } else { zstd(bytes) };
        let file = pack(&honest);
        let cases = [
            (
                "trailing bytes",
                [file.as_slice(), b"PK\x03\x04 something else"].concat(),
                "does not decompress",
            ),
            ("trailing zeros", [file.as_slice(), &[0; 512]].concat(), "does not decompress"),
            ("cut off", file[..file.len() - 1].to_vec(), "does not decompress"),
            ("empty", Vec::new(), "layer 0"),
            ("a second stream", [file.as_slice(), &pack(b"more")].concat(), "content of layer 0"),
            ("other content", pack(b"other"), "content of layer 0"),
        ];
        for (name, bytes, expected) in cases {
            refuse(name, compression, expected, |e| {
                let descriptor = e.put(compression.media_type(ImageFormat::Oci).unwrap(), &bytes);
                e.write(&[descriptor], &[digest(&honest)]);
            });
        }
    }
}

#[test]
fn a_file_whose_digest_is_not_its_name_is_refused() {
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        refuse("flipped byte", compression, "layer 1", |e| {
            let mut bytes = fs::read(e.layer(1)).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(e.layer(1), bytes).unwrap();
        });
    }
    refuse("same content, other gzip", Compression::Gzip, "layer 0 is sha256:", |e| {
        let name = e.layer(0);
        let mut bytes = fs::read(&name).unwrap();
        bytes[4] ^= 1; // the time in the header: decompresses to the same content
        fs::write(&name, bytes).unwrap();
    });
    refuse("flipped config", Compression::None, "config is sha256:", |e| {
        let config = e.manifest()["config"]["digest"].as_str().unwrap().replace("sha256:", "");
        let text = fs::read_to_string(e.path(&config)).unwrap().replace("65532", "00000");
        fs::write(e.path(&config), text).unwrap();
    });
}

#[test]
fn files_that_are_swapped_meanwhile_never_reach_the_sealed_image() {
    let export = Export::by_hand(ImageFormat::Oci, Compression::Gzip, &contents());
    let path = export.layer(1);
    let (good, evil, spare) =
        (fs::read(&path).unwrap(), gzip(&tar_of("evil", &vec![b'e'; 400_000])), export.path("spare"));
    let expected = export.seal(&[], &Store::new()).unwrap();
    let done = AtomicBool::new(false);
    let mut outcomes = [0, 0];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for content in [&evil, &good] {
                    fs::write(&spare, content).unwrap();
                    fs::rename(&spare, &path).unwrap();
                    fs::write(&path, content).unwrap();
                }
            }
        });
        for _ in 0..100 {
            let store = Store::new();
            match export.seal(&[], &store) {
                Ok(sealed) => {
                    outcomes[0] += 1;
                    assert_eq!(sealed, expected);
                    assert_consistent(&store, &sealed);
                }
                Err(error) => {
                    outcomes[1] += 1;
                    assert_eq!(error.reason(), Reason::CandidateCorrupt, "{error}");
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(outcomes[1] > 0, "the swaps were never noticed: {outcomes:?}");
}

#[test]
fn sealed_bytes_do_not_change_with_the_export() {
    let (export, store) =
        (Export::by_hand(ImageFormat::Docker, Compression::Gzip, &contents()), Store::new());
    let sealed = export.seal(&[], &store).unwrap();
    for index in [0, 1] {
        fs::write(export.layer(index), "gone").unwrap();
    }
    assert_consistent(&store, &sealed);
}

#[test]
fn a_failed_seal_leaves_no_layer_and_a_stop_ends_it() {
    for compression in [Compression::None, Compression::Gzip] {
        let (export, store) = (Export::by_hand(ImageFormat::Docker, compression, &contents()), Store::new());
        let options = SealOptions { should_stop: &|| true, ..options(ImageFormat::Docker) };
        let error = seal(export.fd(), &[], &store.blobs, &options).unwrap_err();
        assert_eq!(error.reason(), Reason::Cancelled);
        assert_eq!(store.files(), 1, "the config only");
    }
}

#[test]
fn the_config_is_kept_byte_for_byte() {
    let (export, store) =
        (Export::by_hand(ImageFormat::Docker, Compression::None, &contents()), Store::new());
    let layers: Vec<Descriptor> = serde_json::from_value(export.manifest()["layers"].clone()).unwrap();
    let text = format!(
        "{{ \"x-unknown\" : [1.50], \"rootfs\":{{\"diff_ids\":{},\"type\":\"layers\"}} }}\n",
        serde_json::to_string(&contents().iter().map(|c| digest(c)).collect::<Vec<_>>()).unwrap()
    );
    let config = export.put(config_type(ImageFormat::Docker), text.as_bytes());
    export.edit(|mut manifest| {
        manifest["config"] = json!(config);
        manifest["layers"] = json!(layers);
        manifest
    });
    let sealed = export.seal(&[], &store).unwrap();
    assert_eq!(store.read(&sealed.image.config_digest), text.as_bytes());
}
