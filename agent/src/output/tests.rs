//! Every form of output, read back by skopeo; destinations that fail (shell).

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_protocol::request::ImageFormat;
use serde_json::Value;

use super::*;
use crate::seal::BaseLayer;
use crate::seal::manifest::Compression;
use crate::seal::testing::*;

/// A sealed image in a store, and a directory for outputs.
struct Case {
    sealed: Sealed,
    store: Store,
    work: Scratch,
}

impl Case {
    fn new(export: &Export) -> Self {
        let store = Store::new();
        Self { sealed: export.seal(&[], &store).unwrap(), store, work: Scratch::new() }
    }

    fn by_hand(format: ImageFormat) -> Self {
        let contents = [tar_of("a", b"first"), tar_of("b", &vec![b'b'; 400_000])];
        Self::new(&Export::by_hand(format, Compression::None, &contents))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn writer(&self) -> Writer<'_> {
        Writer { blobs: &self.store.blobs, should_stop: &|| false }
    }

    /// Writes `form` with `@` as the working directory; gives what went to standard output.
    fn write(&self, form: &str) -> Result<Vec<u8>, OutputError> {
        let mut stdout = Vec::new();
        self.write_with(&self.writer(), form, &mut stdout).map(|()| stdout)
    }

    fn write_with(&self, writer: &Writer<'_>, form: &str, stdout: &mut dyn Write) -> Result<(), OutputError> {
        let text = form.replace('@', self.work.path().to_str().unwrap());
        match OutputSpec::parse(&text).unwrap() {
            OutputSpec::Image(output) => writer.image(&output, &self.sealed, stdout),
            OutputSpec::Files(output) => {
                let layer = &self.sealed.layers[1];
                let plain = tar_of("b", &vec![b'b'; 400_000]);
                assert_eq!(self.store.put(&plain), layer.diff_id);
                writer.files(&output, (&layer.diff_id, plain.len() as u64), stdout, &mut |tar, root| {
                    unpack(tar, root, b"x")
                })
            }
        }
    }

    /// Everything in the working directory: kind, mode and content by path.
    fn snapshot(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        let mut pending = vec![self.work.path().to_owned()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
                let metadata = fs::symlink_metadata(entry.path()).unwrap();
                let content = if metadata.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
                if metadata.is_dir() {
                    pending.push(entry.path());
                }
                found.insert(entry.path(), (metadata.mode(), content));
            }
        }
        found
    }
}

/// Stands for the guarded extractor: a file, in a directory that its owner may not write to.
fn unpack(mut tar: File, root: BorrowedFd<'_>, content: &[u8]) -> Result<(), UnpackFailure> {
    let mut bytes = Vec::new();
    tar.read_to_end(&mut bytes).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root)));
    fs::create_dir(path.join("closed")).unwrap();
    fs::write(path.join("closed/file"), content).unwrap();
    fs::set_permissions(path.join("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    if tar::Archive::new(bytes.as_slice()).entries().unwrap().count() == 1 {
        return Ok(());
    }
    Err(UnpackFailure { reason: Reason::CandidateCorrupt, source: "no entry".into() })
}

fn skopeo_json(arguments: &[&str]) -> Value {
    serde_json::from_slice(&skopeo(arguments)).unwrap()
}

/// The diff ids and the user, as skopeo reads them from the config.
fn config_facts(config: &Value) -> (Vec<String>, String) {
    let diff_ids = serde_json::from_value(config["rootfs"]["diff_ids"].clone()).unwrap();
    (diff_ids, config["config"]["User"].as_str().unwrap().to_owned())
}

fn check_with_skopeo(case: &Case, source: &str, same_digest: bool) {
    let config = skopeo(&["inspect", "--config", "--raw", source]);
    assert_eq!(digest(&config), case.sealed.image.config_digest, "{source}");
    let (diff_ids, user) = config_facts(&serde_json::from_slice(&config).unwrap());
    let expected: Vec<_> = case.sealed.layers.iter().map(|l| l.diff_id.to_string()).collect();
    assert_eq!((diff_ids, user.as_str()), (expected, "65532"), "{source}");
    let copy = case.path("copy");
    let destination = format!("dir:{}", copy.display());
    if same_digest {
        assert_eq!(
            digest(&skopeo(&["inspect", "--raw", source])),
            case.sealed.image.manifest_digest,
            "{source}"
        );
        skopeo(&["copy", "--preserve-digests", source, &destination]);
        assert_eq!(fs::read(copy.join("manifest.json")).unwrap(), case.sealed.manifest, "{source}");
    } else {
        // An archive of docker has no manifest; skopeo makes one up while it copies and verifies every layer.
        skopeo(&["copy", source, &destination]);
    }
    fs::remove_dir_all(copy).unwrap();
}

#[test]
fn skopeo_reads_every_form_and_finds_the_same_image() {
    for format in [ImageFormat::Docker, ImageFormat::Oci] {
        let (export, image_id) = Export::by_buildah(format, &["-D"]);
        let case = Case::new(&export);
        assert_eq!(case.sealed.image.config_digest, image_id);
        let mut forms = vec![("docker-archive:@/d.tar", false), ("dir:@/dir", true)];
        if format == ImageFormat::Oci {
            forms.extend([("oci:@/oci", true), ("oci-archive:@/o.tar", true)]);
        }
        for (form, same_digest) in forms {
            case.write(form).unwrap();
            let source = form.replace('@', case.work.path().to_str().unwrap());
            check_with_skopeo(&case, &source, same_digest);
        }
    }
}

#[test]
fn skopeo_finds_images_by_the_name_they_were_given() {
    let case = Case::by_hand(ImageFormat::Oci);
    for form in
        ["docker-archive:@/d.tar:r.example:5000/team/app:1.0", "oci:@/oci:v1", "oci-archive:@/o.tar:v1"]
    {
        case.write(form).unwrap();
        check_with_skopeo(
            &case,
            &form.replace('@', case.work.path().to_str().unwrap()),
            !form.starts_with("docker"),
        );
    }
    let listed = skopeo_json(&["list-tags", &format!("docker-archive:{}", case.path("d.tar").display())]);
    assert_eq!(listed["Tags"][0], "r.example:5000/team/app:1.0");
}

/// An image whose base layer has a length that nobody noted.
fn case_with_base() -> Case {
    let contents = [tar_of("base", &vec![b'0'; 100_000]), tar_of("b", &vec![b'b'; 400_000])];
    let export = Export::by_hand(ImageFormat::Oci, Compression::None, &contents);
    let store = Store::new();
    let blob = zstd(&contents[0]);
    let media_type = Compression::Zstd.media_type(ImageFormat::Oci).unwrap().to_owned();
    let (diff_id, size) = (digest(&contents[0]), blob.len() as u64);
    let base = BaseLayer { diff_id, digest: store.put(&blob), size, media_type };
    let sealed = export.seal(&[base], &store).unwrap();
    assert_eq!(sealed.layers[0].unpacked, None);
    Case { sealed, store, work: Scratch::new() }
}

#[test]
fn an_archive_on_standard_output_is_the_same_as_in_a_file() {
    let case = case_with_base();
    for form in ["docker-archive", "oci-archive"] {
        case.write(&format!("{form}:@/file")).unwrap();
        let stdout = case.write(&format!("{form}:-")).unwrap();
        assert!(stdout == fs::read(case.path("file")).unwrap(), "{form}");
        check_with_skopeo(&case, &format!("{form}:{}", case.path("file").display()), form == "oci-archive");
    }
    assert_eq!(case.write("-").unwrap(), tar_of("b", &vec![b'b'; 400_000]));
}

#[test]
fn gnu_tar_lists_the_archive_and_its_layers() {
    let case = case_with_base();
    case.write("docker-archive:@/file").unwrap();
    let mut list = std::process::Command::new("tar");
    let listing = run(list.env("TZ", "UTC").args(["--full-time", "-tvf"]).arg(case.path("file")));
    let listing = String::from_utf8(listing).unwrap();
    assert_eq!(listing.lines().count(), 4, "{listing}");
    let plain = |line: &str| line.starts_with("-rw-r--r-- 0/0 ") && line.contains(" 1970-01-01 00:00:00 ");
    assert!(listing.lines().all(plain), "{listing}");
    let mut archive = tar::Archive::new(File::open(case.path("file")).unwrap());
    let sizes = archive.entries().unwrap().map(|entry| 512 + entry.unwrap().size().next_multiple_of(512));
    assert_eq!(fs::metadata(case.path("file")).unwrap().len(), sizes.sum::<u64>() + 1024);
    let layer = format!("{}.tar", case.sealed.layers[0].diff_id.hex());
    let plain = run(std::process::Command::new("tar").arg("-xOf").arg(case.path("file")).arg(&layer));
    assert_eq!(digest(&plain), case.sealed.layers[0].diff_id);
}

#[test]
fn outputs_are_the_same_every_time() {
    let (first, second) = (case_with_base(), case_with_base());
    for form in [
        "docker-archive:@/d.tar:app",
        "oci:@/oci:v1",
        "oci-archive:@/o.tar",
        "dir:@/dir",
        "type=tar,dest=@/f.tar",
    ] {
        first.write(form).unwrap();
        second.write(form).unwrap();
    }
    let relative = |case: &Case| -> BTreeMap<_, _> {
        let strip = |path: PathBuf| path.strip_prefix(case.work.path()).unwrap().to_owned();
        case.snapshot().into_iter().map(|(path, entry)| (strip(path), entry)).collect()
    };
    assert!(relative(&first) == relative(&second));
    assert!(!first.snapshot().is_empty());
}

#[test]
fn an_existing_file_is_replaced_also_behind_a_link_and_parents_are_made() {
    let case = Case::by_hand(ImageFormat::Oci);
    fs::create_dir(case.path("real")).unwrap();
    fs::write(case.path("real/file"), "old").unwrap();
    symlink("real/file", case.path("link")).unwrap();
    case.write("oci-archive:@/link").unwrap();
    assert!(fs::symlink_metadata(case.path("link")).unwrap().is_symlink());
    assert!(fs::metadata(case.path("real/file")).unwrap().len() > 1000);
    case.write("oci-archive:@/a/b/file").unwrap();
    case.write("oci:@/a/c/d").unwrap();
    assert!(case.path("a/c/d/index.json").exists() && case.path("a/b/file").exists());
}

#[test]
fn an_empty_directory_or_an_earlier_layout_is_replaced() {
    let case = Case::by_hand(ImageFormat::Oci);
    fs::create_dir(case.path("x")).unwrap();
    for form in ["oci:@/x", "oci:@/x:v2", "dir:@/x", "dir:@/x", "oci:@/x"] {
        case.write(form).unwrap();
        let layout_is_oci = case.path("x/oci-layout").exists();
        assert_eq!(
            (layout_is_oci, case.path("x/version").exists()),
            (form.starts_with("oci"), form.starts_with("dir"))
        );
        assert_eq!(fs::read_dir(case.work.path()).unwrap().count(), 1, "{form} left something beside it");
    }
    fs::create_dir(case.path("files")).unwrap();
    case.write("type=local,dest=@/files").unwrap();
    assert_eq!(fs::read(case.path("files/closed/file")).unwrap(), b"x");
}

/// Expects a refusal that leaves everything as it was, in the check before a build as well.
fn refuse(case: &Case, form: &str, expected: &str) {
    let before = case.snapshot();
    let text = form.replace('@', case.work.path().to_str().unwrap());
    for error in
        [preflight(&OutputSpec::parse(&text).unwrap()).expect_err(form), case.write(form).expect_err(form)]
    {
        assert!(error.to_string().contains(expected), "{form}: {error}");
        assert_eq!(error.reason(), Reason::BadRequest, "{form}: {error}");
    }
    assert!(case.snapshot() == before, "{form}");
}

#[test]
fn what_kiln_did_not_write_is_not_replaced() {
    let case = Case::by_hand(ImageFormat::Oci);
    fs::create_dir(case.path("full")).unwrap();
    fs::write(case.path("full/precious"), "x").unwrap();
    for form in ["oci:@/full", "dir:@/full", "type=local,dest=@/full", "@/full"] {
        refuse(&case, form, "holds `precious`");
    }
    case.write("oci:@/layout").unwrap();
    refuse(&case, "type=local,dest=@/layout", "replaces only an empty directory: empty it");
    fs::write(case.path("layout/blobs/sha256/notes.txt"), "x").unwrap();
    refuse(&case, "oci:@/layout", "holds `notes.txt`");
    fs::remove_file(case.path("layout/blobs/sha256/notes.txt")).unwrap();
    fs::write(case.path("layout/index.json"), r#"{"manifests":[{},{}]}"#).unwrap();
    refuse(&case, "oci:@/layout", "a layout of 2 images");
    case.write("dir:@/dir").unwrap();
    fs::create_dir(case.path("dir/extra")).unwrap();
    refuse(&case, "dir:@/dir", "holds `extra`");
}

#[test]
fn destinations_of_the_wrong_kind_are_refused() {
    let case = Case::by_hand(ImageFormat::Oci);
    fs::create_dir(case.path("dir")).unwrap();
    fs::write(case.path("file"), "x").unwrap();
    symlink("/dev/null", case.path("null")).unwrap();
    refuse(&case, "docker-archive:@/dir", "not a plain file");
    refuse(&case, "oci-archive:@/null", "not a plain file");
    refuse(&case, "docker-archive:/dev/null", "`-` for standard output");
    refuse(&case, "oci:@/file", "not a directory");
    refuse(&case, "oci:/", "name a file or directory in it");
    refuse(&case, "oci-archive:@/file/below", "cannot look at");
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
}

#[test]
fn a_failed_output_leaves_the_destination_as_it_was() {
    let mut case = Case::by_hand(ImageFormat::Oci);
    let forms =
        ["docker-archive:@/d.tar", "oci:@/oci", "oci-archive:@/o.tar", "dir:@/dir", "type=local,dest=@/new"];
    for form in &forms[..4] {
        case.write(form).unwrap();
    }
    let before = case.snapshot();
    fs::remove_file(case.store.blobs.path(&case.sealed.layers[1].descriptor.digest)).unwrap();
    for form in &forms[..4] {
        let error = case.write(form).expect_err(form);
        assert_eq!(error.reason(), Reason::StoreCorrupt, "{form}: {error}");
        assert!(case.snapshot() == before, "{form}");
    }
    // A base layer whose content is not what the config says.
    case.sealed.layers.truncate(1);
    case.sealed.layers[0].diff_id = digest(b"other");
    let error = case.write("docker-archive:@/d.tar").unwrap_err();
    assert!(matches!(error, OutputError::Content { .. }), "{error}");
    // A blob that was cut off.
    let blob = case.store.blobs.path(&case.sealed.layers[0].descriptor.digest);
    let bytes = fs::read(&blob).unwrap();
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, &bytes[1..]).unwrap();
    let error = case.write("oci-archive:@/o.tar").unwrap_err();
    assert!(error.to_string().contains("bytes long"), "{error}");
    assert!(case.snapshot() == before);
}

#[test]
fn a_layout_that_changes_at_the_last_instant_is_put_back() {
    let case = Case::by_hand(ImageFormat::Oci);
    case.write("oci:@/oci").unwrap();
    let staged = Staged::new(&case.path("oci"), Kind::Layout).unwrap();
    fs::write(case.path("oci/precious"), "x").unwrap();
    let before = case.snapshot();
    let error = staged.exchange().unwrap_err();
    assert!(error.to_string().contains("holds `precious`"), "{error}");
    assert!(case.snapshot() == before);
    drop(staged);
    assert_eq!(fs::read_dir(case.work.path()).unwrap().count(), 1);
}

#[test]
fn a_layout_in_the_hands_of_another_process_is_left_to_it() {
    let case = Case::by_hand(ImageFormat::Oci);
    case.write("oci:@/oci").unwrap();
    let before = case.snapshot();
    let other = File::open(case.path("oci")).unwrap();
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let error = case.write("oci:@/oci").unwrap_err();
    assert!(matches!(error, OutputError::Busy { .. }), "{error}");
    assert!(case.snapshot() == before);
    drop(other);
    case.write("oci:@/oci").unwrap();
}

#[test]
fn a_failed_unpack_is_reported_with_its_reason_and_removed() {
    let case = Case::by_hand(ImageFormat::Oci);
    let output = FilesOutput::Directory(case.path("new"));
    let archive = case.store.put(b"");
    let outcome = case
        .writer()
        .files(&output, (&archive, 0), &mut io::sink(), &mut |tar, root| unpack(tar, root, b"x"));
    let error = outcome.unwrap_err();
    assert_eq!(error.reason(), Reason::CandidateCorrupt, "{error}");
    assert!(case.snapshot().is_empty());
}

#[test]
fn a_stop_at_any_step_leaves_the_destination_as_it_was() {
    let case = Case::by_hand(ImageFormat::Oci);
    for form in ["docker-archive:@/d.tar", "oci:@/oci", "dir:@/dir", "type=tar,dest=@/t.tar"] {
        let steps = AtomicUsize::new(0);
        let count = || {
            steps.fetch_add(1, Ordering::Relaxed);
            false
        };
        let writer = Writer { blobs: &case.store.blobs, should_stop: &count };
        case.write_with(&writer, form, &mut io::sink()).unwrap();
        let before = case.snapshot();
        for last in 0..steps.load(Ordering::Relaxed) {
            let left = AtomicUsize::new(last);
            let stop =
                || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err();
            let writer = Writer { blobs: &case.store.blobs, should_stop: &stop };
            let error = case.write_with(&writer, form, &mut io::sink()).unwrap_err();
            assert_eq!(error.reason(), Reason::Cancelled, "{form} {last}");
            assert!(case.snapshot() == before, "{form} {last}");
        }
    }
}

#[test]
fn the_destination_changes_only_when_everything_is_written() {
    let case = Case::by_hand(ImageFormat::Oci);
    let output = FilesOutput::Directory(case.path("new"));
    let plain = tar_of("b", b"x");
    let archive = case.store.put(&plain);
    let seen = Cell::new(None);
    case.writer()
        .files(&output, (&archive, plain.len() as u64), &mut io::sink(), &mut |tar, root| {
            let outcome = unpack(tar, root, b"x");
            seen.set(Some(case.path("new").exists()));
            outcome
        })
        .unwrap();
    assert_eq!((seen.get(), case.path("new").exists()), (Some(false), true));
}

#[test]
fn a_layout_that_changes_during_the_write_is_not_deleted() {
    let case = Case::by_hand(ImageFormat::Oci);
    case.write("oci:@/oci").unwrap();
    let spoil = || {
        fs::write(case.path("oci/precious"), "x").unwrap();
        false
    };
    let writer = Writer { blobs: &case.store.blobs, should_stop: &spoil };
    let error = case.write_with(&writer, "oci:@/oci", &mut io::sink()).unwrap_err();
    assert!(error.to_string().contains("holds `precious`"), "{error}");
    assert_eq!(fs::read(case.path("oci/precious")).unwrap(), b"x");
    assert_eq!(fs::read_dir(case.work.path()).unwrap().count(), 1);
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not() {
    let case = Case::by_hand(ImageFormat::Oci);
    let abandoned = Staged::new(&case.path("oci"), Kind::Layout).unwrap();
    fs::write(abandoned.path().join("half"), "x").unwrap();
    let copy = abandoned.path().with_extension("killed");
    fs::create_dir(&copy).unwrap();
    fs::write(copy.join("half"), "x").unwrap();
    fs::write(case.path(".kiln-other-name"), "x").unwrap();
    case.write("oci:@/oci").unwrap();
    assert!(!copy.exists(), "left by a killed process");
    assert!(abandoned.path().join("half").exists(), "another process works here");
    assert!(case.path(".kiln-other-name").exists(), "belongs to another destination");
    drop(abandoned);
    assert_eq!(fs::read_dir(case.work.path()).unwrap().count(), 2);
}

#[test]
fn concurrent_outputs_to_one_place_leave_one_whole_result() {
    let case = Case::by_hand(ImageFormat::Oci);
    let expected = Case::by_hand(ImageFormat::Oci);
    expected.write("oci:@/oci").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    case.write("oci-archive:@/o.tar").unwrap();
                    // The directory may be in the hands of another thread; that is the only failure.
                    if let Err(error) = case.write("oci:@/oci") {
                        assert!(matches!(error, OutputError::Busy { .. }), "{error:?}");
                    }
                }
            });
        }
    });
    case.write("oci:@/oci").unwrap();
    assert_eq!(fs::read_dir(case.work.path()).unwrap().count(), 2);
    assert_eq!(count_files(&case.path("oci")), count_files(&expected.path("oci")));
}

#[test]
fn a_closed_standard_output_is_an_error() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let case = Case::by_hand(ImageFormat::Oci);
    for form in ["docker-archive:-", "oci-archive:-", "-"] {
        let error = case.write_with(&case.writer(), form, &mut Closed).unwrap_err();
        assert_eq!(error.reason(), Reason::ClientGone, "{form}: {error}");
    }
}

#[test]
fn small_files_are_written_whole_with_the_permissions_of_the_umask() {
    let case = Case::by_hand(ImageFormat::Oci);
    let path = case.path("iid");
    for _ in 0..2 {
        write_text(&path, &image_id(&case.sealed.image.config_digest)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!((text.len(), &text[..7]), (71, "sha256:"));
    }
    let plain = case.path("plain");
    fs::write(&plain, "").unwrap();
    let expected = fs::metadata(plain).unwrap().mode() & 0o644;
    assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, expected);
}
