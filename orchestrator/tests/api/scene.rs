//! A served orchestrator, clients, and an agent that does nothing.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_orchestrator::api::{Api, Listener, Token, serve};
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::logs::LogSource;
use kiln_orchestrator::schedule::Limits;
use kiln_orchestrator::store::{Clock, Retention, Store};
use kiln_protocol::api::{Accepted, Problem};
use kiln_protocol::id::{AgentId, BootId, ClaimId, Pool};
use kiln_protocol::message::{
    AttemptEnd, BuildGrant, ClaimAnswer, ClaimRequest, CommitAnswer, CommitRequest, Committed, Lane, Report,
    Snapshot,
};
use kiln_protocol::request::{BuildRequest, ImageFormat, NetworkMode};
use kiln_protocol::result::{Failure, Phase};
use kiln_protocol::spec::{ContextRef, Destination, SecretSource};
use kiln_protocol::{BuildId, BuildSpec, Digest, Reason};
use kiln_transport::Blobs;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use sha2::Digest as _;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// The largest context of the tests.
pub(crate) const MAX_CONTEXT: u64 = 1024 * 1024;
/// Nothing takes longer but for a fault.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Scene {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) orchestrator: Arc<Orchestrator>,
    pub(crate) port: u16,
    pub(crate) token: String,
    /// Where the metrics are.
    pub(crate) metrics: String,
    unix: Client,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinSet<()>,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        Self::within(tempfile::tempdir().unwrap()).await
    }

    /// A server on what another one left.
    pub(crate) async fn within(folder: tempfile::TempDir) -> Self {
        Self::serving(folder, None).await
    }

    /// A server with this pool only.
    pub(crate) async fn of_pool(pool: &str) -> Self {
        Self::serving(tempfile::tempdir().unwrap(), Some(pool.parse().unwrap())).await
    }

    async fn serving(folder: tempfile::TempDir, only_pool: Option<Pool>) -> Self {
        let store = Store::open(&folder.path().join("kiln.db"), Clock::System).await.unwrap();
        let settings = Settings {
            limits: Limits { per_namespace: 8 },
            policies: Vec::new(),
            retention: Retention::default(),
            only_pool,
        };
        let orchestrator = Arc::new(Orchestrator::new(store, settings, Entropy::System));
        let logs = folder.path().to_owned();
        let api = Api {
            orchestrator: Arc::clone(&orchestrator),
            contexts: Blobs::directory(&folder.path().join("contexts")).await.unwrap(),
            max_context_bytes: MAX_CONTEXT,
            logs: LogSource::files(move |build, attempt| logs.join(format!("{build}-{attempt}.log"))),
            metrics: Vec::new(),
        };
        let socket = folder.path().join("api/kiln.sock");
        let unix = Listener::unix(&socket).unwrap();
        let token_file = folder.path().join("api/token");
        let token = Token::open(&token_file).unwrap();
        let loopback = Listener::loopback("127.0.0.1:0".parse().unwrap(), token).await.unwrap();
        let port = loopback.address().rsplit_once(':').unwrap().1.parse().unwrap();
        let numbers = Listener::metrics("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let metrics = format!("{}/metrics", numbers.address());
        let (stop, stopped) = oneshot::channel::<()>();
        let mut serving = JoinSet::new();
        serving.spawn(serve(api, vec![unix, loopback, numbers], async {
            let _ = stopped.await;
        }));
        Self {
            orchestrator,
            port,
            token: std::fs::read_to_string(token_file).unwrap().trim_end().to_owned(),
            unix: Client::builder().unix_socket(socket).no_proxy().build().unwrap(),
            metrics,
            folder,
            stop: Some(stop),
            serving,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("api/kiln.sock")
    }

    pub(crate) fn mode(&self, path: &str) -> u32 {
        std::fs::metadata(self.folder.path().join(path)).unwrap().permissions().mode() & 0o7777
    }

    /// A request through the Unix socket.
    pub(crate) fn ask(&self, method: Method, path: &str) -> RequestBuilder {
        self.unix.request(method, format!("http://localhost/api/v1{path}"))
    }

    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        self.ask(Method::GET, path)
    }

    /// A request through loopback, with the token.
    pub(crate) fn loopback(&self, method: Method, path: &str) -> RequestBuilder {
        let client = Client::builder().no_proxy().build().unwrap();
        let url = format!("http://127.0.0.1:{}/api/v1{path}", self.port);
        client.request(method, url).bearer_auth(&self.token)
    }

    pub(crate) async fn json(&self, path: &str) -> serde_json::Value {
        body(self.get(path).send().await.unwrap(), StatusCode::OK).await
    }

    pub(crate) async fn post(&self, path: &str, status: StatusCode) -> serde_json::Value {
        body(self.ask(Method::POST, path).send().await.unwrap(), status).await
    }

    pub(crate) async fn upload(&self, context: &[u8]) -> ContextRef {
        let digest = digest(context);
        let put = self.ask(Method::PUT, &format!("/contexts/{digest}")).body(context.to_vec());
        assert!(put.send().await.unwrap().status().is_success());
        ContextRef { digest, size: context.len() as u64 }
    }

    pub(crate) fn submission(&self, spec: &BuildSpec) -> RequestBuilder {
        self.ask(Method::POST, "/builds")
            .header("content-type", "application/json")
            .body(serde_json::to_vec(spec).unwrap())
    }

    pub(crate) async fn submit(&self, spec: &BuildSpec) -> BuildId {
        let answer = self.submission(spec).send().await.unwrap();
        let accepted: Accepted = parsed(answer, StatusCode::ACCEPTED).await;
        accepted.id
    }

    /// A build whose context is there.
    pub(crate) async fn build(&self) -> BuildId {
        let context = self.upload(b"files").await;
        self.submit(&spec(context)).await
    }

    /// An agent takes the next build.
    pub(crate) async fn claim(&self) -> BuildGrant {
        let request = ClaimRequest {
            agent: agent(),
            boot: BootId::from_uuid(uuid::Uuid::nil()),
            claim: ClaimId::generate(),
            lane: Lane::Build,
            pools: ["default".parse().unwrap()].into(),
            policies: std::collections::BTreeSet::new(),
            slots: 4,
        };
        match self.orchestrator.claim(&request).await.unwrap() {
            ClaimAnswer::Build(grant) => *grant,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn report(&self, grant: &BuildGrant, seq: u64, snapshot: Snapshot) {
        self.orchestrator.take_report(&agent(), &Report { lease: grant.lease, seq, snapshot }).await.unwrap();
    }

    pub(crate) async fn phase(&self, grant: &BuildGrant, seq: u64, phase: Phase) {
        self.report(grant, seq, Snapshot { phase: Some(phase), ..Snapshot::default() }).await;
    }

    pub(crate) async fn fail(&self, grant: &BuildGrant, seq: u64, reason: Reason) {
        let failure = Failure {
            reason,
            phase: Phase::Build,
            message: "it broke".to_owned(),
            location: None,
            hint: None,
            limit: None,
            run_exit_code: None,
        };
        let end = Some(AttemptEnd::Failed(Box::new(failure)));
        self.report(grant, seq, Snapshot { end, ..Snapshot::default() }).await;
    }

    pub(crate) async fn commit(&self, grant: &BuildGrant) {
        let committed = Committed {
            digest: digest(b"manifest"),
            media_type: "application/json".to_owned(),
            manifest: "{}".to_owned(),
        };
        let request = CommitRequest { lease: grant.lease, committed, verdicts: Vec::new() };
        let answer = self.orchestrator.commit(&agent(), &request).await.unwrap();
        assert!(matches!(answer, CommitAnswer::Granted { .. }), "{answer:?}");
    }

    /// What an attempt printed so far.
    pub(crate) fn print(&self, build: BuildId, attempt: u32, text: &str) {
        use std::io::Write as _;
        let path = self.folder.path().join(format!("{build}-{attempt}.log"));
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Stops the server; its folder stays.
    pub(crate) async fn stop(mut self) -> tempfile::TempDir {
        drop(self.stop.take());
        tokio::time::timeout(PATIENCE, self.serving.join_next()).await.unwrap().unwrap().unwrap();
        self.orchestrator.store().close().await;
        self.folder
    }
}

pub(crate) async fn body(response: Response, status: StatusCode) -> serde_json::Value {
    parsed(response, status).await
}

pub(crate) async fn parsed<T: serde::de::DeserializeOwned>(response: Response, status: StatusCode) -> T {
    let (found, text) = (response.status(), response.text().await.unwrap());
    assert_eq!(found, status, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// The refusal in an answer.
pub(crate) async fn problem(response: Response) -> Problem {
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let status = response.status();
    let problem: Problem = parsed(response, status).await;
    assert_eq!(problem.status, status.as_u16());
    problem
}

pub(crate) fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(sha2::Sha256::digest(bytes).into())
}

pub(crate) fn agent() -> AgentId {
    "agent-1".parse().unwrap()
}

pub(crate) fn spec(context: ContextRef) -> BuildSpec {
    BuildSpec {
        namespace: "team-a".parse().unwrap(),
        pool: "default".parse().unwrap(),
        priority: 5,
        group: None,
        requester: "somebody".to_owned(),
        request: BuildRequest {
            dockerfile: "FROM scratch\n".to_owned(),
            dockerfile_name: "Dockerfile".to_owned(),
            build_args: std::collections::BTreeMap::new(),
            labels: std::collections::BTreeMap::new(),
            target: None,
            format: ImageFormat::Docker,
            timestamp: None,
            network: NetworkMode::Isolated,
            timeout: Duration::from_hours(1),
            root_filesystem: false,
            no_cache: false,
        },
        context,
        destinations: vec![Destination::Image("r.example/app:1".parse().unwrap())],
        secrets: Vec::new(),
        credentials: SecretSource::Server("registry".to_owned()),
        max_attempts: 4,
        queue_timeout: Duration::from_hours(24),
    }
}
