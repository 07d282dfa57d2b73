//! Uploaded contexts (edge).

use std::time::Duration;

use axum::Json as Answer;
use axum::body::Body;
use axum::extract::State as Context;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use kiln_protocol::Digest;
use kiln_protocol::api::{Code, Stored};
use kiln_transport::blobs::{BlobError, BlobWriter};
use kiln_transport::crash::{self, CrashPoint};

use super::problem::Refusal;
use super::request::{Named, text};
use super::{Served, serve};

/// An upload that sends nothing for this long is given up.
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);

/// Whether a context need not be sent.
pub(super) async fn exists(
    Context(served): Context<Served>,
    Named(digest): Named<Digest>,
) -> Result<Response, Refusal> {
    touch(&served, &digest).await?;
    Ok(match served.contexts.size(&digest).await? {
        Some(size) => [(header::CONTENT_LENGTH, size)].into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    })
}

/// Keeps a context for whoever asks for it, until the build is there that needs it.
pub(super) async fn touch(served: &Served, digest: &Digest) -> Result<(), Refusal> {
    served.contexts.touch(digest, jiff::Timestamp::now().into()).await?;
    Ok(())
}

/// Stores a context. Sending it again does no harm.
pub(super) async fn upload(
    Context(served): Context<Served>,
    Named(digest): Named<Digest>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let limit = served.max_context_bytes;
    let announced = text(&headers, header::CONTENT_LENGTH.as_str())?.and_then(|length| length.parse().ok());
    if announced.is_some_and(|length: u64| length > limit) {
        return Err(BlobError::TooLarge { expected: digest, limit }.into());
    }
    let known = served.contexts.size(&digest).await?.is_some();
    let writer = served.contexts.put(digest.clone(), limit).await?;
    let size = tokio::time::timeout(serve::MAX_LIFE, receive(served, writer, body)).await;
    let size = size.map_err(|_| Refusal::new(Code::Timeout, "the upload took too long"))??;
    crash::reach(CrashPoint::ContextStored);
    let status = if known { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Answer(Stored { digest, size })).into_response())
}

async fn receive(served: Served, mut writer: BlobWriter, body: Body) -> Result<u64, Refusal> {
    let mut parts = body.into_data_stream();
    let broken = |why: &str| Refusal::new(Code::BadRequest, format!("the upload {why}; send it again"));
    loop {
        let part = tokio::select! {
            part = tokio::time::timeout(IDLE_TIMEOUT, parts.next()) => part,
            () = served.closing.begun() => {
                return Err(Refusal::new(Code::Unavailable, "the server stops; upload again later"));
            }
        };
        match part.map_err(|_| broken("stood still"))? {
            Some(Ok(bytes)) => writer.write(&bytes).await?,
            Some(Err(_)) => return Err(broken("broke off")),
            None => return Ok(writer.finish().await?),
        }
    }
}
