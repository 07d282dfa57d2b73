//! Who may ask at all (edge; [`admit`] is pure).
//!
//! A web page that somebody has open can make the browser send requests to loopback, also under a name of its
//! own that resolves to 127.0.0.1. So every request has to name this server as its host, and may come from no
//! page of another one. Nothing here depends on what else the token or the mode of the socket keep away.

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Uri, header};
use axum::middleware::Next;
use axum::response::Response;
use kiln_protocol::api::Code;

use super::problem::Refusal;
use super::token::Token;

/// Names of this machine's loopback.
const OURS: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];
/// Whoever probes for life has no token.
const WITHOUT_TOKEN: [&str; 2] = ["/healthz", "/readyz"];
/// The port that an address without one means.
const DEFAULT_PORT: u16 = 80;

/// The way in to a server.
#[derive(Debug, Clone)]
pub(super) enum Door {
    /// Whoever can open the socket is the owner of the server.
    Unix,
    /// Anybody on the machine can connect.
    Loopback {
        /// Its port.
        port: u16,
        /// What they have to show.
        token: Token,
    },
    /// Anybody on the machine may read the numbers.
    Metrics {
        /// Its port.
        port: u16,
    },
}

/// Who asks, for the audit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Actor(pub(super) &'static str);

/// Lets requests pass that may.
pub(super) async fn guard(
    State(door): State<Door>,
    mut request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    admit(&door, request.uri(), request.headers())?;
    let actor = match door {
        Door::Unix => "unix socket",
        Door::Loopback { .. } => "loopback token",
        Door::Metrics { .. } => "metrics",
    };
    request.extensions_mut().insert(Actor(actor));
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    Ok(response)
}

fn admit(door: &Door, uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
    let host = only(headers, &header::HOST).and_then(|host| host.parse::<Authority>().ok());
    let named = host.is_some_and(|host| is_ours(door, &host));
    // An absolute request target overrules the header.
    if !named || uri.authority().is_some_and(|authority| !is_ours(door, authority)) {
        let why = "the Host of the request is not this server; use localhost and the port it listens on";
        return Err(Refusal::new(Code::HostRefused, why));
    }
    if headers.contains_key(header::ORIGIN) && !only(headers, &header::ORIGIN).is_some_and(|o| same(door, o))
    {
        return Err(Refusal::new(Code::OriginRefused, "pages of other sites may not use this server"));
    }
    match door {
        Door::Loopback { token, .. } if !WITHOUT_TOKEN.contains(&uri.path()) => authorize(token, headers),
        _ => Ok(()),
    }
}

fn authorize(token: &Token, headers: &HeaderMap) -> Result<(), Refusal> {
    let shown = only(headers, &header::AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token)
    });
    match shown {
        Some(shown) if token.is(shown) => Ok(()),
        Some(_) => Err(Refusal::new(Code::Unauthorized, "the token is wrong")),
        None => {
            Err(Refusal::new(Code::Unauthorized, "a token is needed: send `Authorization: Bearer TOKEN`"))
        }
    }
}

/// The value of a header that comes exactly once: of two, everybody picks another one.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    if values.next().is_some() { None } else { value.to_str().ok() }
}

fn is_ours(door: &Door, authority: &Authority) -> bool {
    let port = match door {
        Door::Unix => DEFAULT_PORT,
        Door::Loopback { port, .. } | Door::Metrics { port } => *port,
    };
    // Userinfo is not part of the host, and no client of ours sends it.
    !authority.as_str().contains('@')
        && OURS.iter().any(|name| name.eq_ignore_ascii_case(authority.host()))
        && authority.port_u16().unwrap_or(DEFAULT_PORT) == port
        && authority.port().is_some() == authority.as_str()[authority.host().len()..].starts_with(':')
}

/// Whether a page of this origin was served by this server. The socket serves none to browsers.
fn same(door: &Door, origin: &str) -> bool {
    let authority = origin.strip_prefix("http://").and_then(|rest| rest.parse::<Authority>().ok());
    matches!(door, Door::Loopback { .. }) && authority.is_some_and(|authority| is_ours(door, &authority))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback() -> (Door, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = Token::open(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap().trim_end().to_owned();
        (Door::Loopback { port: 8123, token }, text)
    }

    fn refused(door: &Door, uri: &str, headers: &[(HeaderName, &str)]) -> Option<Code> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name.clone(), value.parse().unwrap());
        }
        admit(door, &uri.parse().unwrap(), &map).err().map(|refusal| refusal.code())
    }

    #[test]
    fn only_requests_to_our_own_address_pass() {
        let (door, token) = loopback();
        let bearer = format!("Bearer {token}");
        let ask = |uri: &str, hosts: &[&str]| {
            let hosts = hosts.iter().map(|&host| (header::HOST, host));
            let headers: Vec<_> = hosts.chain([(header::AUTHORIZATION, bearer.as_str())]).collect();
            refused(&door, uri, &headers)
        };
        for good in ["localhost:8123", "LOCALHOST:8123", "127.0.0.1:8123", "[::1]:8123"] {
            assert_eq!(ask("/api/v1/builds", &[good]), None, "{good}");
        }
        for bad in [
            "evil.example:8123",
            "localhost",
            "localhost:80",
            "localhost:8124",
            "localhost:",
            "localhost.evil.example:8123",
            "localhost@evil.example:8123",
            "x@localhost:8123",
            "127.0.0.1.evil.example:8123",
            "127.0.0.2:8123",
            "[::1]",
            "",
            "localhost:8123/x",
        ] {
            assert_eq!(ask("/api/v1/builds", &[bad]), Some(Code::HostRefused), "{bad}");
        }
        assert_eq!(ask("/", &[]), Some(Code::HostRefused));
        assert_eq!(ask("/", &["localhost:8123", "evil.example"]), Some(Code::HostRefused));
        assert_eq!(ask("http://evil.example:8123/", &["localhost:8123"]), Some(Code::HostRefused));
        assert_eq!(refused(&Door::Unix, "/", &[(header::HOST, "localhost")]), None);
        assert_eq!(refused(&Door::Unix, "/", &[(header::HOST, "kiln.example")]), Some(Code::HostRefused));
    }

    #[test]
    fn no_page_of_another_site_passes() {
        let (door, token) = loopback();
        let bearer = format!("Bearer {token}");
        let ask = |origin: &str| {
            let host = (header::HOST, "localhost:8123");
            refused(&door, "/", &[host, (header::AUTHORIZATION, &bearer), (header::ORIGIN, origin)])
        };
        assert_eq!(ask("http://localhost:8123"), None);
        for bad in [
            "null",
            "",
            "http://localhost",
            "https://localhost:8123",
            "http://evil.example",
            "http://localhost:9",
        ] {
            assert_eq!(ask(bad), Some(Code::OriginRefused), "{bad}");
        }
        let page = [(header::HOST, "localhost"), (header::ORIGIN, "http://localhost")];
        assert_eq!(refused(&Door::Unix, "/", &page), Some(Code::OriginRefused));
    }

    #[test]
    fn the_token_is_needed_but_for_probes() {
        let (door, token) = loopback();
        let host = (header::HOST, "localhost:8123");
        let ask = |uri: &str, values: &[&str]| {
            let values = values.iter().map(|&value| (header::AUTHORIZATION, value));
            refused(&door, uri, &[host.clone()].into_iter().chain(values).collect::<Vec<_>>())
        };
        let good = format!("bearer {token}");
        assert_eq!(ask("/api/v1/builds", &[&good]), None);
        assert_eq!(ask("/healthz", &[]), None);
        for bad in [&[][..], &["Bearer "], &["Bearer x"], &[&token], &["Basic x"], &[&good, &good]] {
            assert_eq!(ask("/api/v1/builds", bad), Some(Code::Unauthorized), "{bad:?}");
        }
        assert_eq!(ask("/healthz/../api", &[]), Some(Code::Unauthorized));
    }
}
