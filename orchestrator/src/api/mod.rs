//! The HTTP API of a server (edge): what people and their tools ask, on a Unix socket and on loopback.

mod builds;
mod contexts;
mod events;
mod guard;
mod listen;
mod log;
mod metrics;
mod patient;
mod problem;
mod queue;
mod request;
mod serve;
mod sse;
mod token;
mod view;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn;
use axum::routing::{get, post, put};
use kiln_protocol::api::{Code, PREFIX};
use kiln_transport::Blobs;

use crate::core::Orchestrator;
use crate::logs::LogSource;

pub use listen::{ListenError, Listener};
pub use serve::serve;
pub use token::{Token, TokenError};

use problem::Refusal;
use serve::Closing;

/// Any question but an upload is answered within this time; a stream has begun by then.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What the API tells of.
#[derive(Debug, Clone)]
pub struct Api {
    /// The record.
    pub orchestrator: Arc<Orchestrator>,
    /// Where uploaded contexts go.
    pub contexts: Blobs,
    /// The largest context in bytes.
    pub max_context_bytes: u64,
    /// Where logs are.
    pub logs: LogSource,
    /// Numbers of other parts of this process, beside those of the orchestrator.
    pub metrics: Vec<prometheus::Registry>,
}

/// The [`Api`] while it is served.
#[derive(Debug, Clone)]
struct Served {
    api: Api,
    /// Says when streams are to end, so that the server can.
    closing: Closing,
}

impl std::ops::Deref for Served {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

/// Every path, without the checks of a listener.
fn router(served: Served) -> Router {
    let quick = Router::new()
        .route("/builds", get(builds::list).post(builds::submit))
        .route("/builds/{id}", get(builds::show))
        .route("/builds/{id}/cancel", post(builds::cancel))
        .route("/builds/{id}/retry", post(builds::retry))
        .route("/builds/{id}/replay", post(builds::replay))
        .route("/builds/{id}/discard", post(builds::discard))
        .route("/builds/{id}/events", get(events::follow))
        .route("/builds/{id}/log", get(log::read))
        .route("/builds/{id}/log/follow", get(log::follow))
        .route("/queue", get(queue::queue))
        .route("/dead", get(queue::dead))
        .route("/bad-messages", get(queue::bad_messages))
        .layer(from_fn(in_time));
    let upload = Router::new()
        .route("/contexts/{digest}", put(contexts::upload).head(contexts::exists))
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .nest(PREFIX, quick.merge(upload))
        .route("/healthz", get(queue::alive))
        .route("/readyz", get(queue::ready))
        .fallback(async || Refusal::new(Code::NotFound, "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            Refusal::new(Code::MethodNotAllowed, "this path has other methods")
        })
        .with_state(served)
}

async fn in_time(
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Result<axum::response::Response, Refusal> {
    let late = |_| Refusal::new(Code::Timeout, "the request took too long; ask again");
    tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await.map_err(late)
}
