//! Whatever the order, the record is the same.

use kiln_protocol::message::Snapshot;
use kiln_protocol::{BuildId, Reason};
use proptest::prelude::*;

use crate::harness::{World, digest, failed};

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

/// The row after these reports arrived, without what only counts the changes.
async fn row_after(snapshots: &[Snapshot], order: &[usize]) -> serde_json::Value {
    let world = World::new().await;
    let agent = world.agent("a");
    let id = world.submit(&["r.example/app:1"]).await;
    let lease = agent.take(id).await;
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
    ) {
        let snapshots = run(steps, end.map(|i| Reason::ALL[i]));
        let straight: Vec<usize> = (0..snapshots.len()).collect();
        let mut shuffled: Vec<usize> = order.iter().map(|i| i % snapshots.len()).collect();
        shuffled.push(snapshots.len() - 1);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (straight, shuffled) = runtime.block_on(async {
            (row_after(&snapshots, &straight).await, row_after(&snapshots, &shuffled).await)
        });
        prop_assert_eq!(straight, shuffled);
    }
}
