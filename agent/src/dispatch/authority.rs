//! Questions to the orchestrator (shell).

use std::time::Duration;

use kiln_protocol::envelope::{self, Message as _};
use kiln_protocol::id::MessageId;
use kiln_protocol::message::{Answer, Request};
use kiln_protocol::topology;
use kiln_transport::{Backoff, Bus, Message};

use crate::error::chain;

/// A question that is not answered within this time is asked again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Pauses between two questions.
const PAUSE: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));

/// The orchestrator, as seen from an agent.
#[derive(Debug, Clone)]
pub(super) struct Authority {
    bus: Bus,
}

/// There was no answer.
#[derive(Debug, thiserror::Error)]
#[error("the orchestrator does not answer: {0}")]
pub(super) struct NoAnswer(String);

impl Authority {
    pub(super) const fn new(bus: Bus) -> Self {
        Self { bus }
    }

    /// Asks once.
    pub(super) async fn ask(&self, request: &Request) -> Result<Answer, NoAnswer> {
        let body = envelope::encode(request).map_err(|e| NoAnswer(chain(&e)))?;
        let message = Message::new(MessageId::generate().as_uuid(), Request::TYPE, body);
        let reply = self.bus.call(topology::RPC, topology::LEASE, message, ANSWER_TIMEOUT).await;
        let reply = reply.map_err(|e| NoAnswer(chain(&e)))?;
        match envelope::decode::<Answer>(&reply.body).map_err(|e| NoAnswer(chain(&e)))? {
            Answer::Unavailable { reason } => Err(NoAnswer(reason)),
            answer => Ok(answer),
        }
    }

    /// Asks until there is an answer. Whoever calls this decides for how long, by dropping it.
    pub(super) async fn insist(&self, request: &Request) -> Answer {
        let mut failures = 0;
        loop {
            match self.ask(request).await {
                Ok(answer) => return answer,
                Err(error) => tracing::warn!(%error, "a question is asked again"),
            }
            tokio::time::sleep(PAUSE.delay(failures, crate::time::jitter())).await;
            failures += 1;
        }
    }
}
