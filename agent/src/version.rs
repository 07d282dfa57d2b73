//! Pure: the version of an external tool, read from what the tool prints.

use std::fmt;
use std::str::FromStr;

/// A `major.minor.patch` version. Suffixes (`-dev`, `-rc1`, `+ds1`) are dropped: a distribution's patch level
/// says nothing about features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Patch number, 0 where the tool prints none.
    pub patch: u32,
}

/// No version could be read from a tool's output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no version number in `{text}`")]
pub struct VersionError {
    /// The start of what was read.
    pub text: String,
}

/// How much of an unreadable output an error shows.
const SHOWN_CHARS: usize = 80;

impl Version {
    /// The version `major.minor.patch`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Reads the output of `buildah --version`, such as `buildah version 1.28.2 (image-spec 1.1.0-rc2, …)`.
    ///
    /// The number after the word `version` counts; the first word that is a version otherwise.
    pub fn from_tool_output(output: &str) -> Result<Self, VersionError> {
        let mut words = output.split_whitespace();
        let after_keyword = words
            .find(|word| word.eq_ignore_ascii_case("version"))
            .and_then(|_| words.next())
            .map(str::parse);
        if let Some(Ok(version)) = after_keyword {
            return Ok(version);
        }
        output
            .split_whitespace()
            .find_map(|word| word.parse().ok())
            .ok_or_else(|| VersionError { text: output.chars().take(SHOWN_CHARS).collect() })
    }
}

impl FromStr for Version {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        read(text).ok_or_else(|| VersionError { text: text.chars().take(SHOWN_CHARS).collect() })
    }
}

fn read(text: &str) -> Option<Version> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (numbers, suffix) = text.split_at(end);
    if !(suffix.is_empty() || suffix.starts_with(['-', '+', '~', ','])) {
        return None;
    }
    let mut parts = numbers.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?.parse().ok()?;
    let patch = parts.next().map_or(Some(0), |patch| patch.parse().ok())?;
    Some(Version { major, minor, patch })
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_tools_print() {
        for (output, expected) in [
            ("buildah version 1.28.2 (image-spec 1.1.0-rc2, runtime-spec 1.0.2-dev)", Some((1, 28, 2))),
            ("buildah version 1.44.0-dev (image-spec 1.1.1, runtime-spec 1.2.1)\n", Some((1, 44, 0))),
            ("Version:         1.33.7\nGo Version: go1.21", Some((1, 33, 7))),
            ("slirp4netns version 1.2.0", Some((1, 2, 0))),
            ("1.28", Some((1, 28, 0))),
            ("v1.30.1", Some((1, 30, 1))),
            ("1.28.2+ds1-3", Some((1, 28, 2))),
            ("buildah version unknown", None),
            ("1", None),
            ("1.x", None),
            ("1.28.2x", None),
            ("99999999999.1.1", None),
            ("", None),
        ] {
            let expected = expected.map(|(major, minor, patch)| Version::new(major, minor, patch));
            assert_eq!(Version::from_tool_output(output).ok(), expected, "{output}");
        }
    }

    #[test]
    fn orders_by_number_not_by_text() {
        assert!(Version::new(1, 9, 9) < Version::new(1, 28, 0));
        assert!(Version::new(1, 28, 2) < Version::new(1, 28, 10));
        assert_eq!(Version::new(1, 28, 2).to_string(), "1.28.2");
    }
}
