//! `kiln build` (edge): from files and flags to a running build and back to files.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_agent::agent::Agent;
use kiln_agent::config::Config;
use kiln_agent::dockerfile::Dockerfile;
use kiln_agent::error::chain;
use kiln_agent::executor::{self, BuildInputs, Event, Finished};
use kiln_agent::housekeeping;
use kiln_agent::layers::{LayerCache, LayerKey, Reuse};
use kiln_agent::output::{self, OutputSpec};
use kiln_agent::registry::{Credentials, RegistryConfig};
use kiln_agent::seal::Sealed;
use kiln_agent::state::Job;
use kiln_agent::stop::{self, StopSignal};
use kiln_agent::unpack::{self, Limits};
use kiln_protocol::request::{BuildRequest, ImageFormat};
use kiln_protocol::result::{Failure, Phase, PhaseDuration};
use kiln_protocol::{BuildId, Reason};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::app::Exit;
use crate::args::{BuildArgs, Progress};
use crate::progress::Printer;
use crate::signals::Signals;
use crate::{context, credentials, dockerfile, inputs, paths, progress};

/// Lines that wait for a slow terminal; then the build waits too.
const EVENT_BUFFER: usize = 1024;
/// A context above this is worth a word: most are accidents.
const LARGE_CONTEXT_BYTES: u64 = 100 * 1024 * 1024;
/// Then whoever does not read does not want to.
const SHOW_AFTER_STOP: Duration = Duration::from_secs(1);
/// The namespace and the trust of what one person builds in one data directory.
const LOCAL: &str = "local";
/// Exit code of a cancelled command.
const CANCELLED: u8 = 130;
/// Exit code when a registry does not let us in.
const UNAUTHORIZED: u8 = 4;

/// Everything that is known before anything runs.
struct Plan {
    args: BuildArgs,
    config: Config,
    data: PathBuf,
    source: dockerfile::Source,
    request: BuildRequest,
    outputs: Vec<OutputSpec>,
    secrets: Vec<executor::Secret>,
    printer: Printer,
}

/// Runs the command.
pub(crate) fn run(args: BuildArgs) -> Result<u8, Exit> {
    let plan = plan(args)?;
    let runtime = paths::runtime()?;
    let code = runtime.block_on(cancellable(plan));
    // A blocking read of the log may outlive a build that was given up; it must not hold us.
    runtime.shutdown_background();
    code
}

fn plan(mut args: BuildArgs) -> Result<Plan, Exit> {
    if args.quiet {
        args.progress = Progress::Quiet;
    }
    check_platform(args.platform.as_deref())?;
    let config = paths::load_config(&args.places)?;
    let data = paths::data_dir(&args.places)?;
    let environment = |name: &str| std::env::var(name).ok();
    let outputs = args.output.iter().map(|text| OutputSpec::parse(text));
    let outputs = outputs.collect::<Result<Vec<_>, _>>().map_err(|e| Exit::usage(chain(&e)))?;
    for spec in &outputs {
        output::preflight(spec).map_err(|e| output_failed(&e))?;
    }
    let stdout_taken = outputs.iter().any(OutputSpec::uses_stdout);
    let secrets = inputs::secrets(&args.secret, environment)?;
    let source = dockerfile::read(&args.context, args.file.as_deref())?;
    let request = BuildRequest {
        dockerfile: source.text.clone(),
        dockerfile_name: source.name.clone(),
        build_args: inputs::build_args(&args.build_arg, environment)?,
        labels: inputs::labels(&args.label)?,
        target: args.target.clone(),
        format: format(&args, &outputs)?,
        timestamp: args.timestamp,
        network: args.network.map_or(config.build.network, Into::into),
        timeout: args.timeout.unwrap_or(config.build.timeout),
        root_filesystem: outputs.iter().any(OutputSpec::wants_root_filesystem),
    };
    let printer = Printer::new(args.progress, stdout_taken);
    Ok(Plan { args, config, data, source, request, outputs, secrets, printer })
}

/// Slots run what the node's own processor runs.
fn check_platform(platform: Option<&str>) -> Result<(), Exit> {
    let ours = format!("linux/{}", executor::architecture());
    match platform {
        Some(wanted) if wanted != ours => {
            Err(Exit::usage(format!("--platform {wanted}: this node builds {ours}"))
                .with_hint("run the build on a node of that platform"))
        }
        _ => Ok(()),
    }
}

fn format(args: &BuildArgs, outputs: &[OutputSpec]) -> Result<ImageFormat, Exit> {
    let wanted = args.format.map(ImageFormat::from);
    outputs.iter().try_fold(wanted.unwrap_or(ImageFormat::Docker), |format, output| {
        // An output that implies a format decides it, unless the flag or an earlier output did.
        let wish = wanted.or_else(|| outputs.iter().find_map(OutputSpec::implied_format)).or(Some(format));
        output.format(wish).map_err(|e| Exit::usage(chain(&e)))
    })
}

/// The first signal cancels whatever is going on; the slot needs a moment to end.
async fn cancellable(plan: Plan) -> Result<u8, Exit> {
    let signals = Signals::listen()?;
    let (stopper, stop) = stop::channel();
    tokio::select! {
        code = execute(plan, stop) => code,
        never = signals.watch(&stopper) => match never {},
    }
}

async fn execute(plan: Plan, mut stop: StopSignal) -> Result<u8, Exit> {
    let mut clock = Clock::start();
    let agent = Arc::new(paths::open_agent(plan.config.clone(), &plan.data)?);
    let prepared = tokio::select! {
        prepared = prepare(&plan, &agent, &mut clock) => prepared?,
        _ = stop.stopped() => return Ok(CANCELLED),
    };
    let (events, receiver) = mpsc::channel(EVENT_BUFFER);
    let Prepared { build, job, inputs } = prepared;
    let layers = Some(layer_cache(&plan.args));
    let order = executor::Order { build, job, request: plan.request.clone(), inputs, layers };
    let signal = stop.clone();
    let work = executor::run(Arc::clone(&agent), order, events, stop);
    let printing = print(plan.printer, receiver);
    let finished = work.await.map_err(|e| Exit::system(chain(&e)))?;
    printed(printing, &finished, &mut signal.clone()).await;
    // On a thread of its own, so that a signal can stop the writing.
    let concluding = tokio::task::spawn_blocking(move || conclude(&plan, &agent, &finished, &signal, clock));
    concluding.await.map_err(|e| Exit::system(format!("write the outputs: {e}")))?
}

/// All builds of one data directory trust each other, as far as cached content goes.
fn layer_cache(args: &BuildArgs) -> LayerCache {
    let key = LayerKey {
        namespace: LOCAL.to_owned(),
        repository: String::new(),
        target: args.target.clone().unwrap_or_default(),
        trust: LOCAL.to_owned(),
    };
    LayerCache { key, reuse: if args.no_cache { Reuse::Nothing } else { Reuse::Cached } }
}

/// On a thread of its own: a terminal that does not read must not make us deaf to signals.
fn print(printer: Printer, mut events: mpsc::Receiver<Event>) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        while let Some(event) = events.blocking_recv() {
            printer.show(&event);
        }
    })
}

/// Waits until everything is shown; after a stop only for a moment.
async fn printed(printing: JoinHandle<()>, finished: &Finished, stop: &mut StopSignal) {
    let given_up = async {
        if !was_stopped(finished) {
            stop.stopped().await;
        }
        tokio::time::sleep(SHOW_AFTER_STOP).await;
    };
    tokio::select! {
        // It ends with the events; a panic in it was shown.
        _ = printing => {}
        () = given_up => {}
    }
}

/// What the client's own parts of a build take.
struct Clock {
    began: Instant,
    phases: Vec<PhaseDuration>,
}

impl Clock {
    fn start() -> Self {
        Self { began: Instant::now(), phases: Vec::new() }
    }

    /// Ends a part; the next one begins.
    fn lap(&mut self, phase: Phase) {
        let milliseconds = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.phases.push(PhaseDuration { phase, milliseconds });
        self.began = Instant::now();
    }
}

/// By a person or by its own time limit.
fn was_stopped(finished: &Finished) -> bool {
    let reason = finished.result.outcome.as_ref().err().map(|failure| failure.reason);
    matches!(reason, Some(Reason::Timeout | Reason::Cancelled | Reason::ClientGone))
}

struct Prepared {
    build: BuildId,
    job: Job,
    inputs: BuildInputs,
}

async fn prepare(plan: &Plan, agent: &Agent, clock: &mut Clock) -> Result<Prepared, Exit> {
    match housekeeping::reclaim(agent).await {
        Ok(0) => {}
        Ok(count) => plan.printer.say(&format!("cleaned up after {count} builds that were killed")),
        Err(error) => plan.printer.say(&format!("cannot clean up after a killed build: {}", chain(&error))),
    }
    keep_below_mark(plan, agent).await;
    let state = &agent.state;
    let opened = state.require_free(agent.config.data.min_free).and_then(|()| {
        let build = BuildId::generate();
        Ok((build, state.create_job(&build.to_string())?))
    });
    let (build, job) = opened.map_err(|e| Exit::system(chain(&e)).with_hint("run `kiln prune`"))?;
    plan.printer.say(&format!("build {build}"));
    clock.lap(Phase::Start);
    let archive = pack(plan, &job).await?;
    clock.lap(Phase::Pack);
    let credentials = find_credentials(plan, agent).await?;
    let inputs = BuildInputs { archive, secrets: plan.secrets.clone(), credentials };
    Ok(Prepared { build, job, inputs })
}

/// Bounds what earlier builds keep. A failure costs disk, not the build.
async fn keep_below_mark(plan: &Plan, agent: &Agent) {
    if let Err(error) = housekeeping::prune(agent, false).await {
        plan.printer.say(&format!("cannot delete old content: {}", chain(&error)));
    }
}

async fn pack(plan: &Plan, job: &Job) -> Result<File, Exit> {
    let (context, dockerfile) = (plan.args.context.clone(), plan.source.path.clone());
    let path = job.dir().join("context.tar");
    let packing = tokio::task::spawn_blocking(move || pack_into(&path, &context, dockerfile.as_deref()));
    let (file, packed) = packing.await.map_err(|e| Exit::system(format!("pack the context: {e}")))??;
    let summary = format!("context {} ({} entries, {} bytes)", packed.digest, packed.entries, packed.bytes);
    plan.printer.say(&summary);
    for note in &packed.skipped {
        plan.printer.say(&format!("skipped {note}"));
    }
    if packed.bytes > LARGE_CONTEXT_BYTES {
        plan.printer.say("the context is large; a .dockerignore can leave files out. The largest:");
        for (path, bytes) in &packed.largest {
            plan.printer.say(&format!("  {bytes:>12} {}", path.display()));
        }
    }
    Ok(file)
}

fn pack_into(
    path: &Path,
    context: &Path,
    dockerfile: Option<&Path>,
) -> Result<(File, context::Packed), Exit> {
    let ignore = context::load(context, dockerfile).map_err(|e| Exit::usage(chain(&e)))?;
    let failed = |e: std::io::Error| Exit::system(format!("{}: {e}", path.display()));
    let file = File::options().write(true).create_new(true).open(path).map_err(failed)?;
    let mut out = std::io::BufWriter::with_capacity(256 * 1024, &file);
    let packed =
        context::pack(context, &ignore, &mut out).map_err(|e| Exit { code: 1, ..Exit::usage(chain(&e)) })?;
    out.flush().map_err(failed)?;
    drop(out);
    drop(file);
    // Only a descriptor that cannot write is used from here on, so a killed build leaves no context behind.
    let file = File::open(path).map_err(failed)?;
    std::fs::remove_file(path).map_err(failed)?;
    Ok((file, packed))
}

/// Credential helpers run here, in the client, and only for registries that this build uses.
async fn find_credentials(plan: &Plan, agent: &Agent) -> Result<Credentials, Exit> {
    let names = registry_names(plan, agent);
    let environment = |name: &str| std::env::var_os(name);
    let found = credentials::load(plan.args.authfile.as_deref(), &environment, &names).await;
    found.map_err(|e| Exit { code: UNAUTHORIZED, ..Exit::usage(chain(&e)) })
}

/// `host/repository` of every place that the build may pull from. What is wrong with the Dockerfile, the
/// build itself will say.
fn registry_names(plan: &Plan, agent: &Agent) -> Vec<String> {
    let input = executor::build_input(&plan.request, agent.buildah);
    let references = Dockerfile::parse(&plan.request.dockerfile).and_then(|file| file.references(&input));
    let Ok(config) = RegistryConfig::new(agent.config.registry.clone()) else { return Vec::new() };
    let references = references.unwrap_or_default();
    let endpoints = references.iter().filter_map(|base| config.endpoints(&base.reference).ok());
    endpoints.flatten().map(|endpoint| endpoint.credential_key()).collect()
}

fn conclude(
    plan: &Plan,
    agent: &Agent,
    finished: &Finished,
    stop: &StopSignal,
    mut clock: Clock,
) -> Result<u8, Exit> {
    clock.phases.extend(&finished.result.phases);
    clock.began = Instant::now();
    let should_stop = || stop.current().is_some();
    match (&finished.result.outcome, &finished.image) {
        (Ok(image), Some(sealed)) => {
            let written = write_outputs(plan, agent, finished, sealed, &should_stop)?;
            clock.lap(Phase::Output);
            write_metadata(plan, finished, sealed, &clock.phases)?;
            plan.printer.success(image, &finished.result, &written);
            Ok(0)
        }
        (Err(failure), _) => Ok(failed(plan, agent, finished, failure)),
        (Ok(_), None) => Err(Exit::system("the build succeeded without an image")),
    }
}

fn failed(plan: &Plan, agent: &Agent, finished: &Finished, failure: &Failure) -> u8 {
    let log = agent.state.log_path(finished.result.build_id);
    progress::failure(failure, finished, &plan.request.dockerfile_name, &log);
    failure.reason.exit_code()
}

fn write_outputs(
    plan: &Plan,
    agent: &Agent,
    finished: &Finished,
    sealed: &Sealed,
    should_stop: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<String>, Exit> {
    let writer = output::Writer { blobs: &finished.blobs, should_stop };
    for spec in &plan.outputs {
        write_output(agent, finished, sealed, &writer, spec).map_err(|e| output_failed(&e))?;
    }
    Ok(plan.args.output.clone())
}

fn write_metadata(
    plan: &Plan,
    finished: &Finished,
    sealed: &Sealed,
    phases: &[PhaseDuration],
) -> Result<(), Exit> {
    if let Some(path) = &plan.args.iidfile {
        output::write_text(path, &output::image_id(&sealed.image.config_digest))
            .map_err(|e| output_failed(&e))?;
    }
    if let Some(path) = &plan.args.metadata_file {
        let mut metadata = output::metadata(&finished.result.build_id, Some(sealed), phases);
        metadata["kiln.log"] = serde_json::json!(finished.result.log);
        metadata["kiln.cache"] = serde_json::json!(finished.result.steps);
        output::write_text(path, &format!("{metadata:#}\n")).map_err(|e| output_failed(&e))?;
    }
    Ok(())
}

fn output_failed(error: &output::OutputError) -> Exit {
    Exit { code: error.reason().exit_code(), message: chain(error), hint: None }
}

fn write_output(
    agent: &Agent,
    finished: &Finished,
    sealed: &Sealed,
    writer: &output::Writer<'_>,
    spec: &OutputSpec,
) -> Result<(), output::OutputError> {
    let mut stdout = std::io::stdout().lock();
    match (spec, &finished.root_filesystem) {
        (OutputSpec::Image(target), _) => writer.image(target, sealed, &mut stdout),
        (OutputSpec::Files(target), Some((digest, size))) => {
            writer.files(target, (digest, *size), &mut stdout, &mut |archive, directory| {
                unpack_result(agent, archive, directory)
            })
        }
        // Asked for by the request, so a finished build has it.
        (OutputSpec::Files(_), None) => Ok(()),
    }
}

/// The result is as untrusted as a context, and gets the same guard.
fn unpack_result(
    agent: &Agent,
    archive: File,
    directory: BorrowedFd<'_>,
) -> Result<(), output::UnpackFailure> {
    let disk = agent.config.build.limits.disk;
    let limits = Limits { max_packed_bytes: disk, max_unpacked_bytes: disk, ..agent.config.context.clone() };
    let unpacked = unpack::unpack(archive, directory, unpack::Modes::Owned, &limits);
    unpacked
        .map(drop)
        .map_err(|e| output::UnpackFailure { reason: Reason::LimitExceeded, source: Box::new(e) })
}
