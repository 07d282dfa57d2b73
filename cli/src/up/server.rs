//! What a server gives its builds (edge): uploaded contexts, secrets by name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use kiln_agent::agent::Agent;
use kiln_agent::dispatch::{Ended, Supplies};
use kiln_agent::error::chain;
use kiln_agent::executor::{BuildInputs, Event, Finished, Secret};
use kiln_agent::registry::Credentials;
use kiln_protocol::message::{BuildGrant, Outcome};
use kiln_protocol::result::{Failure, Phase};
use kiln_protocol::spec::{ContextRef, SecretSource};
use kiln_protocol::{BuildId, Reason};
use kiln_transport::Blobs;
use kiln_transport::crash::{self, CrashPoint};
use tokio::sync::mpsc;

use crate::build::pulled_names;
use crate::credentials;

/// Bytes of one secret; the largest in the wild are keys and certificates of some KiB.
const MAX_SECRET_BYTES: u64 = 1024 * 1024;
/// Variables with secrets begin with this.
const VARIABLE_PREFIX: &str = "KILN_SECRET_";

/// A server's store of contexts and its secrets directory.
#[derive(Debug)]
pub(super) struct Server {
    agent: Arc<Agent>,
    contexts: Blobs,
}

impl Server {
    pub(super) fn new(agent: Arc<Agent>, contexts: Blobs) -> Self {
        Self { agent, contexts }
    }

    /// A copy that never has a name, so that it ends with its build even if this process is killed.
    async fn context(&self, context: &ContextRef) -> Result<File, Failure> {
        let lost = |why: String| failure(Reason::ContextInvalid, why);
        let broken = |e: std::io::Error| failure(Reason::DiskFull, format!("copy the context: {e}"));
        let opened = self.contexts.open(&context.digest).await;
        let opened = opened.map_err(|e| failure(Reason::ObjectStore, chain(&e)))?;
        let mut reader = opened
            .ok_or_else(|| lost(format!("the context {} is gone; submit the build again", context.digest)))?;
        let copy = tempfile::tempfile_in(self.agent.state.root()).map_err(broken)?;
        while let Some(chunk) = reader.chunk().await.map_err(|e| failure(Reason::ObjectStore, chain(&e)))? {
            (&copy).write_all(&chunk).map_err(broken)?;
        }
        crash::reach(CrashPoint::ContextCopied);
        // The slot may read it only.
        File::open(format!("/proc/self/fd/{}", copy.as_raw_fd())).map_err(broken)
    }

    fn secret_path(&self, name: &str) -> PathBuf {
        self.agent.state.path("secrets").join(name)
    }

    /// A file of the secrets directory, or a variable of the environment.
    fn secret(&self, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        if !kiln_protocol::request::is_secret_id(name) {
            return Err(failure(Reason::BadRequest, format!("`{name}` is no name of a secret")));
        }
        let path = self.secret_path(name);
        let failed = |e: std::io::Error| failure(Reason::Unknown, format!("read the secret `{name}`: {e}"));
        let mut value = Vec::new();
        match File::open(&path) {
            Ok(file) => {
                file.take(MAX_SECRET_BYTES + 1).read_to_end(&mut value).map_err(failed)?;
                if value.len() as u64 > MAX_SECRET_BYTES {
                    let message = format!("the secret `{name}` is longer than {MAX_SECRET_BYTES} bytes");
                    return Err(failure(Reason::BadRequest, message));
                }
                Ok(Some(value))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let variable = name.to_ascii_uppercase().replace(['-', '.'], "_");
                let found = std::env::var_os(format!("{VARIABLE_PREFIX}{variable}"));
                Ok(found.map(std::os::unix::ffi::OsStringExt::into_vec))
            }
            Err(e) => Err(failed(e)),
        }
    }

    fn secrets(&self, grant: &BuildGrant) -> Result<Vec<Secret>, Failure> {
        let redeem = |wanted: &kiln_protocol::spec::SecretRef| {
            let SecretSource::Server(name) = &wanted.source else {
                return Err(failure(
                    Reason::BadRequest,
                    format!("the secret `{}` stayed with its client", wanted.id),
                ));
            };
            let missing = || {
                let message = format!("the server has no secret `{name}`");
                let hint = format!("write it to {} on the server", self.secret_path(name).display());
                Failure { hint: Some(hint), ..failure(Reason::BadRequest, message) }
            };
            Ok(Secret { id: wanted.id.clone(), value: self.secret(name)?.ok_or_else(missing)? })
        };
        grant.spec.secrets.iter().map(redeem).collect()
    }

    /// The `auth.json` of the secrets directory, or what the user of the server logged in with.
    async fn credentials(&self, source: &SecretSource, names: &[String]) -> Result<Credentials, Failure> {
        let file = match source {
            SecretSource::Server(name) => Some(self.secret_path(name)).filter(|path| path.exists()),
            SecretSource::Client => None,
        };
        let environment = |name: &str| std::env::var_os(name);
        let found = credentials::load(file.as_deref(), &environment, names).await;
        found.map_err(|e| failure(Reason::Unauthorized, chain(&e)))
    }

    async fn gather(&self, grant: &BuildGrant) -> Result<BuildInputs, Failure> {
        let names = pulled_names(&grant.spec.request, &self.agent);
        Ok(BuildInputs {
            archive: self.context(&grant.spec.context).await?,
            secrets: self.secrets(grant)?,
            credentials: self.credentials(&grant.spec.credentials, &names).await?,
        })
    }
}

impl Supplies for Server {
    fn inputs<'a>(&'a self, grant: &'a BuildGrant) -> BoxFuture<'a, Result<BuildInputs, Failure>> {
        self.gather(grant).boxed()
    }

    fn push_credentials<'a>(
        &'a self,
        _: BuildId,
        source: &'a SecretSource,
        repositories: Vec<String>,
    ) -> BoxFuture<'a, Result<Credentials, Failure>> {
        async move { self.credentials(source, &repositories).await }.boxed()
    }

    /// Nobody in this process: people follow the log through the server.
    fn watcher(&self, _: BuildId) -> mpsc::Sender<Event> {
        mpsc::channel(1).0
    }

    /// The API refuses outputs that are no tags.
    fn deliver<'a>(&'a self, _: &'a BuildGrant, _: &'a Finished) -> BoxFuture<'a, BTreeMap<String, Outcome>> {
        std::future::ready(BTreeMap::new()).boxed()
    }

    fn ended<'a>(&'a self, _: BuildId, _: Ended<'a>) -> BoxFuture<'a, ()> {
        std::future::ready(()).boxed()
    }
}

fn failure(reason: Reason, message: String) -> Failure {
    Failure::new(reason, Phase::Start, message)
}
