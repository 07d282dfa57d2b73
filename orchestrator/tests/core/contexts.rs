//! Which uploaded contexts are deleted, and which never.

use std::time::{Duration, SystemTime};

use kiln_orchestrator::contexts::GRACE;
use kiln_orchestrator::core::Settings;
use kiln_orchestrator::store::Retention;
use kiln_orchestrator::submit::{Submission, SubmitError};
use kiln_protocol::spec::ContextRef;
use kiln_protocol::{BuildId, BuildSpec, Digest, Reason};
use kiln_transport::Blobs;
use sha2::Digest as _;

use super::harness::{World, failed, settings, spec};

const TAG: &str = "r.example/app:1";
const MINUTE: Duration = Duration::from_mins(1);

struct Scene {
    world: World,
    contexts: Blobs,
    _folder: tempfile::TempDir,
}

impl Scene {
    async fn new(retention: Retention) -> Self {
        let world = World::with(Settings { retention, ..settings() }).await;
        let folder = tempfile::tempdir().unwrap();
        let contexts = Blobs::directory(folder.path()).await.unwrap();
        Self { world, contexts, _folder: folder }
    }

    /// A context that was last used at this time.
    async fn upload(&self, bytes: &[u8], used: SystemTime) -> Digest {
        let digest = Digest::from_sha256(sha2::Sha256::digest(bytes).into());
        let mut writer = self.contexts.put(digest.clone(), u64::MAX).await.unwrap();
        writer.write(bytes).await.unwrap();
        writer.finish().await.unwrap();
        self.contexts.touch(&digest, used).await.unwrap();
        digest
    }

    async fn submit(&self, context: &Digest) -> Result<BuildId, SubmitError> {
        let context = ContextRef { digest: context.clone(), size: 1 };
        let submission =
            Submission { spec: BuildSpec { context, ..spec(&[TAG]) }, key: None, retry_of: None };
        let submitted = self.world.orchestrator.submit_uploaded(submission, &self.contexts).await;
        submitted.map(|submitted| submitted.id)
    }

    async fn has(&self, digest: &Digest) -> bool {
        self.contexts.size(digest).await.unwrap().is_some()
    }

    async fn prune(&self, now: SystemTime) -> u64 {
        self.world.orchestrator.prune_contexts(&self.contexts, now).await.unwrap()
    }
}

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_hours(24 * 365 * 55)
}

#[tokio::test]
async fn a_context_goes_when_it_is_old_and_nobody_needs_it() {
    let scene = Scene::new(Retention { contexts: 3 * GRACE, ..Retention::default() }).await;
    let (idle, waiting, dead, over) = (
        scene.upload(b"idle", start()).await,
        scene.upload(b"waiting", start()).await,
        scene.upload(b"dead", start()).await,
        scene.upload(b"over", start()).await,
    );
    let agent = scene.world.agent("a");
    let letter = scene.submit(&dead).await.unwrap();
    let lease = agent.take(letter).await;
    agent.report(lease, 1, failed(Reason::HookFault)).await;
    scene.submit(&waiting).await.unwrap();
    let ended = scene.submit(&over).await.unwrap();
    scene.world.orchestrator.cancel(ended, Reason::Cancelled, "somebody").await.unwrap();

    assert_eq!(scene.prune(start() + 3 * GRACE - MINUTE).await, 0);
    assert_eq!(scene.prune(start() + 3 * GRACE + MINUTE).await, 2);
    let left =
        [scene.has(&idle).await, scene.has(&waiting).await, scene.has(&dead).await, scene.has(&over).await];
    assert_eq!(left, [false, true, true, false]);

    scene.world.orchestrator.discard(letter, "somebody").await.unwrap();
    assert_eq!(scene.prune(start() + 3 * GRACE + MINUTE).await, 1);
    assert!(matches!(scene.submit(&dead).await, Err(SubmitError::ContextMissing(digest)) if digest == dead));
    assert_eq!(scene.world.orchestrator.queue().await.unwrap().len(), 1, "what was refused is not recorded");
}

#[tokio::test]
async fn of_too_much_the_least_recently_used_goes_but_nothing_fresh() {
    let scene = Scene::new(Retention { context_bytes: 1500, ..Retention::default() }).await;
    let mut contexts = Vec::new();
    for i in 0..4 {
        contexts.push(scene.upload(&vec![i; 1000], start() + u32::from(i) * MINUTE).await);
    }
    scene.submit(&contexts[1]).await.unwrap();
    scene.contexts.touch(&contexts[0], start() + 2 * GRACE).await.unwrap();
    assert_eq!(scene.prune(start() + GRACE + 10 * MINUTE).await, 2);
    let mut left = Vec::new();
    for context in &contexts {
        left.push(scene.has(context).await);
    }
    assert_eq!(left, [true, true, false, false], "used lately, needed, and two that are neither");
}

/// A submission finds its context and is accepted, or it does not and is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_context_that_a_build_was_accepted_with_is_there() {
    let scene = Scene::new(Retention { contexts: GRACE, ..Retention::default() }).await;
    let (mut accepted, mut refused) = (0, 0);
    for i in 0..60_u32 {
        // The worst case: the client took longer than the grace.
        let context = scene.upload(&i.to_be_bytes(), start()).await;
        let late = start() + 2 * GRACE;
        let (submit, prune) = (scene.submit(&context), scene.prune(late));
        let submitted = match i % 3 {
            0 => tokio::join!(submit, prune).0,
            1 => tokio::join!(prune, submit).1,
            _ => {
                prune.await;
                submit.await
            }
        };
        match submitted {
            Ok(_) => {
                assert!(scene.has(&context).await, "round {i}");
                accepted += 1;
            }
            Err(SubmitError::ContextMissing(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(accepted + refused, 60);
    assert!(accepted > 0 && refused > 0, "{accepted} accepted, {refused} refused");
}
