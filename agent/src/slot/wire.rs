//! What agent, shim and the processes of a slot say to each other (pure data, shell framing).
//!
//! Frames are a four-byte little-endian length and JSON. Both ends are ours; the bound only keeps a bug
//! from eating the memory of the other side.

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;

use kiln_protocol::request::NetworkMode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A specification carries the Dockerfile (at most 1 MiB), secrets and a CA bundle, base64 or escaped.
const MAX_FRAME_BYTES: u32 = 16 * 1024 * 1024;

/// An IPv4 network, `address/prefix`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Lowest address.
    pub address: Ipv4Addr,
    /// Number of leading bits that count, 0 to 32.
    pub prefix: u8,
}

/// Ids of the host that become 0, 1, 2 … inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// First subordinate user id.
    pub first_uid: u32,
    /// First subordinate group id.
    pub first_gid: u32,
    /// Length of both ranges.
    pub count: u32,
}

/// An ordinary user that a privileged agent becomes before it creates anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
}

/// A file that appears inside the slot.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotFile {
    /// Absolute path inside.
    pub path: String,
    /// Content; secrets travel here, never in argv or environment.
    pub contents: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
}

impl std::fmt::Debug for SlotFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SlotFile({} , {} bytes)", self.path, self.contents.len())
    }
}

/// What one slot may use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SlotLimits {
    /// Processes and threads.
    pub pids: u64,
    /// Bytes below the job directory.
    pub disk_bytes: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Open files of one process.
    pub open_files: u64,
    /// Bytes of memory, where cgroup v2 is delegated.
    pub memory_bytes: Option<u64>,
    /// CPUs, where cgroup v2 is delegated.
    pub cpus: Option<f64>,
}

/// A writable overlay over immutable generations of cache mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheMount {
    /// Generations, newest first, relative to the store directory.
    pub generations: Vec<String>,
}

/// What a slot is for, which decides what its root holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Steps that run programs: system directories, and the job's directory to write to.
    Work,
    /// Export alone: no program at all. The job's directory is read-only at `/job`; what is written to `/out` lies
    /// in `layout` beside it, where no step of a build reaches.
    Export,
}

/// Everything a slot is made of. Paths are relative to the store directory unless said otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlotSpec {
    /// What it is for.
    pub purpose: Purpose,
    /// Name of the job directory below `jobs/`.
    pub job: String,
    /// Ids of the host that the slot runs under.
    pub ids: IdRange,
    /// Whom a root agent becomes first.
    pub drop_to: Option<User>,
    /// What RUN may reach.
    pub network: NetworkMode,
    /// Addresses of this host and other places that an isolated network must not reach.
    pub blocked: Vec<Network>,
    /// If given, the only networks that an isolated slot reaches.
    pub allowed: Option<Vec<Network>>,
    /// Read-only image stores, mounted at `/b/0`, `/b/1` ….
    pub stores: Vec<String>,
    /// Kept content of `RUN --mount=type=cache`.
    pub cache: Option<CacheMount>,
    /// A directory that is mounted read-only at `/in`.
    pub input: Option<String>,
    /// Files inside.
    pub files: Vec<SlotFile>,
    /// Bounds.
    pub limits: SlotLimits,
    /// From SIGTERM to SIGKILL, in milliseconds.
    pub grace_ms: u64,
}

/// One step of a job. Each runs under a PID 1 of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Unpack the archive that was sent as a descriptor into `/job/ctx`.
    Unpack(crate::unpack::Limits),
    /// Write an image of the stores into `/out`.
    Export(crate::export::Order),
    /// Run one program.
    Exec {
        /// Program and arguments; the program by absolute path.
        argv: Vec<String>,
        /// The whole environment.
        env: Vec<(String, String)>,
        /// The slot's network, or none at all.
        network: bool,
    },
}

/// From the agent to the slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Run a step.
    Run(Step),
    /// End every process and namespace of the slot, and make new ones over the same job directory.
    Renew(Box<SlotSpec>),
    /// Move something of the job directory to its published place, by one rename.
    Promote {
        /// Relative to the job directory.
        from: String,
        /// Relative to the store directory.
        to: String,
    },
    /// Delete published directories.
    Remove(Vec<String>),
    /// End the running step: SIGTERM, grace, SIGKILL.
    Terminate,
    /// Delete the job directory and end.
    Finish,
}

/// A bound that ended a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Breach {
    /// Too many processes.
    Pids {
        /// Highest number seen.
        peak: u64,
    },
    /// Too much memory.
    Memory {
        /// Highest number of bytes seen.
        peak: u64,
    },
    /// Too many bytes in the job directory.
    Disk {
        /// Highest number seen.
        peak: u64,
    },
}

/// How the program of a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Together with its PID 1, which was killed.
    Killed,
    /// It never ran.
    NotStarted,
}

/// The end of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepEnd {
    /// How the program ended.
    pub exit: Exit,
    /// The end of what it wrote to its own standard error.
    pub stderr: String,
    /// The bound that ended it, if one did.
    pub breach: Option<Breach>,
    /// SIGTERM was sent to it.
    pub terminated: bool,
    /// Processes that were left when its PID 1 ended; the kernel kills them with it.
    pub left: u32,
    /// Processes that outlived its PID 1. The kernel allows none.
    pub leftovers: u32,
}

/// From the slot to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// Namespaces, mounts and network are in place.
    Ready,
    /// A step ended.
    StepEnded(StepEnd),
    /// A rename or a removal took place, or why not.
    Done(Result<(), String>),
    /// The job directory is gone, or why it is not.
    Finished(Result<(), String>),
    /// The slot could not be made.
    Failed(SetupError),
}

/// Why a slot could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct SetupError {
    /// What was being done.
    pub what: String,
    /// What the system answered.
    pub cause: String,
    /// It concerns the network of the slot only.
    pub network: bool,
}

impl SetupError {
    /// An error of everything but the network.
    pub fn new(what: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self { what: what.into(), cause: cause.to_string(), network: false }
    }

    /// An error of the network.
    pub fn network(what: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self { what: what.into(), cause: cause.to_string(), network: true }
    }
}

/// Serialises one frame.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|l| *l <= MAX_FRAME_BYTES).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("frame of {} bytes", body.len()))
    })?;
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Length of the body that follows a frame head.
pub fn body_length(head: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(head);
    if length > MAX_FRAME_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {length} bytes")));
    }
    Ok(length as usize)
}

/// Writes one frame.
pub fn send<T: Serialize>(out: &mut impl Write, message: &T) -> io::Result<()> {
    out.write_all(&encode(message)?)
}

/// Reads one frame; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<Option<T>> {
    let mut head = [0; 4];
    match input.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let mut body = vec![0; body_length(head)?];
    input.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_end_cleanly() {
        let mut bytes = Vec::new();
        send(&mut bytes, &Command::Terminate).unwrap();
        send(&mut bytes, &Command::Finish).unwrap();
        let mut input = bytes.as_slice();
        assert_eq!(receive(&mut input).unwrap(), Some(Command::Terminate));
        assert_eq!(receive(&mut input).unwrap(), Some(Command::Finish));
        assert_eq!(receive::<Command>(&mut input).unwrap(), None);
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_read() {
        let mut bytes = (MAX_FRAME_BYTES + 1).to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        assert!(receive::<Command>(&mut bytes.as_slice()).is_err());
    }
}
