//! What waits, what was given up, and whether the server lives (edge).

use axum::Json as Answer;
use axum::extract::State as Context;
use kiln_protocol::State;
use kiln_protocol::api::{BadMessage, BuildSummary, Code, PAGE, Page, Waiting};
use serde::Deserialize;

use super::problem::Refusal;
use super::request::Asked;
use super::{Served, builds, view};

/// Waiting builds, the next one first. Beyond [`PAGE`] the order means little.
pub(super) async fn queue(Context(served): Context<Served>) -> Result<Answer<Page<Waiting>>, Refusal> {
    let mut queued = served.orchestrator.queue().await?;
    queued.truncate(PAGE as usize);
    let ids: Vec<_> = queued.iter().map(|queued| queued.id).collect();
    let found = served.orchestrator.find(&ids).await?;
    let why = |id| queued.iter().find(|queued| queued.id == id).map(|queued| queued.wait.to_string());
    let waiting = found.iter().filter(|found| found.build.state == State::Pending).filter_map(|found| {
        let why = why(found.build.id)?;
        Some(Waiting { build: view::summary(found), why })
    });
    Ok(Answer(Page { items: waiting.collect(), next_cursor: None }))
}

/// Which part of a list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    cursor: Option<i64>,
    limit: Option<u32>,
}

pub(super) async fn dead(
    Context(served): Context<Served>,
    Asked(part): Asked<Part>,
) -> Result<Answer<Page<BuildSummary>>, Refusal> {
    builds::page(&served, Some(State::DeadLetter), part.cursor, part.limit).await.map(Answer)
}

pub(super) async fn bad_messages(
    Context(served): Context<Served>,
) -> Result<Answer<Page<BadMessage>>, Refusal> {
    let found = served.orchestrator.bad_messages().await?;
    Ok(Answer(Page { items: found.into_iter().map(view::bad_message).collect(), next_cursor: None }))
}

/// The process answers, whatever else is broken.
pub(super) async fn alive() -> &'static str {
    "alive\n"
}

/// The record answers, and the server is not about to stop.
pub(super) async fn ready(Context(served): Context<Served>) -> Result<&'static str, Refusal> {
    if served.closing.has_begun() {
        return Err(Refusal::new(Code::Unavailable, "the server stops"));
    }
    served.orchestrator.list(None, None, 1).await?;
    Ok("ready\n")
}
