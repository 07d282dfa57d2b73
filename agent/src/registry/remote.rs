//! One repository at one endpoint, over HTTP (shell).
//!
//! Every wait has a limit and every body a bound. An `Authorization` header goes to the endpoint itself and
//! to no other origin, whatever it redirects to.

use std::future::Future;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::{Mutex, OnceCell};

use super::config::Endpoint;
use super::credentials::Credential;
use super::error::Cause;
use super::retry::{Limits, retry_after};
use super::token;

/// Registries redirect blobs once, sometimes twice.
const MAX_REDIRECTS: usize = 5;
/// Bytes of an error body that are looked at for its code.
const ERROR_LIMIT: u64 = 16 * 1024;
/// Registries' own codes are about half as long.
const CODE_CHARACTERS: usize = 40;

/// A repository and what is needed to ask for it.
#[derive(Debug)]
pub(crate) struct Remote {
    pub(super) client: Client,
    pub(super) endpoint: Endpoint,
    pub(super) credential: Option<Credential>,
    pub(super) limits: Limits,
    /// `https://host/v2/repository`, once it is known whether the endpoint speaks TLS.
    base: OnceCell<Url>,
    /// What the endpoint accepted last. Held while it is renewed, so that parallel requests renew it once.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Remote {
    pub(crate) fn new(
        client: Client,
        endpoint: Endpoint,
        credential: Option<Credential>,
        limits: Limits,
    ) -> Self {
        Self { client, endpoint, credential, limits, base: OnceCell::new(), authorization: Mutex::default() }
    }

    /// Sends a request for `manifests/…` or `blobs/…` and returns the answer if it is a success.
    pub(crate) async fn send(&self, method: Method, path: &str, accept: &str) -> Result<Response, Cause> {
        let base = self.base().await?;
        let mut url = base.clone();
        url.set_path(&format!("{}/{path}", base.path()));
        let sent = self.authorization.lock().await.clone();
        let mut response = self.follow(&method, &url, accept, sent.as_ref()).await?;
        let home = response.url().origin() == base.origin();
        if home
            && response.status() == StatusCode::UNAUTHORIZED
            && let Some(renewed) = self.renew(sent.as_ref(), response.headers()).await?
        {
            response = self.follow(&method, &url, accept, Some(&renewed)).await?;
        }
        if response.status() == StatusCode::OK { Ok(response) } else { Err(self.failure(response).await) }
    }

    /// The next piece of a body, within the idle timeout.
    pub(crate) async fn chunk(&self, response: &mut Response) -> Result<Option<impl AsRef<[u8]>>, Cause> {
        self.timed("waiting for the next bytes", response.chunk()).await
    }

    /// A whole body of at most `limit` bytes.
    pub(crate) async fn body(
        &self,
        response: &mut Response,
        limit: u64,
        what: &'static str,
    ) -> Result<Vec<u8>, Cause> {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk(response).await? {
            body.extend_from_slice(chunk.as_ref());
            if body.len() as u64 > limit {
                return Err(Cause::TooLarge { what, limit });
            }
        }
        Ok(body)
    }

    /// `https` unless the endpoint turned out to be plain.
    pub(super) fn scheme(&self) -> &str {
        self.base.get().map_or("https", Url::scheme)
    }

    async fn base(&self) -> Result<&Url, Cause> {
        self.base.get_or_try_init(|| self.find_base()).await
    }

    /// An endpoint that may be insecure is asked for TLS first, as registries.conf does.
    async fn find_base(&self) -> Result<Url, Cause> {
        let url = |scheme: &str, path: &str| {
            let text = format!("{scheme}://{}/v2/{path}", self.endpoint.address());
            Url::parse(&text).map_err(|_| Cause::Address(self.endpoint.host.clone()))
        };
        let plain = self.endpoint.insecure && {
            let probe = self.client.head(url("https", "")?).send();
            self.timed("waiting for an answer", probe).await.is_err()
        };
        url(if plain { "http" } else { "https" }, &self.endpoint.repository)
    }

    async fn follow(
        &self,
        method: &Method,
        url: &Url,
        accept: &str,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Cause> {
        let mut next = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client.request(method.clone(), next.clone()).header(ACCEPT, accept);
            if let Some(authorization) = authorization.filter(|_| next.origin() == url.origin()) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.timed("waiting for an answer", request.send()).await?;
            match redirect(&response, self.endpoint.insecure)? {
                Some(target) => next = target,
                None => return Ok(response),
            }
        }
        Err(Cause::Redirect("too often"))
    }

    /// Answers the endpoint's challenge; `None` if there is nothing better than what was sent.
    async fn renew(
        &self,
        sent: Option<&HeaderValue>,
        headers: &HeaderMap,
    ) -> Result<Option<HeaderValue>, Cause> {
        let mut current = self.authorization.lock().await;
        if current.as_ref() != sent {
            // A parallel request was faster.
            return Ok(current.clone());
        }
        let answer = token::answer(self, headers).await?;
        *current = answer.filter(|answer| Some(answer) != sent);
        Ok(current.clone())
    }

    pub(super) async fn timed<T>(
        &self,
        what: &'static str,
        future: impl Future<Output = Result<T, reqwest::Error>>,
    ) -> Result<T, Cause> {
        let limit = self.limits.idle;
        let answered = tokio::time::timeout(limit, future).await;
        let answered = answered.map_err(|_| Cause::Timeout { what, limit })?;
        answered.map_err(|error| Cause::of_request(error, self.limits.connect))
    }

    /// Why an answer is not a success.
    pub(super) async fn failure(&self, mut response: Response) -> Cause {
        let by = host(response.url());
        let status = response.status().as_u16();
        let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after = asked.and_then(retry_after);
        let home = self.base.get().is_some_and(|base| base.origin() == response.url().origin());
        let body = self.body(&mut response, ERROR_LIMIT, "the answer").await;
        let code = body.ok().and_then(|body| error_code(&body));
        match status {
            408 | 429 | 500.. => Cause::Unavailable { by, status, code, retry_after },
            // The registry granted access and sent us there: a link that expired or a cache that is behind.
            400.. if !home => Cause::Unavailable { by, status, code, retry_after },
            401 | 403 => Cause::Unauthorized { by, status, code, credential: self.credential.is_some() },
            404 => Cause::NotFound { code },
            _ => Cause::Refused { by, status, code },
        }
    }
}

/// `host[:port]`, without anything secret that an address may carry.
pub(super) fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Where an answer sends us, if it does and if we go there.
fn redirect(response: &Response, insecure: bool) -> Result<Option<Url>, Cause> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let target = location.and_then(|location| response.url().join(location).ok());
    let mut target = target.ok_or(Cause::Redirect("to nowhere"))?;
    if !allowed(response.url().scheme(), target.scheme(), insecure) {
        return Err(Cause::Redirect("to an address without encryption"));
    }
    // Else the library would send what stands there as a password.
    if target.set_username("").is_err() || target.set_password(None).is_err() {
        return Err(Cause::Redirect("to nowhere"));
    }
    Ok(Some(target))
}

/// Whether one may go on from one scheme to another: never from TLS to plain text, unless that is accepted.
pub(super) fn allowed(from: &str, to: &str, insecure: bool) -> bool {
    to == "https" || (to == "http" && (from == "http" || insecure))
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    code: String,
}

/// The code of an error body. Its message is left out: it is free text of a stranger.
fn error_code(body: &[u8]) -> Option<String> {
    let body: ErrorBody = serde_json::from_slice(body).ok()?;
    let code = body.errors.into_iter().next()?.code;
    let plain = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    (!code.is_empty() && code.len() <= CODE_CHARACTERS && code.chars().all(plain)).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encryption_is_never_given_up_on_the_way() {
        assert!(allowed("https", "https", false));
        assert!(allowed("http", "https", false));
        assert!(allowed("http", "http", false));
        assert!(allowed("https", "http", true));
        assert!(!allowed("https", "http", false));
        assert!(!allowed("http", "file", true));
    }

    #[test]
    fn only_a_plain_code_is_taken_from_an_error_body() {
        let code = |text: &str| error_code(text.as_bytes());
        assert_eq!(
            code(r#"{"errors":[{"code":"NAME_UNKNOWN","message":"m"}]}"#),
            Some("NAME_UNKNOWN".into())
        );
        for body in [
            r#"{"errors":[{"code":"Bearer eyJhbGci"}]}"#,
            r#"{"errors":[]}"#,
            r#"{"errors":[{"code":""}]}"#,
            "<html>",
        ] {
            assert_eq!(code(body), None, "{body}");
        }
    }
}
