//! `GET /metrics` on a listener of its own (edge): the numbers of this process as Prometheus reads them.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::proto::MetricFamily;
use prometheus::{Registry, TEXT_FORMAT, TextEncoder};

use super::problem::Refusal;
use super::serve::Closing;
use super::{Api, Served};
use crate::core::{CoreError, Orchestrator};
use crate::error::chain;
use crate::metrics::Standing;
use kiln_protocol::api::Code;

/// Prometheus itself waits 10 s by default.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The paths of the listener, without its checks.
pub(super) fn router(api: Api, closing: Closing) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .fallback(async || Refusal::new(Code::NotFound, "there is only /metrics here"))
        .method_not_allowed_fallback(async || Refusal::new(Code::MethodNotAllowed, "/metrics has only GET"))
        .with_state(Served { api, closing })
}

async fn metrics(State(served): State<Served>) -> Response {
    let read = tokio::time::timeout(READ_TIMEOUT, served.orchestrator.standing()).await;
    let standing = match read {
        Ok(Ok(standing)) => standing,
        Ok(Err(error)) => return unreadable(&chain(&error)),
        Err(_) => return unreadable("it takes too long"),
    };
    let metrics = served.orchestrator.store().metrics();
    metrics.show(&standing);
    let registries = std::iter::once(metrics.registry()).chain(&served.metrics);
    match TextEncoder::new().encode_to_string(&merged(registries)) {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            let why = "the metrics cannot be written; the server's own log says why\n";
            (StatusCode::INTERNAL_SERVER_ERROR, why).into_response()
        }
    }
}

/// No number is better than an old one.
fn unreadable(error: &str) -> Response {
    tracing::warn!(error, "the record cannot be read for metrics");
    let why = "the record cannot be read now; the server's own log says why\n";
    (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
}

/// Families of the same name become one, as the format wants it.
fn merged<'a>(registries: impl Iterator<Item = &'a Registry>) -> Vec<MetricFamily> {
    let mut families: BTreeMap<String, MetricFamily> = BTreeMap::new();
    for mut family in registries.flat_map(Registry::gather) {
        match families.get_mut(family.name()) {
            Some(known) => known.mut_metric().extend(family.take_metric()),
            None => drop(families.insert(family.name().to_owned(), family)),
        }
    }
    families.into_values().collect()
}

impl Orchestrator {
    /// What the record says of all builds now.
    async fn standing(&self) -> Result<Standing, CoreError> {
        let mut tx = self.store.read().await?;
        let counts = tx.counts().await?;
        let oldest = tx.in_state(kiln_protocol::State::Pending, None, 1).await?;
        let (outbox, outbox_oldest) = tx.outbox_backlog().await?;
        let oldest_pending = oldest.first().map(|found| found.build.submitted_at);
        Ok(Standing { counts, oldest_pending, outbox, outbox_oldest })
    }
}
