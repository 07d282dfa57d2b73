//! What Dockerfiles can say, built by Kiln and by plain buildah: the images are the same.

use std::path::Path;

use kiln_tests::base::{BaseImage, LayerTar};
use kiln_tests::image::Image;
use kiln_tests::lab::Lab;
use kiln_tests::process::Outcome;
use serde_json::json;

/// A place with this Dockerfile.
fn lab(dockerfile: &str) -> Lab {
    let lab = Lab::new();
    lab.dockerfile(dockerfile);
    lab
}

/// A text file of an image, as far as its digest tells.
fn has_content(image: &Image, path: &str, content: &str) {
    let entry = image.entry(path).unwrap_or_else(|| panic!("{path} is missing"));
    assert_eq!(entry.content, kiln_tests::base::digest(content.as_bytes()), "content of {path}");
}

#[test]
fn copy_files_and_directories() {
    let lab =
        lab("FROM busybox:1\nCOPY a b/ /here/\nCOPY b /there/\nCOPY *.txt /texts/\nWORKDIR /w\nCOPY a .\n");
    lab.context.file("a", "A").file("b/c", "C").file("b/d/e", "E").file("x.txt", "X").file("y.txt", "Y");
    let image = lab.compare(&[]);
    has_content(&image, "there/d/e", "E");
    has_content(&image, "texts/y.txt", "Y");
    has_content(&image, "w/a", "A");
}

#[test]
fn multi_stage() {
    let lab = lab(
        "FROM busybox:1 AS one\nRUN echo made > /made\nFROM busybox:1 AS two\nRUN echo unused > /unused\n\
         FROM busybox:1\nCOPY --from=one /made /got\n",
    );
    let image = lab.compare(&[]);
    has_content(&image, "got", "made\n");
    assert!(image.entry("unused").is_none());
}

#[test]
fn copy_from_a_stage_by_number() {
    let lab = lab("FROM busybox:1\nRUN mkdir /d && echo x > /d/x\nFROM scratch\nCOPY --from=0 /d /d\n");
    assert_eq!(lab.compare(&[]).layers.len(), 1);
}

#[test]
fn a_stage_on_top_of_a_stage() {
    let lab =
        lab("FROM busybox:1 AS base\nENV A=1\nRUN echo 1 > /1\nFROM base\nENV B=2\nRUN echo $A$B > /2\n");
    has_content(&lab.compare(&[]), "2", "12\n");
}

#[test]
fn copy_from_an_image() {
    let lab = lab("FROM busybox:1\nCOPY --from=tools/kit:2 /kit /opt/kit\n");
    let kit = LayerTar::default().dir("kit", 0o750).file("kit/tool", 0o4755, b"#!/bin/sh\n");
    lab.registry.push("tools/kit", "2", &BaseImage::new(vec![kit.finish()]));
    assert_eq!(lab.compare(&[]).entry("opt/kit/tool").unwrap().mode, 0o4755);
}

#[test]
fn copy_from_an_index() {
    let lab = lab("FROM busybox:1\nCOPY --from=tools/multi:1 /arch /arch\n");
    push_two_platforms(&lab, "tools/multi");
    has_content(&lab.compare(&[]), "arch", "ours");
}

#[test]
fn a_base_that_is_an_index() {
    let lab = lab("FROM tools/multi:1\nRUN cp /arch /seen\n");
    push_two_platforms(&lab, "tools/multi");
    has_content(&lab.compare(&[]), "seen", "ours");
}

fn push_two_platforms(lab: &Lab, repository: &str) {
    let image = |text: &[u8]| BaseImage::busybox().layer(LayerTar::default().file("arch", 0o644, text)).oci();
    lab.registry.push_index(repository, "1", &[image(b"theirs").architecture("s390x"), image(b"ours")]);
}

#[test]
fn a_base_by_digest() {
    let lab = Lab::new();
    let digest = lab.registry.push("library/busybox", "1", &BaseImage::busybox());
    lab.dockerfile(&format!("FROM busybox@{digest}\nRUN echo x > /x\n"));
    lab.compare(&[]);
}

#[test]
fn chown_and_chmod() {
    let lab =
        lab("FROM busybox:1\nCOPY --chown=65532:10 a /1\nCOPY --chown=nobody b /2\nCOPY --chmod=600 a /3\n\
         ADD --chown=1000 --chmod=4711 a /4\n");
    lab.context.file("a", "A").file("b/c", "C");
    let image = lab.compare(&[]);
    let entry = |path: &str| image.entry(path).unwrap();
    assert_eq!((entry("1").uid, entry("1").gid), (65532, 10));
    assert_eq!((entry("2/c").uid, entry("2/c").gid), (65534, 65534));
    assert_eq!(entry("3").mode, 0o600);
    assert_eq!((entry("4").mode, entry("4").uid), (0o4711, 1000));
}

#[test]
fn build_arguments() {
    let lab = lab(
        "FROM busybox:1\nARG WITH=default\nARG OTHER=default\nARG EMPTY\nRUN echo \"$WITH $OTHER [$EMPTY]\" > /x\n",
    );
    has_content(
        &lab.compare(&["--build-arg", "WITH=given, with = and spaces"]),
        "x",
        "given, with = and spaces default []\n",
    );
}

#[test]
fn scopes_of_build_arguments() {
    let lab = lab(
        "FROM busybox:1 AS one\nARG A=one\nRUN echo \"$A\" > /one\nFROM busybox:1\nRUN echo \"[$A]\" > /before\nARG A\n\
         RUN echo \"[$A]\" > /after\nCOPY --from=one /one /one\n",
    );
    let image = lab.compare(&["--build-arg=A=given"]);
    has_content(&image, "one", "given\n");
    has_content(&image, "before", "[]\n");
    has_content(&image, "after", "[given]\n");
}

#[test]
fn argument_before_from() {
    let lab = lab(
        "ARG VERSION=9\nARG NAME=busybox\nFROM ${NAME}:${VERSION}\nARG VERSION\nRUN echo $VERSION > /version\n",
    );
    has_content(&lab.compare(&["--build-arg=VERSION=1"]), "version", "1\n");
}

#[test]
fn a_bare_argument_takes_its_value_from_the_caller() {
    let lab = lab("FROM busybox:1\nARG GIVEN\nARG MISSING=default\nRUN echo $GIVEN $MISSING > /x\n");
    let command = lab.build_archive().args(["--build-arg=GIVEN", "--build-arg=MISSING"]).env("GIVEN", "mine");
    let _ = command.env("UNRELATED", "canary").run().expect_code(0);
    let image = Image::docker_archive(&lab.archive());
    has_content(&image, "x", "mine default\n");
    assert!(!image.text().contains("canary"));
}

#[test]
fn add_unpacks_archives() {
    let lab = lab("FROM busybox:1\nADD a.tar /plain/\nADD a.tar.gz /packed/\nCOPY a.tar /copied/\n");
    let tar = LayerTar::default().dir("d", 0o711).file("d/f", 0o640, b"F").symlink("d/l", "f").finish();
    let packed = {
        use std::io::Write as _;
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        gzip.finish().unwrap()
    };
    lab.context.file("a.tar", tar).file("a.tar.gz", packed);
    let image = lab.compare(&[]);
    has_content(&image, "packed/d/f", "F");
    assert!(image.entry("copied/a.tar").is_some());
}

#[test]
fn symbolic_links() {
    let lab = lab(
        "FROM busybox:1\nCOPY . /ctx/\nCOPY to-file /resolved\nRUN ln -s nowhere /dangling && ln -s /ctx /loop\n",
    );
    lab.context.file("file", "F").symlink("to-file", "file").symlink("broken", "missing/x").dir("d", 0o755);
    lab.context.symlink("d/up", "../file").symlink("absolute", "/etc/passwd");
    let image = lab.compare(&[]);
    assert_eq!(image.entry("ctx/absolute").unwrap().link, "/etc/passwd");
    assert_eq!(image.entry("ctx/d/up").unwrap().link, "../file");
}

#[test]
fn modes() {
    let lab = lab(
        "FROM busybox:1\nCOPY . /m/\nRUN mkdir -m 1777 /sticky && mkdir -m 2755 /group && touch /s && chmod 6755 /s\n",
    );
    for mode in [0o400, 0o600, 0o640, 0o755, 0o777, 0o511, 0o4755] {
        lab.context.file_mode(&format!("{mode:o}"), "x", mode);
    }
    lab.context.dir("closed", 0o700).dir("open", 0o777);
    let image = lab.compare(&[]);
    assert_eq!(image.entry("s").unwrap().mode, 0o6755);
    assert_eq!(image.entry("m/400").unwrap().mode, 0o400);
}

/// Those of RUN stay links; those of a context become files of their own, as their archive has no inodes.
#[test]
fn hard_links() {
    let lab = lab("FROM busybox:1\nCOPY . /h/\nRUN echo x > /one && ln /one /two && ln /one /bin/three\n");
    lab.context.file("first", "same").dir("d", 0o755).hard_link("d/second", "first");
    let separate = Lab::new();
    separate.context.file("first", "same").file("d/second", "same");
    let image = lab.compare_with(&[], separate.context.path());
    assert_eq!(image.entry("two").unwrap().link, "bin/three");
    assert_eq!(image.entry("h/first").unwrap().link, "");
}

#[test]
fn empty_directories() {
    let lab =
        lab("FROM busybox:1\nCOPY . /e/\nCOPY nothing /n/\nWORKDIR /made/by/workdir\nRUN mkdir -p /a/b/c\n");
    lab.context.dir("nothing", 0o755).dir("deep/er/still", 0o750);
    let image = lab.compare(&[]);
    assert!(image.entry("e/deep/er/still").is_some());
    assert!(image.entry("made/by/workdir").is_some());
}

#[test]
fn user_65532() {
    let lab = lab(
        "FROM busybox:1\nRUN mkdir /w && chown 65532:65532 /w\nUSER 65532:65532\nRUN id -u > /w/id && id -g >> /w/id\n",
    );
    let image = lab.compare(&[]);
    has_content(&image, "w/id", "65532\n65532\n");
    assert_eq!(image.entry("w/id").unwrap().uid, 65532);
}

#[test]
fn user_nobody() {
    let lab = lab("FROM busybox:1\nUSER nobody\nRUN id -un > /tmp/id\nWORKDIR /tmp/w\nRUN ! touch /etc/x\n");
    has_content(&lab.compare(&[]), "tmp/id", "nobody\n");
}

#[test]
fn triggers_of_the_base_run() {
    let lab = lab("FROM library/onbuild:1\nRUN cat /triggered > /seen\n");
    let triggers = json!({"OnBuild": ["ARG WHO=trigger", "RUN echo $WHO > /triggered", "COPY app /app"]});
    lab.registry.push("library/onbuild", "1", &BaseImage::busybox().with(triggers));
    lab.context.file("app", "A");
    let image = lab.compare(&["--build-arg=WHO=me"]);
    has_content(&image, "seen", "me\n");
    has_content(&image, "app", "A");
}

#[test]
fn onbuild_healthcheck_and_shell_are_kept() {
    let lab =
        lab("FROM busybox:1\nONBUILD RUN echo later\nHEALTHCHECK --interval=5s --retries=2 CMD [\"true\"]\n\
         SHELL [\"/bin/sh\", \"-e\", \"-c\"]\nRUN echo x > /x\n");
    let image = lab.compare(&[]);
    assert_eq!(image.config["config"]["OnBuild"], json!(["RUN echo later"]));
    assert_eq!(image.config["config"]["Healthcheck"]["Test"], json!(["CMD", "true"]));
    assert_eq!(image.config["config"]["Shell"], json!(["/bin/sh", "-e", "-c"]));
}

#[test]
fn entrypoint_and_command_forms() {
    for (lines, entrypoint, command) in [
        ("ENTRYPOINT [\"a\", \"b\"]\nCMD [\"c\"]", json!(["a", "b"]), json!(["c"])),
        ("ENTRYPOINT run --this", json!(["/bin/sh", "-c", "run --this"]), json!(null)),
        ("CMD echo $HOME", json!(null), json!(["/bin/sh", "-c", "echo $HOME"])),
        ("ENTRYPOINT []\nCMD []", json!(null), json!(null)),
    ] {
        let lab = lab(&format!("FROM busybox:1\n{lines}\n"));
        let config = lab.compare(&[]).config["config"].clone();
        let non_empty =
            |key: &str| config.get(key).filter(|v| **v != json!([])).cloned().unwrap_or(json!(null));
        assert_eq!((non_empty("Entrypoint"), non_empty("Cmd")), (entrypoint, command), "{lines}");
    }
}

#[test]
fn metadata_instructions() {
    let lab = lab(
        "FROM busybox:1\nLABEL a=1 \"b c\"=\"d e\"\nENV X=1 Y=\"two words\"\nENV Z=$X$Y\nEXPOSE 80 53/udp\n\
         VOLUME /data\nSTOPSIGNAL SIGINT\nMAINTAINER me\nWORKDIR /w\nUSER 7\n",
    );
    let config = lab.compare(&["--label", "from=flag"]).config["config"].clone();
    assert_eq!(config["Labels"]["from"], "flag");
    assert_eq!(config["StopSignal"], "SIGINT");
    assert!(config["Env"].to_string().contains("Z=1two words"));
}

#[test]
fn a_base_with_user_and_environment() {
    let lab = lab("FROM library/custom:1\nRUN echo \"$KEPT $(id -u)\" > /tmp/seen\n");
    let base = BaseImage::busybox()
        .with(json!({"User": "65532", "Env": ["KEPT=yes", "PATH=/bin"], "WorkingDir": "/tmp"}));
    lab.registry.push("library/custom", "1", &base);
    has_content(&lab.compare(&[]), "tmp/seen", "yes 65532\n");
}

#[test]
fn changes_to_files_of_the_base() {
    let lab = lab(
        "FROM library/layered:1\nRUN rm /gone && rm -r /dir && echo new > /kept && chmod 600 /etc/passwd && rm /link1\n",
    );
    let layer = LayerTar::default().file("gone", 0o644, b"x").file("kept", 0o644, b"x").dir("dir", 0o755);
    let layer = layer.file("dir/f", 0o644, b"x").file("link1", 0o644, b"x").hard_link("link2", "link1");
    lab.registry.push("library/layered", "1", &BaseImage::busybox().layer(layer));
    let image = lab.compare(&[]);
    let own = &image.own_layers(2)[0];
    assert!(own.contains_key(".wh.gone") && own.contains_key(".wh.dir"), "{own:?}");
}

#[test]
fn from_scratch() {
    let lab = lab("FROM scratch\nCOPY hello /\nENTRYPOINT [\"/hello\"]\n");
    lab.context.file_mode("hello", "not really a program", 0o755);
    assert_eq!(lab.compare(&[]).layers.len(), 1);
}

#[test]
fn empty_context() {
    lab("FROM busybox:1\nRUN echo x > /x\n").compare(&[]);
}

#[test]
fn an_image_without_a_layer_of_its_own() {
    lab("FROM busybox:1\nENV A=b\n").compare(&[]);
}

#[test]
fn a_target_stage() {
    let lab = lab(
        "FROM busybox:1 AS first\nRUN echo 1 > /first\nFROM first AS second\nRUN echo 2 > /second\nFROM busybox:1\nRUN false\n",
    );
    let image = lab.compare(&["--target", "second"]);
    has_content(&image, "second", "2\n");
}

#[test]
fn dockerignore() {
    let lab = lab("FROM busybox:1\nCOPY . /all/\n");
    let all = [
        "keep",
        "a.log",
        "logs/x.log",
        "logs/keep.log",
        "node_modules/m/x",
        "d/node_modules/y",
        "d/z",
        ".hidden",
    ];
    for path in all {
        lab.context.file(path, path);
    }
    lab.context
        .file(".dockerignore", "# comment\n*.log\n**/node_modules\nlogs/*\n!logs/keep.log\n.dockerignore\n");
    let filtered = Lab::new();
    for path in ["keep", "logs/keep.log", "d/z", ".hidden"] {
        filtered.context.file(path, path);
    }
    lab.compare_with(&[], filtered.context.path());
}

#[test]
fn names_that_hurt() {
    let lab = lab("FROM busybox:1\nCOPY . /n/\nCOPY [\"with space\", \"/with space\"]\n");
    for name in
        ["with space", "ünïcode", "-dash", "semi;colon", "quote'\"", "back\\slash", "new\nline", "$VAR", "*"]
    {
        lab.context.file(name, name);
    }
    lab.context.file(&format!("{}f", "long/".repeat(40)), "deep");
    lab.context.file(&"n".repeat(200), "long name");
    lab.compare(&[]);
}

#[test]
fn times_are_fixed_by_a_timestamp() {
    let lab = lab("FROM busybox:1\nCOPY a /a\nRUN echo x > /x\n");
    lab.context.file("a", "A");
    let first = lab.compare(&["--timestamp=1000000000"]);
    assert_eq!(first.entry("a").unwrap().mtime, 1_000_000_000);
    assert_eq!(first.entry("x").unwrap().mtime, 1_000_000_000);
    let _ = lab.build_archive().env("SOURCE_DATE_EPOCH", "1000000000").run().expect_code(0);
    assert_eq!(
        Image::docker_archive(&lab.archive()).diff_ids(),
        first.diff_ids(),
        "the same input, other layers"
    );
}

#[test]
fn mounts_of_run() {
    let lab = lab("FROM busybox:1 AS src\nRUN echo from-stage > /f\nFROM busybox:1\n\
         RUN --mount=type=bind,from=src,source=/f,target=/m/f cat /m/f > /bind\n\
         RUN --mount=type=bind,source=a,target=/m/a cat /m/a > /context\n\
         RUN --mount=type=tmpfs,target=/t echo x > /t/x && ls /t > /tmpfs\n");
    lab.context.file("a", "from-context\n");
    let image = lab.compare(&[]);
    has_content(&image, "bind", "from-stage\n");
    has_content(&image, "context", "from-context\n");
    has_content(&image, "tmpfs", "x\n");
}

#[test]
fn a_secret_is_seen_by_run_and_by_nobody_else() {
    let secret = "canary-secret-5d1e";
    let lab = lab(
        "FROM busybox:1\nRUN --mount=type=secret,id=key sha256sum < /run/secrets/key > /sum && cat /run/secrets/key\n\
         RUN --mount=type=secret,id=key,target=/elsewhere,mode=0440,uid=7 stat -c '%a %u' /elsewhere > /stat\n\
         RUN ! ls /run/secrets/key /elsewhere\n",
    );
    let file = lab.path("secret");
    std::fs::write(&file, secret).unwrap();
    let flag = format!("--secret=id=key,src={}", file.display());
    let image = lab.compare(&[&flag]);
    let sum = kiln_tests::base::digest(secret.as_bytes()).replace("sha256:", "");
    has_content(&image, "sum", &format!("{sum}  -\n"));
    has_content(&image, "stat", "440 7\n");
    assert!(!image.text().contains(secret));
    let outcome = lab.build_archive().arg(&flag).run().expect_code(0);
    assert!(!outcome.output().contains(secret), "{}", outcome.output());
}

#[test]
fn a_secret_from_the_environment() {
    let lab = lab("FROM busybox:1\nRUN --mount=type=secret,id=key cat /run/secrets/key | sha256sum > /sum\n");
    let command = lab.build_archive().arg("--secret=id=key,env=TOKEN").env("TOKEN", "canary-token-1");
    let _ = command.run().expect_code(0);
    let sum = kiln_tests::base::digest(b"canary-token-1").replace("sha256:", "");
    has_content(&Image::docker_archive(&lab.archive()), "sum", &format!("{sum}  -\n"));
}

#[test]
fn the_dockerfile_on_standard_input() {
    let lab = lab("FROM busybox:1\nCOPY a /a\n");
    lab.context.file("a", "A").file("Dockerfile", "FROM nothing:0\n");
    let plain = lab.compare(&[]);
    let command = lab
        .kiln("build")
        .args(["--file", "-", "--output"])
        .arg(format!("docker-archive:{}", lab.archive().display()));
    let _ = command.arg(lab.context.path()).run_with_input("FROM busybox:1\nCOPY a /a\n").expect_code(0);
    kiln_tests::image::assert_same(&Image::docker_archive(&lab.archive()), &plain, false);
}

#[test]
fn the_dockerfile_of_the_context_is_the_default() {
    let lab = Lab::new();
    lab.context.file("Dockerfile", "FROM busybox:1\nCOPY Dockerfile /seen\n");
    let output = format!("docker-archive:{}", lab.archive().display());
    let _ = lab.kiln("build").args(["-o", &output]).arg(lab.context.path()).run().expect_code(0);
    has_content(&Image::docker_archive(&lab.archive()), "seen", "FROM busybox:1\nCOPY Dockerfile /seen\n");
}

#[test]
fn a_dockerfile_is_never_preprocessed() {
    let lab = Lab::new();
    let host = lab.path("host-file");
    std::fs::write(&host, "RUN echo canary-host-file\n").unwrap();
    let text = format!("FROM busybox:1\n#include \"{}\"\nRUN echo x > /x\n", host.display());
    std::fs::write(lab.path("Dockerfile.in"), text).unwrap();
    let output = format!("docker-archive:{}", lab.archive().display());
    let command = lab.kiln("build").arg("-f").arg(lab.path("Dockerfile.in")).args(["-o", &output]);
    let outcome = command.arg(lab.context.path()).run();
    assert!(!outcome.output().contains("canary-host-file"), "{}", outcome.output());
}

/// Builds into another form and checks that it is the image of the archive.
fn same_as_archive(lab: &Lab, kind: &str, read: impl Fn(&Path) -> Image) -> Image {
    let target = lab.path("out");
    let flags = [format!("--output={kind}:{}", target.display()), "--timestamp=0".to_owned()];
    let _ = lab.build().args(flags).run().expect_code(0);
    read(&target)
}

const FORMS: &str = "FROM busybox:1\nCOPY a /a\nRUN echo x > /x\nENV A=b\nUSER 5\n";

#[test]
fn output_as_docker_dir() {
    let lab = lab(FORMS);
    lab.context.file("a", "A");
    let archive = lab.image(&["--timestamp=0"]);
    let dir = same_as_archive(&lab, "dir", Image::dir);
    assert_eq!(dir.diff_ids(), archive.diff_ids());
    // The base's own blob, not a recompressed one.
    let base = BaseImage::busybox().pack();
    assert_eq!(dir.manifest["layers"][0]["digest"], kiln_tests::base::digest(&base.blobs[0]));
}

#[test]
fn output_as_oci_layout() {
    let lab = lab(FORMS);
    lab.context.file("a", "A");
    let dir = same_as_archive(&lab, "oci", Image::oci);
    assert_eq!(dir.manifest["config"]["mediaType"], "application/vnd.oci.image.config.v1+json");
    std::fs::remove_dir_all(lab.path("out")).unwrap();
    assert_eq!(same_as_archive(&lab, "oci-archive", Image::oci_archive).digest, dir.digest);
}

#[test]
fn the_oci_format_is_the_same_as_buildahs() {
    let lab = lab(FORMS);
    lab.context.file("a", "A");
    let kiln = same_as_archive(&lab, "oci", Image::oci);
    let plain = kiln_tests::plain::Plain::new(lab.path("plain"), &lab.registry.host());
    let flags = ["--timestamp=0".to_owned()];
    let _ = plain.build("oci", &lab.path("Dockerfile"), lab.context.path(), &flags).expect_code(0);
    kiln_tests::image::assert_same(&kiln, &plain.image(), true);
}

#[test]
fn oci_refuses_what_it_would_lose() {
    for line in ["HEALTHCHECK CMD true", "ONBUILD RUN true", "SHELL [\"/bin/sh\", \"-c\"]"] {
        let lab = lab(&format!("FROM busybox:1\n\n{line}\n"));
        let instruction = line.split(' ').next().unwrap();
        let refused = |outcome: Outcome| {
            let _ = outcome.expect_code(2).expect_text(&["Dockerfile:3", instruction]);
        };
        refused(lab.build().arg("--format=oci").run());
        refused(lab.build().arg(format!("--output=oci:{}", lab.path("out").display())).run());
        assert!(!lab.path("out").exists());
    }
}

#[test]
fn files_of_the_target_as_directory_and_archive() {
    let lab = lab(
        "FROM busybox:1 AS test\nRUN mkdir /r && echo ok > /r/report\nFROM scratch\nCOPY --from=test /r /\n",
    );
    let (dir, tar) = (lab.path("files"), lab.path("files.tar"));
    let outputs = [format!("type=local,dest={}", dir.display()), format!("type=tar,dest={}", tar.display())];
    let _ = lab.build().args(["-o", &outputs[0], "-o", &outputs[1]]).run().expect_code(0);
    assert_eq!(std::fs::read_to_string(dir.join("report")).unwrap(), "ok\n");
    let mut archive = tar::Archive::new(std::fs::File::open(tar).unwrap());
    let names: Vec<_> =
        archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
    assert!(names.iter().any(|n| n.trim_start_matches("./") == "report"), "{names:?}");
}

#[test]
fn identifiers_and_metadata_are_written() {
    let lab = lab("FROM busybox:1\nRUN echo x > /x\n");
    let (id, metadata, out) = (lab.path("id"), lab.path("metadata.json"), lab.path("out"));
    let command = lab.build().arg("--iidfile").arg(&id).arg("--metadata-file").arg(&metadata);
    let _ = command.arg(format!("--output=dir:{}", out.display())).run().expect_code(0);
    let image = Image::dir(&out);
    assert_eq!(std::fs::read_to_string(id).unwrap().trim(), image.id);
    let metadata: serde_json::Value = serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
    assert_eq!(metadata["containerimage.config.digest"], image.id);
    assert_eq!(metadata["containerimage.digest"], image.digest);
    assert!(metadata["kiln.log"]["lines"].as_u64().is_some_and(|lines| lines > 0), "{metadata}");
    assert_eq!(metadata["kiln.log"]["sha256"].as_str().map(str::len), Some(71), "{metadata}");
    let outcome = lab.build().arg("--quiet").run().expect_code(0);
    assert!(
        outcome.stdout.starts_with("sha256:") && outcome.stdout.lines().count() == 1,
        "{}",
        outcome.stdout
    );
}

#[test]
fn a_tag_that_moves_between_two_builds() {
    let lab = lab("FROM busybox:1\nRUN cp /generation /seen\n");
    let push = |text: &[u8]| {
        let image = BaseImage::busybox().layer(LayerTar::default().file("generation", 0o644, text));
        lab.registry.push("library/busybox", "1", &image);
    };
    push(b"first");
    has_content(&lab.image(&[]), "seen", "first");
    push(b"second");
    has_content(&lab.image(&[]), "seen", "second");
}

#[test]
fn a_base_is_fetched_once() {
    let lab = lab("FROM busybox:1\nRUN echo x > /x\n");
    let proxy = kiln_tests::proxy::FaultProxy::start(lab.registry.address());
    lab.configure(&proxy.host(), "");
    lab.image(&[]);
    let blobs = proxy.count("/blobs/");
    assert!(blobs >= 2, "{:?}", proxy.requests());
    lab.image(&[]);
    assert_eq!(proxy.count("/blobs/"), blobs, "the second build fetched blobs again");
}

#[test]
fn cache_mounts_keep_their_content() {
    let lab = lab("FROM busybox:1\nARG ROUND\nRUN --mount=type=cache,target=/cache \
         echo $ROUND >> /cache/rounds && cp /cache/rounds /rounds\n");
    has_content(&lab.image(&["--build-arg=ROUND=1"]), "rounds", "1\n");
    has_content(&lab.image(&["--build-arg=ROUND=2"]), "rounds", "1\n2\n");
    let _ = lab.build_archive().args(["--build-arg=ROUND=3", "--no-cache"]).run().expect_code(0);
    let image = Image::docker_archive(&lab.archive());
    assert!(image.entry("cache/rounds").is_none(), "the cache is no part of the image");
}

#[test]
fn a_failed_build_keeps_the_old_cache() {
    let lab = lab("FROM busybox:1\nARG END=true\nRUN --mount=type=cache,id=c,target=/cache \
         echo x >> /cache/rounds && cp /cache/rounds /rounds && $END\n");
    has_content(&lab.image(&[]), "rounds", "x\n");
    let _ = lab.fails(&["--build-arg=END=false"], 1);
    has_content(&lab.image(&["--no-cache"]), "rounds", "x\nx\n");
}

#[test]
fn first_builds_share_a_data_directory() {
    let lab = lab("FROM busybox:1\nARG N\nRUN echo $N > /n\n");
    let outputs: Vec<_> = (0..4).map(|n| lab.path(&format!("image-{n}.tar"))).collect();
    let builds: Vec<_> = outputs
        .iter()
        .enumerate()
        .map(|(n, path)| {
            let build = lab.build().arg(format!("--build-arg=N={n}"));
            build.arg(format!("--output=docker-archive:{}", path.display())).start()
        })
        .collect();
    for build in builds {
        let _ = build.wait().expect_code(0);
    }
    for (n, path) in outputs.iter().enumerate() {
        has_content(&Image::docker_archive(path), "n", &format!("{n}\n"));
    }
    kiln_tests::leftovers::assert_none(&lab.data(), kiln_tests::lab::CLEAN);
}

#[test]
fn prune_frees_what_no_build_uses() {
    let lab = lab("FROM busybox:1\nRUN --mount=type=cache,target=/c echo x > /c/x\n");
    lab.image(&[]);
    let stores = || std::fs::read_dir(lab.data().join("store/base")).unwrap().count();
    assert_eq!(stores(), 1);
    let _ = lab.kiln("prune").run().expect_code(0);
    assert_eq!(stores(), 1, "without --all a small directory stays as it is");
    let _ = lab.kiln("prune").arg("--all").run().expect_code(0);
    assert_eq!(stores(), 0);
    lab.image(&[]);
}

#[test]
fn a_closed_standard_output_changes_nothing() {
    let lab = lab("FROM busybox:1\nRUN for i in $(seq 2000); do echo line $i; done; echo x > /x\n");
    let script = "\"$@\" | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}";
    let mut command = std::process::Command::new("bash");
    command.args(["-c", script, "bash"]).arg(kiln_tests::kiln::binary()).arg("build");
    command
        .arg("--data")
        .arg(lab.data())
        .arg("--config")
        .arg(lab.path("kiln.toml"))
        .arg("-f")
        .arg(lab.path("Dockerfile"));
    command.arg("-o").arg(format!("docker-archive:{}", lab.archive().display())).arg(lab.context.path());
    let _ = kiln_tests::process::run(&mut command, kiln_tests::kiln::HARD_LIMIT).expect_code(0);
    has_content(&Image::docker_archive(&lab.archive()), "x", "x\n");
}

#[test]
fn output_is_live_and_complete() {
    let lab = lab("FROM busybox:1\nRUN echo first; while [ ! -e /tmp/never ]; do sleep 0.1; done\n");
    let build = lab.build().start();
    build.expect_output("first").signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(build.wait().code, 130);
    lab.dockerfile("FROM busybox:1\nRUN for i in $(seq 3000); do echo \"line $i\"; done; echo err >&2\n");
    let outcome = lab.build().run().expect_code(0);
    let lines = outcome.stdout.lines().filter(|l| l.contains("line ")).count();
    assert!(lines >= 3000 && outcome.output().contains("err"), "{lines} lines");
}
