//! `kiln build -t` through a proxy to a real registry that misbehaves while the image is published.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

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
