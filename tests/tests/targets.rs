//! `kiln build -t`: what is published, what is refused before anything runs, and what policies have to say.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::assert_none;
use kiln_tests::plugin;
use kiln_tests::registry::Access;

fn target(lab: &Lab, name: &str) -> String {
    format!("{}/{name}", lab.registry.host())
}

/// A plugin with settings, as `--plugin` takes it.
fn with_settings(lab: &Lab, name: &str, settings: &str) -> String {
    let file = lab.path(&format!("{name}.json"));
    std::fs::write(&file, settings).unwrap();
    format!("{},settings={}", plugin::file(name).display(), file.display())
}

fn small(lab: &Lab) -> &Lab {
    lab.dockerfile("FROM busybox:1\nRUN echo made > /made\n")
}

#[test]
fn tags_and_files_get_the_same_image() {
    let lab = Lab::new();
    let metadata = lab.path("metadata.json");
    let _ = small(&lab)
        .build_archive()
        .args(["-t", &target(&lab, "team/app:1.0"), "-t", &target(&lab, "team/app:latest")])
        .args(["-t", &target(&lab, "copy/app:1.0")])
        .arg("--metadata-file")
        .arg(&metadata)
        .run()
        .expect_code(0)
        .expect_text(&["[upload]", "[commit]", "[publish]", "team/app:1.0", "copy/app:1.0"]);
    assert_none(&lab.data(), CLEAN);
    let metadata: serde_json::Value = serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
    let digest = metadata["containerimage.digest"].as_str().unwrap();
    for (repository, name) in [("team/app", "1.0"), ("team/app", "latest"), ("copy/app", "1.0")] {
        assert_eq!(lab.registry.tag(repository, name).as_deref(), Some(digest), "{repository}:{name}");
    }
    assert!(lab.archive().exists());
}

#[test]
fn a_second_build_is_cached_and_publishes_the_next_tag() {
    let lab = Lab::new();
    let build = |name: &str| small(&lab).build().args(["-t", &target(&lab, name)]).run().expect_code(0);
    let _ = build("app:1");
    let _ = build("app:2").expect_text(&["cached 1/1 steps"]);
    assert!(lab.registry.tag("app", "1").is_some() && lab.registry.tag("app", "2").is_some());
}

#[test]
fn a_name_without_a_registry_says_both_ways_out() {
    let lab = Lab::new();
    let _ = small(&lab).build().args(["-t", "app:1"]).run().expect_code(2).expect_text(&[
        "-t app:1 names no registry",
        "-t registry.example/app:1",
        "-o docker-archive:FILE -t app:1",
    ]);
    let _ = small(&lab).build_archive().args(["-t", "app:1"]).run().expect_code(0);
    let manifest = std::fs::read(lab.archive()).unwrap();
    assert!(String::from_utf8_lossy(&manifest).contains(r#""RepoTags":["app:1"]"#));
}

#[test]
fn a_bad_target_is_named() {
    let lab = Lab::new();
    let _ = small(&lab)
        .build()
        .args(["-t", "registry.example/App:1"])
        .run()
        .expect_code(2)
        .expect_text(&["registry.example/App:1", "repository that registries refuse"]);
}

#[test]
fn a_push_that_will_be_refused_ends_before_the_slot_starts() {
    let lab = Lab::empty(Access::Password);
    lab.dockerfile("FROM scratch\nCOPY . /\n");
    lab.context.file("file", "x");
    let outcome = lab.build().args(["-t", &target(&lab, "app:1")]).run().expect_code(4);
    let outcome = outcome.expect_text(&["in phase probe (unauthorized)", "app"]);
    assert!(!outcome.output().contains("[slot]"), "{}", outcome.output());
    assert_none(&lab.data(), CLEAN);
}

#[test]
fn a_policy_that_denies_leaves_no_tag_and_runs_nothing() {
    let lab = Lab::new();
    let policy = with_settings(&lab, "tag-policy", r#"{"deny": ["latest"]}"#);
    let denied = small(&lab)
        .build()
        .args(["--plugin", &policy, "-t", &target(&lab, "app:latest")])
        .run()
        .expect_code(3)
        .expect_text(&["in phase pre-build (policy_denied)", "tag-policy", "latest"]);
    assert!(!denied.output().contains("[slot]"), "{}", denied.output());
    assert_eq!(lab.registry.tag("app", "latest"), None);
    assert_none(&lab.data(), CLEAN);

    let _ = small(&lab)
        .build()
        .args(["--plugin", &policy, "-t", &target(&lab, "app:1.0.0")])
        .run()
        .expect_code(0);
    assert!(lab.registry.tag("app", "1.0.0").is_some());
}

#[test]
fn a_policy_that_denies_after_the_upload_leaves_no_tag() {
    let lab = Lab::new();
    let policy = with_settings(&lab, "hostile", r#"{"mode": "deny-image"}"#);
    let _ = small(&lab)
        .build()
        .args(["--plugin", &policy, "-t", &target(&lab, "app:1"), "-t", &target(&lab, "copy:1")])
        .run()
        .expect_code(3)
        .expect_text(&["[upload]", "in phase post-push (policy_denied)", "not this image"]);
    assert_eq!((lab.registry.tag("app", "1"), lab.registry.tag("copy", "1")), (None, None));
    assert_none(&lab.data(), CLEAN);
}

#[test]
fn a_policy_that_breaks_ends_the_build_and_the_next_one_is_fine() {
    let lab = Lab::new();
    let broken = with_settings(&lab, "hostile", r#"{"mode": "trap"}"#);
    let _ = small(&lab)
        .build()
        .args(["--plugin", &broken, "-t", &target(&lab, "app:1")])
        .run()
        .expect_code(5)
        .expect_text(&["(hook_fault)", "hostile", "trap"]);
    assert_eq!(lab.registry.tag("app", "1"), None);
    let _ = small(&lab).build().args(["-t", &target(&lab, "app:1")]).run().expect_code(0);
}

#[test]
fn a_registry_that_is_down_ends_the_attempt_before_the_slot() {
    let lab = Lab::new();
    // Nobody listens on port 1 of the loopback interface.
    let _ = small(&lab)
        .build()
        .args(["-t", "127.0.0.1:1/app:1"])
        .run()
        .expect_code(5)
        .expect_text(&["in phase probe (network)"]);
}
