//! One repository at one endpoint, over HTTP (shell).
//!
//! Every wait has a limit and every body a bound. An `Authorization` header goes to the endpoint itself and
//! to no other origin, whatever it redirects to.

use std::future::Future;
use std::sync::OnceLock;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::{Mutex, OnceCell};

use super::config::Endpoint;
use super::credentials::Credential;
use super::error::Cause;
use super::push::BlobSource;
use super::retry::{Limits, retry_after};
use super::said::Said;
use super::token;

/// Registries redirect blobs once, sometimes twice.
const MAX_REDIRECTS: usize = 5;
/// Bytes of an error body that are looked at for its code.
const ERROR_LIMIT: u64 = 16 * 1024;

/// A request that can be sent more than once.
#[derive(Debug)]
pub(super) struct Call {
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Payload,
}

/// What a request carries.
#[derive(Debug)]
pub(super) enum Payload {
    /// Nothing.
    None,
    /// A document.
    Bytes(Vec<u8>),
    /// A blob of the store.
    Blob(BlobSource),
}

impl Call {
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self { method, url, headers: HeaderMap::new(), body: Payload::None }
    }

    pub(super) fn header(mut self, name: HeaderName, value: &str) -> Result<Self, Cause> {
        let value = HeaderValue::from_str(value).map_err(|_| Cause::Header)?;
        self.headers.insert(name, value);
        Ok(self)
    }

    pub(super) fn body(self, body: Payload) -> Self {
        Self { body, ..self }
    }
}

/// A repository and what is needed to ask for it.
#[derive(Debug)]
pub(crate) struct Remote {
    pub(super) client: Client,
    pub(super) endpoint: Endpoint,
    pub(super) credential: Option<Credential>,
    /// What tokens are asked for.
    pub(super) scopes: Vec<String>,
    pub(super) limits: Limits,
    service: OnceLock<String>,
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
        scopes: Vec<String>,
        limits: Limits,
    ) -> Self {
        Self {
            client,
            endpoint,
            credential,
            scopes,
            limits,
            service: OnceLock::new(),
            base: OnceCell::new(),
            authorization: Mutex::default(),
        }
    }

    /// Sends a request for `manifests/…` or `blobs/…` and returns the answer if it is a success.
    pub(crate) async fn send(&self, method: Method, path: &str, accept: &str) -> Result<Response, Cause> {
        let call = Call::new(method, self.url(path).await?).header(ACCEPT, accept)?;
        self.expect(&call, &[StatusCode::OK]).await
    }

    /// Sends a request and returns the answer if its status is one of those.
    pub(super) async fn expect(&self, call: &Call, accepted: &[StatusCode]) -> Result<Response, Cause> {
        let response = self.call(call).await?;
        if accepted.contains(&response.status()) { Ok(response) } else { Err(self.failure(response).await) }
    }

    /// The address of `manifests/…` or `blobs/…` in this repository.
    pub(super) async fn url(&self, path: &str) -> Result<Url, Cause> {
        let base = self.base().await?;
        let mut url = base.clone();
        url.set_path(&format!("{}/{path}", base.path()));
        Ok(url)
    }

    /// Sends a request, a second time if the endpoint wants other authentication.
    pub(super) async fn call(&self, call: &Call) -> Result<Response, Cause> {
        let sent = self.authorization.lock().await.clone();
        let response = self.follow(call, sent.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED
            && self.is_home(response.url())
            && let Some(renewed) = self.renew(sent.as_ref(), response.headers()).await?
        {
            return self.follow(call, Some(&renewed)).await;
        }
        Ok(response)
    }

    /// Whether an address belongs to the endpoint itself, which alone gets its credential.
    pub(super) fn is_home(&self, url: &Url) -> bool {
        self.base.get().is_some_and(|base| base.origin() == url.origin())
    }

    /// Remembers what the token service is for.
    pub(super) fn note_service(&self, service: Option<&str>) {
        if let Some(service) = service {
            // The first one stays; it does not change within one push.
            let _ = self.service.set(service.to_owned());
        }
    }

    /// The service that tokens were asked for.
    pub(super) fn service(&self) -> Option<&str> {
        self.service.get().map(String::as_str)
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

    async fn follow(&self, call: &Call, authorization: Option<&HeaderValue>) -> Result<Response, Cause> {
        let mut next = call.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client.request(call.method.clone(), next.clone());
            request = request.headers(call.headers.clone());
            if let Some(authorization) = authorization.filter(|_| self.is_home(&next)) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.submit(request, &call.body).await?;
            match redirect(&response, self.endpoint.insecure)? {
                Some(target) => next = target,
                None => return Ok(response),
            }
        }
        Err(Cause::Redirect("too often"))
    }

    async fn submit(&self, request: RequestBuilder, payload: &Payload) -> Result<Response, Cause> {
        match payload {
            Payload::None => self.timed("waiting for an answer", request.send()).await,
            Payload::Bytes(bytes) => {
                let sending = request.body(bytes.clone()).send();
                self.timed("waiting for an answer", sending).await
            }
            Payload::Blob(source) => source.send(request, &self.limits).await,
        }
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
        let home = self.is_home(response.url());
        let said = self.said(&mut response).await;
        match status {
            408 | 425 | 429 | 500.. => Cause::Unavailable { by, status, said, retry_after },
            // The registry granted access and sent us there: a link that expired or a cache that is behind.
            400.. if !home => Cause::Unavailable { by, status, said, retry_after },
            401 | 403 => Cause::Unauthorized { by, status, said, credential: self.credential.is_some() },
            404 => Cause::NotFound { said },
            _ => Cause::Refused { by, status, said },
        }
    }

    async fn said(&self, response: &mut Response) -> Said {
        let body = self.body(response, ERROR_LIMIT, "the answer").await.unwrap_or_default();
        let current = self.authorization.lock().await.clone();
        let current = current.as_ref().and_then(|header| header.to_str().ok());
        let token = current.and_then(|header| header.split_once(' ')).map(|(_, token)| token);
        let own = self.credential.as_ref().map(Credential::secret);
        Said::read(&body, own.into_iter().chain(token))
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
    location(response, insecure).map(Some)
}

/// The address in the `Location` header, if one may go there.
pub(super) fn location(response: &Response, insecure: bool) -> Result<Url, Cause> {
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
    Ok(target)
}

/// Whether one may go on from one scheme to another: never from TLS to plain text, unless that is accepted.
pub(super) fn allowed(from: &str, to: &str, insecure: bool) -> bool {
    to == "https" || (to == "http" && (from == "http" || insecure))
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
}
