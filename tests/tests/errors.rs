//! What goes wrong ends with the right reason, exit code and words, and leaves nothing behind.

use std::net::TcpListener;
use std::time::Duration;

use kiln_tests::base::{BaseImage, LayerTar, digest};
use kiln_tests::image::Image;
use kiln_tests::lab::Lab;
use kiln_tests::process::Outcome;
use kiln_tests::proxy::{Fault, FaultProxy};
use kiln_tests::registry::{Access, PASSWORD, USER};

const USES_BUSYBOX: &str = "FROM busybox:1\nRUN echo x > /x\n";
/// As often as anybody asks.
const ALWAYS: usize = usize::MAX;

fn lab(dockerfile: &str) -> Lab {
    let lab = Lab::new();
    lab.dockerfile(dockerfile);
    lab
}

/// A place whose registry is reached through a proxy.
fn proxied() -> (Lab, FaultProxy) {
    let lab = lab(USES_BUSYBOX);
    let proxy = FaultProxy::start(lab.registry.address());
    lab.configure(&proxy.host(), "");
    (lab, proxy)
}

fn fails(dockerfile: &str, code: i32, texts: &[&str]) -> Outcome {
    lab(dockerfile).fails(&[], code).expect_text(texts)
}

#[test]
fn run_that_fails() {
    let outcome = fails(
        "FROM busybox:1\n\nRUN echo first\nRUN echo about to fail && \\\n    exit 37\n",
        1,
        &["build_failed", "Dockerfile:4", "37", "about to fail", "phase build"],
    );
    let again = outcome.stderr.rsplit("last lines").next().unwrap_or_default();
    assert!(again.contains("about to fail"), "{}", outcome.stderr);
}

#[test]
fn run_that_prints_registry_errors_is_still_a_failed_run() {
    for text in [
        "received unexpected HTTP status: 503 Service Unavailable",
        "Error: initializing source docker://x: reading manifest: unauthorized: authentication required",
        "no space left on device",
        "toomanyrequests: You have reached your pull rate limit",
        "Error: building at STEP \\\"RUN x\\\": layer not known",
        "dial tcp: lookup registry: no such host",
    ] {
        let _ = fails(
            &format!("FROM busybox:1\nRUN echo \"{text}\" >&2; exit 1\n"),
            1,
            &["build_failed", "Dockerfile:2"],
        );
    }
}

#[test]
fn run_with_code_125_is_a_failed_run() {
    let _ = fails("FROM busybox:1\nRUN exit 125\n", 1, &["build_failed", "125"]);
    let _ = fails("FROM busybox:1\nRUN no-such-program\n", 1, &["build_failed", "127"]);
}

#[test]
fn unknown_instruction() {
    let _ = fails("FROM busybox:1\n\nBREW coffee\n", 2, &["bad_request", "Dockerfile:3", "BREW"]);
}

#[test]
fn files_that_are_not_dockerfiles() {
    let _ = fails("", 2, &["Dockerfile"]);
    let _ = fails("# only a comment\n", 2, &["Dockerfile"]);
    let _ = fails("RUN echo no FROM\n", 2, &["Dockerfile:1"]);
    let _ = fails("FROM busybox:1\nCOPY <<EOF /x\nno end\n", 2, &["Dockerfile:2"]);
}

#[test]
fn a_missing_dockerfile() {
    let lab = Lab::new();
    let _ = lab.build().run().expect_code(1).expect_text(&["Dockerfile"]);
    let _ = lab.kiln("build").arg(lab.context.path()).run().expect_code(1).expect_text(&["Dockerfile"]);
    let _ = lab.kiln("build").arg(lab.path("nowhere")).run().expect_code(2).expect_text(&["nowhere"]);
}

#[test]
fn copy_of_a_missing_file() {
    let lab = lab("FROM busybox:1\nCOPY there /x\nCOPY missing /x\n");
    lab.context.file("there", "x");
    let _ = lab.fails(&[], 1).expect_text(&["not_found", "Dockerfile:3", "missing"]);
}

#[test]
fn a_missing_stage() {
    let _ = lab(USES_BUSYBOX).fails(&["--target=missing"], 2).expect_text(&["missing"]);
}

#[test]
fn a_feature_that_this_buildah_lacks() {
    // From 1.33 on, buildah has heredocs.
    let version = kiln_tests::process::run(
        std::process::Command::new("buildah").arg("--version"),
        Duration::from_secs(20),
    );
    if version.stdout.contains("version 1.2") {
        let _ = fails("FROM busybox:1\nRUN <<EOF\necho x\nEOF\n", 2, &["Dockerfile:2", "1.33"]);
    }
}

#[test]
fn a_missing_image() {
    let _ =
        fails("FROM nothing/here:1\n", 1, &["not_found", "nothing/here:1", "Dockerfile:1", "phase resolve"]);
    let _ = fails("FROM busybox:missing\n", 1, &["not_found", "busybox:missing"]);
    let _ = fails("FROM busybox:1\nCOPY --from=nothing/here:1 /x /x\n", 1, &["not_found", "nothing/here:1"]);
}

#[test]
fn images_come_only_from_registries() {
    for source in
        ["dir:/etc", "oci:/etc", "docker-archive:/etc/passwd", "containers-storage:x", "oci-archive:/x:y"]
    {
        let _ = fails(&format!("FROM {source}\n"), 2, &["bad_request", "Dockerfile:1"]);
        let _ = fails(
            &format!("FROM busybox:1\nCOPY --from={source} / /x\n"),
            2,
            &["bad_request", "Dockerfile:2"],
        );
    }
}

/// A registry with a password, and what a client knows about it.
fn locked(authfile: Option<(&str, &str)>) -> Lab {
    let lab = Lab::empty(Access::Password);
    lab.registry.push("library/busybox", "1", &BaseImage::busybox());
    lab.dockerfile(USES_BUSYBOX);
    if let Some((user, password)) = authfile {
        let auth = base64(&format!("{user}:{password}"));
        let json = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{auth}\"}}}}}}", lab.registry.host());
        std::fs::write(lab.path("auth.json"), json).unwrap_or_else(|e| panic!("{e}"));
    }
    lab
}

fn base64(text: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let encode = |chunk: &[u8]| {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        let digit = |n: usize| {
            if n > chunk.len() { '=' } else { char::from(ALPHABET[(bits >> (18 - 6 * n) & 63) as usize]) }
        };
        (0..4).map(digit).collect::<String>()
    };
    text.as_bytes().chunks(3).map(encode).collect()
}

#[test]
fn base64_is_base64() {
    for (plain, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
    {
        assert_eq!(base64(plain), encoded);
    }
}

#[test]
fn unauthorized() {
    let lab = locked(None);
    let _ = lab.fails(&[], 4).expect_text(&["unauthorized", &lab.registry.host()]);
    let lab = locked(Some((USER, "wrong")));
    let outcome = lab.fails(&["--authfile", &lab.path("auth.json").display().to_string()], 4);
    assert!(!outcome.output().contains("wrong"), "{}", outcome.output());
}

#[test]
fn a_credential_opens_the_registry() {
    let lab = locked(Some((USER, PASSWORD)));
    let authfile = lab.path("auth.json");
    let _ = lab.build_archive().arg("--authfile").arg(&authfile).run().expect_code(0);
    let _ = lab.build_archive().env("REGISTRY_AUTH_FILE", &authfile).run().expect_code(0);
    let docker = lab.path("home/.docker");
    std::fs::create_dir(&docker)
        .and_then(|()| std::fs::copy(&authfile, docker.join("config.json")))
        .unwrap_or_else(|e| panic!("{e}"));
    let _ = lab.build_archive().run().expect_code(0);
}

#[test]
fn a_base_that_is_here_still_needs_its_credential() {
    let lab = locked(Some((USER, PASSWORD)));
    let authfile = lab.path("auth.json").display().to_string();
    lab.image(&["--authfile", &authfile]);
    std::fs::remove_file(lab.archive()).unwrap_or_else(|e| panic!("{e}"));
    let _ = lab.fails(&[], 4).expect_text(&["unauthorized"]);
}

#[test]
fn a_registry_that_answers_500_twice_and_then_works() {
    let (lab, proxy) = proxied();
    proxy.fault("/manifests/", 2, Fault::Status(500)).fault("/blobs/", 2, Fault::Status(503));
    lab.image(&[]);
    assert!(proxy.count("/manifests/") >= 3 && proxy.count("/blobs/") >= 4, "{:?}", proxy.requests());
}

#[test]
fn a_registry_that_only_answers_500() {
    let (lab, proxy) = proxied();
    proxy.fault("", ALWAYS, Fault::Status(500));
    let _ = lab.fails(&[], 5).expect_text(&["registry_unavailable", "500", &proxy.host()]);
    assert!(proxy.requests().len() > 1, "it was not tried again");
}

#[test]
fn a_registry_that_limits_the_rate() {
    let (lab, proxy) = proxied();
    proxy.fault("", ALWAYS, Fault::Status(429));
    let _ = lab.fails(&[], 5).expect_text(&["registry_unavailable", "429"]);
}

#[test]
fn a_slow_registry() {
    let (lab, proxy) = proxied();
    proxy.fault("/manifests/", 1, Fault::Delay(Duration::from_secs(1)));
    proxy.fault("/blobs/", 1, Fault::Throttle(600_000));
    lab.image(&[]);
}

#[test]
fn a_connection_that_breaks() {
    let (lab, proxy) = proxied();
    proxy.fault("/blobs/", 2, Fault::CutAfter(100_000));
    lab.image(&[]);
}

#[test]
fn a_registry_that_never_answers_meets_the_timeout() {
    for fault in [Fault::BlackHole, Fault::DropAnswers] {
        let (lab, proxy) = proxied();
        proxy.fault("", ALWAYS, fault);
        let outcome = lab.fails(&["--timeout=3s"], 124).expect_text(&["timeout", "phase resolve"]);
        assert!(outcome.elapsed < Duration::from_secs(8), "{:?}", outcome.elapsed);
    }
}

#[test]
fn a_registry_that_is_not_there() {
    let lab = lab(USES_BUSYBOX);
    let closed =
        TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).unwrap_or_else(|e| panic!("{e}"));
    lab.configure(&closed.to_string(), "");
    let _ = lab.fails(&[], 5).expect_text(&["network", &closed.to_string()]);
}

#[test]
fn a_blocked_registry_is_not_asked() {
    let (lab, proxy) = proxied();
    let host = proxy.host();
    lab.configure_exactly(&format!(
        "[[registry]]\nprefix = \"docker.io\"\nlocation = \"{host}\"\ninsecure = true\nblocked = true\n"
    ));
    let _ = lab.fails(&[], 2).expect_text(&["bad_request", "blocked"]);
    assert_eq!(proxy.requests().len(), 0);
}

#[test]
fn a_mirror_that_fails_leads_to_the_next() {
    let (lab, proxy) = proxied();
    let host = lab.registry.host();
    lab.configure_exactly(&format!(
        "[[registry]]\nprefix = \"docker.io\"\nlocation = \"{host}\"\ninsecure = true\n\
         [[registry.mirror]]\nlocation = \"{}\"\ninsecure = true\n",
        proxy.host()
    ));
    proxy.fault("", ALWAYS, Fault::Status(404));
    lab.image(&[]);
    assert!(!proxy.requests().is_empty());
}

#[test]
fn certificates_are_checked() {
    let lab = Lab::empty(Access::Tls);
    lab.registry.push("library/busybox", "1", &BaseImage::busybox());
    lab.dockerfile(USES_BUSYBOX);
    let host = lab.registry.host();
    let section = format!("[[registry]]\nprefix = \"docker.io\"\nlocation = \"{host}\"\n");
    lab.configure_exactly(&section);
    let _ = lab.fails(&[], 2).expect_text(&["certificate", &host]);
    let ca = lab.registry.ca().unwrap_or_else(|| panic!("no ca"));
    lab.configure_exactly(&format!("{section}ca = \"{}\"\n", ca.display()));
    lab.image(&[]);
}

#[test]
fn plain_http_needs_to_be_allowed() {
    let lab = lab(USES_BUSYBOX);
    lab.configure_exactly(&format!(
        "[[registry]]\nprefix = \"docker.io\"\nlocation = \"{}\"\n",
        lab.registry.host()
    ));
    let outcome = lab.fails(&[], 2);
    let _ = outcome.expect_text(&["insecure"]);
}

#[test]
fn a_blob_with_other_bytes_is_never_used() {
    let lab = lab(USES_BUSYBOX);
    let blob = digest(&BaseImage::busybox().pack().blobs[0]).replace("sha256:", "");
    let path = format!("docker/registry/v2/blobs/sha256/{}/{blob}/data", &blob[..2]);
    let path = lab.registry.storage().join(path);
    let mut bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{e}"));
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap_or_else(|e| panic!("{e}"));
    let _ = lab.fails(&[], 5).expect_text(&["registry_unavailable", &blob]);
    assert!(kiln_tests::tree::paths(&lab.data().join("store/base")).is_empty());
}

#[test]
fn limits_of_processes_do_not_concern_the_neighbour() {
    // A shell that cannot fork ends, so the loop ends by itself; what it started stays.
    for bomb in ["(while :; do sleep 20 & done); exec sleep 20", "f() { f & f; sleep 20; }; f"] {
        let lab = lab(&format!("FROM busybox:1\nRUN {bomb}\n"));
        lab.configure(&lab.registry.host(), "[build]\ngrace = \"1s\"\n[build.limits]\npids = 200\n");
        let beside = neighbour();
        let _ = lab.fails(&[], 1).expect_text(&["limit_exceeded", "pids", "200", "Dockerfile:2"]);
        let _ = beside.1.wait().expect_code(0);
    }
}

#[test]
fn limits_of_disk_do_not_concern_the_neighbour() {
    let lab =
        lab("FROM busybox:1\nRUN echo filling && dd if=/dev/zero of=/big bs=1M count=4000 && sleep 20\n");
    lab.configure(&lab.registry.host(), "[build]\ngrace = \"1s\"\n[build.limits]\ndisk = \"200MiB\"\n");
    let beside = neighbour();
    let _ = lab.fails(&[], 1).expect_text(&[
        "limit_exceeded",
        "disk",
        "209715200",
        "build.limits.disk",
        "Dockerfile:2",
    ]);
    let _ = beside.1.wait().expect_code(0);
}

fn neighbour() -> (Lab, kiln_tests::kiln::Build) {
    let lab = lab("FROM busybox:1\nRUN for i in 1 2 3 4 5 6; do sleep 0.5; (true); done; echo x > /x\n");
    let build = lab.build_archive().start();
    (lab, build)
}

#[test]
fn limits_of_one_file() {
    let lab = Lab::new();
    lab.configure(&lab.registry.host(), "[build.limits]\nfile_size = \"64MiB\"\n");
    // The kernel ends the command, and only the log says by which signal: the hint names the
    // limit. First the signal reaches the shell's child, then the shell's successor.
    for then in ["&& echo done", ""] {
        lab.dockerfile(&format!("FROM busybox:1\nRUN dd if=/dev/zero of=/big bs=1M count=100 {then}\n"));
        let _ = lab.fails(&[], 1).expect_text(&["build.limits.file_size", "Dockerfile:2"]);
    }
}

/// A slot has the ids 0 to 65535, and an image may name any.
#[test]
fn owners_beyond_the_ids_of_a_slot() {
    for (uid, gid) in [(65_536, 0), (0, 2_000_000)] {
        let far = lab("FROM busybox:1\nFROM owned:1\nCOPY --from=0 /bin/busybox /x\n");
        let layer = LayerTar::default().owned("far", uid, gid);
        far.registry.push("library/owned", "1", &BaseImage::busybox().layer(layer));
        let text = format!("{uid}:{gid}");
        let _ = far.fails(&[], 1).expect_text(&[
            "limit_exceeded",
            &text,
            "/far",
            "0 to 65535",
            "Dockerfile:2",
            "chown",
        ]);
    }
    for instruction in ["COPY --chown=65536:7 x /x", "ADD far.tar /d/"] {
        let far = lab(&format!("FROM busybox:1\n{instruction}\n"));
        far.context.file("x", "");
        far.context.file("far.tar", LayerTar::default().owned("far", 65_536, 7).finish());
        let _ = far.fails(&[], 1).expect_text(&["limit_exceeded", "65536:7", "0 to 65535", "Dockerfile:2"]);
    }
    let near = lab("FROM busybox:1\nRUN touch /x && chown 65535:65535 /x\nCOPY --chown=65535 x /y\n");
    near.context.file("x", "");
    let image = near.image(&[]);
    assert_eq!(image.entry("x").map(|e| (e.uid, e.gid)), Some((65_535, 65_535)));
}

#[test]
fn limits_of_open_files_reach_run() {
    let lab = lab("FROM busybox:1\nRUN ulimit -n > /n\n");
    lab.configure(&lab.registry.host(), "[build.limits]\nopen_files = 1777\n");
    let image = lab.image(&[]);
    assert_eq!(image.entry("n").map(|e| e.content.as_str()), Some(digest(b"1777\n").as_str()));
}

#[test]
fn timeout() {
    let lab = lab("FROM busybox:1\nRUN trap '' TERM; echo waiting; sleep 50; sleep 50\n");
    lab.configure(&lab.registry.host(), "[build]\ngrace = \"1s\"\n");
    let outcome = lab.fails(&["--timeout=3s"], 124).expect_text(&["timeout", "3s", "--timeout"]);
    assert!(outcome.elapsed < Duration::from_secs(10), "{:?}", outcome.elapsed);
}

#[test]
fn a_timeout_shows_no_secret_of_the_line_that_it_names() {
    let secret = "canary-token-1";
    let lab = lab(&format!("FROM busybox:1\nRUN : {secret}; sleep 50\n"));
    let file = lab.path("secret");
    std::fs::write(&file, secret).unwrap();
    let outcome = lab.fails(&["--timeout=3s", &format!("--secret=id=key,src={}", file.display())], 124);
    let outcome = outcome.expect_text(&["timeout", "Dockerfile:2"]);
    assert!(!outcome.output().contains(secret), "{}", outcome.output());
}

#[test]
fn network_none_is_no_network() {
    let lab = lab("FROM busybox:1\nRUN ip -o addr > /addr; ! nc -w 2 192.0.2.1 80 </dev/null\n");
    lab.image(&["--network=none"]);
}

#[test]
fn contexts_beyond_their_limits() {
    let lab = lab("FROM busybox:1\nCOPY . /c\n");
    for n in 0..20 {
        lab.context.file(&format!("f{n}"), vec![b'x'; 100_000]);
    }
    for limit in ["max_entries = 10", "max_unpacked_bytes = 1000000"] {
        lab.configure(&lab.registry.host(), &format!("[context]\n{limit}\n"));
        let _ = lab.fails(&[], 1).expect_text(&["context_invalid"]);
    }
}

#[test]
fn secrets_that_are_not_there() {
    let lab = lab("FROM busybox:1\nRUN --mount=type=secret,id=key,required=true cat /run/secrets/key\n");
    let _ = lab.fails(&["--secret=id=key,src=/nowhere/at/all"], 2).expect_text(&["/nowhere/at/all"]);
    let outcome = lab.fails(&[], 2);
    let _ = outcome.expect_text(&["key", "Dockerfile:2"]);
}

#[test]
fn flags_of_docker_are_refused_by_name() {
    let lab = lab(USES_BUSYBOX);
    for flag in ["-t=x", "--push", "--load", "--ssh=default", "--cache-from=x", "--platform=linux/s390x"] {
        let name = flag.split('=').next().unwrap_or(flag);
        let _ = lab.build().arg(flag).run().expect_code(2).expect_text(&[name]);
    }
}

#[test]
fn arguments_that_make_no_sense() {
    let lab = lab(USES_BUSYBOX);
    for (flag, word) in [
        ("--build-arg==x", "build-arg"),
        ("--build-arg=A B=x", "build-arg"),
        ("--label==x", "label"),
        ("--secret=src=/etc/passwd", "id"),
        ("--secret=id=../x,src=/etc/passwd", "secret"),
        ("--output=tarball:/x", "output"),
        ("--output=dir:", "dir"),
        ("--timeout=soon", "soon"),
        ("--network=bridge", "bridge"),
    ] {
        let outcome = lab.build().arg(flag).run().expect_code(2);
        assert!(outcome.output().contains(word), "{flag}: {}", outcome.output());
    }
}

#[test]
fn a_configuration_with_a_mistake() {
    let lab = lab(USES_BUSYBOX);
    lab.configure_exactly("[build]\nmemroy = 1\n");
    let _ = lab.build().run().expect_code(2).expect_text(&["kiln.toml:2", "memroy"]);
}

#[test]
fn an_output_that_cannot_be_written() {
    let lab = lab(USES_BUSYBOX);
    let output = format!("--output=docker-archive:{}", lab.path("Dockerfile/x.tar").display());
    let outcome = lab.build().arg(output).run();
    assert_ne!(outcome.code, 0);
    assert!(outcome.output().contains("Dockerfile/x.tar"), "{}", outcome.output());
    assert!(!outcome.output().contains("STEP"), "it was built in vain: {}", outcome.output());
}

#[test]
fn an_output_that_exists_is_replaced_as_a_whole_or_not_at_all() {
    let lab = lab(USES_BUSYBOX);
    std::fs::write(lab.archive(), "old").unwrap_or_else(|e| panic!("{e}"));
    lab.dockerfile("FROM busybox:1\nRUN false\n");
    let _ = lab.build_archive().run().expect_code(1);
    assert_eq!(std::fs::read_to_string(lab.archive()).ok().as_deref(), Some("old"));
    lab.dockerfile(USES_BUSYBOX);
    let _ = lab.build_archive().run().expect_code(0);
    Image::docker_archive(&lab.archive());
}

#[test]
fn check_says_what_can_be_known_without_a_slot() {
    let lab = Lab::new();
    lab.context.file("Dockerfile", "FROM busybox:1\nRUN --mount=type=cache,id=../x,target=/x true\n");
    lab.context.file("large", vec![0; 200_000]);
    let check = |file: &str| {
        lab.context.file("Dockerfile", file);
        let mut command = std::process::Command::new(kiln_tests::kiln::binary());
        kiln_tests::process::run(command.arg("check").arg(lab.context.path()), Duration::from_secs(30))
    };
    let _ = check("FROM busybox:1\nRUN --mount=type=cache,id=../x,target=/x true\n")
        .expect_code(1)
        .expect_text(&["Dockerfile:2"]);
    let _ = check("FROM busybox:1\nRUN true\n").expect_code(0).expect_text(&["large"]);
}

#[test]
fn doctor_says_what_is_there() {
    let lab = Lab::new();
    let _ = lab.kiln("doctor").run().expect_code(0).expect_text(&["buildah", "sealed slot", "limit on disk"]);
    let script = lab.kiln("doctor").arg("--print-setup").run().expect_code(0).stdout;
    let file = lab.path("setup.sh");
    std::fs::write(&file, script).unwrap_or_else(|e| panic!("{e}"));
    let mut command = std::process::Command::new("sh");
    let _ = kiln_tests::process::run(command.arg("-n").arg(file), Duration::from_secs(10)).expect_code(0);
}

/// Bytes that have no name any more count too.
#[test]
fn limits_of_disk_hold_for_deleted_files() {
    let lab =
        lab("FROM busybox:1\nRUN exec 3>/gone; rm /gone; dd if=/dev/zero bs=1M count=3000 >&3; sleep 20\n");
    lab.configure(&lab.registry.host(), "[build]\ngrace = \"1s\"\n[build.limits]\ndisk = \"200MiB\"\n");
    let _ = lab.fails(&[], 1).expect_text(&["limit_exceeded", "disk", "build.limits.disk", "Dockerfile:2"]);
}
