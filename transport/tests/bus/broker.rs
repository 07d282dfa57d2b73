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

use crate::scene::{ALPHA, BETA, Scene, World, within};
use crate::{conformance, dead_letters, rpc, subscriptions};

/// Cases of the conformance suite at once: most of them wait that nothing comes.
const AT_ONCE: usize = 6;

/// A broker over the network.
pub(crate) struct Remote(Arc<Rabbit>);

impl World for Remote {
    async fn connect(&self, identity: &str) -> Bus {
        connected(settings(&self.0.url(identity))).await
    }
}

/// Settings for a machine on which an outage is over soon.
fn settings(url: &str) -> AmqpSettings {
    let backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(500));
    AmqpSettings::new(url).unwrap().with_timing(Timing { backoff, ..Timing::default() })
}

async fn connected(settings: AmqpSettings) -> Bus {
    let bus = amqp::connect(settings).unwrap();
    within(bus.watch().connected()).await.unwrap();
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
async fn run(cases: Vec<Case>, at_once: usize) -> Vec<&'static str> {
    let outcomes = stream::iter(cases).map(|case| async move {
        let mut task = tokio::task::JoinSet::new();
        task.spawn(case.body);
        let passed = task.join_next().await.unwrap().is_ok();
        (!passed).then_some(case.name)
    });
    outcomes.buffer_unordered(at_once).filter_map(std::future::ready).collect().await
}

#[test]
fn a_real_broker() {
    let only = std::env::var("KILN_CASE").ok();
    let wanted = |case: &Case| only.as_ref().is_none_or(|only| case.name.contains(only));
    let rabbit = Arc::new(Rabbit::start(&[ALPHA, BETA]));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let world = || Remote(Arc::clone(&rabbit));
    let cases: Vec<Case> = all_cases!(cases, world(),);
    let failed = runtime.block_on(run(cases.into_iter().filter(wanted).collect(), AT_ONCE));
    assert!(failed.is_empty(), "failed: {failed:#?}");
}
