//! The harness notices what the suites rely on it to notice.

use std::process::Command;
use std::time::{Duration, Instant};

use kiln_tests::base::{BaseImage, LayerTar, native};
use kiln_tests::http::request;
use kiln_tests::image::{Image, config_difference, layer_difference};
use kiln_tests::lab::Lab;
use kiln_tests::leftovers;
use kiln_tests::plain::Plain;
use kiln_tests::process::{Process, Running, descendants, eventually, run, with_argument};
use kiln_tests::proxy::{Fault, FaultProxy};
use kiln_tests::registry::{Access, Registry};
use kiln_tests::tree::{Tree, containing};
use nix::sys::signal::Signal;

const ACCEPT_INDEX: &str = "Accept: application/vnd.oci.image.index.v1+json";
const SOON: Duration = Duration::from_secs(10);

fn plain_image(lab: &Lab, dockerfile: &str) -> Image {
    lab.dockerfile(dockerfile);
    let plain = Plain::new(lab.path("plain"), &lab.registry.host());
    let _ = plain.build("docker", &lab.path("Dockerfile"), lab.context.path(), &[]).expect_code(0);
    plain.image()
}

#[test]
fn plain_buildah_builds_from_the_registry() {
    let lab = Lab::new();
    lab.context.file("a", "content");
    let image = plain_image(&lab, "FROM busybox:1\nCOPY a /a\nRUN echo x > /b && chown 65532 /b\nENV K=v\n");
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.entry("b").unwrap().uid, 65532);
    assert_eq!(image.entry("a").unwrap().mode, 0o644);
    assert_eq!(image.entry("bin/sh").unwrap().link, "busybox");
    assert!(image.config["config"]["Env"].to_string().contains("K=v"));
}

#[test]
fn two_images_that_differ_are_told_apart() {
    let lab = Lab::new();
    let one = plain_image(&lab, "FROM busybox:1\nRUN echo x > /b\n");
    assert_eq!(config_difference(&one, &one), None);
    assert_eq!(layer_difference(&one, &one, true), None);
    for change in [
        "RUN echo y > /b",
        "RUN echo x > /b && chmod 600 /b",
        "RUN echo x > /b && chown 1 /b",
        "RUN ln -s x /b",
    ] {
        let other = plain_image(&lab, &format!("FROM busybox:1\n{change}\n"));
        assert!(layer_difference(&one, &other, false).is_some_and(|text| text.contains(", b")), "{change}");
    }
    let other = plain_image(&lab, "FROM busybox:1\nRUN echo x > /b\nENV A=b\n");
    assert!(config_difference(&one, &other).is_some());
}

#[test]
fn a_process_and_a_file_of_a_build_are_left_over() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    std::fs::create_dir_all(data.join("store/jobs")).unwrap();
    leftovers::assert_none(data, Duration::ZERO);
    let sleeper = Running::start(Command::new("sleep").arg("600").current_dir(data.join("store")));
    assert_eq!(leftovers::live(data).len(), 1, "{:?}", leftovers::of(data));
    drop(sleeper);
    std::fs::write(data.join("store/jobs/x"), "").unwrap();
    assert_eq!(leftovers::of(data).len(), 1, "{:?}", leftovers::of(data));
}

/// The control of every test that finds nothing: what Kiln ends, plain buildah leaves, and it is seen.
#[test]
fn what_plain_buildah_leaves_is_seen() {
    let lab = Lab::new();
    let mark = format!("sleep 9{}.75", lab.registry.address().port());
    plain_image(&lab, &format!("FROM busybox:1\nRUN setsid {mark} >/dev/null 2>&1 </dev/null &\n"));
    let left = with_argument(&mark);
    assert!(!left.is_empty(), "the daemon is gone");
    for process in &left {
        process.signal(Signal::SIGKILL);
    }
    leftovers::assert_dead(&left, SOON);
}

#[test]
fn a_mount_in_another_namespace_is_left_over() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    std::fs::create_dir_all(data.join("store/jobs")).unwrap();
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        "mount --bind \"$0\" /mnt && exec sleep 600",
    ]);
    let sleeper = Running::start(command.arg(data.join("store")));
    let seen = || leftovers::live(data).iter().any(|line| line.contains("sleep 600"));
    assert!(eventually(SOON, seen), "{:?}", leftovers::of(data));
    drop(sleeper);
    leftovers::assert_none(data, SOON);
}

#[test]
fn a_tree_that_changed_is_not_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("d/f");
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(&file, "one").unwrap();
    let before = Tree::of(dir.path());
    before.assert_same(&Tree::of(dir.path()));
    let time = std::fs::metadata(&file).and_then(|m| m.modified()).unwrap();
    std::fs::write(&file, "two").unwrap();
    std::fs::File::options().write(true).open(&file).and_then(|f| f.set_modified(time)).unwrap();
    assert!(before != Tree::of(dir.path()), "other content at the same time");
    assert_eq!(containing(dir.path(), &["tw".to_owned()]), [file]);
}

#[test]
fn descendants_are_found_and_their_end_is_noticed() {
    let mut shell = Running::start(Command::new("sh").args(["-c", "sleep 600.25 & (sleep 600.25 &) ; wait"]));
    let found =
        || descendants(shell.pid()).into_iter().filter(|p| p.command.contains("600.25")).collect::<Vec<_>>();
    assert!(eventually(SOON, || with_argument("600.25")
        .iter()
        .filter(|p| p.command.starts_with("sleep"))
        .count()
        == 2));
    let children = found();
    assert_eq!(children.len(), 1, "the orphan is nobody's descendant: {children:?}");
    for process in with_argument("sleep 600.25") {
        process.signal(Signal::SIGKILL);
    }
    leftovers::assert_dead(&children, SOON);
    assert!(eventually(SOON, || shell.ended()));
}

#[test]
fn a_server_ends_with_its_owner() {
    let registry = Registry::start(Access::Open);
    let find = || -> Vec<Process> {
        let storage = registry.storage().parent().unwrap().to_str().unwrap();
        with_argument(storage).into_iter().filter(|p| p.command.starts_with("docker-registry")).collect()
    };
    let servers = find();
    assert_eq!(servers.len(), 1);
    drop(registry);
    leftovers::assert_dead(&servers, SOON);
}

#[test]
fn registries_keep_passwords_tls_and_indexes() {
    let locked = Registry::start(Access::Password);
    locked.push("library/busybox", "1", &BaseImage::busybox());
    let answer = request(locked.address(), "GET", "/v2/library/busybox/manifests/1", "", &[]);
    assert_eq!(answer.status, 401);

    let tls = Registry::start(Access::Tls);
    tls.push_index("i", "1", &[BaseImage::busybox().oci(), BaseImage::busybox().oci().architecture("s390x")]);
    let url = format!("https://{}/v2/i/manifests/1", tls.host());
    let fetch = |ca: &[&str]| {
        let mut command = Command::new("curl");
        run(
            command
                .args(["--silent", "--show-error", "--noproxy", "*", "--header", ACCEPT_INDEX])
                .args(ca)
                .arg(&url),
            SOON,
        )
    };
    assert_eq!(fetch(&[]).code, 60, "an unknown authority must not be trusted");
    let _ = fetch(&["--cacert", tls.ca().unwrap().to_str().unwrap()])
        .expect_code(0)
        .expect_text(&["s390x", native()]);
}

#[test]
fn faults_happen_as_often_as_asked_and_where() {
    let registry = Registry::start(Access::Open);
    let image = BaseImage::new(vec![LayerTar::default().file("a", 0o644, &[7; 4096]).finish()]);
    let digest = registry.push("x", "1", &image);
    let proxy = FaultProxy::start(registry.address());
    let get = |path: &str| {
        request(proxy.host().parse().unwrap(), "GET", &format!("/v2/x/manifests/{path}"), "", &[]).status
    };
    proxy.fault("manifests/1", 2, Fault::Status(500));
    assert_eq!([get(&digest), get("1"), get("1"), get("1")], [200, 500, 500, 200]);
    assert_eq!(proxy.count("manifests/1"), 3);
    proxy.fault("manifests/1", 1, Fault::Delay(Duration::from_millis(200)));
    let began = Instant::now();
    assert_eq!(get("1"), 200);
    assert!(began.elapsed() >= Duration::from_millis(200));
}

#[test]
fn connections_are_cut_swallowed_and_slowed() {
    let registry = Registry::start(Access::Open);
    registry.push("x", "1", &BaseImage::busybox());
    let proxy = FaultProxy::start(registry.address());
    let url = format!("http://{}/v2/x/manifests/1", proxy.host());
    let fetch = || {
        let mut command = Command::new("curl");
        run(command.args(["--silent", "--noproxy", "*", "--max-time", "1", &url]), SOON).code
    };
    assert_eq!(fetch(), 0);
    // curl: 18 is a partial file, 28 a time-out.
    for (fault, code) in [
        (Fault::CutAfter(400), 18),
        (Fault::BlackHole, 28),
        (Fault::DropAnswers, 28),
        (Fault::Throttle(100), 28),
    ] {
        proxy.fault("manifests", 1, fault);
        assert_eq!(fetch(), code, "{fault:?}");
    }
}
