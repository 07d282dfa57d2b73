//! Builds: submitted, listed, shown, changed (edge).

use axum::extract::State as Context;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json as Answer};
use kiln_protocol::api::{
    Accepted, BuildDetail, BuildSummary, Changed, Code, IDEMPOTENCY_HEADER, PAGE, PREFIX, Page,
};
use kiln_protocol::id::SubmitSeq;
use kiln_protocol::spec::{Destination, SecretSource};
use kiln_protocol::{BuildId, BuildSpec, Reason, State};
use serde::Deserialize;

use super::guard::Actor;
use super::problem::Refusal;
use super::request::{Asked, Json, Named, text};
use super::{Served, contexts, view};
use crate::submit::{Submission, SubmitError, Submitted};

/// Which builds a list shows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filter {
    state: Option<State>,
    cursor: Option<i64>,
    limit: Option<u32>,
}

pub(super) async fn list(
    Context(served): Context<Served>,
    Asked(filter): Asked<Filter>,
) -> Result<Answer<Page<BuildSummary>>, Refusal> {
    page(&served, filter.state, filter.cursor, filter.limit).await.map(Answer)
}

/// A page of builds, the newest first. The cursor is the place of the last one in the order of submission, so
/// that builds that come meanwhile shift nothing.
pub(super) async fn page(
    served: &Served,
    state: Option<State>,
    cursor: Option<i64>,
    limit: Option<u32>,
) -> Result<Page<BuildSummary>, Refusal> {
    let limit = limit.unwrap_or(PAGE);
    if !(1..=PAGE).contains(&limit) {
        return Err(Refusal::new(Code::BadRequest, format!("limit is {limit}; use 1 to {PAGE}")));
    }
    let found = served.orchestrator.list(cursor.map(SubmitSeq), state, i64::from(limit)).await?;
    let full = found.len() == limit as usize;
    let last = found.last().filter(|_| full).map(|last| last.build.submit_seq.0);
    Ok(Page {
        items: found.iter().map(view::summary).collect(),
        next_cursor: last.map(|seq| seq.to_string()),
    })
}

pub(super) async fn show(
    Context(served): Context<Served>,
    Named(id): Named<BuildId>,
) -> Result<Answer<BuildDetail>, Refusal> {
    let found = served.orchestrator.show(id).await?;
    let attempts = served.orchestrator.attempts(id).await?;
    Ok(Answer(view::detail(found, attempts, served.orchestrator.store().now())))
}

pub(super) async fn submit(
    Context(served): Context<Served>,
    headers: HeaderMap,
    Json(spec): Json<BuildSpec>,
) -> Result<Response, Refusal> {
    let key = text(&headers, IDEMPOTENCY_HEADER)?.map(str::to_owned);
    has_pool(&served, &spec)?;
    serves_itself(&spec)?;
    has_context(&served, &spec).await?;
    let submission = Submission { spec, key, retry_of: None };
    let submitted = served.orchestrator.submit_uploaded(submission, &served.contexts).await?;
    Ok(accepted(submitted))
}

/// An agent may come later to a pool that is configured; to another one never.
fn has_pool(served: &Served, spec: &BuildSpec) -> Result<(), Refusal> {
    match served.orchestrator.only_pool() {
        Some(only) if *only != spec.pool => {
            let why =
                format!("pool is {}; this server has only the pool {only}: submit with that one", spec.pool);
            Err(Refusal::new(Code::PoolUnknown, why))
        }
        _ => Ok(()),
    }
}

/// The client of a server leaves: nothing may need it later.
fn serves_itself(spec: &BuildSpec) -> Result<(), Refusal> {
    let refuse = |why: String| Err(Refusal::new(Code::InvalidSpec, why));
    if let Some(file) = spec.destinations.iter().find(|d| matches!(d, Destination::File(_))) {
        return refuse(format!(
            "the destination {file} is a file of the client; a server publishes to registries only"
        ));
    }
    if let Some(secret) = spec.secrets.iter().find(|secret| secret.source == SecretSource::Client) {
        return refuse(format!("the secret {} is with the client; name one of the server", secret.id));
    }
    if spec.credentials == SecretSource::Client {
        return refuse("the registry credentials are with the client; name those of the server".to_owned());
    }
    Ok(())
}

async fn has_context(served: &Served, spec: &BuildSpec) -> Result<(), Refusal> {
    let (digest, announced) = (&spec.context.digest, spec.context.size);
    // Whoever looks is about to use it.
    contexts::touch(served, digest).await?;
    match served.contexts.size(digest).await? {
        None => Err(SubmitError::ContextMissing(digest.clone()).into()),
        Some(size) if size != announced => {
            let why = format!("the context {digest} has {size} bytes, not {announced} as the request says");
            Err(Refusal::new(Code::InvalidSpec, why))
        }
        Some(_) => Ok(()),
    }
}

fn accepted(submitted: Submitted) -> Response {
    let Submitted { id, repeated } = submitted;
    let location = [(header::LOCATION, format!("{PREFIX}/builds/{id}"))];
    (StatusCode::ACCEPTED, location, Answer(Accepted { id, repeated })).into_response()
}

pub(super) async fn cancel(
    Context(served): Context<Served>,
    Extension(Actor(actor)): Extension<Actor>,
    Named(id): Named<BuildId>,
) -> Result<Answer<Changed>, Refusal> {
    let state = served.orchestrator.cancel(id, Reason::Cancelled, actor).await?;
    Ok(Answer(Changed { id, state }))
}

pub(super) async fn retry(
    Context(served): Context<Served>,
    headers: HeaderMap,
    Named(id): Named<BuildId>,
) -> Result<Response, Refusal> {
    let key = text(&headers, IDEMPOTENCY_HEADER)?.map(str::to_owned);
    let spec = served.orchestrator.show(id).await?.spec;
    has_pool(&served, &spec)?;
    has_context(&served, &spec).await?;
    Ok(accepted(served.orchestrator.retry(id, key, Some(&served.contexts)).await?))
}

/// How a dead letter is replayed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Replay {
    #[serde(default)]
    take_head: bool,
}

pub(super) async fn replay(
    Context(served): Context<Served>,
    Extension(Actor(actor)): Extension<Actor>,
    Named(id): Named<BuildId>,
    Asked(Replay { take_head }): Asked<Replay>,
) -> Result<Answer<Changed>, Refusal> {
    let state = served.orchestrator.replay(id, take_head, actor).await?;
    Ok(Answer(Changed { id, state }))
}

pub(super) async fn discard(
    Context(served): Context<Served>,
    Extension(Actor(actor)): Extension<Actor>,
    Named(id): Named<BuildId>,
) -> Result<Answer<Changed>, Refusal> {
    let state = served.orchestrator.discard(id, actor).await?;
    Ok(Answer(Changed { id, state }))
}
