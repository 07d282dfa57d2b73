//! `kiln up` (edge): a server for this machine.

mod server;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_agent::agent::Agent;
use kiln_agent::dispatch::{self, Station, Wish};
use kiln_agent::error::chain;
use kiln_agent::hooks::HookHost;
use kiln_agent::housekeeping;
use kiln_orchestrator::api::{self, Api, Listener, Token};
use kiln_orchestrator::core::{Orchestrator, Settings};
use kiln_orchestrator::entropy::Entropy;
use kiln_orchestrator::logs::LogSource;
use kiln_orchestrator::run;
use kiln_orchestrator::schedule::Limits;
use kiln_protocol::id::{AgentId, BootId, Pool};
use kiln_transport::{Blobs, MemoryBroker};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::server::Server;
use crate::app::Exit;
use crate::args::UpArgs;
use crate::signals::Signals;
use crate::{embedded, paths, remote, terminal};

/// The pool of a server that is alone.
const POOL: &str = "default";
/// Its only agent.
const AGENT: &str = "local";
/// What still runs at the end is given back within this time, or its lease runs out.
const LAST_WORK: Duration = Duration::from_secs(20);

/// Runs the command until a signal.
pub(crate) fn run(args: &UpArgs) -> Result<u8, Exit> {
    let config = paths::load_config(&args.places)?;
    let agent = paths::open_agent(config, &paths::data_dir(&args.places)?)?;
    paths::runtime()?.block_on(up(args, agent))
}

async fn up(args: &UpArgs, agent: Agent) -> Result<u8, Exit> {
    let mut signals = Signals::listen()?;
    let agent = Arc::new(agent);
    // First, because its lock keeps a second server away from the record.
    let listeners = listen(args, agent.state.root()).await?;
    if let Err(error) = housekeeping::reclaim(&agent).await {
        terminal::say(&format!("cannot clean up after a killed build: {}", chain(&error)));
    }
    let hooks = embedded::load_hooks(&agent).await?;
    let api = api(&agent, hooks.as_deref()).await?;
    let mut loops = JoinSet::new();
    let broker = MemoryBroker::new(0);
    let pool: Pool = POOL.parse().map_err(|e| Exit::system(chain(&e)))?;
    let bus = broker.connect("kiln-orchestrator");
    let started = run::start(&api.orchestrator, &bus, std::slice::from_ref(&pool), &mut loops).await;
    started.map_err(|e| Exit::system(chain(&e)))?;
    let id: AgentId = AGENT.parse().map_err(|e| Exit::system(chain(&e)))?;
    let bus = broker.connect(AGENT);
    let pools = BTreeSet::from([pool]);
    let station = Station { id, boot: BootId::generate(), pools, slots: args.slots };
    let (wish, wished) = watch::channel(Wish::Work);
    let supplies = Arc::new(Server::new(Arc::clone(&agent), api.contexts.clone()));
    let mut working = JoinSet::new();
    working.spawn(dispatch::run(station, (agent, hooks), supplies, bus, wished));
    for listener in &listeners {
        terminal::say(&format!("listening on {}", listener.address()));
    }
    let orchestrator = Arc::clone(&api.orchestrator);
    api::serve(api, listeners, async {
        signals.next().await;
        terminal::say("stopping: what runs is given back");
    })
    .await;
    // The dispatcher may be gone already.
    let _ = wish.send(Wish::Stop);
    let _ = tokio::time::timeout(LAST_WORK, working.join_next()).await;
    working.shutdown().await;
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

async fn api(agent: &Arc<Agent>, hooks: Option<&HookHost>) -> Result<Api, Exit> {
    let failed = |e: &dyn std::error::Error| Exit::system(chain(e));
    let store = embedded::open_store(agent.state.root()).await?;
    let contexts = Blobs::directory(&agent.state.path("contexts")).await.map_err(|e| failed(&e))?;
    let settings = Settings {
        // One person's server is never unfair to anybody.
        limits: Limits { per_namespace: u32::MAX },
        policies: embedded::rules(hooks),
        // One-shot builds on the same directory have pools of their own.
        only_pool: Some(POOL.parse().map_err(|e| Exit::system(chain(&e)))?),
    };
    let orchestrator = Arc::new(Orchestrator::new(store, settings, Entropy::System));
    let max_context_bytes = agent.config.context.max_packed_bytes;
    let agent = Arc::clone(agent);
    let logs = LogSource::files(move |build, attempt| agent.state.log_path(build, attempt));
    Ok(Api { orchestrator, contexts, max_context_bytes, logs })
}
