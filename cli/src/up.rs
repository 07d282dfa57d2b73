//! `kiln up` (edge): a server for this machine.

use std::path::Path;
use std::sync::Arc;

use kiln_agent::agent::Agent;
use kiln_agent::error::chain;
use kiln_orchestrator::api::{self, Api, Listener, Token};
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::logs::LogSource;
use kiln_orchestrator::run;
use kiln_orchestrator::schedule::Limits;
use kiln_orchestrator::store::{Clock, Store};
use kiln_transport::{Blobs, MemoryBroker};
use tokio::task::JoinSet;

use crate::app::Exit;
use crate::args::UpArgs;
use crate::signals::Signals;
use crate::{paths, remote, terminal};

/// Runs the command until a signal.
pub(crate) fn run(args: &UpArgs) -> Result<u8, Exit> {
    let config = paths::load_config(&args.places)?;
    let agent = paths::open_agent(config, &paths::data_dir(&args.places)?)?;
    paths::runtime()?.block_on(up(args, agent))
}

async fn up(args: &UpArgs, agent: Agent) -> Result<u8, Exit> {
    let mut signals = Signals::listen()?;
    // First, because its lock keeps a second server away from the record.
    let listeners = listen(args, agent.state.root()).await?;
    let api = api(agent).await?;
    let mut loops = JoinSet::new();
    start(&api.orchestrator, &mut loops).await?;
    for listener in &listeners {
        terminal::say(&format!("listening on {}", listener.address()));
    }
    let orchestrator = Arc::clone(&api.orchestrator);
    api::serve(api, listeners, async {
        signals.next().await;
        terminal::say("stopping");
    })
    .await;
    loops.shutdown().await;
    orchestrator.store().close().await;
    Ok(0)
}

/// Opens the socket of the data directory, and the port if one is wanted.
async fn listen(args: &UpArgs, data: &Path) -> Result<Vec<Listener>, Exit> {
    let refused = |e: &dyn std::error::Error| Exit::system(chain(e));
    let mut listeners = vec![Listener::unix(&remote::default_socket(data)).map_err(|e| refused(&e))?];
    if let Some(address) = args.listen {
        let token = Token::open(&remote::default_token(data)).map_err(|e| refused(&e))?;
        listeners.push(Listener::loopback(address, token).await.map_err(|e| refused(&e))?);
    }
    Ok(listeners)
}

async fn api(agent: Agent) -> Result<Api, Exit> {
    let failed = |e: &dyn std::error::Error| Exit::system(chain(e));
    let store = Store::open(&agent.state.path("kiln.db"), Clock::System).await.map_err(|e| failed(&e))?;
    let contexts = Blobs::directory(&agent.state.path("contexts")).await.map_err(|e| failed(&e))?;
    let settings = Settings {
        // One person's server is never unfair to anybody.
        limits: Limits { per_namespace: u32::MAX },
        policies: Vec::new(),
        only_pool: None,
    };
    let orchestrator = Arc::new(Orchestrator::new(store, settings, Entropy::System));
    let max_context_bytes = agent.config.context.max_packed_bytes;
    let logs = LogSource::files(move |build, _| agent.state.log_path(build));
    Ok(Api { orchestrator, contexts, max_context_bytes, logs })
}

/// Starts what decides about builds.
async fn start(orchestrator: &Arc<Orchestrator>, loops: &mut JoinSet<()>) -> Result<(), Exit> {
    let pool = "default".parse().map_err(|e| Exit::system(chain(&e)))?;
    let bus = MemoryBroker::new(0).connect("orchestrator");
    let started = run::start(orchestrator, &bus, &[pool], loops).await;
    started.map_err(|e| Exit::system(chain(&e)))
}
