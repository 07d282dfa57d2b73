//! Why one request of a push failed, and whether it is sent again (pure).

use kiln_protocol::Digest;

use crate::registry::error::Cause;

/// Why a push failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    /// As a pull may fail.
    #[error(transparent)]
    Client(#[from] Cause),
    /// The registry stored something else than it was sent, or says so.
    #[error("the registry answered another digest: {answered}, not {expected}")]
    OtherDigest {
        /// What was sent.
        expected: Digest,
        /// What the registry names.
        answered: Digest,
    },
    /// A rule of the registry forbids to move this tag, as its own interface says.
    #[error("the tag exists with digest {existing} and a rule of the registry makes it immutable")]
    ImmutableTag {
        /// What it points to.
        existing: Digest,
    },
}

/// When something is sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// As long as there is time.
    Always,
    /// A few times: it may be a replica that is behind, and it may be for good.
    Sometimes,
    /// It would fail again.
    Never,
}

/// Codes for an upload session that is gone, for bytes that were damaged on the way, and for a manifest whose
/// blobs the replica has not seen yet. Names: error codes of the OCI distribution specification.
const PASSING_CODES: [&str; 5] =
    ["BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID", "DIGEST_INVALID", "SIZE_INVALID", "MANIFEST_BLOB_UNKNOWN"];

impl Failed {
    pub(super) fn again(&self) -> Again {
        let Self::Client(cause) = self else { return Again::Never };
        match cause {
            Cause::Unavailable { .. } | Cause::Connect(_) | Cause::Broken(_) | Cause::Timeout { .. } => {
                Again::Always
            }
            Cause::Refused { status: 416, .. } => Again::Sometimes,
            Cause::Refused { said, .. } | Cause::NotFound { said } => {
                let passing = said.code.as_deref().is_some_and(|code| PASSING_CODES.contains(&code));
                if passing { Again::Sometimes } else { Again::Never }
            }
            _ => Again::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Said;
    use std::time::Duration;

    fn refused(status: u16, code: &str) -> Failed {
        let said = Said { code: Some(code.into()), message: None };
        Cause::Refused { by: "h".into(), status, said }.into()
    }

    #[test]
    fn what_may_pass_is_sent_again() {
        let said = Said::default();
        let busy = Cause::Unavailable { by: "h".into(), status: 503, said, retry_after: None };
        let hung = Cause::Timeout { what: "x", limit: Duration::ZERO };
        assert_eq!(Failed::from(busy).again(), Again::Always);
        assert_eq!(Failed::from(hung).again(), Again::Always);
        assert_eq!(refused(416, "X").again(), Again::Sometimes);
        assert_eq!(refused(400, "DIGEST_INVALID").again(), Again::Sometimes);
        assert_eq!(refused(400, "MANIFEST_INVALID").again(), Again::Never);
        assert_eq!(refused(412, "PRECONDITION").again(), Again::Never);
    }
}
