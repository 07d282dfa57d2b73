//! Why a build ended: one table generates label, retry class, final state and exit code (pure).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whether, and where, a failed attempt is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryClass {
    /// The same input would fail again.
    Never,
    /// The cause lies outside the build and may pass.
    Transient,
    /// The cause lies on this node.
    TransientElsewhere,
    /// One more try, on another node.
    OnceElsewhere,
    /// At once, from a budget of its own.
    AgentLost,
    /// Tried again without counting against any budget.
    Uncounted,
}

/// The final state that a reason leads to once nothing is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndState {
    /// The user's fault, a policy or a limit.
    Failed,
    /// Somebody asked for it to stop.
    Cancelled,
    /// The system gave up; a person may replay it.
    DeadLetter,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal, $class:ident, $end:ident, $exit:literal;)+) => {
        /// Why an attempt did not succeed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[doc = $doc])+ #[serde(rename = $label)] $name,)+
        }

        impl Reason {
            /// Every reason, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The name on the wire and in metric labels.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label),+ }
            }

            /// Whether the attempt is tried again.
            pub const fn retry_class(self) -> RetryClass {
                match self { $(Self::$name => RetryClass::$class),+ }
            }

            /// The state of a build that ends for this reason.
            pub const fn end_state(self) -> EndState {
                match self { $(Self::$name => EndState::$end),+ }
            }

            /// The exit code of the command that waited for the build.
            pub const fn exit_code(self) -> u8 {
                match self { $(Self::$name => $exit),+ }
            }
        }
    };
}

reasons! {
    /// An instruction of the Dockerfile failed.
    BuildFailed = "build_failed", Never, Failed, 1;
    /// An image or file that the build names does not exist.
    NotFound = "not_found", Never, Failed, 1;
    /// The context cannot be unpacked safely or within its limits.
    ContextInvalid = "context_invalid", Never, Failed, 1;
    /// The slot's own memory, disk, processes or file size ran out.
    LimitExceeded = "limit_exceeded", Never, Failed, 1;
    /// The request or the Dockerfile asks for something that Kiln refuses.
    BadRequest = "bad_request", Never, Failed, 2;
    /// A policy plugin denied the build or the image.
    PolicyDenied = "policy_denied", Never, Failed, 3;
    /// A registry or repository refused the credential.
    Unauthorized = "unauthorized", Never, Failed, 4;
    /// A policy plugin did not answer: trap, memory, deadline, another limit, or it does not load.
    HookFault = "hook_fault", Never, DeadLetter, 5;
    /// A server that a policy plugin asks does not answer.
    HookUnavailable = "hook_unavailable", Transient, DeadLetter, 5;
    /// A registry answered that it cannot serve now.
    RegistryUnavailable = "registry_unavailable", Transient, DeadLetter, 5;
    /// A name did not resolve or a connection broke.
    Network = "network", Transient, DeadLetter, 5;
    /// The store of contexts and logs does not answer.
    ObjectStore = "object_store", Transient, DeadLetter, 5;
    /// What the slot exported does not match its own digests.
    CandidateCorrupt = "candidate_corrupt", Transient, DeadLetter, 5;
    /// The node's disk is full.
    DiskFull = "disk_full", TransientElsewhere, DeadLetter, 5;
    /// A local image store is damaged.
    StoreCorrupt = "store_corrupt", TransientElsewhere, DeadLetter, 5;
    /// The node cannot run sealed builds.
    NodeUnfit = "node_unfit", TransientElsewhere, DeadLetter, 5;
    /// The node ran out of memory.
    OutOfMemory = "out_of_memory", OnceElsewhere, DeadLetter, 5;
    /// Nothing known matches.
    Unknown = "unknown", OnceElsewhere, DeadLetter, 5;
    /// The agent that held the lease went silent.
    AgentLost = "agent_lost", AgentLost, DeadLetter, 5;
    /// The agent shut down and gave the build back.
    AgentDrain = "agent_drain", Uncounted, DeadLetter, 5;
    /// The agent found no room for the build after it had claimed it.
    NoCapacity = "no_capacity", Uncounted, DeadLetter, 5;
    /// The build took longer than it may.
    Timeout = "timeout", Never, Failed, 124;
    /// No agent took the build in the time that it may wait.
    QueueTimeout = "queue_timeout", Never, Failed, 124;
    /// A person or a signal asked for the end.
    Cancelled = "cancelled", Never, Cancelled, 130;
    /// Every target of the build belongs to a newer build.
    Superseded = "superseded", Never, Cancelled, 130;
    /// The client that waited for the build is gone.
    ClientGone = "client_gone", Never, Cancelled, 130;
    /// After the commit a target was refused for good; the others moved.
    PartialPublish = "partial_publish", Never, Failed, 5;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_unique_and_round_trip_through_serde() {
        let mut labels: Vec<_> = Reason::ALL.iter().map(|r| r.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            let json = serde_json::to_string(reason).unwrap();
            assert_eq!(json, format!("\"{}\"", reason.label()));
            assert_eq!(serde_json::from_str::<Reason>(&json).unwrap(), *reason);
        }
    }

    #[test]
    fn exit_codes_follow_the_end_state() {
        for reason in Reason::ALL {
            match reason.end_state() {
                EndState::Cancelled => assert_eq!(reason.exit_code(), 130),
                EndState::DeadLetter => assert_eq!(reason.exit_code(), 5),
                EndState::Failed => assert!([1, 2, 3, 4, 5, 124].contains(&reason.exit_code())),
            }
        }
    }
}
