//! The dispatcher: takes work from the orchestrator, runs it, and says what became of it (shell).
//!
//! One loop waits for whatever comes first and names it as an event; [`core`] says what follows from it.

mod authority;
mod core;
mod hands;
mod publish;
mod spool;
mod supplies;
mod work;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::BuildId;
use kiln_protocol::envelope;
use kiln_protocol::id::{AgentId, BootId, ClaimId, Pool};
use kiln_protocol::message::{
    Answer, AttemptEnd, BuildGrant, Cancel, ClaimAnswer, ClaimRequest, Lane, LeaseKey, PublishGrant,
    RenewRequest, Request, TagCheck,
};
use kiln_protocol::result::{Failure, Phase};
use kiln_protocol::topology;
use kiln_transport::crash::{self, CrashPoint};
use kiln_transport::topology::{Binding, Bound, Overflow, Queue, QueueKind};
use kiln_transport::{Backoff, Bus, BusError, Delivery, Topology};
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};

use self::authority::Authority;
use self::core::{Core, Event, Reaction};
use self::publish::{Pusher, Tags};
use self::spool::Spool;
use self::work::Work;
use crate::agent::Agent;
use crate::hooks::HookHost;
use crate::stop::{self, Stopper};

pub use self::core::Wish;
pub use self::hands::{Hands, Machine, Remote};
pub use self::supplies::{Ended, Supplies};

/// Pause between two renewals: six fit into the time of a lease.
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// A free slot asks for work this often, also without a hint.
const ASK_EVERY: Duration = Duration::from_secs(30);
/// The publish lane has no hints.
const PUBLISH_EVERY: Duration = Duration::from_secs(5);
/// Pause before a broken subscription is begun anew.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// An agent that ends waits this long for its last reports to be confirmed.
const LAST_CONFIRM: Duration = Duration::from_secs(10);
/// Pauses between two questions whether a report was taken. It mostly was after the first.
const CONFIRM_PAUSE: Backoff = Backoff::new(Duration::from_millis(4), Duration::from_millis(500));
/// Cancels that wait for this agent; the next renewal says the same.
const CONTROL_BOUND: Bound = Bound { messages: 1000, bytes: 1024 * 1024 };
/// A cancel that nobody took for this long is known from renewals.
const CONTROL_TTL: Duration = Duration::from_mins(10);

/// Who an agent is, and what it does.
#[derive(Debug, Clone)]
pub struct Station {
    /// Its name, over all its runs. The broker knows it by the same.
    pub id: AgentId,
    /// This run.
    pub boot: BootId,
    /// Whose builds it takes.
    pub pools: BTreeSet<Pool>,
    /// Builds at once.
    pub slots: u32,
}

/// The parts that all work of an agent shares.
#[derive(Debug)]
struct Context {
    id: AgentId,
    station: Station,
    agent: Arc<Agent>,
    supplies: Arc<dyn Supplies>,
    hands: Arc<dyn Hands>,
    hooks: Option<Arc<HookHost>>,
    authority: Authority,
    bus: Bus,
    spool: Arc<Spool>,
    wish: watch::Receiver<Wish>,
}

/// Runs builds until the wish is to stop and nothing is left to do.
pub async fn run(
    station: Station,
    (agent, hooks): (Arc<Agent>, Option<Arc<HookHost>>),
    (supplies, hands): (Arc<dyn Supplies>, Arc<dyn Hands>),
    bus: Bus,
    wish: watch::Receiver<Wish>,
) -> std::io::Result<()> {
    let spool = Spool::open(&agent.state.path(&format!("reports/{}", station.id)), station.boot)?;
    let slots = station.slots;
    agent.metrics.offers(slots);
    agent.metrics.may_ask(hooks.iter().flat_map(|host| host.policies()).map(|(policy, _)| policy));
    let ctx = Arc::new(Context {
        id: station.id.clone(),
        authority: Authority::new(bus.clone()),
        station,
        agent,
        supplies,
        hands,
        hooks,
        bus,
        spool,
        wish,
    });
    let (commands, received) = mpsc::channel(16);
    let mut background = JoinSet::new();
    background.spawn(send_reports(Arc::clone(&ctx)));
    background.spawn(listen(Arc::clone(&ctx), commands));
    // A new run that makes itself known ends the leases of the one before.
    if tokio::time::timeout(LAST_CONFIRM, confirm_earlier(&ctx)).await.is_err() {
        ctx.spool.forget_earlier();
    }
    crash::reach(CrashPoint::EarlierConfirmed);
    let dispatcher = Dispatcher {
        core: Core::new(usize::try_from(slots).unwrap_or(usize::MAX)),
        tasks: JoinSet::new(),
        owners: HashMap::new(),
        stoppers: BTreeMap::new(),
        ctx: Arc::clone(&ctx),
    };
    dispatcher.work(received).await;
    if tokio::time::timeout(LAST_CONFIRM, confirm(&ctx, ctx.station.boot)).await.is_err() {
        tracing::warn!("the last reports were not confirmed; their builds count as lost");
    }
    background.shutdown().await;
    Ok(())
}

struct Dispatcher {
    ctx: Arc<Context>,
    core: Core,
    tasks: JoinSet<Vec<Event>>,
    /// Whose task it is, should it panic.
    owners: HashMap<Id, (BuildId, Lane)>,
    stoppers: BTreeMap<BuildId, Stopper>,
}

impl Dispatcher {
    async fn work(mut self, mut commands: mpsc::Receiver<Cancel>) {
        let mut wish = self.ctx.wish.clone();
        let mut renew = tokio::time::interval(RENEW_EVERY);
        renew.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut renewing = JoinSet::new();
        for reaction in self.core.start() {
            self.react(reaction);
        }
        while !self.core.is_done() {
            let events = tokio::select! {
                biased;
                Ok(()) = wish.changed() => vec![Event::Wish(*wish.borrow_and_update())],
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
                Some(events) = renewing.join_next() => events.unwrap_or_default(),
                Some(cancel) = commands.recv() => vec![Event::Cancel(cancel)],
                _ = renew.tick(), if renewing.is_empty() => {
                    let (leases, free) = (self.core.leases().collect(), self.core.free());
                    renewing.spawn(renew_all(Arc::clone(&self.ctx), leases, free));
                    Vec::new()
                }
            };
            for event in events {
                for reaction in self.core.handle(event) {
                    self.react(reaction);
                }
            }
        }
    }

    fn ended(&mut self, ended: Result<(Id, Vec<Event>), JoinError>) -> Vec<Event> {
        let (id, events) = match ended {
            Ok((id, events)) => (id, events),
            Err(error) => {
                tracing::error!(%error, "a task of the dispatcher broke; its lease runs out");
                let owner = self.owners.get(&error.id());
                (error.id(), owner.map(|(build, lane)| Event::Ended(*build, *lane)).into_iter().collect())
            }
        };
        if let Some((build, _)) = self.owners.remove(&id) {
            self.stoppers.remove(&build);
        }
        events
    }

    fn react(&mut self, reaction: Reaction) {
        let ctx = Arc::clone(&self.ctx);
        match reaction {
            Reaction::Seek(lane, claim) => drop(self.tasks.spawn(seek(ctx, lane, claim))),
            Reaction::Build(grant) => {
                let (stopper, stop) = stop::channel();
                let build = grant.lease.build;
                let work = Work::new(ctx, *grant, stop);
                let task = async move {
                    Box::pin(work.run()).await;
                    vec![Event::Ended(build, Lane::Build)]
                };
                self.own(build, Lane::Build, stopper, task);
            }
            Reaction::Publish(grant) => {
                let (stopper, stop) = stop::channel();
                let build = grant.lease.build;
                let task = async move {
                    publish_only(&ctx, &grant, stop).await;
                    vec![Event::Ended(build, Lane::Publish)]
                };
                self.own(build, Lane::Publish, stopper, task);
            }
            Reaction::Check(check) => drop(self.tasks.spawn(async move {
                check_tag(&ctx, &check).await;
                Vec::new()
            })),
            Reaction::HandBack(grant) => hand_back(&ctx, &grant),
            Reaction::Stop(build, reason) => {
                if let Some(stopper) = self.stoppers.get(&build) {
                    stopper.request(reason);
                }
            }
        }
    }

    fn own(
        &mut self,
        build: BuildId,
        lane: Lane,
        stopper: Stopper,
        task: impl Future<Output = Vec<Event>> + Send + 'static,
    ) {
        let handle = self.tasks.spawn(task);
        self.owners.insert(handle.id(), (build, lane));
        self.stoppers.insert(build, stopper);
    }
}

/// Asks for one piece of work, when there is a hint that there is some.
async fn seek(ctx: Arc<Context>, lane: Lane, claim: ClaimId) -> Vec<Event> {
    let mut wish = ctx.wish.clone();
    let hint = tokio::select! {
        biased;
        hint = hint(&ctx, lane) => hint,
        _ = wish.wait_for(|wish| *wish != Wish::Work) => return vec![Event::Answered(lane, ClaimAnswer::Nothing)],
    };
    let request = Request::Claim(ClaimRequest {
        agent: ctx.id.clone(),
        boot: ctx.station.boot,
        claim,
        lane,
        pools: ctx.station.pools.clone(),
        policies: ctx.hooks.as_ref().map(|host| host.keys()).unwrap_or_default(),
        slots: ctx.station.slots,
    });
    // With the same id until there is an answer: one that was lost may have been a lease.
    let answer = tokio::select! {
        biased;
        answer = ctx.authority.insist(&request) => answer,
        _ = wish.wait_for(|wish| *wish == Wish::Stop) => Answer::Claim(ClaimAnswer::Nothing),
    };
    if let Some(hint) = hint {
        // The record knows the build; a hint that comes again finds nothing.
        let _ = hint.ack().await;
    }
    let answer = match answer {
        Answer::Claim(answer) => answer,
        _ => ClaimAnswer::Nothing,
    };
    if lane == Lane::Publish && answer == ClaimAnswer::Nothing {
        tokio::select! {
            biased;
            () = tokio::time::sleep(PUBLISH_EVERY) => {}
            _ = wish.wait_for(|wish| *wish != Wish::Work) => {}
        }
    }
    vec![Event::Answered(lane, answer)]
}

/// Waits for a hint, but not for ever: hints may be lost.
async fn hint(ctx: &Context, lane: Lane) -> Option<Delivery> {
    if lane == Lane::Publish {
        return None;
    }
    let mut waiting = JoinSet::new();
    for pool in &ctx.station.pools {
        waiting.spawn(first_of(ctx.bus.clone(), topology::requests(pool)));
    }
    let first = async {
        loop {
            match waiting.join_next().await {
                Some(Ok(Some(delivery))) => return Some(delivery),
                Some(_) => {}
                None => tokio::time::sleep(ASK_EVERY).await,
            }
        }
    };
    tokio::time::timeout(ASK_EVERY, first).await.ok().flatten()
}

/// The first delivery of a queue; the subscription ends with it.
async fn first_of(bus: Bus, queue: String) -> Option<Delivery> {
    loop {
        match next_of(&bus, &queue).await {
            Ok(Some(delivery)) => return Some(delivery),
            Ok(None) | Err(_) => tokio::time::sleep(AGAIN_AFTER).await,
        }
    }
}

async fn next_of(bus: &Bus, queue: &str) -> Result<Option<Delivery>, BusError> {
    let mut consumer = bus.consume(queue, NonZeroU16::MIN).await?;
    let delivery = consumer.next().await;
    consumer.cancel().await?;
    Ok(delivery)
}

async fn send_reports(ctx: Arc<Context>) {
    ctx.spool.send_all(&ctx.bus, &ctx.id).await;
}

/// Hears cancels on a queue of its own.
async fn listen(ctx: Arc<Context>, commands: mpsc::Sender<Cancel>) {
    while !commands.is_closed() {
        if let Err(error) = listen_once(&ctx, &commands).await {
            tracing::debug!(%error, "the subscription to commands is begun anew");
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

async fn listen_once(ctx: &Context, commands: &mpsc::Sender<Cancel>) -> Result<(), BusError> {
    let name = topology::control_queue(&ctx.id, &BootId::generate());
    ctx.bus.declare(&control(&ctx.id, &name)).await?;
    let mut consumer = ctx.bus.consume(&name, NonZeroU16::MIN).await?;
    while let Some(delivery) = consumer.next().await {
        if let Ok(cancel) = envelope::decode::<Cancel>(&delivery.message.body) {
            // The dispatcher is gone: then nothing runs that could be cancelled.
            let _ = commands.send(cancel).await;
        }
        delivery.ack().await?;
    }
    Ok(())
}

fn control(agent: &AgentId, name: &str) -> Topology {
    let queue = Queue {
        name: name.to_owned(),
        kind: QueueKind::Exclusive,
        bound: CONTROL_BOUND,
        overflow: Overflow::DropHead,
        message_ttl: Some(CONTROL_TTL),
        dead_letter: None,
    };
    let (exchange, key) = (topology::COMMANDS.to_owned(), topology::cancels(agent));
    let binding = Binding { exchange, queue: name.to_owned(), key };
    Topology { queues: vec![queue], bindings: vec![binding], ..Topology::default() }
}

/// Prolongs every lease of this run, and hears what became of its reports.
async fn renew_all(ctx: Arc<Context>, mut leases: Vec<LeaseKey>, free: usize) -> Vec<Event> {
    leases.extend(ctx.spool.unconfirmed(ctx.station.boot));
    leases.sort_by_key(|key| (key.build, key.attempt));
    leases.dedup();
    renew(&ctx, ctx.station.boot, leases, free).await
}

async fn renew(ctx: &Context, boot: BootId, leases: Vec<LeaseKey>, free: usize) -> Vec<Event> {
    let request = Request::Renew(RenewRequest {
        agent: ctx.id.clone(),
        boot,
        pools: ctx.station.pools.clone(),
        policies: ctx.hooks.as_ref().map(|host| host.keys()).unwrap_or_default(),
        slots: ctx.station.slots,
        free: u32::try_from(free).unwrap_or(u32::MAX),
        leases: leases.clone(),
    });
    let answer = match ctx.authority.ask(&request).await {
        Ok(Answer::Renew(answer)) => answer,
        Ok(_) => return Vec::new(),
        Err(error) => {
            tracing::warn!(%error, "leases cannot be renewed now");
            return Vec::new();
        }
    };
    let mut events = Vec::new();
    for (key, renewed) in leases.into_iter().zip(answer.leases) {
        ctx.spool.settle(&key, &renewed);
        events.push(Event::Standing(key, renewed.standing));
    }
    events
}

/// Waits until everything that a run had to report is confirmed.
async fn confirm(ctx: &Context, boot: BootId) {
    let mut failures = 0;
    loop {
        let waiting = ctx.spool.unconfirmed(boot);
        if waiting.is_empty() {
            return;
        }
        renew(ctx, boot, waiting, 0).await;
        tokio::time::sleep(CONFIRM_PAUSE.delay(failures, crate::time::jitter())).await;
        failures += 1;
    }
}

async fn confirm_earlier(ctx: &Context) {
    for boot in ctx.spool.earlier() {
        confirm(ctx, boot).await;
    }
}

/// A build that was given to an agent that is leaving.
fn hand_back(ctx: &Context, grant: &BuildGrant) {
    let reporter = ctx.spool.reporter(grant.lease);
    let drain =
        Failure::new(kiln_protocol::Reason::AgentDrain, Phase::Start, "the agent shuts down".to_owned());
    reporter.durable(|snapshot| snapshot.end = Some(AttemptEnd::Failed(Box::new(drain))));
}

/// Moves the tags of a build whose first holder is lost.
async fn publish_only(ctx: &Context, grant: &PublishGrant, stop: stop::StopSignal) {
    let reporter = ctx.spool.reporter(grant.lease);
    let credentials = ctx
        .supplies
        .push_credentials(grant.lease.build, &grant.credentials, publish::names(&grant.open))
        .await;
    match credentials.and_then(|credentials| Pusher::new(ctx, credentials)) {
        Ok(pusher) => {
            let tags = Tags { lease: grant.lease, committed: &grant.committed, open: &grant.open };
            pusher.move_tags(ctx, tags, &reporter, &stop).await;
        }
        Err(failure) => {
            tracing::warn!(build = %grant.lease.build, failure.message, "tags cannot be moved now");
        }
    }
    for file in &grant.lost {
        let gone =
            kiln_protocol::message::Outcome::Failed("the client that waited for it is gone".to_owned());
        reporter.durable(|snapshot| drop(snapshot.outcomes.insert(file.clone(), gone)));
    }
    reporter.durable(|snapshot| snapshot.end = Some(AttemptEnd::Answered));
}

async fn check_tag(ctx: &Context, check: &TagCheck) {
    let credentials =
        ctx.supplies.push_credentials(check.build, &check.credentials, vec![check.target.name()]).await;
    let checked = match credentials.and_then(|credentials| Pusher::new(ctx, credentials)) {
        Ok(pusher) => pusher.check(ctx, check).await,
        Err(failure) => Err(failure.message),
    };
    if let Err(error) = checked {
        tracing::warn!(target = %check.target, error, "a tag cannot be looked at now");
    }
}
