//! Names of exchanges, queues and routing keys (pure).

use crate::BuildId;
use crate::id::{AgentId, BootId, Namespace, Pool};

/// Commands to agents.
pub const COMMANDS: &str = "kiln.cmd";
/// Reports of agents to orchestrators, private.
pub const REPORTS: &str = "kiln.report";
/// What happened, for everybody who may watch.
pub const EVENTS: &str = "kiln.event";
/// Live log lines, while somebody watches.
pub const LOGS: &str = "kiln.log";
/// Questions and answers.
pub const RPC: &str = "kiln.rpc";
/// What could not be delivered or read.
pub const DEAD: &str = "kiln.dead";

/// Routing key and queue of questions for leases.
pub const LEASE: &str = "rpc.lease";
/// Queue of reports.
pub const REPORT_QUEUE: &str = "kiln.report.all";
/// Binding of that queue.
pub const REPORT_BINDING: &str = "report.*";
/// Queue and routing key of hints that nobody could take.
pub const DEAD_COMMANDS: &str = "dead.cmd";
/// Queue and routing key of reports that nobody could read.
pub const DEAD_REPORTS: &str = "dead.report";

/// Routing key, and queue, of hints for a pool.
pub fn requests(pool: &Pool) -> String {
    format!("cmd.build.request.{pool}")
}

/// Routing key of cancels for an agent.
pub fn cancels(agent: &AgentId) -> String {
    format!("cmd.build.cancel.{agent}")
}

/// Queue on which one run of an agent hears its commands.
pub fn control_queue(agent: &AgentId, boot: &BootId) -> String {
    format!("kiln.agent.{agent}.{boot}")
}

/// Routing key of an agent's reports.
pub fn reports(agent: &AgentId) -> String {
    format!("report.{agent}")
}

/// Routing key of changes of builds of a namespace.
pub fn status(namespace: &Namespace) -> String {
    format!("event.build.status.{namespace}")
}

/// Routing key of the live log of a build.
pub fn log(build: &BuildId) -> String {
    format!("event.build.log.{build}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_passes_the_limit_of_the_broker() {
        // AMQP 0.9.1: names and routing keys are short strings of at most 255 bytes.
        let longest = "x".repeat(crate::id::MAX_NAME_BYTES);
        let (pool, agent) = (longest.parse().unwrap(), longest.parse().unwrap());
        let namespace = longest.parse().unwrap();
        let keys = [
            requests(&pool),
            cancels(&agent),
            control_queue(&agent, &BootId::generate()),
            reports(&agent),
            status(&namespace),
            log(&BuildId::generate()),
        ];
        for key in keys {
            assert!(key.len() <= 255, "{key}");
        }
    }
}
