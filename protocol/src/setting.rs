//! Durations and sizes as configuration files have them, and what is wrong with a setting (pure).

use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

const KIB: u64 = 1024;
/// Units of sizes, the largest first.
const UNITS: [(&str, u64); 5] =
    [("TiB", KIB * KIB * KIB * KIB), ("GiB", KIB * KIB * KIB), ("MiB", KIB * KIB), ("KiB", KIB), ("B", 1)];

/// A setting that is well formed and cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct InvalidSetting {
    /// The key with its sections, as in `build.limits.pids`; a place in an array counts from 0: `registry.0.ca`.
    pub key: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl InvalidSetting {
    /// Of a key.
    pub fn new(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { key: key.into(), reason: reason.into() }
    }

    /// The same, seen from the section that holds it.
    #[must_use]
    pub fn within(self, section: &str) -> Self {
        Self { key: format!("{section}.{}", self.key), ..self }
    }
}

/// Refuses a number below the least that makes sense.
pub fn at_least(key: &str, is: u64, least: u64) -> Result<(), InvalidSetting> {
    if is >= least {
        return Ok(());
    }
    Err(InvalidSetting::new(key, format!("{is} is too small; at least {least}")))
}

/// Parses `90s`, `10m`, `1h 30m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration; write for example 90s, 10m or 1h30m");
    let span: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    Duration::try_from(span).map_err(|_| wrong())
}

/// Parses `1048576`, `512MiB`, `20GiB`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write for example 512MiB or 20GiB");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let name = &text[digits.len()..];
    let unit = if name.is_empty() { Some(1) } else { unit(name) };
    let number = digits.trim().parse::<u64>().ok();
    number.zip(unit).and_then(|(number, unit)| number.checked_mul(unit)).ok_or_else(wrong)
}

fn unit(name: &str) -> Option<u64> {
    UNITS.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes)
}

/// The shortest text that [`parse_bytes`] reads as this number.
pub fn bytes_text(bytes: u64) -> String {
    let whole = UNITS.iter().find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit));
    whole.map_or_else(|| format!("{bytes}B"), |(name, unit)| format!("{}{name}", bytes / unit))
}

/// `#[serde(with = "duration")]` on a [`Duration`].
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer, de, ser};

    /// Reads a text with units.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        super::parse_duration(&String::deserialize(input)?).map_err(de::Error::custom)
    }

    /// Writes a text with units.
    pub fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        let signed = jiff::SignedDuration::try_from(*duration).map_err(ser::Error::custom)?;
        to.serialize_str(&format!("{signed:#}"))
    }
}

/// `#[serde(with = "bytes")]` on a `u64`.
pub mod bytes {
    use std::fmt;

    use serde::{Deserializer, Serializer, de};

    struct Bytes;

    impl de::Visitor<'_> for Bytes {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size, for example 512MiB, or a number of bytes")
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<u64, E> {
            Ok(number)
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<u64, E> {
            u64::try_from(number).map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            super::parse_bytes(text).map_err(E::custom)
        }
    }

    /// Reads a number of bytes or a text with a unit.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
        input.deserialize_any(Bytes)
    }

    /// Writes a text with a unit.
    pub fn serialize<S: Serializer>(bytes: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&super::bytes_text(*bytes))
    }
}

/// `#[serde(with = "optional_bytes")]` on an `Option<u64>`, with a default.
pub mod optional_bytes {
    use serde::{Deserializer, Serializer};

    /// Reads a number of bytes or a text with a unit.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
        super::bytes::deserialize(input).map(Some)
    }

    /// Writes a text with a unit.
    pub fn serialize<S: Serializer>(bytes: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => super::bytes::serialize(bytes, to),
            None => to.serialize_none(),
        }
    }
}

/// What the schema says of a duration.
#[derive(Debug)]
pub struct DurationText;

impl JsonSchema for DurationText {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A duration: 90s, 10m, 1h30m",
            "type": "string",
            "pattern": "^(?=.)([0-9]+h ?)?([0-9]+m ?)?([0-9]+s ?)?([0-9]+ms)?$"
        })
    }
}

/// What the schema says of a size.
#[derive(Debug)]
pub struct BytesText;

impl JsonSchema for BytesText {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A number of bytes, or a text with a unit: 512MiB, 20GiB",
            "anyOf": [
                { "type": "integer", "minimum": 0 },
                { "type": "string", "pattern": "^[0-9]+ ?(B|KiB|MiB|GiB|TiB)?$" }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Values {
        #[serde(with = "duration")]
        duration: Duration,
        #[serde(with = "bytes")]
        size: u64,
        #[serde(with = "optional_bytes", default)]
        optional: Option<u64>,
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_the_same(ms in 0_u64..1 << 50, size: u64, optional: Option<u64>) {
            let values = Values { duration: Duration::from_millis(ms), size, optional };
            let mut json = serde_json::to_value(&values).unwrap();
            json.as_object_mut().unwrap().retain(|_, value| !value.is_null());
            prop_assert_eq!(serde_json::from_value::<Values>(json).unwrap(), values);
        }
    }

    #[test]
    fn sizes_have_the_largest_whole_unit() {
        for (bytes, text) in
            [(0, "0B"), (1, "1B"), (1023, "1023B"), (1024, "1KiB"), (3 << 20, "3MiB"), (1 << 42, "4TiB")]
        {
            assert_eq!(bytes_text(bytes), text);
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        assert_eq!(parse_bytes("7"), Ok(7));
        for wrong in ["", "GiB", "1 parsec", "1.5GiB", "-1", "99999999TiB", "1gib"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_mins(90)));
        assert_eq!(parse_duration("1h 30m"), Ok(Duration::from_mins(90)));
        for wrong in ["", "90", "soon", "-1s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
