//! Where settings and state are (edge).

use std::path::{Path, PathBuf};

use kiln_agent::agent::Agent;
use kiln_agent::config::Config as AgentConfig;
use kiln_agent::error::chain;

use crate::app::Exit;
use crate::args::Places;
use crate::config::{self, Config};

/// The configuration of `--config`, of the user, of the system, or the default.
pub(crate) fn load_config(places: &Places) -> Result<Config, Exit> {
    let Some(path) = config_file(places.config.as_deref()) else { return Ok(Config::default()) };
    config::load(&path).map_err(|e| Exit::usage(chain(&e)))
}

/// The file that was named, or the first that exists.
pub(crate) fn config_file(named: Option<&Path>) -> Option<PathBuf> {
    let first = || default_configs().into_iter().find(|path| path.exists());
    named.map(Path::to_owned).or_else(first)
}

fn default_configs() -> Vec<PathBuf> {
    let user =
        std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or_else(|| Some(home()?.join(".config")));
    let system = PathBuf::from("/etc/kiln/config.toml");
    user.map(|dir| dir.join("kiln/config.toml")).into_iter().chain([system]).collect()
}

/// The data directory.
pub(crate) fn data_dir(places: &Places) -> Result<PathBuf, Exit> {
    if let Some(data) = &places.data {
        return Ok(data.clone());
    }
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let state = state.or_else(|| Some(home()?.join(".local/state")));
    let missing = || Exit::usage("neither --data nor XDG_STATE_HOME nor HOME says where to keep state");
    Ok(state.ok_or_else(missing)?.join("kiln"))
}

fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").map(PathBuf::from).filter(|p| p.is_absolute())
}

/// Opens the agent, with errors that name the way out.
pub(crate) fn open_agent(config: AgentConfig, data: &Path) -> Result<Agent, Exit> {
    Agent::open(config, data).map_err(|e| Exit::system(chain(&e)).with_hint(e.hint()))
}

/// A runtime for one command. Two workers are plenty: the work is done by other processes.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Exit> {
    let built = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    built.map_err(|e| Exit::system(format!("start the runtime: {e}")))
}
