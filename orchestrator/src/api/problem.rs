//! Refusals (edge): from the errors of the record to `application/problem+json`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kiln_protocol::api::{Code, Problem};
use kiln_transport::blobs::BlobError;

use crate::control::ControlError;
use crate::core::CoreError;
use crate::error::chain;
use crate::logs::LogError;
use crate::submit::SubmitError;

/// Seconds: most trouble with a database is over soon, or lasts long.
const RETRY_AFTER: &str = "2";

/// A request is refused.
#[derive(Debug)]
pub(super) struct Refusal {
    code: Code,
    detail: String,
}

impl Refusal {
    pub(super) fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }

    #[cfg(test)]
    pub(super) const fn code(&self) -> Code {
        self.code
    }

    /// Nothing in the request is wrong. The cause goes to the log of the server, not to whoever asks.
    fn ours(code: Code, error: &dyn std::error::Error) -> Self {
        tracing::warn!(error = chain(error), code = code.label(), "a request cannot be answered");
        Self::new(code, "the server cannot answer this now; its own log says why")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = Problem::new(self.code, self.detail);
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.code == Code::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.code == Code::Unavailable {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        response
    }
}

impl From<CoreError> for Refusal {
    fn from(error: CoreError) -> Self {
        match error {
            CoreError::Conflict(_) => Self::new(Code::Changed, error.to_string()),
            CoreError::Illegal(illegal) => Self::new(Code::DiscardRefused, illegal.to_string()),
            CoreError::Store(_) => Self::ours(Code::Unavailable, &error),
            CoreError::Envelope(_) => Self::ours(Code::Internal, &error),
        }
    }
}

impl From<ControlError> for Refusal {
    fn from(error: ControlError) -> Self {
        let code = match error {
            ControlError::Missing(_) => Code::BuildMissing,
            ControlError::Cancel { .. } => Code::CancelRefused,
            ControlError::Replay { .. } => Code::ReplayRefused,
            ControlError::Core(core) => return core.into(),
        };
        Self::new(code, chain(&error))
    }
}

impl From<SubmitError> for Refusal {
    fn from(error: SubmitError) -> Self {
        let code = match error {
            SubmitError::Invalid(_) => Code::InvalidSpec,
            SubmitError::Key(_) => Code::BadRequest,
            SubmitError::OtherRequest(_) => Code::KeyReused,
            SubmitError::NotOver { .. } => Code::NotOver,
            SubmitError::Missing(_) => Code::BuildMissing,
            SubmitError::ContextMissing(_) => Code::ContextMissing,
            SubmitError::Contexts(error) => return error.into(),
            SubmitError::Core(core) => return core.into(),
        };
        Self::new(code, chain(&error))
    }
}

impl From<BlobError> for Refusal {
    fn from(error: BlobError) -> Self {
        match &error {
            BlobError::TooLarge { .. } => Self::new(Code::TooLarge, error.to_string()),
            BlobError::Mismatch { .. } => Self::new(Code::DigestMismatch, error.to_string()),
            BlobError::Io { .. } if error.is_disk_full() => {
                Self::new(Code::DiskFull, "the disk of the server is full; upload again once it has room")
            }
            BlobError::Io { .. } => Self::ours(Code::Unavailable, &error),
        }
    }
}

impl From<LogError> for Refusal {
    fn from(error: LogError) -> Self {
        Self::ours(Code::Unavailable, &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_meets_trouble_of_the_database_is_told_to_come_again() {
        let trouble = crate::store::StoreError::from(sqlx::Error::PoolTimedOut);
        let response = Refusal::from(CoreError::Store(trouble)).into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(response.headers().contains_key(header::RETRY_AFTER));
        let ours = Refusal::new(Code::BadRequest, "").into_response();
        assert!(!ours.headers().contains_key(header::RETRY_AFTER));
    }
}
