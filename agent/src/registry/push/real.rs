//! Pushes to Debian's docker-registry.

use kiln_protocol::Reason;

use super::testing::{Front, Stock, forward, limits, push, registry, silent};
use super::*;
use crate::registry::RegistrySection;
use crate::registry::real::{DockerRegistry, PASSWORD};
use crate::registry::stub::Seen;

fn all_sent(candidate: &Candidate) -> Uploaded {
    let bytes = candidate.blobs.iter().map(|blob| blob.size).sum();
    Uploaded { sent: u32::try_from(candidate.blobs.len()).unwrap(), bytes, ..Uploaded::default() }
}

#[tokio::test]
async fn a_candidate_arrives_over_tls_and_a_tag_moves() {
    let server = DockerRegistry::start();
    let host = format!("127.0.0.1:{}", server.port);
    let with_ca = || RegistrySection { ca: Some(server.ca()), ..RegistrySection::default() };
    let registry = server.registry(with_ca(), PASSWORD);
    let push = push(&registry, &host, "team/app");
    let stock = Stock::new();
    let candidate = stock.candidate(b"ab");

    let free = Probe { existing: None, rule: TagRule::Free };
    assert_eq!(push.probe(Some("1")).await.unwrap(), free);
    let mut missing = push.verify_candidate(&candidate).await.unwrap();
    assert_eq!(missing.pop(), Some(candidate.digest.clone()));
    assert_eq!(missing.len(), 3);

    let uploaded = push.upload_candidate(&candidate, &stock.store, &silent()).await.unwrap();
    assert_eq!(uploaded, all_sent(&candidate));
    assert_eq!(push.verify_candidate(&candidate).await.unwrap(), []);
    assert_eq!(push.head_tag("1").await.unwrap(), None, "an upload makes no tag");

    let tagged = push.put_tag("1", candidate.manifest.as_bytes(), &candidate.media_type).await.unwrap();
    assert_eq!(tagged, TagOutcome::Moved);
    assert_eq!(push.head_tag("1").await.unwrap(), Some(candidate.digest.clone()));
    let known = Probe { existing: Some(candidate.digest.clone()), rule: TagRule::Unknown };
    assert_eq!(push.probe(Some("1")).await.unwrap(), known);

    let second = stock.candidate(b"ac");
    let uploaded = push.upload_candidate(&second, &stock.store, &silent()).await.unwrap();
    assert_eq!((uploaded.present, uploaded.sent), (1, 2));
    let tagged = push.put_tag("1", second.manifest.as_bytes(), &second.media_type).await.unwrap();
    assert_eq!(tagged, TagOutcome::Moved);
    assert_eq!(push.head_tag("1").await.unwrap(), Some(second.digest.clone()));
    assert_eq!(push.verify_candidate(&candidate).await.unwrap(), []);

    let stranger = server.registry(with_ca(), "wrong");
    let error = super::testing::push(&stranger, &host, "team/app").probe(Some("1")).await.unwrap_err();
    assert_eq!((error.kind, error.reason), (Kind::Unauthorized, Reason::Unauthorized), "{error:?}");
    assert!(error.hint.unwrap().contains("right to pull and push in team/app"));
}

#[tokio::test]
async fn blobs_are_mounted_from_a_neighbour_and_not_sent() {
    let front = Front::start(|_, _| None).await;
    let host = front.host();
    let registry = registry(&host, None, limits());
    let stock = Stock::new();
    let candidate = stock.candidate(b"a");
    let base = push(&registry, &host, "base/app");
    base.upload_candidate(&candidate, &stock.store, &silent()).await.unwrap();
    let sent = front.count("PUT", "/blobs/uploads/");
    assert_eq!(sent, 2);

    let mount = |repository: &str, blobs: BTreeSet<Digest>| {
        let repository = format!("{host}/{repository}").parse().unwrap();
        Mount { repository, blobs }
    };
    let blobs: BTreeSet<_> = candidate.blobs.iter().map(|blob| blob.digest.clone()).collect();
    let upload = async |target: &str, mounts: &[Mount]| {
        let name = format!("{host}/{target}").parse().unwrap();
        let push = registry.push(&name, mounts, DEFAULT_BUDGET).unwrap();
        push.upload_candidate(&candidate, &stock.store, &silent()).await.unwrap()
    };
    let uploaded = upload("team/one", &[mount("base/app", blobs.clone())]).await;
    assert_eq!(uploaded, Uploaded { mounted: 2, ..Uploaded::default() });
    assert_eq!(front.count("PUT", "/blobs/uploads/"), sent);
    assert_eq!(front.count("POST", "from=base%2Fapp"), 2);

    // Who is wrong about a neighbour only loses time.
    assert_eq!(upload("team/two", &[mount("empty/app", blobs)]).await, all_sent(&candidate));
    let elsewhere = Mount { repository: "other.invalid/base".parse().unwrap(), blobs: BTreeSet::new() };
    assert_eq!(upload("team/three", &[elsewhere]).await, all_sent(&candidate));
    assert_eq!(upload("team/three", &[]).await.present, 2);
}

#[tokio::test]
async fn a_probe_leaves_no_upload_behind() {
    let front = Front::start(|_, _| None).await;
    let registry = registry(&front.host(), None, limits());
    push(&registry, &front.host(), "team/app").probe(None).await.unwrap();
    assert_eq!((front.count("POST", "/blobs/uploads/"), front.count("DELETE", "/blobs/uploads/")), (1, 1));
    let session = front.stub.seen().into_iter().find(|seen| seen.method == "DELETE").unwrap();
    let status = forward(&Seen { method: "GET".into(), ..session }, front.port());
    assert!(format!("{status:?}").contains("404"), "{status:?}");
}
