//! From submission to exit code (edge).

use std::time::Duration;

use kiln_agent::agent::Agent;
use kiln_agent::error::chain;
use kiln_agent::stop::StopSignal;
use kiln_orchestrator::build::Build;
use kiln_orchestrator::control::ControlError;
use kiln_orchestrator::decide::SECOND;
use kiln_orchestrator::submit::Submission;
use kiln_protocol::message::Outcome;
use kiln_protocol::result::{BuildResult, Failure, Phase};
use kiln_protocol::spec::{
    ContextRef, DEFAULT_PRIORITY, DEFAULT_QUEUE_TIMEOUT, Destination, SecretRef, SecretSource,
};
use kiln_protocol::{BuildId, BuildSpec, Reason, State};

use tokio::time::timeout;

use super::client::{Client, Seen};
use super::{LOCAL, Plan};
use crate::app::Exit;
use crate::embedded::Embedded;
use crate::progress::{self, Printer};

/// The record is looked at this often, should a change be missed.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Submits the build and waits for its end. The first signal cancels it.
pub(super) async fn follow(
    plan: &Plan,
    embedded: &Embedded,
    client: &Client,
    context: ContextRef,
    stop: &mut StopSignal,
) -> Result<Build, Exit> {
    let spec = spec(plan, embedded, context)?;
    let submitted = embedded.orchestrator().submit(Submission { spec, key: None, retry_of: None }).await;
    let id = submitted.map_err(|e| Exit::usage(chain(&e)))?.id;
    // Set once; nobody else sets it.
    let _ = client.id.set(id);
    plan.printer.say(&format!("build {id}"));
    let mut attempt = kiln_protocol::id::Attempt::FIRST;
    let mut cancelled = false;
    loop {
        let changed = embedded.orchestrator().store().next_change();
        let build = show(embedded, id).await?;
        if build.state.is_over() {
            return Ok(build);
        }
        if build.attempt != attempt {
            attempt = build.attempt;
            say_retry(plan.printer, &build);
        }
        tokio::select! {
            _ = timeout(LOOK_EVERY, changed) => {}
            _ = stop.stopped(), if !cancelled => {
                cancelled = true;
                cancel(plan.printer, embedded, id).await;
            }
        }
    }
}

async fn show(embedded: &Embedded, id: BuildId) -> Result<Build, Exit> {
    let found = embedded.orchestrator().show(id).await;
    found.map(|found| found.build).map_err(|e| Exit::system(chain(&e)))
}

async fn cancel(printer: Printer, embedded: &Embedded, id: BuildId) {
    match embedded.orchestrator().cancel(id, Reason::Cancelled, "the client").await {
        Ok(_) | Err(ControlError::Missing(_)) => {}
        Err(error) => printer.say(&chain(&error)),
    }
}

fn say_retry(printer: Printer, build: &Build) {
    let why = build.failure.as_ref().map_or("", |failure| failure.message.as_str());
    let wait = build.not_before.saturating_sub(build.pending_since).max(0) / SECOND;
    printer.say(&format!("attempt {} begins in {wait} s, because: {why}", build.attempt));
}

fn spec(plan: &Plan, embedded: &Embedded, context: ContextRef) -> Result<BuildSpec, Exit> {
    let namespace = LOCAL.parse().map_err(|e| Exit::system(chain(&e)))?;
    let tags = plan.targets.iter().cloned().map(Destination::Image);
    let files = plan.args.output.iter().cloned().map(Destination::File);
    let secret = |id: &String| SecretRef { id: id.clone(), source: SecretSource::Client };
    Ok(BuildSpec {
        namespace,
        pool: embedded.pool.clone(),
        priority: DEFAULT_PRIORITY,
        group: None,
        requester: std::env::var("USER").unwrap_or_else(|_| LOCAL.to_owned()),
        request: plan.request.clone(),
        context,
        destinations: tags.chain(files).collect(),
        secrets: plan.secrets.iter().map(|s| &s.id).map(secret).collect(),
        credentials: SecretSource::Client,
        max_attempts: plan.args.attempts.unwrap_or(plan.config.agent.build.attempts),
        queue_timeout: DEFAULT_QUEUE_TIMEOUT,
    })
}

/// Says how it ended. Gives the exit code.
pub(super) fn conclude(
    plan: &Plan,
    agent: &Agent,
    build: &Build,
    seen: Option<Seen>,
    refused: Option<Exit>,
) -> Result<u8, Exit> {
    say_outcomes(plan.printer, build);
    // The client's own word about an output is better than what the record keeps of it.
    if let Some(exit) = refused {
        return Err(exit);
    }
    match (build.state, seen) {
        (State::Success, Some(Seen { image: Some(image), result: Some(result), phases, .. })) => {
            plan.printer.success(&image, &BuildResult { phases, ..result }, &written(plan, build));
            Ok(0)
        }
        (State::Success, _) => Err(Exit::system("the build succeeded without an image")),
        (_, seen) => Ok(failed(plan, agent, build, seen)),
    }
}

fn written(plan: &Plan, build: &Build) -> Vec<String> {
    let moved = |target: &String| {
        let outcomes = build.commit.as_ref().map(|commit| &commit.outcomes);
        outcomes.is_some_and(|outcomes| outcomes.get(target) == Some(&Outcome::Moved))
    };
    let all = plan.targets.iter().map(ToString::to_string).chain(plan.args.output.iter().cloned());
    all.filter(moved).collect()
}

fn say_outcomes(printer: Printer, build: &Build) {
    for (target, outcome) in build.commit.iter().flat_map(|commit| &commit.outcomes) {
        match outcome {
            Outcome::Moved => {}
            Outcome::Overtaken => {
                printer.say(&format!("{target} belongs to a newer build and was left alone"));
            }
            Outcome::Failed(why) => printer.say(&format!("{target} was not written: {why}")),
        }
    }
}

fn failed(plan: &Plan, agent: &Agent, build: &Build, seen: Option<Seen>) -> u8 {
    let reason = build.reason.unwrap_or(Reason::Unknown);
    let seen_failure = seen.as_ref().and_then(|seen| seen.failure.clone());
    let failure = match (seen_failure, &build.failure) {
        // What the attempt said is the whole story, if the record ends with it.
        (Some(failure), _) if failure.reason == reason => failure,
        (_, Some(failure)) => failure.clone(),
        (_, None) => Failure::new(reason, Phase::Start, "no more is known".to_owned()),
    };
    let last_lines = seen.map(|seen| seen.last_lines).unwrap_or_default();
    let log = agent.state.log_path(build.id, build.attempt);
    progress::failure(&failure, &last_lines, &plan.request.dockerfile_name, &log);
    if build.attempt.get() > 1 {
        crate::terminal::say(&format!("it was tried {} times", build.attempt));
    }
    reason.exit_code()
}
