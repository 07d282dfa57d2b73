//! HTTP clients, one for each way to trust a server (shell).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use reqwest::{Certificate, Client, ClientBuilder, NoProxy, Proxy};

use super::config::{Endpoint, ProxyConfig};
use super::error::Cause;
use super::retry::Limits;

const USER_AGENT: &str = concat!("kiln/", env!("CARGO_PKG_VERSION"));
/// Bytes of the largest PEM file; all certificates of a system together have a quarter of that.
const CA_FILE_LIMIT: u64 = 1024 * 1024;

/// Makes clients when they are first needed: reading the system's certificates costs milliseconds.
#[derive(Debug)]
pub(crate) struct Clients {
    proxy: ProxyConfig,
    /// `[build.ca]`, trusted everywhere.
    ca: Vec<Vec<u8>>,
    made: Mutex<HashMap<(bool, Option<PathBuf>), Client>>,
}

impl Clients {
    pub(crate) fn new(proxy: ProxyConfig, ca: Vec<Vec<u8>>) -> Self {
        Self { proxy, ca, made: Mutex::default() }
    }

    pub(crate) fn get(&self, endpoint: &Endpoint, limits: &Limits) -> Result<Client, Cause> {
        // The map stays whole if a thread panics while it holds the lock.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (endpoint.insecure, endpoint.ca.clone());
        if let Some(client) = made.get(&key) {
            return Ok(client.clone());
        }
        let client = self.make(endpoint, limits)?;
        made.insert(key, client.clone());
        Ok(client)
    }

    fn make(&self, endpoint: &Endpoint, limits: &Limits) -> Result<Client, Cause> {
        let mut builder = Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(limits.connect)
            // Redirects and proxies are decided here, not by the library or the environment.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy();
        builder = self.with_proxies(builder).map_err(unusable)?;
        builder = builder.tls_certs_merge(self.certificates(endpoint.ca.as_deref())?);
        builder = builder.tls_danger_accept_invalid_certs(endpoint.insecure);
        builder.build().map_err(unusable)
    }

    fn with_proxies(&self, mut builder: ClientBuilder) -> Result<ClientBuilder, reqwest::Error> {
        let exceptions = || NoProxy::from_string(self.proxy.no_proxy.as_deref().unwrap_or_default());
        if let Some(url) = &self.proxy.http {
            builder = builder.proxy(Proxy::http(url)?.no_proxy(exceptions()));
        }
        if let Some(url) = &self.proxy.https {
            builder = builder.proxy(Proxy::https(url)?.no_proxy(exceptions()));
        }
        Ok(builder)
    }

    fn certificates(&self, ca: Option<&Path>) -> Result<Vec<Certificate>, Cause> {
        let of_endpoint = ca.map(read_ca).transpose()?;
        let files = self.ca.iter().chain(&of_endpoint);
        let parsed = files.map(|pem| Certificate::from_pem_bundle(pem).map_err(unusable));
        Ok(parsed.collect::<Result<Vec<_>, _>>()?.concat())
    }
}

/// The address is cut off, that of a proxy may carry a password.
fn unusable(error: reqwest::Error) -> Cause {
    Cause::Client(error.without_url())
}

fn read_ca(path: &Path) -> Result<Vec<u8>, Cause> {
    let mut pem = Vec::new();
    let read = File::open(path).and_then(|file| file.take(CA_FILE_LIMIT).read_to_end(&mut pem));
    let checked = read.and_then(|_| {
        let begins = pem.windows(11).any(|window| window == b"-----BEGIN ");
        if begins { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, "not a PEM file")) }
    });
    checked.map_err(|source| Cause::CaFile { path: path.to_owned(), source })?;
    Ok(pem)
}
