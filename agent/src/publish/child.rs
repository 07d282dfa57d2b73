//! The publish process itself (shell).

use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::sync::Arc;

use rustix::process::{DumpableBehavior, Signal, getpid, kill_process, set_dumpable_behavior};

use super::order::{Answer, Message, ORDER_BYTES, Order, Task};
use crate::blobs::{BlobError, BlobStore};
use crate::registry::push::{Blob, Mount, Push, PushError, Sent};
use crate::registry::{Reference, Registry, RegistryConfig};

/// Bytes between two lines of progress.
const STEP: u64 = 1024 * 1024;

/// An order that this program did not write.
#[derive(Debug, thiserror::Error)]
enum BadOrder {
    #[error("cannot read the order")]
    Read(#[from] io::Error),
    // The parser's message would quote the order.
    #[error("the order is not understood")]
    Parse,
    #[error("the order names something that is no repository")]
    Reference,
    #[error("the order's registries contradict each other")]
    Registries,
    #[error(transparent)]
    Blobs(#[from] BlobError),
}

/// Reads an order, does it, answers. Returns the exit code.
pub(super) fn run() -> i32 {
    // Nobody of the same user reads this memory, and a crash writes no core of it. A kernel that refuses
    // only protects less.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    match serve() {
        Ok(()) => 0,
        Err(error) => {
            // Whoever reads this also sees that there is no answer.
            let _ = writeln!(io::stderr(), "kiln publish: {}", crate::error::chain(&error));
            1
        }
    }
}

fn serve() -> Result<(), BadOrder> {
    let mut stdin = BufReader::new(io::stdin());
    let order = read_order(&mut stdin)?;
    end_with_the_agent(stdin)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(obey(order))?;
    // A name lookup that hangs must not keep the process alive.
    runtime.shutdown_background();
    say(&Message::Answer(answer));
    Ok(())
}

fn read_order(stdin: &mut BufReader<io::Stdin>) -> Result<Order, BadOrder> {
    let mut line = Vec::new();
    stdin.take(ORDER_BYTES).read_until(b'\n', &mut line)?;
    serde_json::from_slice(&line).map_err(|_| BadOrder::Parse)
}

/// The agent keeps its end of the pipe open as long as it lives and wants an answer.
fn end_with_the_agent(mut stdin: BufReader<io::Stdin>) -> io::Result<()> {
    let watch = move || {
        let mut ignored = [0; 64];
        while stdin.read(&mut ignored).is_ok_and(|count| count > 0) {}
        // Not an exit: that would wait for whatever the other threads hold.
        let _ = kill_process(getpid(), Signal::KILL);
    };
    std::thread::Builder::new().name("lifeline".to_owned()).spawn(watch).map(drop)
}

async fn obey(order: Order) -> Result<Result<Answer, PushError>, BadOrder> {
    let Order { registries, proxy, ca, credentials, repository, budget, task } = order;
    let config = RegistryConfig::new(registries).map_err(|_| BadOrder::Registries)?;
    let ca = ca.into_iter().map(String::into_bytes).collect();
    let registry = Registry::new(config, credentials, proxy, ca);
    let repository = reference(&repository)?;
    let mounts = mounts(&task)?;
    match registry.push(&repository, &mounts, budget) {
        Ok(push) => perform(&push, task).await,
        Err(error) => Ok(Err(error)),
    }
}

fn reference(text: &str) -> Result<Reference, BadOrder> {
    text.parse().map_err(|_| BadOrder::Reference)
}

fn mounts(task: &Task) -> Result<Vec<Mount>, BadOrder> {
    let Task::Upload { mounts, .. } = task else { return Ok(Vec::new()) };
    let made = mounts.iter().map(|(repository, blobs)| {
        reference(repository).map(|repository| Mount { repository, blobs: blobs.clone() })
    });
    made.collect()
}

async fn perform(push: &Push, task: Task) -> Result<Result<Answer, PushError>, BadOrder> {
    Ok(match task {
        Task::Probe { tag } => push.probe(tag.as_deref()).await.map(Answer::Probed),
        Task::Upload { candidate, blobs, .. } => {
            let store = BlobStore::open(&blobs)?;
            push.upload_candidate(&candidate, &store, &progress()).await.map(Answer::Uploaded)
        }
        Task::Verify { candidate } => push.verify_candidate(&candidate).await.map(Answer::Verified),
        Task::Tag { tag, manifest, media_type } => {
            push.put_tag(&tag, manifest.as_bytes(), &media_type).await.map(Answer::Tagged)
        }
        Task::Head { tag } => push.head_tag(&tag).await.map(Answer::Head),
    })
}

fn progress() -> Sent {
    Arc::new(|blob: &Blob, sent: u64| {
        if sent == blob.size || sent.is_multiple_of(STEP) {
            say(&Message::Sent(blob.clone(), sent));
        }
    })
}

/// An agent that reads no more is dead, and the lifeline says so.
fn say(message: &Message) {
    if let Ok(mut line) = serde_json::to_vec(message) {
        line.push(b'\n');
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(&line).and_then(|()| stdout.flush());
    }
}
