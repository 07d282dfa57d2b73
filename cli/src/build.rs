//! `kiln build` (edge): from files and flags to a running build and back to files.

mod client;
mod session;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_agent::agent::Agent;
use kiln_agent::dockerfile::Dockerfile;
use kiln_agent::error::chain;
use kiln_agent::executor::{self, Event};
use kiln_agent::hooks::config::PluginConfig;
use kiln_agent::housekeeping;
use kiln_agent::output::{self, OutputSpec};
use kiln_agent::registry::{Credentials, RegistryConfig};
use kiln_agent::stop::{self, StopSignal};
use kiln_orchestrator::build::Build;
use kiln_protocol::request::{BuildRequest, ImageFormat};
use kiln_protocol::result::{Phase, PhaseDuration};
use kiln_protocol::spec::ContextRef;
use kiln_protocol::target::InvalidTarget;
use kiln_protocol::{Reason, Target};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use self::client::{Client, ClientParts};
use crate::app::Exit;
use crate::args::{BuildArgs, Progress};
use crate::config::Config;
use crate::embedded::Embedded;
use crate::packing::{self, PackedContext};
use crate::pair::{self, Equipped};
use crate::progress::Printer;
use crate::signals::Signals;
use crate::{credentials, dockerfile, inputs, paths};

/// Lines that wait for a slow terminal; then the build waits too.
const EVENT_BUFFER: usize = 1024;
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
    targets: Vec<Target>,
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
    let mut config = paths::load_config(&args.places)?;
    for text in &args.plugin {
        config.agent.plugin.push(PluginConfig::from_option(text).map_err(|e| Exit::usage(chain(&e)))?);
        // Whoever names a file wants it, draft of the contract or not.
        config.agent.plugins.allow_unstable = true;
    }
    let targets = targets(&mut args)?;
    let data = paths::data_dir(&args.places)?;
    let environment = |name: &str| std::env::var(name).ok();
    let outputs = args.output.iter().map(|text| OutputSpec::parse(text));
    let outputs = outputs.collect::<Result<Vec<_>, _>>().map_err(|e| Exit::usage(chain(&e)))?;
    for spec in &outputs {
        output::preflight(spec).map_err(|e| client::output_failed(&e))?;
    }
    let stdout_taken = outputs.iter().any(OutputSpec::uses_stdout);
    let secrets = inputs::secrets(&args.secret, environment)?;
    let source = dockerfile::read(&args.context, args.file.as_deref())?;
    let format = format(&args, &outputs)?;
    let root_filesystem = outputs.iter().any(OutputSpec::wants_root_filesystem);
    let request = BuildRequest { root_filesystem, ..inputs::request(&args, &source, &config.agent, format)? };
    let printer = Printer::new(args.progress, stdout_taken);
    Ok(Plan { args, config, data, source, request, outputs, targets, secrets, printer })
}

/// Tags to publish to. A name without a registry names the image inside a `docker-archive:`.
fn targets(args: &mut BuildArgs) -> Result<Vec<Target>, Exit> {
    let mut targets = Vec::new();
    for tag in std::mem::take(&mut args.tag) {
        match tag.parse::<Target>() {
            Ok(target) if targets.contains(&target) => {}
            Ok(target) => targets.push(target),
            Err(InvalidTarget::NoRegistry(name)) => name_archives(args, &name)?,
            Err(error) => return Err(Exit::usage(format!("-t: {}", chain(&error)))),
        }
    }
    Ok(targets)
}

fn name_archives(args: &mut BuildArgs, name: &str) -> Result<(), Exit> {
    let unnamed =
        |output: &&mut String| output.strip_prefix("docker-archive:").is_some_and(|file| !file.contains(':'));
    let tag = if name.contains(':') { "" } else { ":latest" };
    let mut named = 0;
    for output in args.output.iter_mut().filter(unnamed) {
        *output = format!("{output}:{name}{tag}");
        named += 1;
    }
    if named > 0 {
        return Ok(());
    }
    let message =
        format!("-t {name} names no registry, and there is no image store on this machine to put it into");
    Err(Exit::usage(message).with_hint(format!(
        "write the host too (-t registry.example/{name}), or ask for a file (-o docker-archive:FILE -t {name})"
    )))
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
    let agent = Arc::new(paths::open_agent(plan.config.agent.clone(), &plan.data)?);
    let prepared = tokio::select! {
        prepared = prepare(&plan, &agent, &mut clock) => prepared?,
        _ = stop.stopped() => return Ok(CANCELLED),
    };
    let (events, receiver) = mpsc::channel(EVENT_BUFFER);
    let Prepared { context, parts, equipped, mut pruning } = prepared;
    let client = Arc::new(Client::new(Arc::clone(&agent), parts, stop.clone(), events));
    let supplies: Arc<dyn kiln_agent::dispatch::Supplies> = Arc::clone(&client) as _;
    let embedded = Embedded::start(equipped, supplies, plan.config.orchestrator.retention).await?;
    let printing = print(plan.printer, receiver);
    let ended = session::follow(&plan, &embedded, &client, context, &mut stop).await;
    embedded.end().await;
    tokio::select! {
        _ = pruning.join_next() => {}
        _ = stop.stopped() => {}
    }
    let seen = client.seen();
    let refused = client.refused();
    let stopped = ended.as_ref().is_ok_and(was_stopped);
    // The events end with the last who could send one.
    drop(client);
    printed(printing, stopped, &mut stop).await;
    session::conclude(&plan, &agent, &ended?, seen, refused)
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
async fn printed(printing: JoinHandle<()>, stopped: bool, stop: &mut StopSignal) {
    let given_up = async {
        if !stopped {
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
fn was_stopped(build: &Build) -> bool {
    matches!(build.reason, Some(Reason::Timeout | Reason::Cancelled | Reason::ClientGone))
}

struct Prepared {
    context: ContextRef,
    parts: ClientParts,
    equipped: Equipped,
    /// Goes on beside the build.
    pruning: JoinSet<()>,
}

async fn prepare(plan: &Plan, agent: &Arc<Agent>, clock: &mut Clock) -> Result<Prepared, Exit> {
    match housekeeping::reclaim(agent).await {
        Ok(0) => {}
        Ok(count) => plan.printer.say(&format!("cleaned up after {count} builds that were killed")),
        Err(error) => plan.printer.say(&format!("cannot clean up after a killed build: {}", chain(&error))),
    }
    let mut pruning = JoinSet::new();
    pruning.spawn(keep_below_mark(plan.printer, Arc::clone(agent)));
    let enough = || agent.state.require_free(agent.config.data.min_free);
    if enough().is_err() {
        // A panic in it was shown.
        let _ = pruning.join_next().await;
    }
    enough().map_err(|e| Exit::system(chain(&e)).with_hint("run `kiln prune`"))?;
    let equipped = pair::equip(Arc::clone(agent)).await?;
    clock.lap(Phase::Start);
    let PackedContext { file: archive, reference: context } = pack(plan, agent).await?;
    clock.lap(Phase::Pack);
    let credentials = find_credentials(plan, agent).await?;
    let parts = ClientParts {
        archive,
        secrets: plan.secrets.clone(),
        authfile: plan.args.authfile.clone(),
        credentials,
        outputs: plan.args.output.iter().cloned().zip(plan.outputs.iter().cloned()).collect(),
        iidfile: plan.args.iidfile.clone(),
        metadata_file: plan.args.metadata_file.clone(),
        before: std::mem::take(&mut clock.phases),
    };
    Ok(Prepared { context, parts, equipped, pruning })
}

/// Bounds what earlier builds keep. A failure costs disk, not the build.
async fn keep_below_mark(printer: Printer, agent: Arc<Agent>) {
    if let Err(error) = housekeeping::prune(&agent, false).await {
        printer.say(&format!("cannot delete old content: {}", chain(&error)));
    }
}

async fn pack(plan: &Plan, agent: &Agent) -> Result<PackedContext, Exit> {
    let (root, source, printer) = (plan.args.context.clone(), plan.source.clone(), plan.printer);
    let directory = agent.state.root().to_owned();
    let packing = tokio::task::spawn_blocking(move || packing::pack(&directory, &root, &source, printer));
    packing.await.map_err(|e| Exit::system(format!("pack the context: {e}")))?
}

/// Credential helpers run here, in the client, and only for registries that this build uses.
async fn find_credentials(plan: &Plan, agent: &Agent) -> Result<Credentials, Exit> {
    let names = registry_names(plan, agent);
    let environment = |name: &str| std::env::var_os(name);
    let found = credentials::load(plan.args.authfile.as_deref(), &environment, &names).await;
    found.map_err(|e| Exit { code: UNAUTHORIZED, ..Exit::usage(chain(&e)) })
}

/// `host/repository` of every place that the build may pull from or push to. What is wrong with the Dockerfile, the
/// build itself will say.
fn registry_names(plan: &Plan, agent: &Agent) -> Vec<String> {
    pulled_names(&plan.request, agent).into_iter().chain(plan.targets.iter().map(Target::name)).collect()
}

/// `host/repository` of every place that a build may pull from.
pub(crate) fn pulled_names(request: &BuildRequest, agent: &Agent) -> Vec<String> {
    let input = executor::build_input(request, agent.buildah);
    let references = Dockerfile::parse(&request.dockerfile).and_then(|file| file.references(&input));
    let Ok(config) = RegistryConfig::new(agent.config.registry.clone()) else { return Vec::new() };
    let references = references.unwrap_or_default();
    let endpoints = references.iter().filter_map(|base| config.endpoints(&base.reference).ok());
    endpoints.flatten().map(|endpoint| endpoint.credential_key()).collect()
}
