//! What the waiting client gives its build, and what it gets from it (edge).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Seek as _;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use kiln_agent::agent::Agent;
use kiln_agent::dispatch::{Ended, Supplies};
use kiln_agent::error::chain;
use kiln_agent::executor::{BuildInputs, Event, Finished, Secret};
use kiln_agent::output::{self, OutputError, OutputSpec};
use kiln_agent::registry::Credentials;
use kiln_agent::seal::Sealed;
use kiln_agent::stop::StopSignal;
use kiln_agent::unpack::{self, Limits};
use kiln_protocol::message::{BuildGrant, Outcome};
use kiln_protocol::result::{BuildResult, Failure, Phase, PhaseDuration, SealedImage};
use kiln_protocol::spec::SecretSource;
use kiln_protocol::{BuildId, Reason};
use tokio::sync::mpsc;

use crate::app::Exit;
use crate::credentials;

/// What is known of the last attempt.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) image: Option<SealedImage>,
    pub(super) result: Option<BuildResult>,
    pub(super) failure: Option<Failure>,
    pub(super) last_lines: Vec<String>,
    pub(super) phases: Vec<PhaseDuration>,
}

/// The client that waits for one build.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) agent: Arc<Agent>,
    pub(super) parts: ClientParts,
    pub(super) stop: StopSignal,
    /// The build, once it is submitted.
    pub(super) id: OnceLock<BuildId>,
    events: mpsc::Sender<Event>,
    seen: Mutex<Option<Seen>>,
    refused: Mutex<Option<Exit>>,
}

/// What the user gave, and what became of it so far.
#[derive(Debug)]
pub(super) struct ClientParts {
    pub(super) archive: File,
    pub(super) secrets: Vec<Secret>,
    pub(super) authfile: Option<PathBuf>,
    /// For every registry that the build uses.
    pub(super) credentials: Credentials,
    /// Outputs, each as the user wrote it and as it is meant.
    pub(super) outputs: Vec<(String, OutputSpec)>,
    pub(super) iidfile: Option<PathBuf>,
    pub(super) metadata_file: Option<PathBuf>,
    /// What the client's own parts took.
    pub(super) before: Vec<PhaseDuration>,
}

impl Client {
    pub(super) fn new(
        agent: Arc<Agent>,
        parts: ClientParts,
        stop: StopSignal,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let (seen, refused) = (Mutex::new(None), Mutex::new(None));
        Self { agent, parts, stop, id: OnceLock::new(), events, seen, refused }
    }

    /// What is known of the last attempt.
    pub(super) fn seen(&self) -> Option<Seen> {
        lock(&self.seen).clone()
    }

    /// Why an output could not be written.
    pub(super) fn refused(&self) -> Option<Exit> {
        lock(&self.refused).take()
    }

    /// For a build of a process that is gone.
    async fn find_credentials(&self, names: &[String]) -> Result<Credentials, Failure> {
        let environment = |name: &str| std::env::var_os(name);
        let found = credentials::load(self.parts.authfile.as_deref(), &environment, names).await;
        found.map_err(|e| Failure::new(Reason::Unauthorized, Phase::Start, chain(&e)))
    }

    fn gather(&self) -> Result<BuildInputs, Failure> {
        let reopened = self.parts.archive.try_clone().and_then(|mut archive| {
            archive.rewind()?;
            Ok(archive)
        });
        let archive = reopened.map_err(|e| Failure::new(Reason::ContextInvalid, Phase::Start, chain(&e)))?;
        let (secrets, credentials) = (self.parts.secrets.clone(), self.parts.credentials.clone());
        Ok(BuildInputs { archive, secrets, credentials })
    }

    /// Everything that the user asked for beside tags. Blocks.
    fn write_all(&self, finished: &Finished) -> BTreeMap<String, Outcome> {
        let mut outcomes = BTreeMap::new();
        let Some(sealed) = &finished.image else { return outcomes };
        let should_stop = || self.stop.current().is_some_and(|stop| stop.force);
        let writer = output::Writer { blobs: &finished.blobs, should_stop: &should_stop };
        for (text, spec) in &self.parts.outputs {
            let outcome = match self.write(finished, sealed, &writer, spec) {
                Ok(()) => Outcome::Moved,
                Err(error) => {
                    let exit = output_failed(&error);
                    let why = exit.message.clone();
                    *lock(&self.refused) = Some(exit);
                    Outcome::Failed(why)
                }
            };
            outcomes.insert(text.clone(), outcome);
        }
        outcomes
    }

    fn write(
        &self,
        finished: &Finished,
        sealed: &Sealed,
        writer: &output::Writer<'_>,
        spec: &OutputSpec,
    ) -> Result<(), OutputError> {
        let mut stdout = std::io::stdout().lock();
        match (spec, &finished.root_filesystem) {
            (OutputSpec::Image(target), _) => writer.image(target, sealed, &mut stdout),
            (OutputSpec::Files(target), Some((digest, size))) => {
                writer.files(target, (digest, *size), &mut stdout, &mut |archive, directory| {
                    unpack_result(&self.agent, archive, directory)
                })
            }
            // Asked for by the request, so a finished build has it.
            (OutputSpec::Files(_), None) => Ok(()),
        }
    }

    fn write_metadata(&self, ended: &Ended<'_>) -> Result<(), Exit> {
        let Some((finished, sealed)) = ended.finished.and_then(|f| Some((f, f.image.as_ref()?))) else {
            return Ok(());
        };
        if let Some(path) = &self.parts.iidfile {
            let id = output::image_id(&sealed.image.config_digest);
            output::write_text(path, &id).map_err(|e| output_failed(&e))?;
        }
        if let Some(path) = &self.parts.metadata_file {
            let phases: Vec<PhaseDuration> = self.parts.before.iter().chain(ended.phases).copied().collect();
            let mut metadata = output::metadata(&finished.result.build_id, Some(sealed), &phases);
            metadata["kiln.log"] = serde_json::json!(finished.result.log);
            if let Some(steps) = &finished.result.steps {
                metadata["kiln.cache"] = serde_json::json!(steps);
            }
            if !finished.verdicts.is_empty() {
                metadata["kiln.verdicts"] = serde_json::json!(finished.verdicts);
            }
            output::write_text(path, &format!("{metadata:#}\n")).map_err(|e| output_failed(&e))?;
        }
        Ok(())
    }

    fn note_end(&self, ended: &Ended<'_>) {
        let seen = Seen {
            image: ended.finished.and_then(|f| f.image.as_ref()).map(|sealed| sealed.image.clone()),
            result: ended.finished.map(|f| f.result.clone()),
            failure: ended.failure.cloned(),
            last_lines: ended.finished.map(|f| f.last_lines.clone()).unwrap_or_default(),
            phases: ended.phases.to_vec(),
        };
        *lock(&self.seen) = Some(seen);
        if ended.failure.is_none()
            && let Err(exit) = self.write_metadata(ended)
        {
            *lock(&self.refused) = Some(exit);
        }
    }
}

impl Supplies for Client {
    fn inputs<'a>(&'a self, _: &'a BuildGrant) -> BoxFuture<'a, Result<BuildInputs, Failure>> {
        std::future::ready(self.gather()).boxed()
    }

    fn push_credentials<'a>(
        &'a self,
        build: BuildId,
        _: &'a SecretSource,
        repositories: Vec<String>,
    ) -> BoxFuture<'a, Result<Credentials, Failure>> {
        if self.id.get() == Some(&build) {
            return std::future::ready(Ok(self.parts.credentials.clone())).boxed();
        }
        async move { self.find_credentials(&repositories).await }.boxed()
    }

    fn watcher(&self, _: BuildId) -> mpsc::Sender<Event> {
        self.events.clone()
    }

    fn deliver<'a>(
        &'a self,
        _: &'a BuildGrant,
        finished: &'a Finished,
    ) -> BoxFuture<'a, BTreeMap<String, Outcome>> {
        // The files are large and belong to this thread's caller; other work goes on on the other worker.
        async move { tokio::task::block_in_place(|| self.write_all(finished)) }.boxed()
    }

    fn ended<'a>(&'a self, _: BuildId, ended: Ended<'a>) -> BoxFuture<'a, ()> {
        async move { tokio::task::block_in_place(|| self.note_end(&ended)) }.boxed()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An output that cannot be written.
pub(super) fn output_failed(error: &OutputError) -> Exit {
    Exit { code: error.reason().exit_code(), message: chain(error), hint: None }
}

/// The result is as untrusted as a context, and gets the same guard.
fn unpack_result(
    agent: &Agent,
    archive: File,
    directory: BorrowedFd<'_>,
) -> Result<(), output::UnpackFailure> {
    let disk = agent.config.build.limits.disk;
    let limits = Limits { max_packed_bytes: disk, max_unpacked_bytes: disk, ..agent.config.context.clone() };
    let unpacked = unpack::unpack(archive, directory, unpack::Modes::Owned, &limits);
    unpacked
        .map(drop)
        .map_err(|e| output::UnpackFailure { reason: Reason::LimitExceeded, source: Box::new(e) })
}
