//! Answers a registry's request for authentication (shell).
//!
//! The token is asked for with the scope that this pull or push needs, not with the one that the challenge names: a
//! registry cannot make us fetch a token for something else. Its lifetime is not tracked; a token that ended
//! is noticed by the next 401.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use super::challenge::{self, Challenge};
use super::credentials::Credential;
use super::error::Cause;
use super::remote::{Remote, allowed, host};
use super::said::Said;

/// Bytes of the largest token answer; tokens that list many groups reach tens of KiB.
const TOKEN_LIMIT: u64 = 256 * 1024;
const CLIENT_ID: &str = "kiln";

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The `Authorization` header that the challenge asks for; `None` if we have nothing to show.
pub(super) async fn answer(remote: &Remote, headers: &HeaderMap) -> Result<Option<HeaderValue>, Cause> {
    let challenges = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    match (challenge::best(challenges), &remote.credential) {
        (Some(Challenge::Bearer { realm, service }), _) => {
            remote.note_service(service.as_deref());
            bearer(remote, &realm, service.as_deref()).await.map(Some)
        }
        (Some(Challenge::Basic), Some(Credential::Password { username, password })) => {
            basic(remote, username, password).map(Some)
        }
        _ => Ok(None),
    }
}

/// The header for a name and a password.
pub(super) fn basic(remote: &Remote, username: &str, password: &str) -> Result<HeaderValue, Cause> {
    let encoded = STANDARD.encode(format!("{username}:{password}"));
    header(remote, &format!("Basic {encoded}"))
}

async fn bearer(remote: &Remote, realm: &str, service: Option<&str>) -> Result<HeaderValue, Cause> {
    let mut url = realm_url(remote, realm)?;
    let scopes = &remote.scopes;
    let request = match &remote.credential {
        Some(Credential::IdentityToken(token)) => by_refresh_token(remote, &url, service, token),
        Some(Credential::Password { username, password }) => {
            url.query_pairs_mut().append_pair("account", username);
            add_scopes(&mut url, service, scopes);
            remote.client.get(url).basic_auth(username, Some(password))
        }
        None => {
            add_scopes(&mut url, service, scopes);
            remote.client.get(url)
        }
    };
    // A redirect is not followed: it would carry the credential along.
    let mut response = remote.timed("waiting for a token", request.send()).await?;
    if response.status() != StatusCode::OK {
        return Err(refusal(remote, response).await);
    }
    let body = remote.body(&mut response, TOKEN_LIMIT, "the token").await?;
    header(remote, &format!("Bearer {}", read_token(remote, &body)?))
}

fn add_scopes(url: &mut Url, service: Option<&str>, scopes: &[String]) {
    let mut query = url.query_pairs_mut();
    if let Some(service) = service {
        query.append_pair("service", service);
    }
    for scope in scopes {
        query.append_pair("scope", scope);
    }
}

fn by_refresh_token(remote: &Remote, url: &Url, service: Option<&str>, token: &str) -> RequestBuilder {
    // An address that is never sent anywhere; its query has the form of the body.
    let mut form = url.clone();
    form.set_query(None);
    form.query_pairs_mut()
        .append_pair("grant_type", "refresh_token")
        .append_pair("client_id", CLIENT_ID)
        .append_pair("refresh_token", token);
    add_scopes(&mut form, service, &remote.scopes);
    let body = form.query().unwrap_or_default().to_owned();
    remote.client.post(url.clone()).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
}

fn realm_url(remote: &Remote, realm: &str) -> Result<Url, Cause> {
    let url = Url::parse(realm).map_err(|_| misunderstood(remote, "its realm is not an address"))?;
    if url.host_str().is_none() || !url.username().is_empty() || url.password().is_some() {
        return Err(misunderstood(remote, "its realm is not a plain address"));
    }
    if !allowed(remote.scheme(), url.scheme(), remote.endpoint.insecure) {
        return Err(misunderstood(remote, "its token service has no encryption"));
    }
    Ok(url)
}

/// Token services answer 400 to refresh tokens that ended.
async fn refusal(remote: &Remote, response: Response) -> Cause {
    let by = host(response.url());
    match response.status().as_u16() {
        status @ (400 | 401 | 403) => {
            Cause::Unauthorized { by, status, said: Said::default(), credential: remote.credential.is_some() }
        }
        408 | 425 | 429 | 500.. => remote.failure(response).await,
        status => Cause::Refused { by, status, said: Said::default() },
    }
}

fn read_token(remote: &Remote, body: &[u8]) -> Result<String, Cause> {
    // The parser's message would quote the token.
    let answer = serde_json::from_slice::<TokenAnswer>(body).ok();
    let token = answer.and_then(|answer| answer.token.or(answer.access_token));
    token
        .filter(|token| !token.is_empty())
        .ok_or_else(|| misunderstood(remote, "its token service sent none"))
}

fn header(remote: &Remote, text: &str) -> Result<HeaderValue, Cause> {
    let header = HeaderValue::from_str(text);
    let mut header = header.map_err(|_| misunderstood(remote, "token or password do not fit a header"))?;
    header.set_sensitive(true);
    Ok(header)
}

fn misunderstood(remote: &Remote, why: &'static str) -> Cause {
    Cause::Challenge { by: remote.endpoint.host.clone(), why }
}
