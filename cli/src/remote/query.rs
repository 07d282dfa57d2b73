//! `kiln ls`, `show`, `logs`, `cancel`, `retry`, `queue` (edge).

use jiff::Timestamp;
use kiln_agent::logs::display::Colours;
use kiln_protocol::BuildId;
use kiln_protocol::api::{
    Accepted, BuildDetail, BuildSummary, Changed, IDEMPOTENCY_HEADER, PAGE, Page, Waiting,
};
use kiln_protocol::id::Attempt;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::args::{CancelArgs, ListArgs, LogsArgs, QueueArgs, RetryArgs, Shape, ShowArgs, Whom};
use super::client::{ANSWER_TIMEOUT, Server};
use super::error::ServerError;
use super::follow::{self, Show, Terminal};
use super::lines::Lines;
use super::table::{age, table};
use crate::app::Exit;
use crate::{paths, terminal};

/// Runs a command that only asks; a signal ends it as it ends any.
pub(super) fn ask<T>(
    whom: &Whom,
    question: impl AsyncFnOnce(&Server) -> Result<T, ServerError>,
) -> Result<T, Exit> {
    let server = Server::of(whom)?;
    Ok(paths::runtime()?.block_on(question(&server))?)
}

/// Prints a document as one line.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Exit> {
    let text = serde_json::to_string(value).map_err(|e| Exit::system(format!("write JSON: {e}")))?;
    terminal::document(&text);
    Ok(())
}

/// Lists builds.
pub(crate) fn list(args: &ListArgs) -> Result<u8, Exit> {
    let path = args.state.map_or("/builds?".to_owned(), |state| format!("/builds?state={state}&"));
    let builds = ask(&args.whom, async |server| pages(server, &path, args.limit).await)?;
    print_builds(&builds, args.shape)
}

/// The first rows of a list, page by page.
pub(super) async fn pages<T: DeserializeOwned>(
    server: &Server,
    path: &str,
    count: usize,
) -> Result<Vec<T>, ServerError> {
    let (mut rows, mut cursor) = (Vec::new(), String::new());
    while rows.len() < count {
        let limit = (count - rows.len()).min(PAGE as usize);
        let page: Page<T> = server.get(&format!("{path}limit={limit}{cursor}")).await?;
        rows.extend(page.items);
        let Some(next) = page.next_cursor else { break };
        cursor = format!("&cursor={next}");
    }
    rows.truncate(count);
    Ok(rows)
}

pub(super) fn print_builds(builds: &[BuildSummary], shape: Shape) -> Result<u8, Exit> {
    if shape.json {
        builds.iter().try_for_each(print_json)?;
        return Ok(0);
    }
    let now = Timestamp::now();
    let row = |build: &BuildSummary| {
        vec![
            build.id.to_string(),
            build.state.to_string(),
            build.attempt.to_string(),
            age(build.submitted_at, now),
            progress(build),
            build.destinations.join(" "),
        ]
    };
    print_table(
        &["BUILD", "STATE", "TRY", "AGE", "PROGRESS", "DESTINATIONS"],
        &builds.iter().map(row).collect::<Vec<_>>(),
    );
    Ok(0)
}

fn print_table(head: &[&str], rows: &[Vec<String>]) {
    for line in table(head, rows) {
        terminal::out(&line);
    }
}

/// What a build does, or why it ended.
fn progress(build: &BuildSummary) -> String {
    let running = build.phase.map(|phase| phase.label().to_owned());
    let ended = build.reason.map(|reason| reason.label().to_owned());
    let wish = build.cancel.filter(|_| !build.state.is_over()).map(|_| "cancelling".to_owned());
    wish.or(running).or(ended).unwrap_or_default()
}

/// Shows a build.
pub(crate) fn show(args: &ShowArgs) -> Result<u8, Exit> {
    let build: BuildDetail =
        ask(&args.whom, async |server| server.get(&format!("/builds/{}", args.id)).await)?;
    if args.shape.json {
        print_json(&build)?;
        return Ok(0);
    }
    for (name, value) in facts(&build, Timestamp::now()) {
        terminal::out(&format!("{name:13} {value}"));
    }
    Ok(0)
}

/// A replay has attempts beyond the budget of its first life.
fn attempt_of(attempt: u32, budget: u32) -> String {
    if attempt > budget { attempt.to_string() } else { format!("{attempt} of {budget}") }
}

fn facts(detail: &BuildDetail, now: Timestamp) -> Vec<(&'static str, String)> {
    let BuildDetail { summary: build, spec, waited_seconds, phases, attempts, verdicts, .. } = detail;
    let ago = |moment: Timestamp| format!("{moment:.0} ({} ago)", age(moment, now));
    let mut facts = vec![
        ("build", build.id.to_string()),
        ("state", build.state.to_string()),
        ("attempt", attempt_of(build.attempt.get(), spec.max_attempts)),
        ("namespace", format!("{}, pool {}, priority {}", build.namespace, build.pool, build.priority)),
        ("requester", build.requester.clone()),
        ("submitted", ago(build.submitted_at)),
        ("waited", format!("{waited_seconds} s")),
        ("context", format!("{} ({} bytes)", spec.context.digest, spec.context.size)),
    ];
    let mut more = |name, value: Option<String>| facts.extend(value.map(|value| (name, value)));
    more("agent", build.agent.as_ref().map(ToString::to_string));
    more("phase", build.phase.map(|phase| phase.label().to_owned()));
    more("not before", build.not_before.map(|moment| format!("{moment:.0}")));
    more("cancel", build.cancel.map(|reason| reason.to_string()));
    more("ended", build.ended_at.map(ago));
    more("digest", build.digest.as_ref().map(ToString::to_string));
    more("reason", build.reason.map(|reason| reason.to_string()));
    if let Some(failure) = &build.failure {
        more("failed in", Some(failure.phase.label().to_owned()));
        let place = failure.location.as_ref().map(|at| format!("line {}: {}", at.line, at.text));
        more("dockerfile", place);
        more("message", Some(failure.message.clone()));
        more("hint", failure.hint.clone());
    }
    more("retry of", build.retry_of.map(|id| id.to_string()));
    for destination in &build.destinations {
        let outcome = build.outcomes.get(destination).map(|o| format!(": {o:?}").to_lowercase());
        more("destination", Some(format!("{destination}{}", outcome.unwrap_or_default())));
    }
    for ended in attempts {
        let reason = ended.reason.map_or("well".to_owned(), |reason| reason.to_string());
        more("try", Some(format!("{} on {} ended: {reason}", ended.attempt, ended.agent)));
    }
    for phase in phases {
        more("spent", Some(format!("{} {} ms", phase.phase.label(), phase.milliseconds)));
    }
    for verdict in verdicts {
        let passed = if verdict.passed { "passed" } else { "did not pass" };
        more(
            "policy",
            Some(format!("{} {} {passed}: {}", verdict.name, verdict.hook.label(), verdict.outcome)),
        );
    }
    facts
}

/// Shows a log.
pub(crate) fn logs(args: &LogsArgs) -> Result<u8, Exit> {
    let mut show = Terminal(colours());
    ask(&args.whom, async |server| {
        if !args.follow {
            return print_log(server, args.id, args.attempt, &mut show).await;
        }
        // Says at once that there is no such build, or no server.
        server.get::<BuildDetail>(&format!("/builds/{}", args.id)).await?;
        follow::log(server, args.id, args.attempt.unwrap_or(Attempt::FIRST), &mut show).await
    })?;
    Ok(0)
}

/// Colours on a terminal only.
fn colours() -> Colours {
    use std::io::IsTerminal as _;
    let wanted = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if wanted { Colours::Keep } else { Colours::Strip }
}

async fn print_log(
    server: &Server,
    id: BuildId,
    attempt: Option<Attempt>,
    show: &mut Terminal,
) -> Result<(), ServerError> {
    let attempt = attempt.map(|attempt| format!("?attempt={attempt}")).unwrap_or_default();
    let request = server.request(Method::GET, &format!("/builds/{id}/log{attempt}"));
    let late = |_| server.slow(ANSWER_TIMEOUT);
    let mut response = timeout(ANSWER_TIMEOUT, server.send(request)).await.map_err(late)??;
    let (mut lines, mut open) = (Lines::default(), Vec::new());
    while let Some(bytes) =
        timeout(ANSWER_TIMEOUT, response.chunk()).await.map_err(late)?.map_err(|e| server.silent(e))?
    {
        open.extend_from_slice(&bytes);
        // A character may be cut in two where the parts meet, but no line feed is inside one.
        let whole = open.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let whole = if open.len() > MAX_OPEN_BYTES { open.len() } else { whole };
        let rest = open.split_off(whole);
        lines.push(&String::from_utf8_lossy(&open), |line| show.line(line));
        open = rest;
    }
    lines.push(&String::from_utf8_lossy(&open), |line| show.line(line));
    lines.finish(|line| show.line(line));
    Ok(())
}

/// Bytes without a line feed that are kept.
const MAX_OPEN_BYTES: usize = 1024 * 1024;

/// Cancels builds.
pub(crate) fn cancel(args: &CancelArgs) -> Result<u8, Exit> {
    change(args, "cancel")
}

/// Changes builds, one after the other, up to the first that refuses.
pub(super) fn change(args: &CancelArgs, action: &str) -> Result<u8, Exit> {
    ask(&args.whom, async |server| {
        for id in &args.ids {
            let changed: Changed = server.post(&format!("/builds/{id}/{action}")).await?;
            tell(&changed, action, args.shape);
        }
        Ok(())
    })?;
    Ok(0)
}

fn tell(changed: &Changed, action: &str, shape: Shape) {
    if shape.json {
        // Two plain fields.
        let _ = print_json(changed);
    } else if action == "cancel" && !changed.state.is_over() {
        terminal::out(&format!("{} is {}; its agent was told to stop", changed.id, changed.state));
    } else {
        terminal::out(&format!("{} is {}", changed.id, changed.state));
    }
}

/// Submits a build once more.
pub(crate) fn retry(args: &RetryArgs) -> Result<u8, Exit> {
    let accepted: Accepted = ask(&args.whom, async |server| {
        let key = uuid::Uuid::new_v4().to_string();
        let request = server.request(Method::POST, &format!("/builds/{}/retry", args.id));
        server.ask(request.header(IDEMPOTENCY_HEADER, key)).await
    })?;
    if args.shape.json {
        print_json(&accepted)?;
    } else {
        terminal::out(&accepted.id.to_string());
    }
    Ok(0)
}

/// Lists what waits, and why.
pub(crate) fn queue(args: &QueueArgs) -> Result<u8, Exit> {
    let page: Page<Waiting> = ask(&args.whom, async |server| server.get("/queue").await)?;
    if args.shape.json {
        page.items.iter().try_for_each(print_json)?;
        return Ok(0);
    }
    let now = Timestamp::now();
    let row = |waiting: &Waiting| {
        let build = &waiting.build;
        vec![
            build.id.to_string(),
            build.namespace.to_string(),
            build.priority.to_string(),
            age(build.submitted_at, now),
            waiting.why.clone(),
        ]
    };
    print_table(
        &["BUILD", "NAMESPACE", "PRIORITY", "AGE", "WAITS"],
        &page.items.iter().map(row).collect::<Vec<_>>(),
    );
    Ok(0)
}
