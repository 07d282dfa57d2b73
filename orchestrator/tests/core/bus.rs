//! The same over a bus: questions, reports, hints, and what nobody could read.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kiln_orchestrator::run;
use kiln_protocol::envelope::{Message as _, decode, encode};
use kiln_protocol::id::{ClaimId, MessageId};
use kiln_protocol::message::{
    Answer, AttemptEnd, ClaimAnswer, CommitAnswer, CommitRequest, Hint, Lane, LeaseKey, Outcome, Report,
    Request, Snapshot,
};
use kiln_protocol::{State, topology};
use kiln_transport::memory::{Fault, MemoryBroker};
use kiln_transport::topology::Binding;
use kiln_transport::{Bus, Message, Published};
use tokio::task::JoinSet;

use super::harness::{FakeAgent, World, image_of};

const TAG: &str = "r.example/app:1";
/// Nothing here takes a tenth of this on an idle machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// An orchestrator on a bus.
struct Served {
    world: World,
    broker: MemoryBroker,
    loops: JoinSet<()>,
}

async fn serve() -> Served {
    let world = World::new().await;
    let broker = MemoryBroker::new(1).with_confirm_timeout(Duration::from_millis(200));
    let mut loops = JoinSet::new();
    let pools = ["default".parse().unwrap()];
    run::start(&world.orchestrator, &broker.connect("orchestrator"), &pools, &mut loops).await.unwrap();
    Served { world, broker, loops }
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, looking).await.unwrap_or_else(|_| panic!("in vain: {what}"))
}

async fn ask(bus: &Bus, request: &Request) -> Option<Answer> {
    let body = Bytes::from(encode(request).unwrap());
    let message = Message::new(MessageId::generate().as_uuid(), Request::TYPE, body);
    let reply = bus.call(topology::RPC, topology::LEASE, message, Duration::from_secs(2)).await.ok()?;
    Some(decode(&reply.body).unwrap())
}

async fn claim(bus: &Bus, agent: &FakeAgent, claim: ClaimId) -> Option<LeaseKey> {
    match ask(bus, &Request::Claim(agent.request(Lane::Build, claim))).await? {
        Answer::Claim(ClaimAnswer::Build(grant)) => Some(grant.lease),
        Answer::Claim(ClaimAnswer::Nothing) => None,
        other => panic!("{other:?}"),
    }
}

async fn say(bus: &Bus, agent: &FakeAgent, report: &Report) {
    let body = Bytes::from(encode(report).unwrap());
    let message = Message::new(MessageId::generate().as_uuid(), Report::TYPE, body);
    let published = bus.publish(topology::REPORTS, &topology::reports(&agent.id), message, true).await;
    assert_eq!(published.unwrap(), Published::Confirmed);
}

#[tokio::test]
async fn a_build_goes_its_whole_way_over_the_bus_with_lost_and_repeated_messages() {
    let served = serve().await;
    let agent = served.world.agent("a");
    let bus = served.broker.connect("a");
    agent.renew(&[]).await;
    let id = served.world.submit(&[TAG]).await;
    let mut hints =
        bus.consume(&topology::requests(&"default".parse().unwrap()), NonZeroU16::MIN).await.unwrap();
    let hint = tokio::time::timeout(DEADLINE, hints.next()).await.unwrap().unwrap();
    assert_eq!(decode::<Hint>(&hint.message.body).unwrap(), Hint { build: id });
    hint.ack().await.unwrap();

    // The answer to the claim is lost, the question comes twice, and the wish is the same.
    served.broker.faults().plan(kiln_transport::memory::Faults::REPLIES, Fault::Lose);
    let wish = ClaimId::generate();
    let lease = until("a lease", async || claim(&bus, &agent, wish).await).await;
    assert_eq!(lease.attempt.get(), 1);
    served.broker.faults().plan(topology::LEASE, Fault::Duplicate);
    let request = CommitRequest { lease, committed: image_of(1), verdicts: Vec::new() };
    let granted = ask(&bus, &Request::Commit(request)).await;
    assert!(matches!(granted, Some(Answer::Commit(CommitAnswer::Granted { .. }))));

    served.broker.faults().plan("report.*", Fault::Duplicate);
    let snapshot = Snapshot {
        outcomes: [(TAG.to_owned(), Outcome::Moved)].into(),
        end: Some(AttemptEnd::Answered),
        ..Snapshot::default()
    };
    say(&bus, &agent, &Report { lease, seq: 1, snapshot }).await;
    until("success", async || (served.world.state(id).await == State::Success).then_some(())).await;
}

#[tokio::test]
async fn a_report_that_nobody_can_read_is_kept_as_a_bad_message() {
    let served = serve().await;
    let bus = served.broker.connect("a");
    let message =
        Message::new(MessageId::generate().as_uuid(), Report::TYPE, Bytes::from_static(b"{\"v\":9}"));
    let published = bus.publish(topology::REPORTS, "report.a", message, true).await;
    assert_eq!(published.unwrap(), Published::Confirmed);
    let store = served.world.orchestrator.store();
    let bad =
        until("a bad message", async || store.read().await.unwrap().bad_messages(10).await.unwrap().pop())
            .await;
    assert!(bad.error.contains("version 9"), "{}", bad.error);
    assert_eq!(bad.body, b"{\"v\":9}");
}

#[tokio::test]
async fn whose_report_it_is_the_broker_says() {
    let served = serve().await;
    let agent = served.world.agent("a");
    let id = served.world.submit(&[TAG]).await;
    let lease = agent.take(id).await;
    let thief = served.broker.connect("b");
    let report =
        Report { lease, seq: 1, snapshot: super::harness::failed(kiln_protocol::Reason::BuildFailed) };
    // Under the key of the agent that it pretends to be.
    say(&thief, &agent, &report).await;
    let honest = Report { lease, seq: 2, snapshot: Snapshot::default() };
    say(&served.broker.connect("a"), &agent, &honest).await;
    until("the honest report", async || (served.world.show(id).await.last_seq == 2).then_some(())).await;
    assert_eq!(served.world.state(id).await, State::Building);
}

#[tokio::test]
async fn a_row_stays_until_the_bus_confirms() {
    let world = World::new().await;
    let broker = MemoryBroker::new(1).with_confirm_timeout(Duration::from_millis(50));
    let bus = broker.connect("orchestrator");
    let mut declared = kiln_orchestrator::topology::shared(&[]);
    // Somebody watches.
    declared.bindings.push(Binding {
        exchange: topology::EVENTS.to_owned(),
        queue: topology::DEAD_COMMANDS.to_owned(),
        key: "event.#".to_owned(),
    });
    bus.declare(&declared).await.unwrap();
    world.submit(&[TAG]).await;
    world.submit(&["r.example/app:2"]).await;
    let backlog = async || {
        let mut tx = world.orchestrator.store().read().await.unwrap();
        tx.outbox_backlog().await.unwrap().0
    };
    broker.faults().plan("event.#", Fault::LosePublish);
    assert_eq!(world.orchestrator.relay(&bus).await.unwrap(), 0, "one is lost, so the other is not tried");
    assert_eq!(backlog().await, 2);
    assert_eq!(world.orchestrator.relay(&bus).await.unwrap(), 0, "not before its pause is over");
    world.set_clock(3);
    assert_eq!(world.orchestrator.relay(&bus).await.unwrap(), 2);
    assert_eq!(backlog().await, 0);
}

#[tokio::test]
async fn while_the_broker_is_away_silence_means_nothing() {
    let mut world = World::new().await;
    let broker = MemoryBroker::new(1).with_confirm_timeout(Duration::from_millis(50));
    let bus = broker.connect("orchestrator");
    bus.declare(&kiln_orchestrator::topology::shared(&[])).await.unwrap();
    let id = world.submit(&[TAG]).await;
    let lease = world.agent("a").take(id).await;
    broker.faults().restart_broker(Duration::from_mins(10));
    for _ in 0..20 {
        world.pass(2);
        world.probe_and_sweep(&bus).await;
    }
    assert_eq!(world.show(id).await.lease_key(), Some(lease), "nobody could renew");
    let whole = MemoryBroker::new(2).connect("orchestrator");
    whole.declare(&kiln_orchestrator::topology::shared(&[])).await.unwrap();
    let mut looks = 0;
    while world.state(id).await == State::Building {
        world.pass(2);
        world.probe_and_sweep(&whole).await;
        looks += 1;
    }
    assert!(looks > 15, "a whole lease time after it came back: {looks}");
}

#[tokio::test]
async fn what_ends_loops_ends_them_between_changes() {
    let mut served = serve().await;
    let id = served.world.submit(&[TAG]).await;
    served.loops.abort_all();
    while served.loops.join_next().await.is_some() {}
    let other = served.world.second(super::harness::settings()).await;
    let mut loops = JoinSet::new();
    let pools = ["default".parse().unwrap()];
    run::start(&other, &served.broker.connect("second"), &pools, &mut loops).await.unwrap();
    let bus = served.broker.connect("a");
    let agent = FakeAgent { orchestrator: Arc::clone(&other), ..served.world.agent("a") };
    let lease = until("a lease", async || claim(&bus, &agent, ClaimId::generate()).await).await;
    assert_eq!(lease.build, id);
}
