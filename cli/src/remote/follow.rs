//! Following what a server tells, across broken connections (edge).

use std::ops::ControlFlow;
use std::time::Duration;

use kiln_agent::logs::display::Colours;
use kiln_protocol::api::{End, LogGap, LogPart, event};
use kiln_protocol::id::Attempt;
use kiln_protocol::message::StatusEvent;
use kiln_protocol::{BuildId, State};
use reqwest::{Method, Response};
use tokio::time::{Instant, sleep, timeout};

use super::client::{ANSWER_TIMEOUT, Server};
use super::error::ServerError;
use super::lines::Lines;
use super::sse::{Event, Parser};
use crate::terminal;

/// A stream says several times within this that it lives.
const SILENCE: Duration = Duration::from_mins(1);
/// A server that restarts is back within this time.
const GIVE_UP: Duration = Duration::from_mins(10);
/// Pauses between tries to connect again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Where the lines of a log go.
pub(crate) trait Show: Send {
    /// A line of the log.
    fn line(&mut self, line: &str);
    /// A line about it.
    fn note(&mut self, note: &str);
}

/// Standard output for lines, standard error for notes.
pub(crate) struct Terminal(pub(crate) Colours);

impl Show for Terminal {
    fn line(&mut self, line: &str) {
        terminal::out_coloured(line, self.0);
    }

    fn note(&mut self, note: &str) {
        terminal::say(note);
    }
}

/// Shows a log from this attempt on until the build is over.
pub(crate) async fn log(
    server: &Server,
    build: BuildId,
    from: Attempt,
    show: &mut dyn Show,
) -> Result<(), ServerError> {
    let (mut lines, mut attempt) = (Lines::default(), from);
    let path = format!("/builds/{build}/log/follow?attempt={from}");
    let take = |event: &Event| {
        match event.name.as_str() {
            event::LOG => {
                let part: LogPart = read(server, event)?;
                if part.attempt != attempt {
                    attempt = part.attempt;
                    lines.finish(|line| show.line(line));
                    show.note(&format!("attempt {attempt}"));
                }
                lines.push(&part.text, |line| show.line(line));
            }
            event::GAP => {
                let gap: LogGap = read(server, event)?;
                show.note(&format!("the log was cut off at byte {} and goes on there", gap.from));
            }
            event::END => {
                lines.finish(|line| show.line(line));
                return Ok(ControlFlow::Break(()));
            }
            _ => {}
        }
        Ok(ControlFlow::Continue(()))
    };
    follow(server, &path, take).await.map(|_| ())
}

/// Tells every change of a build until it is over; the state at the end, unless the server said no more.
pub(crate) async fn changes(
    server: &Server,
    build: BuildId,
    mut tell: impl FnMut(&StatusEvent) + Send,
) -> Result<Option<State>, ServerError> {
    let take = |event: &Event| {
        match event.name.as_str() {
            event::STATUS => tell(&read(server, event)?),
            event::END => return Ok(ControlFlow::Break(read::<End>(server, event)?.state)),
            _ => {}
        }
        Ok(ControlFlow::Continue(()))
    };
    follow(server, &format!("/builds/{build}/events"), take).await
}

fn read<T: serde::de::DeserializeOwned>(server: &Server, event: &Event) -> Result<T, ServerError> {
    let strange = |e| server.strange(format!("an event `{}` that cannot be read ({e})", event.name));
    serde_json::from_str(&event.data).map_err(strange)
}

/// How one connection ended.
enum Cut<T> {
    /// With the last event, or because there is nothing more.
    Done(Option<T>),
    /// Early.
    Early(Option<ServerError>),
}

/// Gives every event to `take` once and in order, until it breaks or the server has nothing more. A connection
/// that breaks is made anew, and goes on after the last event.
async fn follow<T>(
    server: &Server,
    path: &str,
    mut take: impl FnMut(&Event) -> Result<ControlFlow<T>, ServerError>,
) -> Result<Option<T>, ServerError> {
    let mut last: Option<String> = None;
    let (mut heard, mut pause) = (Instant::now(), FIRST_PAUSE);
    loop {
        let before = last.clone();
        let error = match connection(server, path, &mut last, &mut take).await? {
            Cut::Done(value) => return Ok(value),
            Cut::Early(error) => error,
        };
        if last != before {
            (heard, pause) = (Instant::now(), FIRST_PAUSE);
        }
        if heard.elapsed() > GIVE_UP {
            return Err(error.unwrap_or_else(|| server.slow(GIVE_UP)));
        }
        tracing::debug!(?error, "a stream broke off; it is resumed");
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn connection<T>(
    server: &Server,
    path: &str,
    last: &mut Option<String>,
    take: &mut impl FnMut(&Event) -> Result<ControlFlow<T>, ServerError>,
) -> Result<Cut<T>, ServerError> {
    let mut response = match open(server, path, last.as_deref()).await {
        Ok(response) if response.status() == reqwest::StatusCode::NO_CONTENT => return Ok(Cut::Done(None)),
        Ok(response) => response,
        Err(error) if error.may_pass() => return Ok(Cut::Early(Some(error))),
        Err(error) => return Err(error),
    };
    let (mut parser, mut events) = (Parser::default(), Vec::new());
    // Ends with the connection, which breaks when it is silent for too long.
    while let Ok(Ok(Some(bytes))) = timeout(SILENCE, response.chunk()).await {
        let pushed = parser.push(&bytes, &mut events);
        for event in events.drain(..) {
            if let ControlFlow::Break(value) = take(&event)? {
                return Ok(Cut::Done(Some(value)));
            }
            if event.id.is_some() {
                *last = event.id;
            }
        }
        pushed.map_err(|_| server.strange("an event that is too long".to_owned()))?;
    }
    Ok(Cut::Early(None))
}

async fn open(server: &Server, path: &str, last: Option<&str>) -> Result<Response, ServerError> {
    let mut request = server.request(Method::GET, path);
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    let opening = timeout(ANSWER_TIMEOUT, server.send(request)).await;
    opening.map_err(|_| server.slow(ANSWER_TIMEOUT))?
}
