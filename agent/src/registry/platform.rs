//! Which entry of an image index fits a platform (pure).

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// Operating system, processor and its variant, in the words of image indexes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// `v7`, `v8`, …
    pub variant: Option<String>,
}

/// The text is not a platform.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a platform; expected os/architecture[/variant], such as linux/amd64")]
pub struct InvalidPlatform(String);

impl Platform {
    /// The platform that this program runs on.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// How far an offered platform lies below the wanted one: 0 is exact, `None` does not run here.
    /// A processor runs what was made for its older variants.
    pub(crate) fn distance_to(&self, offered: &Self) -> Option<u32> {
        if (&self.os, &self.architecture) != (&offered.os, &offered.architecture) {
            return None;
        }
        match (self.level(), offered.level()) {
            (Some(wanted), Some(level)) => wanted.checked_sub(level),
            _ => (self.variant == offered.variant).then_some(0),
        }
    }

    /// The variant as a number; a missing one means what the architecture's images usually are.
    fn level(&self) -> Option<u32> {
        match (self.variant.as_deref().filter(|variant| !variant.is_empty()), self.architecture.as_str()) {
            (Some(variant), _) => variant.trim_start_matches('v').parse().ok(),
            (None, "amd64") => Some(1),
            (None, "arm") => Some(7),
            (None, "arm64") => Some(8),
            (None, _) => Some(0),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.as_deref() {
            Some(variant) if !variant.is_empty() => write!(f, "/{variant}"),
            _ => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<_> = text.split('/').map(str::to_owned).collect();
        match parts.as_slice() {
            _ if parts.iter().any(String::is_empty) => Err(InvalidPlatform(text.to_owned())),
            [os, architecture] => {
                Ok(Self { os: os.clone(), architecture: architecture.clone(), variant: None })
            }
            [os, architecture, variant] => Ok(Self {
                os: os.clone(),
                architecture: architecture.clone(),
                variant: Some(variant.clone()),
            }),
            _ => Err(InvalidPlatform(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_variants_run_and_newer_ones_do_not() {
        for (wanted, offered, expected) in [
            ("linux/amd64", "linux/amd64", Some(0)),
            ("linux/amd64", "linux/amd64/v1", Some(0)),
            ("linux/amd64", "linux/amd64/v3", None),
            ("linux/amd64/v3", "linux/amd64", Some(2)),
            ("linux/arm64", "linux/arm64/v8", Some(0)),
            ("linux/arm/v7", "linux/arm/v6", Some(1)),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/arm/v7", "linux/arm", Some(0)),
            ("linux/riscv64", "linux/riscv64", Some(0)),
            ("linux/riscv64", "linux/riscv64/odd", None),
            ("linux/riscv64/odd", "linux/riscv64/odd", Some(0)),
            ("linux/amd64", "windows/amd64", None),
            ("linux/amd64", "unknown/unknown", None),
        ] {
            let (wanted, offered): (Platform, Platform) = (wanted.parse().unwrap(), offered.parse().unwrap());
            assert_eq!(wanted.distance_to(&offered), expected, "{wanted} {offered}");
        }
    }

    #[test]
    fn text_that_is_no_platform_is_refused() {
        for text in ["", "linux", "linux/", "a/b/c/d", "/amd64"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}
