//! Streams of server-sent events (edge).
//!
//! Nothing is held for a client: the next events are read from the record when the connection has room for
//! them, so a slow one costs a place and slows nobody down. Every event has an id that lasts, and whoever
//! reconnects with the last one gets what follows it.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use tokio::time::timeout;

use super::problem::Refusal;
use super::request::text;
use super::serve::Closing;

/// A silent stream says this often that it lives; proxies cut silent ones.
const HEARTBEAT: Duration = Duration::from_secs(15);
const ALIVE: &str = ": alive\n\n";
/// A client that was cut off waits this long, in milliseconds.
const RETRY: &str = "retry: 2000\n\n";
const LAST_EVENT_ID: &str = "last-event-id";

/// What a stream has for its client.
pub(super) enum Next {
    /// Events.
    Events(String),
    /// The last events.
    End(String),
    /// It breaks off; the client comes again.
    Cut,
}

/// Where the events of one stream come from.
pub(super) trait Source: Send + 'static {
    /// Waits until there is something. Dropped before that, it has taken nothing.
    fn next(&mut self) -> impl Future<Output = Next> + Send;
}

/// The id after which a client wants to go on.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    text(headers, LAST_EVENT_ID)
}

/// One event.
pub(super) fn event(name: &str, id: Option<&str>, data: &impl Serialize) -> String {
    // What is told has been read from JSON or consists of plain fields.
    let data = serde_json::to_string(data).unwrap_or_default();
    let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
    format!("event: {name}\n{id}data: {data}\n\n")
}

/// A browser that gets this does not come again.
pub(super) fn nothing_more() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

/// Answers with everything that the source has, until it ends or the server stops.
pub(super) fn respond(source: impl Source, closing: Closing) -> Response {
    let pump = Pump { source, closing, begun: false, over: false };
    let body = stream::unfold(pump, async |mut pump| {
        let events = pump.next().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(events)), pump))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

struct Pump<S> {
    source: S,
    closing: Closing,
    begun: bool,
    over: bool,
}

impl<S: Source> Pump<S> {
    async fn next(&mut self) -> Option<String> {
        if !std::mem::replace(&mut self.begun, true) {
            return Some(RETRY.to_owned());
        }
        if self.over {
            return None;
        }
        let next = tokio::select! {
            next = timeout(HEARTBEAT, self.source.next()) => next,
            () = self.closing.begun() => return None,
        };
        match next {
            Ok(Next::Events(events)) => Some(events),
            Ok(Next::End(events)) => {
                self.over = true;
                Some(events)
            }
            Ok(Next::Cut) => None,
            Err(_) => Some(ALIVE.to_owned()),
        }
    }
}
