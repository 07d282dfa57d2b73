//! The numbers of a server (edge): where they are served, and whose they are.

use std::net::SocketAddr;

use kiln_agent::agent::Agent;
use kiln_agent::error::chain;
use kiln_orchestrator::api::{ListenError, Listener};
use prometheus::Registry;
use prometheus::process_collector::ProcessCollector;

use crate::app::Exit;

/// Opens the port of `--metrics`.
pub(super) async fn listen(address: SocketAddr) -> Result<Listener, Exit> {
    Listener::metrics(address).await.map_err(|error| {
        let why = format!("--metrics {address}: {}", chain(&error));
        if matches!(error, ListenError::NotLoopback(_)) { Exit::usage(why) } else { Exit::system(why) }
    })
}

/// What is served beside the numbers of the orchestrator: those of the agent and of the process.
pub(super) fn registries(agent: &Agent) -> Result<Vec<Registry>, Exit> {
    let process = process().map_err(|e| Exit::system(format!("prepare the metrics: {e}")))?;
    Ok(vec![agent.metrics.registry().clone(), process])
}

fn process() -> prometheus::Result<Registry> {
    let registry = Registry::new();
    registry.register(Box::new(ProcessCollector::for_self()))?;
    Ok(registry)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kiln_protocol::Digest;
    use kiln_protocol::message::{Hook, PolicyKey, RequiredPolicy};

    use super::*;

    /// Rewrites the reference instead of comparing it.
    const WRITE: &str = "KILN_WRITE_DOCS";
    const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    const BEGIN: &str =
        "<!-- generated from here on; KILN_WRITE_DOCS=1 cargo test -p kiln metrics writes it -->\n";

    fn rows() -> String {
        let agent = kiln_agent::metrics::Metrics::new().unwrap();
        let key = PolicyKey { plugin: Digest::from_sha256([0; 32]), settings: Digest::from_sha256([0; 32]) };
        let hooks = vec![Hook::PreBuild];
        let policy = RequiredPolicy { name: "policy".to_owned(), key, hooks, repositories: Vec::new() };
        agent.may_ask(std::iter::once(policy));
        let orchestrator = kiln_orchestrator::metrics::Metrics::new().unwrap();
        let process = process().unwrap();
        let parts =
            [("agent", agent.registry()), ("orchestrator", orchestrator.registry()), ("process", &process)];
        let mut rows: BTreeMap<(String, &str), String> = BTreeMap::new();
        for (part, registry) in parts {
            for family in registry.gather() {
                let labels = family.get_metric()[0].get_label().iter().map(|l| format!("`{}`", l.name()));
                let labels = labels.collect::<Vec<_>>().join(" ");
                let kind = format!("{:?}", family.get_field_type()).to_lowercase();
                let row =
                    format!("| `{}` | {part} | {kind} | {labels} | {} |\n", family.name(), family.help());
                rows.insert((family.name().to_owned(), part), row);
            }
        }
        rows.into_values().collect()
    }

    #[test]
    fn the_reference_says_what_is_served() {
        let committed = std::fs::read_to_string(REFERENCE).unwrap();
        let (text, _) = committed.split_once(BEGIN).unwrap();
        let header = "\n| name | part | type | labels | help |\n| --- | --- | --- | --- | --- |\n";
        let expected = format!("{text}{BEGIN}{header}{}", rows());
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(REFERENCE, &expected).unwrap();
        }
        assert!(
            std::env::var_os(WRITE).is_some() || committed == expected,
            "docs/metrics.md is not what is served; write it with {WRITE}=1:\n{expected}"
        );
    }
}
