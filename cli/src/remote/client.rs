//! Requests to a server (edge).

use std::path::Path;
use std::time::Duration;

use kiln_agent::error::chain;
use kiln_protocol::api::{PREFIX, Problem};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::args::{ServerAddress, Whom, default_socket, default_token};
use super::error::ServerError;
use crate::app::Exit;
use crate::paths;

/// A server on this machine accepts at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A server gives up on a question before this.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);
/// Problems are small; who sends more is no Kiln.
const MAX_PROBLEM_BYTES: usize = 64 * 1024;
/// A page of builds with their failures and outcomes.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// A token file has one line.
const MAX_TOKEN_BYTES: u64 = 1024;

/// A server that can be asked.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    client: Client,
    base: String,
    token: Option<String>,
    /// What people call it.
    pub(crate) address: String,
}

impl Server {
    /// The server that the arguments name, or the one of the data directory.
    pub(crate) fn of(whom: &Whom) -> Result<Self, Exit> {
        let data = || paths::data_dir(&whom.places);
        let address = match &whom.server {
            Some(address) => address.clone(),
            None => ServerAddress::Unix(default_socket(&data()?)),
        };
        let mut builder = Client::builder().connect_timeout(CONNECT_TIMEOUT).no_proxy();
        let (base, token, address) = match address {
            ServerAddress::Unix(path) => {
                let address = format!("unix:{}", path.display());
                builder = builder.unix_socket(path);
                ("http://localhost".to_owned(), None, address)
            }
            ServerAddress::Http(url) => {
                let file = match &whom.access.token_file {
                    Some(file) => file.clone(),
                    None => default_token(&data()?),
                };
                (url.clone(), Some(read_token(&file)?), url)
            }
        };
        let client = builder.build().map_err(|e| Exit::system(format!("start the client: {}", chain(&e))))?;
        Ok(Self { client, base: format!("{base}{PREFIX}"), token, address })
    }

    /// A request; its sender bounds it.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// The answer to a question.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ServerError> {
        self.ask(self.request(Method::GET, path)).await
    }

    /// The answer to a change.
    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ServerError> {
        self.ask(self.request(Method::POST, path)).await
    }

    /// The answer to a request that is answered soon.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ServerError> {
        self.upload(request.timeout(ANSWER_TIMEOUT)).await
    }

    /// The answer to a request with a bound of its own.
    pub(crate) async fn upload<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
    ) -> Result<T, ServerError> {
        let response = self.send(request).await?;
        let body = self.body(response, MAX_ANSWER_BYTES).await?;
        serde_json::from_slice(&body).map_err(|e| self.strange(format!("something unreadable ({e})")))
    }

    /// A request with a body.
    pub(crate) fn with_json(
        &self,
        request: RequestBuilder,
        body: &impl Serialize,
    ) -> Result<RequestBuilder, ServerError> {
        let body = serde_json::to_vec(body);
        let body = body.map_err(|e| self.strange(format!("nothing, as the request has no JSON ({e})")))?;
        Ok(request.header("content-type", "application/json").body(body))
    }

    /// The beginning of an answer, unless it is a refusal.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response, ServerError> {
        let response = request.send().await.map_err(|source| self.silent(source))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = self.body(response, MAX_PROBLEM_BYTES).await?;
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(ServerError::Refused(problem)),
            Err(_) => Err(self.strange(format!("{status} without saying why"))),
        }
    }

    async fn body(&self, mut response: Response, limit: usize) -> Result<Vec<u8>, ServerError> {
        let mut body = Vec::new();
        loop {
            let part = tokio::time::timeout(ANSWER_TIMEOUT, response.chunk()).await;
            match part.map_err(|_| self.slow(ANSWER_TIMEOUT))?.map_err(|source| self.silent(source))? {
                Some(part) if body.len() + part.len() > limit => {
                    return Err(self.strange(format!("more than {limit} bytes")));
                }
                Some(part) => body.extend_from_slice(&part),
                None => return Ok(body),
            }
        }
    }

    pub(super) fn silent(&self, source: reqwest::Error) -> ServerError {
        // The URL says nothing more than the address.
        ServerError::Silent { address: self.address.clone(), source: source.without_url() }
    }

    pub(super) fn slow(&self, waited: Duration) -> ServerError {
        ServerError::Slow { address: self.address.clone(), seconds: waited.as_secs() }
    }

    pub(super) fn strange(&self, what: String) -> ServerError {
        ServerError::Strange { address: self.address.clone(), what }
    }
}

fn read_token(path: &Path) -> Result<String, Exit> {
    use std::io::Read as _;
    let failed = |e: std::io::Error| {
        let message = format!("read the token file {}: {e}", path.display());
        Exit::usage(message).with_hint("name it with --token-file FILE or KILN_TOKEN_FILE")
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_TOKEN_BYTES).read_to_string(&mut text).map_err(failed)?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Exit::usage(format!("the file {} holds no token", path.display())));
    }
    Ok(token.to_owned())
}
