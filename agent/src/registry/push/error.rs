//! Why a push failed, for people and across processes (pure).
//!
//! The error of a push is data: it is made in one process and read in another, so its sources are text.

use std::fmt;

use kiln_protocol::Reason;
use serde::{Deserialize, Serialize};

use super::failed::{Again, Failed};
use crate::blobs::BlobError;
use crate::error::chain;
use crate::registry::Said;
use crate::registry::error::{Cause, RegistryError};

/// What kind of failure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It may pass: overload, a rate limit, a broken connection.
    Transient,
    /// The credential is wrong, or lacks the right to push.
    Unauthorized,
    /// The registry knows no such repository or project.
    NotFound,
    /// A rule of the registry forbids to move this tag.
    ImmutableTag,
    /// The project or account is full.
    Quota,
    /// The registry, or a proxy before it, takes no body of this size.
    TooLarge,
    /// Another state of the registry stands against it.
    Conflict,
    /// The registry cannot do this.
    Unsupported,
    /// The registry calls the manifest or the request invalid, or a policy forbids it.
    Invalid,
    /// Configuration, certificates or redirects on our side or theirs.
    Setup,
    /// The registry stored something else than it was sent.
    OtherDigest,
    /// The sealed bytes are gone, damaged or cannot be read.
    Candidate,
}

impl Kind {
    /// Whether the registry refuses for good: asking again changes nothing until a person changes something.
    pub fn is_refusal(self) -> bool {
        !matches!(self, Self::Transient | Self::OtherDigest | Self::Candidate)
    }

    fn of(failed: &Failed) -> Self {
        if failed.again() == Again::Always {
            return Self::Transient;
        }
        match failed {
            Failed::OtherDigest { .. } => Self::OtherDigest,
            Failed::ImmutableTag { .. } => Self::ImmutableTag,
            Failed::Client(Cause::Store(_)) => Self::Candidate,
            Failed::Client(Cause::Interrupted | Cause::Length { .. } | Cause::Mismatch { .. }) => {
                Self::Transient
            }
            Failed::Client(Cause::NotFound { said }) => Self::of_answer(404, said),
            Failed::Client(
                Cause::Unauthorized { status, said, .. } | Cause::Refused { status, said, .. },
            ) => Self::of_answer(*status, said),
            Failed::Client(_) => Self::Setup,
        }
    }

    /// What an answer means. Harbor answers 403 `DENIED` for quotas and 412 `PRECONDITION` for immutable tags
    /// (its `src/controller/quota/controller.go`, `src/server/middleware/immutable`, `src/lib/http/error.go`);
    /// ECR answers `TAG_INVALID` for those (moby/buildkit issue 3776).
    fn of_answer(status: u16, said: &Said) -> Self {
        match status {
            _ if said.mentions("quota") || said.mentions("configured upper limit") => Self::Quota,
            400 | 403 | 409 | 412 if said.mentions("immutable") => Self::ImmutableTag,
            401 | 403 => Self::Unauthorized,
            404 => Self::NotFound,
            405 | 415 | 501 => Self::Unsupported,
            409 => Self::Conflict,
            413 => Self::TooLarge,
            _ => Self::Invalid,
        }
    }

    fn reason(self, failed: &Failed) -> Reason {
        match (self, failed) {
            (Self::Candidate, Failed::Client(cause @ Cause::Store(error))) => match error {
                BlobError::Io { source, .. } if source.kind() != std::io::ErrorKind::NotFound => {
                    cause.reason()
                }
                _ => Reason::CandidateCorrupt,
            },
            (Self::OtherDigest, _) => Reason::CandidateCorrupt,
            (Self::Unauthorized, _) => Reason::Unauthorized,
            (Self::NotFound, _) => Reason::NotFound,
            (Self::Transient, Failed::Client(cause)) => cause.reason(),
            _ => Reason::BadRequest,
        }
    }
}

/// A push that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushError {
    /// `host[:port]`.
    pub registry: String,
    /// The repository on that host.
    pub repository: String,
    /// The tag, if one was to be moved or looked at.
    pub tag: Option<String>,
    /// What kind of failure it is.
    pub kind: Kind,
    /// The class for the build.
    pub reason: Reason,
    /// HTTP status, if the registry answered.
    pub status: Option<u16>,
    /// The registry's own error code.
    pub code: Option<String>,
    /// The registry's own words, shortened and without control characters.
    pub answer: Option<String>,
    /// What happened, with its sources.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for PushError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot push to {}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        write!(f, ": {}", self.message)?;
        self.answer.as_ref().map_or(Ok(()), |answer| write!(f, ": {answer}"))
    }
}

impl std::error::Error for PushError {}

impl PushError {
    pub(super) fn new(registry: &str, repository: &str, tag: Option<&str>, failed: Failed) -> Self {
        let kind = Kind::of(&failed);
        let (status, said) = answer(&failed);
        let mut error = Self {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            kind,
            reason: kind.reason(&failed),
            status,
            code: said.code,
            answer: said.message,
            message: chain(&failed),
            hint: None,
        };
        error.hint = error.find_hint(failed);
        error
    }

    fn find_hint(&self, failed: Failed) -> Option<String> {
        let Self { registry, repository, .. } = self;
        let hint = match (self.kind, &failed) {
            (Kind::Unauthorized, Failed::Client(Cause::Unauthorized { credential: false, .. })) => format!(
                "no credential for {registry} was found: run `podman login {registry}` or pass --authfile"
            ),
            (Kind::Unauthorized, _) => format!(
                "the credential for {registry} needs the right to pull and push in {repository}; in Harbor, \
                 a robot account needs both for this project"
            ),
            (Kind::NotFound, _) => {
                format!("check the name; some registries want {repository} or its project to be made first")
            }
            (Kind::ImmutableTag, _) => {
                "push to another tag, or change the immutability rule of the registry".to_owned()
            }
            (Kind::Quota, _) => {
                "delete images that nobody needs, or ask for a larger quota of the project".to_owned()
            }
            (Kind::TooLarge, _) => {
                "raise the body limit of the registry or of the proxy before it (nginx: client_max_body_size)"
                    .to_owned()
            }
            (Kind::OtherDigest, _) => {
                "something between here and the registry changes manifests; nothing may be published like that"
                    .to_owned()
            }
            (_, Failed::Client(Cause::Unavailable { status: 429, .. })) => {
                "the registry limits how often it is asked: wait, or push with another account".to_owned()
            }
            (_, Failed::Client(Cause::Redirect(_))) => format!(
                "{registry} names an address of its own that cannot be used: its external URL must be https"
            ),
            (_, Failed::Client(_)) => return self.general_hint(failed),
            _ => return None,
        };
        Some(hint)
    }

    /// What helps a pull against connections, certificates and the configuration helps a push.
    fn general_hint(&self, failed: Failed) -> Option<String> {
        let Failed::Client(cause) = failed else { return None };
        let (reference, host) = (self.repository.clone(), self.registry.clone());
        RegistryError { reference, host, cause: Box::new(cause), earlier: Vec::new() }.hint()
    }
}

fn answer(failed: &Failed) -> (Option<u16>, Said) {
    match failed {
        Failed::Client(
            Cause::Unauthorized { status, said, .. }
            | Cause::Unavailable { status, said, .. }
            | Cause::Refused { status, said, .. },
        ) => (Some(*status), said.clone()),
        Failed::Client(Cause::NotFound { said }) => (Some(404), said.clone()),
        _ => (None, Said::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(code: &str, message: &str) -> Said {
        Said { code: Some(code.into()), message: Some(message.into()) }
    }

    fn error(failed: impl Into<Failed>) -> PushError {
        PushError::new("reg.corp", "team/app", Some("1"), failed.into())
    }

    #[test]
    fn answers_have_their_kinds() {
        let quota = "Quota exceeded when processing the request of adding 1 MiB of storage resource, which \
                     when updated to current usage of 9 MiB will exceed the configured upper limit of 9 MiB.";
        for (status, code, message, kind) in [
            (400, "MANIFEST_INVALID", "manifest invalid", Kind::Invalid),
            (
                400,
                "TAG_INVALID",
                "cannot be overwritten because the repository is immutable",
                Kind::ImmutableTag,
            ),
            (401, "UNAUTHORIZED", "unauthorized to access repository", Kind::Unauthorized),
            (403, "DENIED", "requested access to the resource is denied", Kind::Unauthorized),
            (403, "DENIED", quota, Kind::Quota),
            (412, "DENIED", quota, Kind::Quota),
            (404, "NAME_UNKNOWN", "repository name not known", Kind::NotFound),
            (405, "UNSUPPORTED", "unsupported", Kind::Unsupported),
            (409, "CONFLICT", "conflict", Kind::Conflict),
            (412, "PRECONDITION", "'app:1' configured as immutable", Kind::ImmutableTag),
            (412, "PROJECTPOLICYVIOLATION", "current image is not signed", Kind::Invalid),
            (413, "SIZE_INVALID", "too large", Kind::TooLarge),
        ] {
            assert_eq!(Kind::of_answer(status, &said(code, message)), kind, "{status} {code} {message}");
            assert!(kind.is_refusal());
        }
    }

    #[test]
    fn a_refusal_names_everything_and_the_way_out() {
        let said = said("PRECONDITION", "Failed to process request due to 'app:1' configured as immutable.");
        let error = error(Cause::Refused { by: "reg.corp".into(), status: 412, said });
        assert_eq!(
            error.to_string(),
            "cannot push to reg.corp/team/app:1: reg.corp answered 412 (PRECONDITION): Failed to process \
             request due to 'app:1' configured as immutable."
        );
        assert_eq!((error.status, error.reason), (Some(412), Reason::BadRequest));
        assert!(error.hint.unwrap().contains("another tag"));
    }

    #[test]
    fn bytes_that_are_lost_damaged_or_unreadable_are_the_candidate() {
        let io = |kind: std::io::ErrorKind| {
            let path = "/x".into();
            error(Cause::Store(BlobError::Io { action: "open", path, source: kind.into() }))
        };
        assert_eq!(io(std::io::ErrorKind::NotFound).reason, Reason::CandidateCorrupt);
        assert_eq!(io(std::io::ErrorKind::PermissionDenied).reason, Reason::StoreCorrupt);
        let digest = |bytes: &[u8]| crate::blobs::digest_of(bytes);
        let other = error(Failed::OtherDigest { expected: digest(b"a"), answered: digest(b"b") });
        assert_eq!((other.kind, other.reason), (Kind::OtherDigest, Reason::CandidateCorrupt));
        assert!(!other.kind.is_refusal());
        let back: PushError = serde_json::from_str(&serde_json::to_string(&other).unwrap()).unwrap();
        assert_eq!(back, other);
    }
}
