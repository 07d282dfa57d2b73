//! Content digests, always sha256 (pure).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Number of hexadecimal characters of a sha256.
const HEX_LENGTH: usize = 64;
const PREFIX: &str = "sha256:";

/// A digest in the form that registries use: `sha256:` and 64 lower-case hexadecimal characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl schemars::JsonSchema for Digest {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Digest".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": format!("^{PREFIX}[0-9a-f]{{{HEX_LENGTH}}}$") })
    }
}

/// The text is not a sha256 digest.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a digest; expected sha256: and 64 lower-case hexadecimal characters")]
pub struct InvalidDigest(String);

impl Digest {
    /// The digest of raw sha256 output.
    pub fn from_sha256(bytes: [u8; 32]) -> Self {
        use fmt::Write as _;
        let mut text = String::with_capacity(PREFIX.len() + HEX_LENGTH);
        text.push_str(PREFIX);
        for byte in bytes {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// The whole text, `sha256:…`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 hexadecimal characters, fit for a file name.
    pub fn hex(&self) -> &str {
        &self.0[PREFIX.len()..]
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text.strip_prefix(PREFIX).unwrap_or_default();
        let valid = hex.len() == HEX_LENGTH && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidDigest(text.to_owned())) }
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_sha256_is_a_digest() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(good.parse::<Digest>().unwrap().hex(), "0a".repeat(32));
        for bad in [
            "",
            "sha256:",
            "sha256:zz",
            "md5:00",
            &good.to_uppercase(),
            &format!("{good}0"),
            "sha256:../../x",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
