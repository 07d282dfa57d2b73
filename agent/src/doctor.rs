//! What this machine offers for sealed builds (shell): every answer comes from trying, not from versions.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use kiln_protocol::BuildId;
use kiln_protocol::request::NetworkMode;

use crate::agent::{Agent, AgentError};
use crate::bases::{container_files, log_pipe};
use crate::config::Config;
use crate::error::chain;
use crate::slot::wire::{CacheMount, Exit, SlotSpec, Step};
use crate::slot::{Slot, SlotFiles, SlotLost};
use crate::state::StateError;
use crate::stop;

/// How a requirement stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is there.
    Good,
    /// Builds run, with less.
    Limited,
    /// No build runs.
    Missing,
}

/// One requirement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub name: &'static str,
    /// How it stands.
    pub standing: Standing,
    /// What was found.
    pub found: String,
    /// How to get it.
    pub remedy: Option<String>,
}

impl Finding {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, standing: Standing::Good, found: found.into(), remedy: None }
    }

    fn bad(
        name: &'static str,
        standing: Standing,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { name, standing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

const SETUP: &str = "run `kiln doctor --print-setup`, read the script, then run it as root";

/// Looks at everything that a sealed build needs.
pub async fn examine(config: Config, data: &Path) -> Vec<Finding> {
    let mut findings =
        vec![tool("newuidmap", "apt-get install uidmap"), tool("newgidmap", "apt-get install uidmap")];
    match Agent::open(config, data) {
        Ok(agent) => {
            findings.push(identity(&agent));
            findings.push(Finding::good("buildah", agent.buildah.to_string()));
            findings.push(space(&agent));
            findings.push(slot(&agent).await);
            findings.push(network(&agent).await);
            findings.extend(limits(&agent));
        }
        Err(error) => findings.push(refusal(&error)),
    }
    findings
}

fn refusal(error: &AgentError) -> Finding {
    let name = match error {
        AgentError::Identity(_) => "subordinate ids",
        AgentError::State(_) => "data directory",
        AgentError::Ca { .. } | AgentError::Registries(_) => "configuration",
        AgentError::Metrics(_) => "metrics",
        AgentError::NoBuildah(_) | AgentError::UnknownVersion(_) | AgentError::OldBuildah(_) => "buildah",
    };
    Finding::bad(name, Standing::Missing, chain(error), error.hint())
}

fn tool(name: &'static str, remedy: &str) -> Finding {
    match find(name) {
        Some(path) => Finding::good(name, path),
        None => Finding::bad(name, Standing::Missing, "not found", remedy),
    }
}

fn find(name: &str) -> Option<String> {
    let dirs = ["/usr/local/bin", "/usr/bin", "/usr/sbin", "/bin", "/sbin"];
    dirs.iter().map(|dir| format!("{dir}/{name}")).find(|path| Path::new(path).exists())
}

fn identity(agent: &Agent) -> Finding {
    let ids = agent.identity.ids;
    let whose = match agent.identity.drop_to {
        Some(user) => format!("of user id {} (running as root)", user.uid),
        None => "of this user".to_owned(),
    };
    Finding::good("subordinate ids", format!("{} from {} {whose}", ids.count, ids.first_uid))
}

fn space(agent: &Agent) -> Finding {
    let wanted = agent.config.data.min_free;
    match agent.state.require_free(wanted) {
        Ok(()) => Finding::good("data directory", format!("{}", agent.state.root().display())),
        Err(error) => Finding::bad("data directory", Standing::Missing, chain(&error), "run `kiln prune`"),
    }
}

async fn slot(agent: &Agent) -> Finding {
    let name = "sealed slot";
    match try_slot(agent, NetworkMode::None, "true").await {
        Ok(Exit::Code(0)) => {
            Finding::good(name, "user, PID, mount, IPC, UTS and network namespaces, native overlay")
        }
        Ok(exit) => Finding::bad(name, Standing::Missing, format!("a trial step ended with {exit:?}"), SETUP),
        Err(error) => Finding::bad(name, Standing::Missing, chain(&error), namespace_remedy()),
    }
}

fn namespace_remedy() -> String {
    let restricted = std::fs::read_to_string("/proc/sys/kernel/apparmor_restrict_unprivileged_userns");
    if restricted.is_ok_and(|value| value.trim() == "1") {
        return "AppArmor restricts user namespaces: give kiln a profile with `userns,`".to_owned();
    }
    SETUP.to_owned()
}

async fn network(agent: &Agent) -> Finding {
    let name = "isolated network";
    if find("slirp4netns").is_none() {
        let remedy = "apt-get install slirp4netns; until then --network=none works";
        return Finding::bad(name, Standing::Limited, "slirp4netns not found", remedy);
    }
    match try_slot(agent, NetworkMode::Isolated, "true").await {
        Ok(_) => Finding::good(name, "slirp4netns, host and link-local addresses closed"),
        Err(error) => {
            let tun = Path::new("/dev/net/tun").metadata().is_ok_and(|m| m.file_type().is_char_device());
            let remedy = if tun {
                "make /dev/net/tun accessible: chmod 666 /dev/net/tun"
            } else {
                "load the tun module"
            };
            let remedy = format!("{remedy}; until then --network=none works");
            Finding::bad(name, Standing::Limited, chain(&error), remedy)
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum TrialError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Slot(#[from] SlotLost),
}

async fn try_slot(agent: &Agent, network: NetworkMode, script: &str) -> Result<Exit, TrialError> {
    let job = agent.state.create_job(&BuildId::generate().to_string())?;
    let (_reader, log) = log_pipe(&job)?;
    let lock = job.lock().map_err(|e| StateError::io("lock", job.dir(), e))?;
    let files = SlotFiles { store: agent.state.store()?, lock, archive: None, log };
    let spec = SlotSpec {
        network,
        cache: Some(CacheMount { generations: Vec::new() }),
        files: container_files(),
        ..agent.bare_slot(job.name())
    };
    let mut slot = Slot::start(&spec, files).await?;
    let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    let (_stopper, mut stop) = stop::channel();
    let end =
        slot.run(Step::Exec { argv, env: crate::plan::environment(&[]), network: false }, &mut stop).await;
    slot.finish().await?;
    Ok(end?.exit)
}

fn limits(agent: &Agent) -> Vec<Finding> {
    let limits = &agent.config.build.limits;
    vec![
        Finding::good("limit on processes", format!("{} (RLIMIT_NPROC of the user namespace)", limits.pids)),
        Finding::good("limit on disk", format!("{} bytes (watched)", limits.disk)),
        Finding::good("limit on file size", format!("{} bytes (RLIMIT_FSIZE)", limits.file_size)),
        Finding::good("limit on open files", format!("{} (RLIMIT_NOFILE)", limits.open_files)),
        memory(agent),
    ]
}

fn memory(agent: &Agent) -> Finding {
    let name = "limit on memory and CPU";
    match crate::slot::delegated_cgroup() {
        Ok(path) => match agent.config.build.limits.memory {
            Some(bytes) => Finding::good(name, format!("{bytes} bytes (cgroup v2 at {})", path.display())),
            None => Finding::bad(
                name,
                Standing::Limited,
                "cgroup v2 is delegated, no limit is set",
                "set build.limits.memory",
            ),
        },
        Err(why) => {
            let remedy =
                "start kiln in a delegated cgroup: systemd-run --user --scope -p Delegate=yes kiln …";
            Finding::bad(name, Standing::Limited, why.to_string(), remedy)
        }
    }
}
