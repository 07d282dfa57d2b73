//! Logs: read, and followed from attempt to attempt (edge).

use std::time::Duration;

use axum::body::Body;
use axum::extract::State as Context;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use kiln_protocol::api::{ATTEMPT_HEADER, Code, End, LogGap, LogPart, OFFSET_HEADER, event};
use kiln_protocol::id::Attempt;
use kiln_protocol::{BuildId, State};
use serde::Deserialize;

use super::Served;
use super::problem::Refusal;
use super::request::{Asked, Named};
use super::sse::{self, Next, Source, nothing_more, respond};
use crate::build::Build;
use crate::error::chain;
use crate::logs::{CHUNK, LogError, LogRead, showable};

/// Files tell nobody that they grew.
const POLL: Duration = Duration::from_millis(200);

/// Which part of which log.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    attempt: Option<Attempt>,
    #[serde(default)]
    offset: u64,
}

/// The log of an attempt as it is now, byte for byte.
pub(super) async fn read(
    Context(served): Context<Served>,
    Named(build): Named<BuildId>,
    Asked(Part { attempt, offset }): Asked<Part>,
) -> Result<Response, Refusal> {
    let found = served.orchestrator.show(build).await?.build;
    let attempt = attempt.unwrap_or_else(|| last_begun(&found));
    let first = match served.logs.read(build, attempt, offset).await? {
        LogRead::Bytes(bytes) => bytes,
        LogRead::Shorter(length) => {
            let why = format!("the log has {length} bytes, so there is nothing from byte {offset} on");
            return Err(Refusal::new(Code::BadRequest, why));
        }
        LogRead::Missing => {
            let why =
                format!("attempt {attempt} of build {build} has no log; it did not begin, or it was deleted");
            return Err(Refusal::new(Code::LogMissing, why));
        }
    };
    let headers = [
        (header::CONTENT_TYPE.as_str(), "text/plain; charset=utf-8".to_owned()),
        (ATTEMPT_HEADER, attempt.to_string()),
        (OFFSET_HEADER, offset.to_string()),
    ];
    let rest = Rest { served, build, attempt, offset, ready: Some(first) };
    let body = stream::try_unfold(rest, async |mut rest| rest.next().await.map(|part| Some((part?, rest))));
    Ok((headers, Body::from_stream(body)).into_response())
}

/// A waiting build counts the attempt that comes.
fn last_begun(build: &Build) -> Attempt {
    let before = Attempt::new(build.attempt.get() - 1);
    before.filter(|_| build.state == State::Pending).unwrap_or(build.attempt)
}

/// What is left of a log that is being sent.
struct Rest {
    served: Served,
    build: BuildId,
    attempt: Attempt,
    offset: u64,
    ready: Option<Bytes>,
}

impl Rest {
    async fn next(&mut self) -> Result<Option<Bytes>, LogError> {
        let bytes = match self.ready.take() {
            Some(bytes) => bytes,
            None => match self.served.logs.read(self.build, self.attempt, self.offset).await? {
                LogRead::Bytes(bytes) => bytes,
                LogRead::Missing | LogRead::Shorter(_) => Bytes::new(),
            },
        };
        self.offset += bytes.len() as u64;
        Ok((!bytes.is_empty()).then_some(bytes))
    }
}

/// Where a follower begins.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct From {
    attempt: Option<Attempt>,
}

/// The log from some attempt on, until the build is over.
pub(super) async fn follow(
    Context(served): Context<Served>,
    Named(build): Named<BuildId>,
    Asked(From { attempt }): Asked<From>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let found = served.orchestrator.show(build).await?.build;
    let last = sse::last_event_id(&headers)?;
    let unreadable = || Refusal::new(Code::BadRequest, "Last-Event-ID is none of this stream");
    let place = last.map(|id| Place::parse(id).ok_or_else(unreadable)).transpose()?;
    let place = place.unwrap_or(Place { attempt: attempt.unwrap_or(Attempt::FIRST), offset: 0 });
    let closing = served.closing.clone();
    let tail = Tail { served, build, place };
    if last.is_some() && found.state.is_over() && tail.is_at_end().await? {
        return Ok(nothing_more());
    }
    Ok(respond(tail, closing))
}

/// How far a follower is; the id of an event is the place behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    attempt: Attempt,
    offset: u64,
}

impl Place {
    fn parse(id: &str) -> Option<Self> {
        let (attempt, offset) = id.split_once('-')?;
        Some(Self { attempt: Attempt::new(attempt.parse().ok()?)?, offset: offset.parse().ok()? })
    }

    fn id(self) -> String {
        format!("{}-{}", self.attempt, self.offset)
    }
}

struct Tail {
    served: Served,
    build: BuildId,
    place: Place,
}

impl Source for Tail {
    async fn next(&mut self) -> Next {
        loop {
            match self.look().await {
                Ok(Some((place, next))) => {
                    self.place = place;
                    // On to the next attempt.
                    if !matches!(&next, Next::Events(events) if events.is_empty()) {
                        return next;
                    }
                }
                Ok(None) => tokio::time::sleep(POLL).await,
                Err(error) => {
                    tracing::warn!(error = chain(&error), "a stream of a log broke off");
                    return Next::Cut;
                }
            }
        }
    }
}

/// A log cannot be followed now.
#[derive(Debug, thiserror::Error)]
enum TailError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Record(#[from] crate::control::ControlError),
}

impl Tail {
    /// What is there now, and the place behind it.
    async fn look(&self) -> Result<Option<(Place, Next)>, TailError> {
        // Before the log: what was printed before the end is in the log once the end is recorded.
        let build = self.served.orchestrator.show(self.build).await?.build;
        let Place { attempt, offset } = self.place;
        let complete = build.state.is_over() || build.attempt > attempt;
        match self.served.logs.read(self.build, attempt, offset).await? {
            LogRead::Bytes(bytes) if !bytes.is_empty() => Ok(self.show(&bytes, complete)),
            LogRead::Shorter(length) => {
                let place = Place { attempt, offset: length };
                let gap = LogGap { attempt, from: length, to: offset };
                Ok(Some((place, Next::Events(sse::event(event::GAP, Some(&place.id()), &gap)))))
            }
            LogRead::Bytes(_) | LogRead::Missing if !complete => Ok(None),
            LogRead::Bytes(_) | LogRead::Missing => Ok(Some(self.after(&build))),
        }
    }

    fn show(&self, bytes: &[u8], complete: bool) -> Option<(Place, Next)> {
        let Place { attempt, offset } = self.place;
        // A full read may end within a character whose rest comes with the next one.
        let shown = showable(bytes, complete && bytes.len() < CHUNK);
        let place = Place { attempt, offset: offset + shown.len() as u64 };
        let part = LogPart { attempt, offset, text: String::from_utf8_lossy(shown).into_owned() };
        let event = sse::event(event::LOG, Some(&place.id()), &part);
        (!shown.is_empty()).then_some((place, Next::Events(event)))
    }

    /// What follows an attempt whose log was shown.
    fn after(&self, build: &Build) -> (Place, Next) {
        let place = Place { attempt: self.place.attempt.next(), offset: 0 };
        if build.attempt >= place.attempt {
            return (place, Next::Events(String::new()));
        }
        (self.place, Next::End(sse::event(event::END, None, &End { state: build.state })))
    }

    /// Whether there is nothing behind the place.
    async fn is_at_end(&self) -> Result<bool, Refusal> {
        let build = self.served.orchestrator.show(self.build).await?.build;
        let Place { attempt, offset } = self.place;
        let read = self.served.logs.read(self.build, attempt, offset).await?;
        let at_end = match read {
            LogRead::Bytes(bytes) => bytes.is_empty(),
            LogRead::Missing => true,
            LogRead::Shorter(_) => false,
        };
        Ok(at_end && attempt >= build.attempt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_place() {
        let place = Place { attempt: Attempt::FIRST.next(), offset: 70 };
        assert_eq!(place.id(), "2-70");
        assert_eq!(Place::parse("2-70"), Some(place));
        for bad in ["", "2", "0-1", "-1-1", "1--1", "x-1", "1-x"] {
            assert_eq!(Place::parse(bad), None, "{bad}");
        }
    }
}
