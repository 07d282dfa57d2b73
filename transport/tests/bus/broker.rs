//! A real RabbitMQ: the conformance suite, and what a network and a server do wrong.
//!
//! It boots for many seconds, so all of it is one test of the runner with one server. A failure names its case.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use kiln_tests::rabbit::Rabbit;
use kiln_transport::amqp::{self, Timing};
use kiln_transport::{AmqpSettings, Backoff, Bus};

use crate::scene::{ALPHA, BETA, Scene, World};
use crate::{conformance, dead_letters, outages, rpc, subscriptions};

/// Cases of the conformance suite at once: most of them wait that nothing comes.
const AT_ONCE: usize = 6;

/// A broker over the network.
pub(crate) struct Remote(String);

impl World for Remote {
    async fn connect(&self, identity: &str) -> Bus {
        connected(settings(&self.0.replace(ALPHA, identity))).await
    }
}

/// An honest connection is there long before.
const PATIENCE: Duration = Duration::from_secs(20);

/// For a machine on which an outage is over soon.
pub(crate) const TIMING: Timing = Timing {
    connect: Duration::from_secs(15),
    operation: Duration::from_secs(10),
    confirm: Duration::from_secs(10),
    heartbeat: Duration::from_secs(20),
    watchdog: Duration::from_mins(1),
    backoff: Backoff::new(Duration::from_millis(50), Duration::from_millis(500)),
};

pub(crate) fn settings(url: &str) -> AmqpSettings {
    AmqpSettings::new(url).unwrap().with_timing(TIMING)
}

pub(crate) async fn connected(settings: AmqpSettings) -> Bus {
    let bus = amqp::connect(settings).unwrap();
    let up = tokio::time::timeout(PATIENCE, async { bus.watch().connected().await.unwrap() }).await;
    assert!(up.is_ok(), "no connection: {:?}", bus.trouble());
    bus
}

/// One case with its name.
pub(crate) struct Case {
    name: &'static str,
    body: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Case {
    pub(crate) fn new(name: &'static str, body: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { name, body: Box::pin(body) }
    }
}

/// Runs cases, some at once; the names of those that failed.
#[expect(clippy::print_stdout, reason = "the runner shows one test, and what fails or is slow is a case")]
async fn run(cases: Vec<Case>, at_once: usize) -> Vec<&'static str> {
    let outcomes = stream::iter(cases).map(|case| async move {
        let mut task = tokio::task::JoinSet::new();
        task.spawn(case.body);
        let start = std::time::Instant::now();
        let passed = task.join_next().await.unwrap().is_ok();
        println!("{} {:?} {}", if passed { "passed" } else { "FAILED" }, start.elapsed(), case.name);
        (!passed).then_some(case.name)
    });
    outcomes.buffer_unordered(at_once).filter_map(std::future::ready).collect().await
}

macro_rules! outages {
    ($rabbit:expr, [$($case:ident),* $(,)?]) => {
        vec![$(Case::new(stringify!($case), outages::$case(Arc::clone($rabbit)))),*]
    };
}

#[test]
fn a_real_broker() {
    let only = std::env::var("KILN_CASE").ok();
    let wanted = |case: &Case| only.as_ref().is_none_or(|only| case.name.contains(only));
    let rabbit = Rabbit::start(&[ALPHA, BETA]);
    let address = rabbit.url(ALPHA);
    let world = || Remote(address.clone());
    let suite: Vec<Case> = all_cases!(cases, world(),);
    let rabbit = Arc::new(tokio::sync::Mutex::new(rabbit));
    let faults = outages!(
        &rabbit,
        [
            a_full_quorum_queue_rejects,
            a_bad_call_does_not_stop_the_others,
            tls_is_checked_against_the_authority,
            a_wrong_password_is_told_and_never_shown,
            a_consumer_that_is_starved_is_given_up,
            a_black_hole_is_noticed_by_its_silence,
            connections_that_an_operator_closes_come_back,
            an_alarm_fails_publishes_in_time_and_ends,
            nothing_confirmed_is_lost_when_the_server_is_killed,
        ]
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let failed = runtime.block_on(async {
        let mut failed = run(suite.into_iter().filter(wanted).collect(), AT_ONCE).await;
        failed.extend(run(faults.into_iter().filter(wanted).collect(), 1).await);
        failed
    });
    assert!(failed.is_empty(), "failed: {failed:#?}");
}
