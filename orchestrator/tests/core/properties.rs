//! Whatever the order, the record is the same.

use kiln_protocol::message::{AttemptEnd, Outcome, Snapshot};
use kiln_protocol::{BuildId, Reason};
use proptest::prelude::*;

use super::harness::{World, digest, failed};

const TAGS: [&str; 2] = ["r.example/app:1", "r.example/app:2"];

/// Reports of one attempt, in the order in which its agent wrote them.
fn run(steps: u64, end: Option<Reason>) -> Vec<Snapshot> {
    let mut snapshots: Vec<Snapshot> = (0..steps)
        .map(|i| Snapshot {
            candidate: (i * 2 > steps).then(|| digest(1)),
            phase: Some(kiln_protocol::result::Phase::Build),
            ..Snapshot::default()
        })
        .collect();
    snapshots.extend(end.map(failed));
    snapshots
}

/// The same for the time after the commit: one answer after the other.
fn publish(answers: u64, end: Option<Reason>) -> Vec<Snapshot> {
    let mut snapshot = Snapshot { candidate: Some(digest(1)), ..Snapshot::default() };
    let mut snapshots = vec![snapshot.clone()];
    for (tag, outcome) in TAGS.iter().zip([Outcome::Moved, Outcome::Failed("immutable".to_owned())]) {
        if snapshots.len() as u64 <= answers {
            snapshot.outcomes.insert((*tag).to_owned(), outcome);
            snapshots.push(snapshot.clone());
        }
    }
    let end = end.map_or(AttemptEnd::Answered, |reason| failed(reason).end.unwrap());
    snapshots.push(Snapshot { end: Some(end), ..snapshot });
    snapshots
}

/// The row after these reports arrived, without what only counts the changes.
async fn row_after(snapshots: &[Snapshot], order: &[usize], committed: bool) -> serde_json::Value {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&TAGS).await;
    let lease = agent.take(id).await;
    if committed {
        agent.commit(lease, 1).await;
    }
    for i in order {
        agent.report(lease, *i as u64 + 1, snapshots[*i].clone()).await;
    }
    row(&world, id).await
}

async fn row(world: &World, id: BuildId) -> serde_json::Value {
    let mut row = serde_json::to_value(world.show(id).await).unwrap();
    for ours in ["version", "lease", "finished"] {
        row.as_object_mut().unwrap().remove(ours);
    }
    row
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_order_and_multiplicity_of_reports_gives_the_same_row(
        steps in 1u64..6,
        end in proptest::option::of(0..Reason::ALL.len()),
        order in proptest::collection::vec(0usize..16, 0..12),
        place in 0usize..12,
        committed in any::<bool>(),
    ) {
        let end = end.map(|i| Reason::ALL[i]);
        let snapshots = if committed { publish(steps, end) } else { run(steps, end) };
        let straight: Vec<usize> = (0..snapshots.len()).collect();
        let mut shuffled: Vec<usize> = order.iter().map(|i| i % snapshots.len()).collect();
        // The agent repeats its last report until it is taken.
        shuffled.insert(place % (shuffled.len() + 1), snapshots.len() - 1);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (straight, shuffled) = runtime.block_on(async {
            (
                row_after(&snapshots, &straight, committed).await,
                row_after(&snapshots, &shuffled, committed).await,
            )
        });
        prop_assert_eq!(straight, shuffled);
    }
}
