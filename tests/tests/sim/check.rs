//! What must hold after every course of events.

use std::collections::BTreeMap;

use kiln_orchestrator::store::{Recorded, StoredEvent};
use kiln_protocol::message::Outcome;
use kiln_protocol::{BuildId, State};

use crate::cluster::{Cluster, Ran, tags};
use crate::outside::Put;

/// Reads everything and judges it.
pub(crate) async fn check(cluster: &Cluster, ended: bool) -> Ran {
    let mut broken = cluster.outside.broken();
    let (mut events, mut rows) = (Vec::new(), BTreeMap::new());
    for &build in &cluster.builds {
        let found = cluster.orchestrator.show(build).await.unwrap();
        if !ended && !found.build.state.is_over() {
            broken.push(format!("I3: {build} does not end: {:?}", found.build));
        }
        let stream = cluster.orchestrator.events(build, 0).await.unwrap();
        history(&stream, &mut broken);
        events.extend(stream);
        rows.insert(build, found);
    }
    if rows.len() != cluster.builds.len() {
        broken.push(format!("a repeated submission made {} builds of {}", rows.len(), cluster.builds.len()));
    }
    let puts = cluster.outside.puts();
    published(cluster, &rows, &puts, &mut broken);
    if ended {
        heads(cluster, &rows, &mut broken).await;
    }
    events.sort_by_key(|event| event.id);
    let trace = trace(&events, &puts);
    Ran { trace, broken, happened: happened(cluster, &rows) }
}

/// I1, I4 and I5, from everything that was ever said of a build.
fn history(stream: &[StoredEvent], broken: &mut Vec<String>) {
    for pair in stream.windows(2) {
        let [before, after] = [&pair[0].event, &pair[1].event];
        let build = after.build;
        if before.state.is_final() && before.state != after.state {
            broken.push(format!("I5: {build} was {} and became {}", before.state, after.state));
        }
        if after.attempt < before.attempt {
            broken.push(format!("I4: {build} went from attempt {} to {}", before.attempt, after.attempt));
        }
        if before.digest.is_some() && before.digest != after.digest {
            broken.push(format!("I1: {build} was {:?} and became {:?}", before.digest, after.digest));
        }
    }
}

/// I1, I6 and I17, from everything that ever reached the registry.
fn published(cluster: &Cluster, rows: &BTreeMap<BuildId, Recorded>, puts: &[Put], broken: &mut Vec<String>) {
    for put in puts {
        let Some(found) = cluster.outside.build_of(&put.digest).and_then(|build| rows.get(&build)) else {
            broken.push(format!("I17: {} shows an image that nobody built", put.tag));
            continue;
        };
        let build = found.build.id;
        if cluster.cancelled.contains(&build) {
            broken.push(format!("I6: {build} was cancelled and moved {}", put.tag));
        }
        let committed = found.build.commit.as_ref().map(|commit| &commit.image.digest);
        if committed != Some(&put.digest) {
            broken
                .push(format!("I1: {} shows {} of {build}, committed is {committed:?}", put.tag, put.digest));
        }
    }
    for build in &cluster.cancelled {
        let state = rows.get(build).map(|found| found.build.state);
        if state != Some(State::Cancelled) {
            broken.push(format!("I6: {build} was cancelled and is {state:?}"));
        }
    }
}

/// I2.
async fn heads(cluster: &Cluster, rows: &BTreeMap<BuildId, Recorded>, broken: &mut Vec<String>) {
    let mut tx = cluster.orchestrator.store().read().await.unwrap();
    for tag in tags() {
        let Some(head) = tx.head(&tag.parse().unwrap()).await.unwrap() else { continue };
        let newest = rows.values().filter(|found| found.build.commit.is_some());
        let newest = newest.filter(|found| found.spec.targets().any(|target| target.to_string() == tag));
        let newest = newest.map(|found| found.build.submit_seq).max();
        if newest != Some(head.submit_seq) {
            broken.push(format!("I2: the head of {tag} is {head:?}, the newest is {newest:?}"));
        }
        let Some(commit) = rows.get(&head.build).and_then(|found| found.build.commit.as_ref()) else {
            broken.push(format!("I2: the head of {tag} is not committed: {head:?}"));
            continue;
        };
        let shown = cluster.outside.shows(tag);
        let failed = matches!(commit.outcomes.get(tag), Some(Outcome::Failed(_)));
        if !failed && shown.as_ref() != Some(&commit.image.digest) {
            let whose = shown.as_ref().and_then(|digest| cluster.outside.build_of(digest));
            broken.push(format!("I2: {tag} shows {whose:?}, its head is {}", head.build));
        }
    }
}

fn trace(events: &[StoredEvent], puts: &[Put]) -> Vec<String> {
    let events = events.iter().map(|event| format!("{} {:?}", event.id, event.event));
    events.chain(puts.iter().map(|put| format!("{:?} PUT {} {}", put.at, put.tag, put.digest))).collect()
}

fn happened(cluster: &Cluster, rows: &BTreeMap<BuildId, Recorded>) -> BTreeMap<&'static str, u64> {
    let mut happened = cluster.outside.counts();
    happened.extend(cluster.record.counts());
    happened.extend(cluster.broker.faults().counts());
    for found in rows.values() {
        let what = match found.build.state {
            State::Success => "succeeded",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
            State::DeadLetter => "dead",
            _ => "open",
        };
        *happened.entry(what).or_default() += 1;
    }
    happened
}
