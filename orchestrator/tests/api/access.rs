//! Who gets in.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use kiln_orchestrator::api::{ListenError, Listener, Token};
use kiln_protocol::api::Code;
use reqwest::{Method, StatusCode};

use crate::scene::{PATIENCE, Scene, problem};

#[tokio::test]
async fn the_socket_is_for_its_owner_only() {
    let scene = Scene::new().await;
    assert_eq!(scene.mode("api"), 0o700);
    assert_eq!(scene.mode("api/kiln.sock"), 0o600);
    assert_eq!(scene.mode("api/token"), 0o600);
    let taken = Listener::unix(&scene.socket()).unwrap_err();
    assert!(matches!(taken, ListenError::Taken { .. }), "{taken}");
    assert!(scene.get("/builds").send().await.unwrap().status().is_success(), "the first server goes on");
    let folder = scene.stop().await;
    assert!(!folder.path().join("api/kiln.sock").exists());
}

#[tokio::test]
async fn a_socket_that_a_killed_server_left_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api/kiln.sock");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let mode = |mode| std::fs::set_permissions(path.parent().unwrap(), std::fs::Permissions::from_mode(mode));
    mode(0o755).unwrap();
    assert!(matches!(Listener::unix(&path).unwrap_err(), ListenError::OpenFolder { mode: 0o755, .. }));
    mode(0o700).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let scene = Scene::within(folder).await;
    assert!(scene.get("/builds").send().await.unwrap().status().is_success());
}

#[tokio::test]
async fn nobody_listens_for_strangers() {
    let folder = tempfile::tempdir().unwrap();
    let token = Token::open(&folder.path().join("token")).unwrap();
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let refused = Listener::loopback(address.parse().unwrap(), token.clone()).await.unwrap_err();
        assert!(matches!(refused, ListenError::NotLoopback(_)), "{refused}");
    }
    let long = folder.path().join("x".repeat(120));
    assert!(matches!(Listener::unix(&long).unwrap_err(), ListenError::LongPath { .. }));
}

#[tokio::test]
async fn loopback_needs_the_token_and_our_name() {
    let scene = Scene::new().await;
    let good = scene.loopback(Method::GET, "/builds").send().await.unwrap();
    assert_eq!(good.status(), StatusCode::OK);
    assert_eq!(good.headers()["x-content-type-options"], "nosniff");

    let url = format!("http://127.0.0.1:{}/api/v1/builds", scene.port);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for token in ["", "x", &scene.token[1..], &scene.token.to_uppercase()] {
        let refused = client.get(&url).bearer_auth(token).send().await.unwrap();
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(refused.headers()["www-authenticate"], "Bearer");
        assert!(problem(refused).await.is(Code::Unauthorized));
    }
    assert!(problem(client.get(&url).send().await.unwrap()).await.is(Code::Unauthorized));
    for (header, value, code) in [
        ("host", "evil.example".to_owned(), Code::HostRefused),
        ("host", format!("evil.example:{}", scene.port), Code::HostRefused),
        ("host", "localhost:1".to_owned(), Code::HostRefused),
        ("origin", "http://evil.example".to_owned(), Code::OriginRefused),
        ("origin", "null".to_owned(), Code::OriginRefused),
    ] {
        let attack = scene.loopback(Method::GET, "/builds").header(header, &value).send().await.unwrap();
        assert_eq!(attack.status(), StatusCode::FORBIDDEN);
        assert!(problem(attack).await.is(code), "{header}: {value}");
        let attack = scene.get("/builds").header(header, &value).send().await.unwrap();
        assert_eq!(attack.status(), StatusCode::FORBIDDEN, "through the socket: {value}");
    }
    let ours = format!("http://localhost:{}", scene.port);
    let page = scene.loopback(Method::GET, "/builds").header("origin", ours).send().await.unwrap();
    assert_eq!(page.status(), StatusCode::OK);
}

#[tokio::test]
async fn probes_need_no_token_but_our_name() {
    let scene = Scene::new().await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for path in ["healthz", "readyz"] {
        let url = format!("http://127.0.0.1:{}/{path}", scene.port);
        assert_eq!(client.get(&url).send().await.unwrap().status(), StatusCode::OK);
        let rebound = client.get(&url).header("host", "evil.example").send().await.unwrap();
        assert_eq!(rebound.status(), StatusCode::FORBIDDEN);
    }
}

#[tokio::test]
async fn what_is_not_there_is_a_problem_too() {
    let scene = Scene::new().await;
    let missing = scene.get("/nothing").send().await.unwrap();
    assert!(problem(missing).await.is(Code::NotFound));
    let method = scene.ask(Method::DELETE, "/builds").send().await.unwrap();
    assert!(problem(method).await.is(Code::MethodNotAllowed));
    for path in
        ["/builds?state=NOPE", "/builds?limit=0", "/builds?limit=201", "/builds?cursor=x", "/builds?no=1"]
    {
        assert!(problem(scene.get(path).send().await.unwrap()).await.is(Code::BadRequest), "{path}");
    }
    let name = scene.get("/builds/not-an-id").send().await.unwrap();
    assert!(problem(name).await.is(Code::BadRequest));
}

/// Two hosts in one request, or a target that names another host: clients and servers read those differently.
#[tokio::test(flavor = "multi_thread")]
async fn ambiguous_requests_are_refused() {
    let scene = Scene::new().await;
    let ask = |request: String| {
        let mut stream = TcpStream::connect(("127.0.0.1", scene.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_whitespace().nth(1).unwrap_or_default().to_owned()
    };
    let port = scene.port;
    let end = format!("authorization: Bearer {}\r\nconnection: close\r\n\r\n", scene.token);
    let ours = format!("host: 127.0.0.1:{port}\r\n");
    assert_eq!(ask(format!("GET /api/v1/builds HTTP/1.1\r\n{ours}{end}")), "200");
    assert_eq!(ask(format!("GET /api/v1/builds HTTP/1.1\r\n{ours}host: evil.example\r\n{end}")), "403");
    assert_eq!(ask(format!("GET http://evil.example/api/v1/builds HTTP/1.1\r\n{ours}{end}")), "403");
    assert_eq!(ask(format!("GET /api/v1/builds HTTP/1.1\r\n{end}")), "403");
    let huge = format!("x: {}\r\n", "y".repeat(128 * 1024));
    assert_eq!(ask(format!("GET /api/v1/builds HTTP/1.1\r\n{ours}{huge}{end}")), "431");
}

/// Half requests, however many, keep nobody out for ever: each ends by itself.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_do_not_keep_others_out() {
    let scene = Scene::new().await;
    let idle: Vec<_> = (0..300).filter_map(|_| TcpStream::connect(("127.0.0.1", scene.port)).ok()).collect();
    assert!(idle.len() > 256, "more than one listener takes");
    let through = scene.get("/builds").timeout(PATIENCE).send().await.unwrap();
    assert_eq!(through.status(), StatusCode::OK, "the socket has places of its own");
    let later = scene.loopback(Method::GET, "/builds").timeout(Duration::from_secs(90)).send().await.unwrap();
    assert_eq!(later.status(), StatusCode::OK);
}
