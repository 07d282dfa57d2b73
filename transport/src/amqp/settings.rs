//! How to reach a broker (pure, but for reading the files that it names).

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use lapin::uri::{AMQPScheme, AMQPUri};

use crate::Backoff;

/// How to reach a broker, and who one is there. Never shows a password.
#[derive(Clone)]
pub struct AmqpSettings {
    uri: AMQPUri,
    password_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    pub(super) timing: Timing,
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// From nothing to a usable connection, TLS and login included.
    pub connect: Duration,
    /// One question to the broker: declare, consume, cancel, settle, open a channel.
    pub operation: Duration,
    /// A publish with its confirm, and how long a publish waits while an alarm blocks the broker.
    pub confirm: Duration,
    /// Asked for in whole seconds; a connection on which nothing came for twice as long is dead. Below five
    /// seconds a busy machine loses healthy connections.
    pub heartbeat: Duration,
    /// A consumer with room looks this often whether messages wait for it that nobody delivers.
    pub watchdog: Duration,
    /// Between two attempts to connect.
    pub backoff: Backoff,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            operation: Duration::from_secs(10),
            confirm: Duration::from_secs(10),
            heartbeat: Duration::from_secs(20),
            watchdog: Duration::from_mins(1),
            backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(30)),
        }
    }
}

/// Why settings are refused, or could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// No URL of a broker. What it holds instead is not shown: it may be a password.
    #[error("the broker's URL is not amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…")]
    Url,
    /// TLS without anything to check the certificate against.
    #[error("the broker's URL says amqps:// and no CA file is named; the system's bundle is a CA file too")]
    NoCaFile,
    /// A CA file that would not be used.
    #[error("a CA file is named, but the broker's URL says amqp://, which is not encrypted; write amqps://")]
    Plaintext,
    /// A file that cannot be read.
    #[error("cannot read the broker's {what} {path}: {reason}")]
    File {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

impl AmqpSettings {
    /// Settings from the URL of a broker; user, password and virtual host are percent-encoded in it.
    pub fn new(url: &str) -> Result<Self, SettingsError> {
        let uri = url.parse().map_err(|_| SettingsError::Url)?;
        Ok(Self { uri, password_file: None, ca_file: None, timing: Timing::default() })
    }

    /// Takes the password from a file instead of the URL, anew for every connection: it may change.
    #[must_use]
    pub fn with_password_file(self, file: impl Into<PathBuf>) -> Self {
        Self { password_file: Some(file.into()), ..self }
    }

    /// Authorities, in PEM, one of which must have signed the broker's certificate. Nobody else is trusted.
    #[must_use]
    pub fn with_ca_file(self, file: impl Into<PathBuf>) -> Self {
        Self { ca_file: Some(file.into()), ..self }
    }

    /// Other limits than the default ones.
    #[must_use]
    pub fn with_timing(self, timing: Timing) -> Self {
        Self { timing, ..self }
    }

    /// Refuses settings that contradict themselves.
    pub fn check(&self) -> Result<(), SettingsError> {
        match (&self.uri.scheme, &self.ca_file) {
            (AMQPScheme::AMQPS, None) => Err(SettingsError::NoCaFile),
            (AMQPScheme::AMQP, Some(_)) => Err(SettingsError::Plaintext),
            _ => Ok(()),
        }
    }

    /// The broker user.
    pub(super) fn identity(&self) -> &str {
        &self.uri.authority.userinfo.username
    }

    /// Where to connect, with the password of now.
    pub(super) async fn uri(&self) -> Result<AMQPUri, SettingsError> {
        let mut uri = self.uri.clone();
        if let Some(path) = &self.password_file {
            let password = read("password file", path).await?;
            password.trim_end_matches(['\r', '\n']).clone_into(&mut uri.authority.userinfo.password);
        }
        uri.query.heartbeat = Some(u16::try_from(self.timing.heartbeat.as_secs()).unwrap_or(u16::MAX).max(1));
        Ok(uri)
    }

    /// The trusted authorities of now, in PEM.
    pub(super) async fn authorities(&self) -> Result<Option<String>, SettingsError> {
        match &self.ca_file {
            Some(path) => read("CA file", path).await.map(Some),
            None => Ok(None),
        }
    }
}

async fn read(what: &'static str, path: &PathBuf) -> Result<String, SettingsError> {
    let failed =
        |error: std::io::Error| SettingsError::File { what, path: path.clone(), reason: error.to_string() };
    tokio::fs::read_to_string(path).await.map_err(failed)
}

impl fmt::Debug for AmqpSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpSettings")
            .field("user", &self.identity())
            .field("host", &self.uri.authority.host)
            .field("port", &self.uri.authority.port)
            .field("vhost", &self.uri.vhost)
            .field("password_file", &self.password_file)
            .field("ca_file", &self.ca_file)
            .field("timing", &self.timing)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_url_is_not_shown() {
        for wrong in ["", "hunter2", "http://kiln:hunter2@broker/", "amqp://kiln:hunter2@broker:no/"] {
            let error = AmqpSettings::new(wrong).unwrap_err();
            assert_eq!(error, SettingsError::Url, "{wrong}");
            assert!(!error.to_string().contains("hunter2"));
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let settings = AmqpSettings::new("amqps://kiln:hunter2@broker:5671/builds").unwrap();
        let shown = format!("{settings:?} {settings:#?}");
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("kiln") && shown.contains("broker") && shown.contains("builds"), "{shown}");
    }

    #[test]
    fn tls_and_a_ca_file_belong_together() {
        let settings = |url| AmqpSettings::new(url).unwrap();
        assert_eq!(settings("amqps://u:p@broker").check(), Err(SettingsError::NoCaFile));
        assert_eq!(settings("amqps://u:p@broker").with_ca_file("ca").check(), Ok(()));
        assert_eq!(settings("amqp://u:p@broker").check(), Ok(()));
        assert_eq!(settings("amqp://u:p@broker").with_ca_file("ca").check(), Err(SettingsError::Plaintext));
    }

    #[tokio::test]
    async fn the_password_is_read_for_every_connection() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let settings = AmqpSettings::new("amqp://kiln:old@broker").unwrap().with_password_file(file.path());
        for password in ["first", "second"] {
            std::fs::write(file.path(), format!("{password}\n")).unwrap();
            assert_eq!(settings.uri().await.unwrap().authority.userinfo.password, password);
        }
        drop(file);
        assert!(matches!(settings.uri().await, Err(SettingsError::File { what: "password file", .. })));
    }

    #[tokio::test]
    async fn the_heartbeat_is_asked_for_in_seconds() {
        for (wanted, asked) in [(0, 1), (900, 1), (20_000, 20), (90_000_000, u16::MAX)] {
            let timing = Timing { heartbeat: Duration::from_millis(wanted), ..Timing::default() };
            let settings = AmqpSettings::new("amqp://u:p@broker").unwrap().with_timing(timing);
            assert_eq!(settings.uri().await.unwrap().query.heartbeat, Some(asked));
        }
    }
}
