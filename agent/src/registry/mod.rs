//! Everything that speaks to registries (edge).
//!
//! `Registry` belongs to one build: it holds that build's credentials, and the tokens that it gets for them
//! end with it. `resolve` asks what a reference means now, `fetch` brings the bytes, `push` takes them there.

mod challenge;
mod clients;
mod config;
mod credentials;
mod error;
mod fetch;
mod manifest;
mod platform;
pub mod push;
mod remote;
mod resolve;
mod retry;
mod said;
mod token;

#[cfg(test)]
mod real;
#[cfg(test)]
mod stub;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use config::{
    Endpoint, MirrorSection, ProxyConfig, RegistryConfig, RegistryConfigError, RegistrySection,
};
pub use credentials::{Credential, Credentials, normalise_key};
pub use error::{Cause, EndpointFailure, RegistryError};
pub use fetch::Progress;
pub use manifest::{Descriptor, ManifestError};
pub use oci_spec::distribution::Reference;
pub use platform::{InvalidPlatform, Platform};
pub use resolve::ResolvedImage;
pub use retry::Limits;
pub use said::Said;

use clients::Clients;
use remote::Remote;

/// The registries as one build sees them.
#[derive(Debug)]
pub struct Registry {
    config: RegistryConfig,
    credentials: Credentials,
    clients: Clients,
    limits: Limits,
    remotes: Mutex<HashMap<Endpoint, Arc<Remote>>>,
}

impl Registry {
    /// `ca` are PEM files that are trusted everywhere, besides the system's certificates. Nothing is read or
    /// connected to yet.
    pub fn new(
        config: RegistryConfig,
        credentials: Credentials,
        proxy: ProxyConfig,
        ca: Vec<Vec<u8>>,
    ) -> Self {
        let (clients, limits) = (Clients::new(proxy, ca), Limits::default());
        Self { config, credentials, clients, limits, remotes: Mutex::default() }
    }

    /// Replaces the bounds of waiting.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    fn remote(&self, endpoint: &Endpoint) -> Result<Arc<Remote>, Cause> {
        let client = self.clients.get(endpoint, &self.limits)?;
        // The map stays whole if a thread panics while it holds the lock.
        let mut remotes = self.remotes.lock().unwrap_or_else(PoisonError::into_inner);
        let remote = remotes.entry(endpoint.clone()).or_insert_with(|| {
            let credential = self.credentials.lookup(&endpoint.credential_key()).cloned();
            let scopes = vec![format!("repository:{}:pull", endpoint.repository)];
            Arc::new(Remote::new(client, endpoint.clone(), credential, scopes, self.limits.clone()))
        });
        Ok(Arc::clone(remote))
    }
}

/// Collects what endpoints answered until one helps or none is left.
#[derive(Debug)]
struct Search<'a> {
    reference: &'a Reference,
    failures: Vec<EndpointFailure>,
}

impl<'a> Search<'a> {
    fn new(reference: &'a Reference) -> Self {
        Self { reference, failures: Vec::new() }
    }

    /// Notes a failure; an error if the search ends with it.
    fn failed(&mut self, endpoint: &Endpoint, cause: Cause, last: bool) -> Result<(), RegistryError> {
        if last || cause.is_local() {
            return Err(self.error(endpoint.host.clone(), cause));
        }
        tracing::warn!(host = endpoint.host, error = %cause, "mirror failed, asking the next");
        self.failures.push(EndpointFailure { host: endpoint.host.clone(), cause });
        Ok(())
    }

    fn expired(&mut self, what: &'static str, limit: Duration) -> RegistryError {
        self.error(self.reference.registry().to_owned(), Cause::Timeout { what, limit })
    }

    fn error(&mut self, host: String, cause: Cause) -> RegistryError {
        RegistryError {
            reference: self.reference.to_string(),
            host,
            cause: Box::new(cause),
            earlier: std::mem::take(&mut self.failures),
        }
    }
}
