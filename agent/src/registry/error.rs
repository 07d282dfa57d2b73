//! What can go wrong between us and a registry, its class and what to do about it (pure).
//!
//! Nothing here holds a credential, a token or the query of an address.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kiln_protocol::{Digest, Reason};

use super::config::{DOCKER_HUB, RegistryConfigError};
use super::manifest::ManifestError;
use super::said::Said;
use crate::blobs::BlobError;

/// A pull that failed at every endpoint; the last one's cause is the source.
#[derive(Debug, thiserror::Error)]
#[error("cannot pull {reference} from {host}{}", tried(.earlier))]
pub struct RegistryError {
    /// The image that was asked for.
    pub reference: String,
    /// `host[:port]` of the endpoint that was asked last.
    pub host: String,
    /// Why that one failed.
    #[source]
    pub cause: Box<Cause>,
    /// Mirrors that were asked before.
    pub earlier: Vec<EndpointFailure>,
}

/// A mirror that did not help.
#[derive(Debug)]
pub struct EndpointFailure {
    /// `host[:port]` of the mirror.
    pub host: String,
    /// Why it failed.
    pub cause: Cause,
}

fn tried(earlier: &[EndpointFailure]) -> String {
    let failures: Vec<_> =
        earlier.iter().map(|failure| format!("mirror {}: {}", failure.host, failure.cause)).collect();
    if failures.is_empty() { String::new() } else { format!(" (before that, {})", failures.join("; ")) }
}

/// Why one endpoint failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The configuration forbids or cannot express the endpoint.
    #[error(transparent)]
    Config(#[from] RegistryConfigError),
    /// `host[:port]` is not one.
    #[error("`{0}` is not a host with a port")]
    Address(String),
    /// A `ca` file cannot be used.
    #[error("cannot read certificates from {}", .path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The HTTP client cannot be made from certificates and proxies.
    #[error("the certificates or the proxy of the configuration cannot be used")]
    Client(#[source] reqwest::Error),
    /// The registry, or the token service that it names, refuses the credential or wants one.
    #[error("{by} answered {status}{said}")]
    Unauthorized {
        /// Host that answered.
        by: String,
        /// HTTP status.
        status: u16,
        /// What the registry says about it.
        said: Said,
        /// Whether a credential was sent.
        credential: bool,
    },
    /// There is no such repository, tag, manifest or blob.
    #[error("it is not there{said}")]
    NotFound {
        /// What the registry says about it.
        said: Said,
    },
    /// The registry is overloaded, broken or limits the rate.
    #[error("{by} answered {status}{said}")]
    Unavailable {
        /// Host that answered.
        by: String,
        /// HTTP status.
        status: u16,
        /// What the registry says about it.
        said: Said,
        /// How long the registry asks to wait.
        retry_after: Option<Duration>,
    },
    /// Another answer than a registry gives.
    #[error("{by} answered {status}{said}")]
    Refused {
        /// Host that answered.
        by: String,
        /// HTTP status.
        status: u16,
        /// What the registry says about it.
        said: Said,
    },
    /// No connection.
    #[error("no connection")]
    Connect(#[source] reqwest::Error),
    /// A connection that ended early.
    #[error("the connection broke")]
    Broken(#[source] reqwest::Error),
    /// Nothing came, or not all in time.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The server's certificate is not trusted.
    #[error("the certificate of the server is not trusted")]
    Certificate(#[source] reqwest::Error),
    /// The server does not speak TLS, or none that fits.
    #[error("no TLS connection")]
    Tls(#[source] reqwest::Error),
    /// A redirect that is not followed.
    #[error("redirected {0}")]
    Redirect(&'static str),
    /// Authentication that makes no sense.
    #[error("{by} asks for authentication in a way that is not understood: {why}")]
    Challenge {
        /// Host that asked.
        by: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A value that no request can carry.
    #[error("a media type has characters that no header can hold")]
    Header,
    /// More bytes than allowed.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What was read.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A blob of another length than its descriptor says.
    #[error("the blob has {expected} bytes, {actual} came")]
    Length {
        /// From the descriptor.
        expected: u64,
        /// What came until it ended or was cut off.
        actual: u64,
    },
    /// Other bytes than asked for.
    #[error("content has digest {actual}, {expected} was asked for")]
    Mismatch {
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// The document cannot be used as a base image.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The blob store refused.
    #[error("cannot store a blob")]
    Store(#[source] BlobError),
    /// A thread that wrote a blob died.
    #[error("the writer of a blob died")]
    Interrupted,
}

impl From<BlobError> for Cause {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Size { expected, actual } => Self::Length { expected, actual },
            BlobError::Digest { expected, actual } => Self::Mismatch { expected, actual },
            error @ BlobError::Io { .. } => Self::Store(error),
        }
    }
}

impl Cause {
    /// Sorts an error of the HTTP library by its type. The address is cut off, it may carry a token.
    pub(crate) fn of_request(error: reqwest::Error, connect: Duration) -> Self {
        let error = error.without_url();
        match find::<rustls::Error>(&error) {
            Some(rustls::Error::InvalidCertificate(_)) => return Self::Certificate(error),
            Some(_) => return Self::Tls(error),
            None => {}
        }
        match () {
            () if error.is_builder() => Self::Client(error),
            () if error.is_timeout() => Self::Timeout { what: "connecting", limit: connect },
            () if error.is_connect() => Self::Connect(error),
            () => Self::Broken(error),
        }
    }

    /// The class of the failure.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unauthorized { .. } => Reason::Unauthorized,
            Self::NotFound { .. } => Reason::NotFound,
            // Wrong bytes are never used, and another try or replica of the registry may have the right ones.
            Self::Unavailable { .. } | Self::Mismatch { .. } | Self::Length { .. } => {
                Reason::RegistryUnavailable
            }
            Self::Connect(_) | Self::Broken(_) | Self::Timeout { .. } => Reason::Network,
            Self::Store(error) if error.is_disk_full() => Reason::DiskFull,
            Self::Store(_) => Reason::StoreCorrupt,
            Self::Interrupted => Reason::Unknown,
            // What the configuration, the image or the server's manners forbid, today and tomorrow.
            Self::Config(_)
            | Self::Address(_)
            | Self::CaFile { .. }
            | Self::Client(_)
            | Self::Certificate(_)
            | Self::Tls(_)
            | Self::Manifest(_)
            | Self::Refused { .. }
            | Self::Challenge { .. }
            | Self::Redirect(_)
            | Self::Header
            | Self::TooLarge { .. } => Reason::BadRequest,
        }
    }

    /// Whether asking another endpoint makes sense: not when the trouble is on this machine.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self, Self::Store(_) | Self::Interrupted)
    }
}

impl RegistryError {
    /// The class of the failure.
    pub fn reason(&self) -> Reason {
        self.cause.reason()
    }

    /// What to do about it, in plain words.
    pub fn hint(&self) -> Option<String> {
        let host = &self.host;
        let hint = match &*self.cause {
            Cause::Unauthorized { credential, .. } => return Some(self.unauthorized_hint(*credential)),
            Cause::NotFound { .. } => "check the name and the tag; they may have been removed".into(),
            Cause::Unavailable { status: 429, .. } => {
                "the registry limits how often it is asked: wait, log in, or set a [[registry.mirror]]".into()
            }
            Cause::Unavailable { .. } => "the registry has a problem: try again later".into(),
            Cause::Connect(_) | Cause::Broken(_) | Cause::Timeout { .. } => {
                format!("check that this machine reaches {host}; a proxy belongs into [build.proxy]")
            }
            Cause::Certificate(_) => format!(
                "name the PEM file that signed it in [[registry]] prefix = \"{host}\" as ca, or in [build] ca"
            ),
            Cause::Tls(_) => {
                format!("if it speaks plain HTTP, set insecure = true in [[registry]] prefix = \"{host}\"")
            }
            Cause::Mismatch { .. } | Cause::Length { .. } => {
                "a proxy or the registry damaged the bytes; they were thrown away: try again".into()
            }
            Cause::Manifest(error) => return manifest_hint(error, host),
            Cause::CaFile { .. } | Cause::Client(_) => {
                "check `ca` in [[registry]], [build.ca] and [build.proxy]".into()
            }
            Cause::Store(error) if error.is_disk_full() => {
                "free disk space, for example with `kiln prune`".into()
            }
            _ => return None,
        };
        Some(hint)
    }

    fn unauthorized_hint(&self, credential: bool) -> String {
        let host = &self.host;
        match (host == DOCKER_HUB, credential) {
            (true, _) => "Docker Hub answers like this for repositories that do not exist, too: check the \
                name; if it is private, run `docker login` or `podman login docker.io`"
                .into(),
            (false, true) => {
                format!("the stored credential for {host} is refused: check it and its rights, log in again")
            }
            (false, false) => {
                format!("no credential for {host} was found: run `podman login {host}` or pass --authfile")
            }
        }
    }
}

fn manifest_hint(error: &ManifestError, host: &str) -> Option<String> {
    let hint = match error {
        ManifestError::Json { .. } => {
            format!("check that {host} is a registry and not a web site or a portal")
        }
        ManifestError::Schema1 => "push the image again with a tool made after 2017".into(),
        ManifestError::LayerType { .. } => "choose a base image without foreign or encrypted layers".into(),
        ManifestError::NoPlatform { .. } => "choose a base image or a tag that has this platform".into(),
        _ => return None,
    };
    Some(hint)
}

/// The first error of type `T` among the sources. An I/O error hides the error that it carries from
/// `source()`, so it is opened.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = inner.map_or_else(|| error.source(), |inner| Some(inner as &(dyn Error + 'static)));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(host: &str, cause: Cause) -> RegistryError {
        RegistryError { reference: "x".into(), host: host.into(), cause: Box::new(cause), earlier: vec![] }
    }

    fn unauthorized(credential: bool) -> Cause {
        Cause::Unauthorized { by: "h".into(), status: 401, said: Said::default(), credential }
    }

    #[test]
    fn docker_hub_answers_401_for_what_does_not_exist() {
        let hint = error(DOCKER_HUB, unauthorized(false)).hint().unwrap();
        assert!(hint.contains("do not exist"), "{hint}");
        assert!(error("reg.corp", unauthorized(false)).hint().unwrap().contains("--authfile"));
        assert!(error("reg.corp", unauthorized(true)).hint().unwrap().contains("refused"));
    }

    #[test]
    fn a_full_disk_is_not_a_damaged_store() {
        let store = |kind: io::ErrorKind| {
            Cause::from(BlobError::Io { action: "write", path: "/x".into(), source: kind.into() })
        };
        assert_eq!(store(io::ErrorKind::StorageFull).reason(), Reason::DiskFull);
        assert_eq!(store(io::ErrorKind::QuotaExceeded).reason(), Reason::DiskFull);
        assert_eq!(store(io::ErrorKind::PermissionDenied).reason(), Reason::StoreCorrupt);
    }

    #[test]
    fn mirrors_that_were_asked_before_are_named() {
        let mut error =
            error("up", Cause::NotFound { said: Said { code: Some("NAME_UNKNOWN".into()), message: None } });
        error.earlier.push(EndpointFailure { host: "m1".into(), cause: Cause::Redirect("too often") });
        let text = crate::error::chain(&error);
        let expected = "cannot pull x from up (before that, mirror m1: redirected too often): \
            it is not there (NAME_UNKNOWN)";
        assert_eq!(text, expected);
    }

    #[test]
    fn an_error_inside_an_io_error_is_found() {
        let inner = io::Error::other(ManifestError::Schema1);
        let outer = io::Error::other(inner);
        assert!(find::<ManifestError>(&outer).is_some());
        assert!(find::<BlobError>(&outer).is_none());
    }
}
