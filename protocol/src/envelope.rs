//! How a message is written: JSON with a version, bounded (pure).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::message::{Answer, Cancel, Hint, Report, Request, StatusEvent};

/// The version that this code writes and the only one that it reads.
pub const VERSION: u32 = 1;
/// Largest encoded message. A broker spreads every message over its nodes; what is larger travels by digest.
pub const MAX_BYTES: usize = 256 * 1024;

/// What a message is called on the wire, in the property `type`.
pub trait Message: Serialize + DeserializeOwned {
    /// Name and schema version.
    const TYPE: &'static str;
}

macro_rules! messages {
    ($($type:ty = $name:literal;)+) => {$(
        impl Message for $type {
            const TYPE: &'static str = $name;
        }
    )+};
}

messages! {
    Hint = "build.request.v1";
    Cancel = "build.cancel.v1";
    Request = "lease.request.v1";
    Answer = "lease.answer.v1";
    Report = "build.report.v1";
    StatusEvent = "build.status.v1";
}

#[derive(Serialize)]
struct Written<'a, T> {
    v: u32,
    body: &'a T,
}

#[derive(Deserialize)]
struct Version {
    v: u32,
}

#[derive(Deserialize)]
struct Read<T> {
    body: T,
}

/// A message cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// Too large.
    #[error("a message of type {kind} has {bytes} bytes; the most is {MAX_BYTES}")]
    TooLarge {
        /// Its type.
        kind: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// Another version.
    #[error("a message of type {kind} has version {found}; this program reads version {VERSION}")]
    Version {
        /// Its type.
        kind: &'static str,
        /// Its version.
        found: u32,
    },
    /// Not the JSON that it should be.
    #[error("a message is not a {kind}")]
    Json {
        /// Its type.
        kind: &'static str,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// Writes a message.
pub fn encode<T: Message>(body: &T) -> Result<Vec<u8>, EnvelopeError> {
    let json = |source| EnvelopeError::Json { kind: T::TYPE, source };
    let bytes = serde_json::to_vec(&Written { v: VERSION, body }).map_err(json)?;
    bounded::<T>(&bytes)?;
    Ok(bytes)
}

/// Reads a message. Unknown fields are ignored, so that a newer sender can add some.
pub fn decode<T: Message>(bytes: &[u8]) -> Result<T, EnvelopeError> {
    bounded::<T>(bytes)?;
    let json = |source| EnvelopeError::Json { kind: T::TYPE, source };
    let Version { v } = serde_json::from_slice(bytes).map_err(json)?;
    if v != VERSION {
        return Err(EnvelopeError::Version { kind: T::TYPE, found: v });
    }
    let Read { body } = serde_json::from_slice(bytes).map_err(json)?;
    Ok(body)
}

fn bounded<T: Message>(bytes: &[u8]) -> Result<(), EnvelopeError> {
    if bytes.len() > MAX_BYTES {
        return Err(EnvelopeError::TooLarge { kind: T::TYPE, bytes: bytes.len() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BuildId;

    #[test]
    fn a_message_survives_and_ignores_what_it_does_not_know() {
        let hint = Hint { build: BuildId::generate() };
        let bytes = encode(&hint).unwrap();
        assert_eq!(decode::<Hint>(&bytes).unwrap(), hint);
        let mut value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        value["trace"] = 1.into();
        value["body"]["later"] = "addition".into();
        assert_eq!(decode::<Hint>(value.to_string().as_bytes()).unwrap(), hint);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = |bytes: &[u8]| decode::<Hint>(bytes).unwrap_err().to_string();
        assert!(error(b"").contains("not a build.request.v1"));
        assert!(error(br#"{"v":1,"body":{}}"#).contains("not a build.request.v1"));
        assert!(error(br#"{"v":2,"body":{}}"#).contains("version 2"));
        assert!(error(&vec![b' '; MAX_BYTES + 1]).contains("the most is 262144"));
    }
}
