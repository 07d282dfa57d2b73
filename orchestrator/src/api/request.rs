//! The parts of a request, each read within its bounds (edge).

use std::str::FromStr;

use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use kiln_protocol::api::Code;
use serde::de::DeserializeOwned;

use super::problem::Refusal;

/// A build description has its own limit; this one leaves room for its JSON to be written less densely.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// The one parameter of a path.
pub(super) struct Named<T>(pub(super) T);

impl<S: Send + Sync, T: FromStr<Err: std::fmt::Display>> FromRequestParts<S> for Named<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        let Path(text) = text.map_err(|e| Refusal::new(Code::BadRequest, e.body_text()))?;
        let parsed = text.parse().map_err(|e| Refusal::new(Code::BadRequest, format!("`{text}`: {e}")));
        parsed.map(Self)
    }
}

/// What follows the question mark.
pub(super) struct Asked<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        let Query(asked) = query.map_err(|e| Refusal::new(Code::BadRequest, e.body_text()))?;
        Ok(Self(asked))
    }
}

/// A body of JSON. A page of another site cannot send one without asking first.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let kind = text(request.headers(), header::CONTENT_TYPE.as_str())?.unwrap_or_default();
        if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
            return Err(Refusal::new(Code::NotJson, "send the body as application/json"));
        }
        let long = |_| {
            Refusal::new(
                Code::TooLarge,
                format!("the body ended early or has more than {MAX_BODY_BYTES} bytes"),
            )
        };
        let body = to_bytes(request.into_body(), MAX_BODY_BYTES).await.map_err(long)?;
        let read = serde_json::from_slice(&body);
        read.map(Self).map_err(|e| Refusal::new(Code::BadRequest, format!("the body: {e}")))
    }
}

/// The text of a header.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Refusal> {
    let unreadable = |_| Refusal::new(Code::BadRequest, format!("the header {name} is no plain text"));
    headers.get(name).map(|value| value.to_str().map_err(unreadable)).transpose()
}
