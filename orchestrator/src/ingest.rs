//! Reports and questions of agents, from the bus to the record (shell).

use std::num::NonZeroU16;

use bytes::Bytes;
use kiln_protocol::envelope::{self, Message as _};
use kiln_protocol::id::{AgentId, MessageId};
use kiln_protocol::message::{Answer, ClaimRequest, Report, Request, TagSeen};
use kiln_protocol::{State, topology};
use kiln_transport::crash::{self, CrashPoint};
use kiln_transport::{Bus, BusError, Delivery, Message};

use crate::core::{CoreError, Orchestrator, tries, undisturbed};
use crate::decide::{self, Taken};

/// Deliveries that one consumer holds: each is settled within one transaction.
const PREFETCH: NonZeroU16 = NonZeroU16::new(50).unwrap();

impl Orchestrator {
    /// Takes a report of an agent.
    pub async fn take_report(&self, from: &AgentId, report: &Report) -> Result<Taken, CoreError> {
        undisturbed(|| self.take_report_once(from, report)).await
    }

    async fn take_report_once(&self, from: &AgentId, report: &Report) -> Result<Taken, CoreError> {
        let mut tx = self.store.write().await?;
        let Some(found) = tx.load(report.lease.build).await? else { return Ok(Taken::Stale) };
        let (tries, now) = (tries(&found), tx.now());
        let taken = decide::report((&found.build, &found.spec), from, report, tries, now);
        if let Taken::Applied(after) = &taken {
            self.save(&mut tx, &found, (**after).clone()).await?;
            tx.commit().await?;
            crash::reach(recorded(after.state));
        }
        Ok(taken)
    }

    /// Answers a question of an agent. `from` overrules whoever the question says that it is from.
    pub async fn answer(&self, from: &AgentId, request: Request) -> Answer {
        match self.try_answer(from, request).await {
            Ok(answer) => answer,
            Err(error) => {
                let reason = crate::error::chain(&error);
                tracing::warn!(agent = %from, reason, "a question of an agent cannot be answered");
                Answer::Unavailable { reason }
            }
        }
    }

    async fn try_answer(&self, from: &AgentId, request: Request) -> Result<Answer, CoreError> {
        let agent = from.clone();
        Ok(match request {
            Request::Claim(claim) => Answer::Claim(self.claim(&ClaimRequest { agent, ..claim }).await?),
            Request::Renew(renew) => {
                let renew = kiln_protocol::message::RenewRequest { agent, ..renew };
                Answer::Renew(self.renew(&renew).await?)
            }
            Request::Commit(commit) => Answer::Commit(self.commit(from, &commit).await?),
            Request::Head(head) => Answer::Head(self.head(from, &head).await?),
            Request::Tag(seen) => Answer::Tag(self.tag_seen(&TagSeen { agent, ..seen }).await?),
        })
    }

    /// Takes reports until the subscription ends.
    pub async fn consume_reports(&self, bus: &Bus) -> Result<(), BusError> {
        let mut reports = bus.consume(topology::REPORT_QUEUE, PREFETCH).await?;
        while let Some(delivery) = reports.next().await {
            self.on_report(delivery).await?;
        }
        Ok(())
    }

    async fn on_report(&self, delivery: Delivery) -> Result<(), BusError> {
        let read = envelope::decode::<Report>(&delivery.message.body).map_err(|e| crate::error::chain(&e));
        let (from, report) = match (sender(&delivery), read) {
            (Ok(from), Ok(report)) => (from, report),
            (Err(why), _) | (_, Err(why)) => {
                tracing::warn!(why, "a report cannot be read");
                return delivery.reject().await;
            }
        };
        match self.take_report(&from, &report).await {
            Ok(_) => delivery.ack().await,
            // The agent keeps it until a renewal says that it was taken.
            Err(error) => {
                tracing::warn!(error = crate::error::chain(&error), "a report cannot be recorded now");
                // It comes back at once, and only so often.
                tokio::time::sleep(crate::run::AGAIN_AFTER).await;
                delivery.requeue().await
            }
        }
    }

    /// Answers questions until the subscription ends.
    pub async fn consume_questions(&self, bus: &Bus) -> Result<(), BusError> {
        let mut questions = bus.consume(topology::LEASE, PREFETCH).await?;
        while let Some(delivery) = questions.next().await {
            self.on_question(bus, delivery).await?;
        }
        Ok(())
    }

    async fn on_question(&self, bus: &Bus, delivery: Delivery) -> Result<(), BusError> {
        let read = envelope::decode::<Request>(&delivery.message.body).map_err(|e| crate::error::chain(&e));
        let answer = match (sender(&delivery), read) {
            (Ok(from), Ok(request)) => self.answer(&from, request).await,
            (Err(reason), _) | (_, Err(reason)) => {
                tracing::warn!(reason, "a question of an agent cannot be read");
                Answer::Unavailable { reason }
            }
        };
        match envelope::encode(&answer) {
            Ok(body) => {
                let reply = Message::new(MessageId::generate().as_uuid(), Answer::TYPE, Bytes::from(body));
                // Who does not wait any more asks again.
                if let Err(error) = bus.reply(&delivery, reply).await {
                    tracing::debug!(%error, "an answer was not taken by the bus");
                }
            }
            Err(error) => tracing::error!(%error, "an answer cannot be written"),
        }
        delivery.ack().await
    }

    /// Keeps messages that nobody could read, until the subscription ends. Hints are dropped: the scheduler
    /// tops them up.
    pub async fn consume_dead(&self, bus: &Bus, queue: &str) -> Result<(), BusError> {
        let mut dead = bus.consume(queue, PREFETCH).await?;
        while let Some(delivery) = dead.next().await {
            let kept = queue == topology::DEAD_COMMANDS || self.keep_bad(queue, &delivery).await;
            if kept {
                delivery.ack().await?;
            } else {
                tokio::time::sleep(crate::run::AGAIN_AFTER).await;
                delivery.requeue().await?;
            }
        }
        Ok(())
    }

    async fn keep_bad(&self, queue: &str, delivery: &Delivery) -> bool {
        let error = envelope::decode::<Report>(&delivery.message.body).err();
        let why = error.map_or_else(|| "it was delivered too often".to_owned(), |e| crate::error::chain(&e));
        let keep = async {
            let mut tx = self.store.write().await?;
            tx.keep_bad(queue, &why, &delivery.message.body).await?;
            tx.commit().await
        };
        match keep.await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "a bad message cannot be kept now");
                false
            }
        }
    }
}

/// What a report did.
const fn recorded(state: State) -> CrashPoint {
    match state {
        State::Pending => CrashPoint::RetryRecorded,
        State::Building | State::Pushing => CrashPoint::ReportRecorded,
        State::Success | State::Failed | State::Cancelled => CrashPoint::EndRecorded,
        State::DeadLetter => CrashPoint::DeadLetterRecorded,
    }
}

/// Who published it, as the broker says.
fn sender(delivery: &Delivery) -> Result<AgentId, String> {
    let user = delivery.user_id.as_deref().ok_or("the broker does not say who sent it")?;
    user.parse().map_err(|e: kiln_protocol::id::InvalidName| e.to_string())
}
