//! `kiln build -t` through a proxy to a real registry that misbehaves while the image is published.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use kiln_tests::base::BaseImage;
use kiln_tests::harbor::{self, Rules};
use kiln_tests::lab::{CLEAN, Lab};
use kiln_tests::leftovers::assert_none;
use kiln_tests::process::Outcome;
use kiln_tests::proxy::{Fault, FaultProxy};

const ALWAYS: usize = usize::MAX;
/// Large enough that a cut comes in the middle.
const LAYER: &str = "FROM busybox:1\nRUN head -c 3000000 /dev/urandom > /made\n";

/// A lab whose registry is reached through a proxy.
fn proxied() -> (Lab, FaultProxy) {
    let lab = Lab::new();
    let proxy = FaultProxy::start(lab.registry.address());
    lab.configure(&proxy.host(), "");
    lab.dockerfile(LAYER);
    (lab, proxy)
}

fn publish(lab: &Lab, proxy: &FaultProxy, flags: &[&str]) -> Outcome {
    lab.build().args(["-t", &format!("{}/app:1", proxy.host())]).args(flags).run()
}

/// The faults are survived inside the first attempt, and the tag has the digest that the client names.
fn survives(fault: impl FnOnce(&FaultProxy)) -> FaultProxy {
    let (lab, proxy) = proxied();
    fault(&proxy);
    let outcome = publish(&lab, &proxy, &[]).expect_code(0);
    let digest = lab.registry.tag("app", "1").unwrap();
    let _ = outcome.expect_text(&[&digest]);
    assert_none(&lab.data(), CLEAN);
    proxy
}

#[test]
fn errors_of_a_server_are_tried_again() {
    let proxy = survives(|proxy| {
        proxy.fault("POST /v2/app/blobs/uploads", 2, Fault::Status(500));
        proxy.fault("PUT /v2/app/manifests/", 2, Fault::Status(500));
    });
    assert!(proxy.count("PUT /v2/app/manifests/") >= 3, "{:?}", proxy.requests());
}

#[test]
fn a_limited_rate_is_waited_for() {
    let proxy = survives(|proxy| {
        proxy.fault("POST /v2/app/blobs/uploads", 1, Fault::Busy(1));
        proxy.fault("PUT /v2/app/manifests/1", 1, Fault::Busy(1));
    });
    assert!(proxy.count("PUT /v2/app/manifests/1") >= 2, "{:?}", proxy.requests());
}

#[test]
fn a_blob_that_is_cut_in_the_middle_is_sent_again() {
    let proxy = survives(|proxy| {
        proxy.fault("PATCH /v2/app/blobs/uploads", 2, Fault::CutBodyAfter(100_000));
        proxy.fault("PUT /v2/app/blobs/uploads", 1, Fault::CutBodyAfter(1_000));
    });
    assert!(proxy.count("POST /v2/app/blobs/uploads") >= 2, "{:?}", proxy.requests());
}

#[test]
fn an_answer_that_is_lost_is_asked_for_again() {
    let _ = survives(|proxy| {
        proxy.fault("PUT /v2/app/manifests/1", 1, Fault::CutAfter(0));
    });
}

#[test]
fn a_credential_that_is_refused_in_the_middle_leaves_no_tag() {
    let (lab, proxy) = proxied();
    proxy.fault("PUT /v2/app/manifests/sha256:", ALWAYS, Fault::Status(401));
    let _ = publish(&lab, &proxy, &[]).expect_code(4).expect_text(&["unauthorized", "phase upload"]);
    assert_eq!(lab.registry.tag("app", "1"), None);
    assert_none(&lab.data(), CLEAN);
}

#[test]
fn a_registry_that_hangs_during_an_upload_meets_the_timeout() {
    let (lab, proxy) = proxied();
    proxy.fault("POST /v2/app/blobs/uploads", ALWAYS, Fault::BlackHole);
    let outcome = publish(&lab, &proxy, &["--timeout=15s"]).expect_code(124).expect_text(&["timeout"]);
    assert!(outcome.elapsed < Duration::from_secs(40), "{:?}", outcome.elapsed);
    assert_eq!(lab.registry.tag("app", "1"), None);
    assert_none(&lab.data(), CLEAN);
}

#[test]
fn a_digest_that_is_not_ours_is_refused() {
    let (lab, proxy) = proxied();
    proxy.fault("PUT /v2/app/manifests/sha256:", ALWAYS, Fault::WrongDigest);
    let outcome = publish(&lab, &proxy, &[]);
    assert_ne!(outcome.code, 0);
    let _ = outcome.expect_text(&["digest"]);
    assert_eq!(lab.registry.tag("app", "1"), None);
    assert_none(&lab.data(), CLEAN);
}

/// A lab whose images go to a Harbor with these rules; base images come from elsewhere. `team/app:v1` exists.
fn harbored(rules: Rules) -> (Lab, FaultProxy) {
    let lab = Lab::new();
    lab.registry.push("team/app", "v1", &BaseImage::busybox());
    let harbor = harbor::start(lab.registry.address(), rules);
    let open = lab.registry.host();
    lab.configure(&open, &format!("[[registry]]\nprefix = \"{0}\"\ninsecure = true\n", harbor.host()));
    let auth = format!("{{\"auths\": {{\"{}\": {{\"auth\": \"{}\"}}}}}}", harbor.host(), harbor::BASIC);
    std::fs::write(lab.path("auth.json"), auth).unwrap();
    lab.dockerfile("FROM busybox:1\nRUN echo a-step-$((40 + 2)) && head -c 3000000 /dev/urandom > /made\n");
    (lab, harbor)
}

fn publish_to_harbor(lab: &Lab, harbor: &FaultProxy, name: &str) -> Outcome {
    let target = format!("{}/{name}", harbor.host());
    let auth = lab.path("auth.json").display().to_string();
    let outcome = lab.build().args(["--authfile", &auth, "-t", &target]).run();
    assert!(!outcome.output().contains(harbor::PASSWORD), "{}", outcome.output());
    assert_none(&lab.data(), CLEAN);
    outcome
}

/// Refused with this code before the slot: nothing was built, nothing sent.
fn refused_early(rules: Rules, name: &str, code: i32, texts: &[&str]) {
    let (lab, harbor) = harbored(rules);
    let before = lab.registry.tag("team/app", "v1");
    let outcome = publish_to_harbor(&lab, &harbor, name).expect_code(code).expect_text(texts);
    let output = outcome.output();
    assert!(!output.contains("[slot]") && !output.contains("a-step-42"), "{output}");
    assert_eq!(harbor.count("PATCH ") + harbor.count("PUT "), 0, "{:?}", harbor.requests());
    assert_eq!(lab.registry.tag("team/app", "v1"), before);
}

#[test]
fn a_robot_publishes_to_its_project() {
    let (lab, harbor) = harbored(Rules { immutable: true, ..Rules::default() });
    let outcome = publish_to_harbor(&lab, &harbor, "team/app:1").expect_code(0);
    let _ = outcome.expect_text(&["a-step-42", &lab.registry.tag("team/app", "1").unwrap()]);
}

#[test]
fn a_tag_that_a_rule_makes_immutable_is_refused_before_the_slot_starts() {
    let rules = Rules { immutable: true, ..Rules::default() };
    let texts = ["in phase probe (bad_request)", "team/app:v1", "makes it immutable", "push to another tag"];
    refused_early(rules, "team/app:v1", 2, &texts);
}

#[test]
fn a_robot_without_the_right_to_push_is_refused_before_the_slot_starts() {
    let texts = ["in phase probe (unauthorized)", "action: push", "a robot account needs both"];
    refused_early(Rules { read_only_robot: true, ..Rules::default() }, "team/app:1", 4, &texts);
    refused_early(Rules::default(), "other/app:1", 4, &texts);
}

#[test]
fn a_full_project_is_named_with_the_way_out() {
    let (lab, harbor) = harbored(Rules { full: true, ..Rules::default() });
    let outcome = publish_to_harbor(&lab, &harbor, "team/app:1").expect_code(2);
    let _ = outcome.expect_text(&[
        "in phase upload (bad_request)",
        "configured upper limit of 100.0 MiB",
        "ask for a larger quota of the project",
    ]);
    assert_eq!(lab.registry.tag("team/app", "1"), None);
}
