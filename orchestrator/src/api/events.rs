//! The changes of a build as a stream (edge).

use std::time::Duration;

use axum::extract::State as Context;
use axum::http::HeaderMap;
use axum::response::Response;
use kiln_protocol::BuildId;
use kiln_protocol::api::{Code, End, PAGE, event};
use tokio::time::timeout;

use super::Served;
use super::problem::Refusal;
use super::request::Named;
use super::sse::{self, Next, Source, nothing_more, respond};
use crate::control::ControlError;
use crate::error::chain;

/// Changes that other processes recorded are seen after this time; those of this process at once.
const POLL: Duration = Duration::from_secs(1);

/// Changes after the last one that the client has, until the build is over.
pub(super) async fn follow(
    Context(served): Context<Served>,
    Named(id): Named<BuildId>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let last = sse::last_event_id(&headers)?;
    let unreadable = |_| Refusal::new(Code::BadRequest, "Last-Event-ID is none of this stream");
    let after = last.map(str::parse).transpose().map_err(unreadable)?.unwrap_or(0);
    let (found, events) = served.orchestrator.changes(id, after).await?;
    if last.is_some() && events.is_empty() && found.build.state.is_over() {
        return Ok(nothing_more());
    }
    let closing = served.closing.clone();
    Ok(respond(Changes { served, id, after }, closing))
}

struct Changes {
    served: Served,
    id: BuildId,
    after: i64,
}

impl Source for Changes {
    async fn next(&mut self) -> Next {
        loop {
            // Before looking, so that what happens while we look wakes us.
            let woken = self.served.orchestrator.store().next_change();
            match self.look().await {
                Ok(Some((last, next))) => {
                    drop(woken);
                    self.after = last;
                    return next;
                }
                Ok(None) => drop(timeout(POLL, woken).await),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "a stream of changes broke off");
                    return Next::Cut;
                }
            }
        }
    }
}

impl Changes {
    /// What is there now, and the id of its last event.
    async fn look(&self) -> Result<Option<(i64, Next)>, ControlError> {
        let (found, events) = self.served.orchestrator.changes(self.id, self.after).await?;
        let mut text = String::new();
        for stored in &events {
            text += &sse::event(event::STATUS, Some(&stored.id.to_string()), &stored.event);
        }
        let state = found.build.state;
        let last = events.last().map_or(self.after, |last| last.id);
        // As of the same moment; a full page may have more behind it.
        if state.is_over() && events.len() < PAGE as usize {
            text += &sse::event(event::END, None, &End { state });
            return Ok(Some((last, Next::End(text))));
        }
        Ok((!text.is_empty()).then_some((last, Next::Events(text))))
    }
}
