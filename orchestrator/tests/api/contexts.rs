//! Uploads.

use futures_util::stream;
use kiln_protocol::api::Code;
use reqwest::{Body, Method, StatusCode};

use crate::scene::{MAX_CONTEXT, Scene, body, digest, problem};

#[tokio::test]
async fn a_context_is_sent_once() {
    let scene = Scene::new().await;
    let context = vec![7; 300_000];
    let path = format!("/contexts/{}", digest(&context));
    assert_eq!(scene.ask(Method::HEAD, &path).send().await.unwrap().status(), StatusCode::NOT_FOUND);
    let put = async || scene.ask(Method::PUT, &path).body(context.clone()).send().await.unwrap();
    let stored = body(put().await, StatusCode::CREATED).await;
    assert_eq!(stored["size"], 300_000);
    assert_eq!(put().await.status(), StatusCode::OK, "again does no harm");
    let there = scene.ask(Method::HEAD, &path).send().await.unwrap();
    assert_eq!(there.status(), StatusCode::OK);
    assert_eq!(there.headers()["content-length"], "300000");
}

#[tokio::test]
async fn other_bytes_than_announced_are_refused() {
    let scene = Scene::new().await;
    let path = format!("/contexts/{}", digest(b"right"));
    let wrong = scene.ask(Method::PUT, &path).body("wrong").send().await.unwrap();
    assert_eq!(wrong.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert!(problem(wrong).await.is(Code::DigestMismatch));
    assert_eq!(scene.ask(Method::HEAD, &path).send().await.unwrap().status(), StatusCode::NOT_FOUND);
    for name in ["x", "sha256:00", "sha512:aa", "..%2F..%2Fetc"] {
        let refused = scene.ask(Method::PUT, &format!("/contexts/{name}")).body("x").send().await.unwrap();
        assert!(problem(refused).await.is(Code::BadRequest), "{name}");
    }
    let left: Vec<_> = std::fs::read_dir(scene.folder.path().join("contexts/sha256")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_context_has_a_largest_size_however_it_is_sent() {
    let scene = Scene::new().await;
    let size = usize::try_from(MAX_CONTEXT).unwrap();
    let largest = vec![1; size];
    scene.upload(&largest).await;
    let large = vec![2; size + 1];
    let path = format!("/contexts/{}", digest(&large));
    let announced = scene.ask(Method::PUT, &path).body(large.clone()).send().await.unwrap();
    assert_eq!(announced.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert!(problem(announced).await.is(Code::TooLarge));
    let parts = large.chunks(1000).map(|part| Ok::<_, std::io::Error>(part.to_vec())).collect::<Vec<_>>();
    let streamed = Body::wrap_stream(stream::iter(parts));
    let silent = scene.ask(Method::PUT, &path).body(streamed).send().await;
    // The server answers before the end of the upload, and not every client reads that.
    if let Ok(silent) = silent {
        assert!(problem(silent).await.is(Code::TooLarge));
    }
    assert_eq!(scene.ask(Method::HEAD, &path).send().await.unwrap().status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let scene = Scene::new().await;
    let path = format!("/contexts/{}", digest(b"whole"));
    let parts = vec![Ok(b"who".to_vec()), Err(std::io::Error::other("gone"))];
    let broken = scene.ask(Method::PUT, &path).body(Body::wrap_stream(stream::iter(parts))).send().await;
    assert!(broken.is_err());
    let folder = scene.stop().await;
    assert_eq!(std::fs::read_dir(folder.path().join("contexts/sha256")).unwrap().count(), 0);
}
