//! The agent's side of a publish process (shell).

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use kiln_protocol::{Digest, Reason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::PUBLISH_ARGUMENT;
use super::order::{ANSWER_BYTES, Answer, Message, Order, Task};
use crate::registry::push::{Blob, Candidate, Mount, Probe, PushError, TagOutcome, Uploaded};
use crate::registry::{
    Credentials, ProxyConfig, Reference, RegistryConfig, RegistryConfigError, RegistrySection,
};
use crate::stop::{StopReason, StopSignal};

/// The process keeps to its budget itself; after this long beyond it, it hangs.
const GRACE: Duration = Duration::from_secs(30);
/// Where OpenSSL's users say which certificates to trust; a pull in this process reads them, too.
const PASSED_ON: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Why publishing failed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The push itself.
    #[error(transparent)]
    Push(#[from] PushError),
    /// The configuration forbids or cannot express the target.
    #[error("cannot push to {repository}")]
    Config {
        /// The target.
        repository: String,
        /// Why.
        #[source]
        source: RegistryConfigError,
    },
    /// There is no process.
    #[error("cannot start the publish process")]
    Start(#[source] io::Error),
    /// The process ended without an answer.
    #[error("lost the publish process")]
    Lost(#[source] io::Error),
    /// It did not answer long after its time was over.
    #[error("the publish process gave no answer within {0:?}")]
    Hung(Duration),
    /// It was ended on request.
    #[error("stopped")]
    Stopped(StopReason),
}

impl PublishError {
    /// The class of the failure.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Push(error) => error.reason,
            Self::Config { .. } => Reason::BadRequest,
            Self::Start(_) | Self::Lost(_) | Self::Hung(_) => Reason::Unknown,
            Self::Stopped(reason) => reason.reason(),
        }
    }

    /// What to do about it, in plain words.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Push(error) => error.hint.as_deref(),
            Self::Config { .. } => Some("mend the [[registry]] sections of the configuration"),
            _ => None,
        }
    }
}

/// A repository, and how long one task there may take.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The repository; its tag does not count.
    pub repository: &'a Reference,
    /// For the task with all its repetitions.
    pub budget: Duration,
}

/// Starts publish processes with the settings and credentials of one build.
#[derive(Debug)]
pub struct Publisher {
    registries: Vec<RegistrySection>,
    config: RegistryConfig,
    proxy: ProxyConfig,
    ca: Vec<String>,
    credentials: Credentials,
}

impl Publisher {
    /// The arguments are those of [`crate::registry::Registry::new`]. Each process gets the credential of its
    /// own target only.
    pub fn new(
        registries: Vec<RegistrySection>,
        credentials: Credentials,
        proxy: ProxyConfig,
        ca: &[Vec<u8>],
    ) -> Result<Self, RegistryConfigError> {
        let config = RegistryConfig::new(registries.clone())?;
        // PEM is text; what stands around it may be anything.
        let ca = ca.iter().map(|pem| String::from_utf8_lossy(pem).into_owned()).collect();
        Ok(Self { registries, config, proxy, ca, credentials })
    }

    /// Whether a push to the repository, and a move of the tag, can succeed.
    pub async fn probe(
        &self,
        target: Target<'_>,
        tag: Option<&str>,
        stop: &mut StopSignal,
    ) -> Result<Probe, PublishError> {
        let task = Task::Probe { tag: tag.map(str::to_owned) };
        match self.run(target, task, stop, &|_, _| ()).await? {
            Answer::Probed(probe) => Ok(probe),
            _ => Err(unexpected()),
        }
    }

    /// Brings a candidate to the repository, by digest, from the blob store with that root.
    pub async fn upload(
        &self,
        target: Target<'_>,
        candidate: &Candidate,
        (blobs, mounts): (&Path, &[Mount]),
        stop: &mut StopSignal,
        progress: &(dyn Fn(&Blob, u64) + Send + Sync),
    ) -> Result<Uploaded, PublishError> {
        let mounts = mounts.iter().map(|mount| (mount.repository.to_string(), mount.blobs.clone()));
        let mounts: Vec<(String, BTreeSet<Digest>)> = mounts.collect();
        let task = Task::Upload { candidate: candidate.clone(), blobs: blobs.to_owned(), mounts };
        match self.run(target, task, stop, progress).await? {
            Answer::Uploaded(uploaded) => Ok(uploaded),
            _ => Err(unexpected()),
        }
    }

    /// What of the candidate the repository lacks.
    pub async fn verify(
        &self,
        target: Target<'_>,
        candidate: &Candidate,
        stop: &mut StopSignal,
    ) -> Result<Vec<Digest>, PublishError> {
        let task = Task::Verify { candidate: candidate.clone() };
        match self.run(target, task, stop, &|_, _| ()).await? {
            Answer::Verified(missing) => Ok(missing),
            _ => Err(unexpected()),
        }
    }

    /// Sends one PUT. After an error, the tag may have moved or not.
    pub async fn put_tag(
        &self,
        target: Target<'_>,
        tag: &str,
        candidate: &Candidate,
        stop: &mut StopSignal,
    ) -> Result<TagOutcome, PublishError> {
        let Candidate { manifest, media_type, .. } = candidate.clone();
        let task = Task::Tag { tag: tag.to_owned(), manifest, media_type };
        match self.run(target, task, stop, &|_, _| ()).await? {
            Answer::Tagged(outcome) => Ok(outcome),
            _ => Err(unexpected()),
        }
    }

    /// What a tag points to; `None` if it does not exist.
    pub async fn head_tag(
        &self,
        target: Target<'_>,
        tag: &str,
        stop: &mut StopSignal,
    ) -> Result<Option<Digest>, PublishError> {
        match self.run(target, Task::Head { tag: tag.to_owned() }, stop, &|_, _| ()).await? {
            Answer::Head(digest) => Ok(digest),
            _ => Err(unexpected()),
        }
    }

    async fn run(
        &self,
        target: Target<'_>,
        task: Task,
        stop: &mut StopSignal,
        progress: &(dyn Fn(&Blob, u64) + Send + Sync),
    ) -> Result<Answer, PublishError> {
        let mut process = self.spawn(target, task).await?;
        let limit = target.budget.saturating_add(GRACE);
        let ended = tokio::select! {
            biased;
            stop = stop.stopped() => Err(PublishError::Stopped(stop.reason)),
            answer = process.answer(progress) => answer,
            () = tokio::time::sleep(limit) => Err(PublishError::Hung(limit)),
        };
        process.end().await;
        ended
    }

    async fn spawn(&self, target: Target<'_>, task: Task) -> Result<Process, PublishError> {
        let order = self.order(target, task)?;
        let mut line = serde_json::to_vec(&order).map_err(|error| PublishError::Start(error.into()))?;
        line.push(b'\n');
        let mut process = Process::start().map_err(PublishError::Start)?;
        process.tell(&line).await?;
        Ok(process)
    }

    fn order(&self, target: Target<'_>, task: Task) -> Result<Order, PublishError> {
        let repository = target.repository.to_string();
        let endpoint = self.config.location(target.repository);
        let endpoint =
            endpoint.map_err(|source| PublishError::Config { repository: repository.clone(), source })?;
        Ok(Order {
            registries: self.registries.clone(),
            proxy: self.proxy.clone(),
            ca: self.ca.clone(),
            credentials: self.credentials.only_for([endpoint.credential_key().as_str()]),
            repository,
            budget: target.budget,
            task,
        })
    }
}

/// A running publish process, in a process group of its own. Dropping it kills it.
#[derive(Debug)]
struct Process {
    child: Child,
    /// Open as long as an answer is wanted: the process dies with it.
    stdin: ChildStdin,
    stdout: ChildStdout,
    buffer: Vec<u8>,
}

impl Process {
    fn start() -> io::Result<Self> {
        let mut child = start_child()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        Ok(Self { child, stdin, stdout, buffer: Vec::new() })
    }

    async fn tell(&mut self, order: &[u8]) -> Result<(), PublishError> {
        let told = tokio::time::timeout(GRACE, self.stdin.write_all(order)).await;
        told.map_err(|_| PublishError::Hung(GRACE))?.map_err(PublishError::Lost)
    }

    async fn answer(
        &mut self,
        progress: &(dyn Fn(&Blob, u64) + Send + Sync),
    ) -> Result<Answer, PublishError> {
        loop {
            match self.next().await.map_err(PublishError::Lost)? {
                Message::Sent(blob, sent) => progress(&blob, sent),
                Message::Answer(answer) => return Ok(answer?),
            }
        }
    }

    async fn next(&mut self) -> io::Result<Message> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            if self.buffer.len() > ANSWER_BYTES {
                return Err(io::Error::other("its answer is too long"));
            }
            if self.stdout.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::Error::other("it ended without an answer"));
            }
        }
    }

    /// Kills it, if it still lives, and waits until the kernel has forgotten it.
    async fn end(mut self) {
        // Errors say that it has ended already.
        let _ = tokio::time::timeout(GRACE, self.child.kill()).await;
    }
}

fn unexpected() -> PublishError {
    PublishError::Lost(io::Error::other("it answered another question"))
}

#[expect(
    clippy::disallowed_methods,
    reason = "its owner kills it on drop, and it ends with its owner's pipe"
)]
fn start_child() -> io::Result<Child> {
    let passed_on = PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    Command::new("/proc/self/exe")
        .arg0("kiln-publish")
        .arg(PUBLISH_ARGUMENT)
        .env_clear()
        .envs(passed_on)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Credential;

    fn password(password: &str) -> Credential {
        Credential::Password { username: "user".into(), password: password.into() }
    }

    #[test]
    fn an_order_has_the_credential_of_its_target_and_no_other() {
        let mut credentials = Credentials::default();
        credentials.insert("new.corp/team", password("canary-of-the-target"));
        credentials.insert("old.corp", password("canary-of-the-old-name"));
        credentials.insert("docker.io", password("canary-of-another"));
        let location = Some("new.corp/team".to_owned());
        let section = RegistrySection { prefix: "old.corp".into(), location, ..RegistrySection::default() };
        let publisher =
            Publisher::new(vec![section], credentials, ProxyConfig::default(), &[b"PEM".to_vec()]).unwrap();
        let repository = "old.corp/app:1".parse().unwrap();
        let target = Target { repository: &repository, budget: Duration::from_mins(1) };
        let order = publisher.order(target, Task::Probe { tag: None }).unwrap();
        let text = serde_json::to_string(&order).unwrap();
        assert!(text.contains("canary-of-the-target"), "{text}");
        assert!(!text.contains("canary-of-the-old-name") && !text.contains("canary-of-another"), "{text}");
        assert!(!format!("{publisher:?} {order:?}").contains("canary"));
        let back: Order = serde_json::from_str(&text).unwrap();
        assert_eq!((back.registries, back.budget), (order.registries, order.budget));
    }

    #[test]
    fn a_blocked_registry_needs_no_process() {
        let section =
            RegistrySection { prefix: "a.corp".into(), blocked: true, ..RegistrySection::default() };
        let publisher =
            Publisher::new(vec![section], Credentials::default(), ProxyConfig::default(), &[]).unwrap();
        let repository = "a.corp/app".parse().unwrap();
        let target = Target { repository: &repository, budget: Duration::from_mins(1) };
        let error = publisher.order(target, Task::Probe { tag: None }).unwrap_err();
        assert_eq!(error.reason(), Reason::BadRequest);
        assert!(crate::error::chain(&error).contains("blocked = true"));
    }

    #[test]
    fn futures_can_move_between_threads() {
        fn check<T: Send>(_: T) {}
        let publisher = Publisher::new(vec![], Credentials::default(), ProxyConfig::default(), &[]).unwrap();
        let repository = "a.corp/app".parse().unwrap();
        let target = Target { repository: &repository, budget: Duration::from_mins(1) };
        let (_stopper, mut stop) = crate::stop::channel();
        check(publisher.probe(target, None, &mut stop));
    }
}
