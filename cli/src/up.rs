//! `kiln up` (edge): a server for this machine.

mod metrics;
mod server;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_agent::agent::Agent;
use kiln_agent::dispatch::Station;
use kiln_agent::error::chain;
use kiln_agent::housekeeping;
use kiln_orchestrator::api::{self, Api, Listener, Token};
use kiln_orchestrator::config::OrchestratorConfig;
use kiln_orchestrator::core::Orchestrator;
use kiln_orchestrator::logs::LogSource;
use kiln_orchestrator::run;
use kiln_protocol::id::{AgentId, BootId, Pool};
use kiln_transport::Blobs;
use tokio::task::JoinSet;

use self::server::Server;
use crate::app::Exit;
use crate::args::UpArgs;
use crate::pair::{self, Pair};
use crate::signals::Signals;
use crate::{paths, remote, terminal};

/// The pool of a server that is alone.
const POOL: &str = "default";
/// Its only agent.
const AGENT: &str = "local";

/// A disk fills more slowly than this, or a build meets `data.min_free`.
const PRUNE_EVERY: Duration = Duration::from_mins(10);

/// Runs the command until a signal.
pub(crate) fn run(args: &UpArgs) -> Result<u8, Exit> {
    let config = paths::load_config(&args.places)?;
    let agent = paths::open_agent(config.agent, &paths::data_dir(&args.places)?)?;
    paths::runtime()?.block_on(up(args, agent, &config.orchestrator))
}

async fn up(args: &UpArgs, agent: Agent, rules: &OrchestratorConfig) -> Result<u8, Exit> {
    let mut signals = Signals::listen()?;
    let agent = Arc::new(agent);
    // First, because its lock keeps a second server away from the record.
    let listeners = listen(args, agent.state.root()).await?;
    if let Err(error) = housekeeping::reclaim(&agent).await {
        terminal::say(&format!("cannot clean up after a killed build: {}", chain(&error)));
    }
    let equipped = pair::equip(agent).await?;
    let agent = &equipped.0;
    let kept = Arc::clone(agent);
    let pool: Pool = POOL.parse().map_err(|e| Exit::system(chain(&e)))?;
    // One-shot builds on the same directory have pools of their own.
    let orchestrator = pair::orchestrator(&equipped, pool.clone(), rules).await?;
    let api = api(agent, Arc::clone(&orchestrator)).await?;
    let id: AgentId = AGENT.parse().map_err(|e| Exit::system(chain(&e)))?;
    let station = Station { id, boot: BootId::generate(), pools: BTreeSet::from([pool]), slots: args.slots };
    let supplies = Arc::new(Server::new(Arc::clone(agent), api.contexts.clone()));
    let pair = Pair::start(Arc::clone(&orchestrator), station, equipped, supplies).await?;
    let mut housekeeper = JoinSet::new();
    housekeeper.spawn(run::tidy_contexts(Arc::clone(&orchestrator), api.contexts.clone()));
    housekeeper.spawn(keep_below_marks(Arc::clone(&kept)));
    for listener in &listeners {
        terminal::say(&listener.announcement());
    }
    api::serve(api, listeners, async {
        signals.next().await;
        terminal::say("stopping: what runs is given back");
    })
    .await;
    housekeeper.shutdown().await;
    pair.end().await;
    orchestrator.store().close().await;
    Ok(0)
}

/// Deletes the least recently used of what can be made again, for as long as the server runs.
async fn keep_below_marks(agent: Arc<Agent>) {
    loop {
        if let Err(error) = housekeeping::prune(&agent, false).await {
            terminal::say(&format!("cannot delete old content: {}", chain(&error)));
        }
        tokio::time::sleep(PRUNE_EVERY).await;
    }
}

/// Opens the socket of the data directory, and the port if one is wanted.
async fn listen(args: &UpArgs, data: &Path) -> Result<Vec<Listener>, Exit> {
    let refused = |e: &dyn std::error::Error| Exit::system(chain(e));
    let mut listeners = vec![Listener::unix(&remote::default_socket(data)).map_err(|e| refused(&e))?];
    if let Some(address) = args.listen {
        let token = Token::open(&remote::default_token(data)).map_err(|e| refused(&e))?;
        listeners.push(Listener::loopback(address, token).await.map_err(|e| refused(&e))?);
    }
    if let Some(address) = args.metrics {
        listeners.push(metrics::listen(address).await?);
    }
    Ok(listeners)
}

async fn api(agent: &Arc<Agent>, orchestrator: Arc<Orchestrator>) -> Result<Api, Exit> {
    let contexts = Blobs::directory(&agent.state.path("contexts")).await;
    let contexts = contexts.map_err(|e| Exit::system(chain(&e)))?;
    let max_context_bytes = agent.config.context.max_packed_bytes;
    let metrics = metrics::registries(agent)?;
    let agent = Arc::clone(agent);
    let logs = LogSource::files(move |build, attempt| agent.state.log_path(build, attempt));
    Ok(Api { orchestrator, contexts, max_context_bytes, logs, metrics })
}
