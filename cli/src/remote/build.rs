//! `kiln build --server` (edge): the files go to a server, and its answers to the terminal.

use std::time::Duration;

use kiln_agent::error::chain;
use kiln_agent::stop::{self, StopSignal};
use kiln_protocol::api::{Accepted, BuildDetail, Changed, Code, IDEMPOTENCY_HEADER, Stored};
use kiln_protocol::id::Attempt;
use kiln_protocol::message::StatusEvent;
use kiln_protocol::request::{BuildRequest, ImageFormat, SECRET_ID_RULE, is_secret_id};
use kiln_protocol::spec::{
    ContextRef, DEFAULT_PRIORITY, DEFAULT_QUEUE_TIMEOUT, Destination, SecretRef, SecretSource,
};
use kiln_protocol::{BuildId, BuildSpec, State, Target};
use reqwest::{Body, Method};
use tokio::time::{sleep, timeout};

use super::args::Whom;
use super::client::Server;
use super::error::ServerError;
use super::follow::{self, Show};
use crate::app::{Exit, SYSTEM};
use crate::args::{BuildArgs, Progress};
use crate::packing::{self, PackedContext};
use crate::progress::Printer;
use crate::signals::Signals;
use crate::{dockerfile, inputs, paths, terminal};

/// No upload takes longer; the server gives up then too.
const UPLOAD_TIMEOUT: Duration = Duration::from_hours(4);
/// A submission that was not answered is repeated, with the same key.
const SUBMIT_TRIES: u32 = 4;
const SUBMIT_PAUSE: Duration = Duration::from_secs(1);
/// The log may say more than this after the end only if it was lost.
const LOG_PATIENCE: Duration = Duration::from_secs(10);
/// Exit code of a cancelled command.
const CANCELLED: u8 = 130;
/// Whose builds these are, and who takes them, on a server for one person.
const NAMESPACE: &str = "default";
const POOL: &str = "default";
/// The registry credentials of a server, by their name there.
const CREDENTIALS: &str = "registry";

/// Runs the command.
pub(crate) fn run(args: &BuildArgs) -> Result<u8, Exit> {
    refuse_local(args)?;
    let progress = if args.quiet { Progress::Quiet } else { args.progress };
    let printer = Printer::new(progress, false);
    let whom = Whom { server: args.server.clone(), access: args.access.clone(), places: args.places.clone() };
    let server = Server::of(&whom)?;
    let source = dockerfile::read(&args.context, args.file.as_deref())?;
    let config = paths::load_config(&args.places)?.agent;
    let format = args.format.map_or(ImageFormat::Docker, Into::into);
    let request = inputs::request(args, &source, &config, format)?;
    let (destinations, secrets) = (targets(args)?, secrets(args)?);
    let packed = packing::pack(&std::env::temp_dir(), &args.context, &source, printer)?;
    let max_attempts = args.attempts.unwrap_or(config.build.attempts);
    let spec = spec(request, packed.reference.clone(), (destinations, secrets), max_attempts)?;
    let runtime = paths::runtime()?;
    let code = runtime.block_on(cancellable(&server, spec, packed, printer));
    // The packed context may still be read; that must not hold us.
    runtime.shutdown_background();
    code
}

/// What only a build on this machine can do.
fn refuse_local(args: &BuildArgs) -> Result<(), Exit> {
    let flags = [
        ("--output", !args.output.is_empty(), "a server publishes to registries: use -t REGISTRY/NAME:TAG"),
        ("--authfile", args.authfile.is_some(), "a server has credentials of its own"),
        ("--metadata-file", args.metadata_file.is_some(), "`kiln show ID --json` tells the same"),
        ("--iidfile", args.iidfile.is_some(), "`kiln show ID --json` tells the digest"),
        ("--plugin", !args.plugin.is_empty(), "a server asks the policies of its own configuration"),
        ("--platform", args.platform.is_some(), "the agents of a server build for their own platform"),
    ];
    match flags.into_iter().find(|(_, given, _)| *given) {
        Some((flag, _, way_out)) => {
            Err(Exit::usage(format!("{flag} does not go with --server")).with_hint(way_out))
        }
        None => Ok(()),
    }
}

fn targets(args: &BuildArgs) -> Result<Vec<Destination>, Exit> {
    let parse = |text: &String| text.parse::<Target>().map_err(|e| Exit::usage(format!("-t {text}: {e}")));
    args.tag.iter().map(|text| parse(text).map(Destination::Image)).collect()
}

/// `id=NAME,server=NAME`: a value that the server has.
fn secrets(args: &BuildArgs) -> Result<Vec<SecretRef>, Exit> {
    let parse = |text: &String| {
        let (mut id, mut name) = (None, None);
        for field in text.split(',') {
            match field.split_once('=') {
                Some(("id", value)) => id = Some(value),
                Some(("server", value)) => name = Some(value),
                _ => {
                    let message = format!("--secret `{text}`: `{field}` does not go with --server");
                    return Err(Exit::usage(message).with_hint(
                        "values stay where they are: name one of the server, id=NAME,server=NAME",
                    ));
                }
            }
        }
        let id = id.ok_or_else(|| Exit::usage(format!("--secret `{text}`: id=NAME is missing")))?;
        if !is_secret_id(id) {
            return Err(Exit::usage(format!("--secret id={id}: {SECRET_ID_RULE}")));
        }
        let source = SecretSource::Server(name.unwrap_or(id).to_owned());
        Ok(SecretRef { id: id.to_owned(), source })
    };
    args.secret.iter().map(parse).collect()
}

fn spec(
    request: BuildRequest,
    context: ContextRef,
    (destinations, secrets): (Vec<Destination>, Vec<SecretRef>),
    max_attempts: u32,
) -> Result<BuildSpec, Exit> {
    let spec = BuildSpec {
        namespace: NAMESPACE.parse().map_err(|e| Exit::system(chain(&e)))?,
        pool: POOL.parse().map_err(|e| Exit::system(chain(&e)))?,
        priority: DEFAULT_PRIORITY,
        group: None,
        requester: std::env::var("USER").unwrap_or_default(),
        request,
        context,
        destinations,
        secrets,
        credentials: SecretSource::Server(CREDENTIALS.to_owned()),
        max_attempts,
        queue_timeout: DEFAULT_QUEUE_TIMEOUT,
    };
    spec.validate().map_err(|e| Exit::usage(chain(&e)))?;
    Ok(spec)
}

/// The first signal cancels the build, once there is one.
async fn cancellable(
    server: &Server,
    spec: BuildSpec,
    packed: PackedContext,
    printer: Printer,
) -> Result<u8, Exit> {
    let signals = Signals::listen()?;
    let (stopper, stop) = stop::channel();
    tokio::select! {
        code = work(server, spec, packed, printer, stop) => code,
        never = signals.watch(&stopper) => match never {},
    }
}

async fn work(
    server: &Server,
    spec: BuildSpec,
    packed: PackedContext,
    printer: Printer,
    mut stop: StopSignal,
) -> Result<u8, Exit> {
    let sending = async {
        upload(server, packed, printer).await?;
        Ok::<_, Exit>(submit(server, &spec).await?)
    };
    let mut signal = stop.clone();
    let submitted = tokio::select! {
        submitted = sending => submitted?,
        _ = signal.stopped() => return Ok(CANCELLED),
    };
    let id = submitted.id;
    printer.say(&format!("build {id} on {}", server.address));
    let followed = tokio::select! {
        followed = watch(server, id, printer) => followed,
        never = cancel(server, id, printer, &mut stop) => match never {},
    };
    let lost = |error| Exit::from(error).with_hint(format!("the build goes on: kiln logs -f {id}"));
    followed.map_err(lost)?;
    conclude(server, id, printer).await.map_err(lost)
}

async fn upload(server: &Server, packed: PackedContext, printer: Printer) -> Result<(), Exit> {
    let ContextRef { digest, size } = packed.reference;
    let path = format!("/contexts/{digest}");
    let known = server.request(Method::HEAD, &path).timeout(super::client::ANSWER_TIMEOUT).send().await;
    if known.map_err(|e| server.silent(e))?.status().is_success() {
        printer.say("the server has the context already");
        return Ok(());
    }
    let file = tokio::fs::File::from_std(packed.file);
    let body = futures_util::stream::try_unfold(file, read_part);
    let put = server.request(Method::PUT, &path).header("content-length", size).timeout(UPLOAD_TIMEOUT);
    let _: Stored = server.upload(put.body(Body::wrap_stream(body))).await?;
    Ok(())
}

async fn read_part(mut file: tokio::fs::File) -> std::io::Result<Option<(Vec<u8>, tokio::fs::File)>> {
    use tokio::io::AsyncReadExt as _;
    let mut part = vec![0; 64 * 1024];
    let read = file.read(&mut part).await?;
    part.truncate(read);
    Ok((read > 0).then_some((part, file)))
}

/// Recorded exactly once, however often it is sent.
async fn submit(server: &Server, spec: &BuildSpec) -> Result<Accepted, ServerError> {
    let key = uuid::Uuid::new_v4().to_string();
    let mut tries = 1;
    loop {
        let request = server.request(Method::POST, "/builds").header(IDEMPOTENCY_HEADER, &key);
        match server.ask(server.with_json(request, spec)?).await {
            Err(error) if error.may_pass() && tries < SUBMIT_TRIES => sleep(SUBMIT_PAUSE * tries).await,
            other => return other,
        }
        tries += 1;
    }
}

/// Shows log and changes until the build is over.
async fn watch(server: &Server, id: BuildId, printer: Printer) -> Result<(), ServerError> {
    let mut show = Shown(printer);
    let mut told = None;
    let changes = follow::changes(server, id, |event| tell(printer, &mut told, event));
    let log = follow::log(server, id, Attempt::FIRST, &mut show);
    tokio::pin!(changes, log);
    let ended = tokio::select! {
        ended = &mut changes => Some(ended),
        logged = &mut log => {
            logged?;
            None
        }
    };
    match ended {
        // The log ends with the build as well.
        Some(ended) => {
            ended?;
            if timeout(LOG_PATIENCE, log).await.is_err() {
                printer.say("the rest of the log does not come");
            }
        }
        None => drop(changes.await?),
    }
    Ok(())
}

struct Shown(Printer);

impl Show for Shown {
    fn line(&mut self, line: &str) {
        self.0.line(line);
    }

    fn note(&mut self, note: &str) {
        self.0.say(note);
    }
}

/// Says what is new about a build, and nothing twice.
fn tell(printer: Printer, told: &mut Option<String>, event: &StatusEvent) {
    let phase = event.phase.filter(|_| event.state != State::Pending && !event.state.is_over());
    let text = match (phase, event.state) {
        (Some(phase), _) => format!("[{}]", phase.label()),
        (None, State::Pending) if event.attempt > Attempt::FIRST => {
            let reason = event.reason.map(|reason| format!(" after {reason}")).unwrap_or_default();
            format!("waiting for attempt {}{reason}", event.attempt)
        }
        (None, State::Pending) => "waiting for an agent".to_owned(),
        (None, state) => state.to_string().to_lowercase(),
    };
    if told.as_ref() != Some(&text) && !event.state.is_over() {
        printer.say(&text);
        *told = Some(text);
    }
}

/// Once a signal came, asks for the end of the build; the build's own end ends the command.
async fn cancel(
    server: &Server,
    id: BuildId,
    printer: Printer,
    stop: &mut StopSignal,
) -> std::convert::Infallible {
    stop.stopped().await;
    match server.post::<Changed>(&format!("/builds/{id}/cancel")).await {
        Ok(_) => {}
        Err(error) if error.is(Code::CancelRefused) => printer.say(&chain(&error)),
        Err(error) => {
            printer.say(&format!("{}; the build goes on: kiln cancel {id}", chain(&error)));
        }
    }
    std::future::pending().await
}

async fn conclude(server: &Server, id: BuildId, printer: Printer) -> Result<u8, ServerError> {
    let BuildDetail { summary: build, .. } = server.get(&format!("/builds/{id}")).await?;
    if build.state == State::Success {
        let digest = build.digest.map(|digest| digest.to_string()).unwrap_or_default();
        printer.published(&digest, &build.destinations);
        return Ok(0);
    }
    terminal::say(&format!("build {id} is {}", build.state));
    if let Some(failure) = &build.failure {
        terminal::say(&format!(
            "  {} in phase {}: {}",
            failure.reason,
            failure.phase.label(),
            failure.message
        ));
        if let Some(location) = &failure.location {
            terminal::say(&format!("  line {}: {}", location.line, location.text));
        }
        if let Some(hint) = &failure.hint {
            terminal::say(&format!("hint: {hint}"));
        }
    }
    if build.state == State::DeadLetter {
        terminal::say(&format!("hint: mend the cause, then kiln dead replay {id}"));
    }
    Ok(build.reason.map_or(SYSTEM, kiln_protocol::Reason::exit_code))
}
