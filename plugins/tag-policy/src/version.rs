//! Pure: whether a tag is a semantic version, as semver 2.0.0 writes it with an optional `v` before it.

/// What a tag is as a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// `1.2.3`, `v1.2.3`.
    Release,
    /// `1.2.3-rc.1`.
    PreRelease,
}

/// The version that a tag is, if it is one. Build metadata (`+…`) cannot be part of a tag.
pub fn parse(tag: &str) -> Option<Version> {
    let tag = tag.strip_prefix('v').unwrap_or(tag);
    let (core, pre) = tag.split_once('-').map_or((tag, None), |(core, pre)| (core, Some(pre)));
    let parts: Vec<&str> = core.split('.').collect();
    if parts.len() != 3 || !parts.iter().all(|part| is_number(part)) {
        return None;
    }
    match pre {
        None => Some(Version::Release),
        Some(pre) => pre.split('.').all(is_identifier).then_some(Version::PreRelease),
    }
}

fn is_number(text: &str) -> bool {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits && (text == "0" || !text.starts_with('0'))
}

fn is_identifier(text: &str) -> bool {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    plain && (is_number(text) || !text.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for release in ["0.0.0", "1.2.3", "v1.2.3", "10.20.30"] {
            assert_eq!(parse(release), Some(Version::Release), "{release}");
        }
        for pre in ["1.2.3-rc.1", "v1.0.0-0", "1.0.0-a-b.7z", "1.0.0--"] {
            assert_eq!(parse(pre), Some(Version::PreRelease), "{pre}");
        }
        for not in [
            "",
            "1",
            "1.2",
            "1.2.3.4",
            "01.2.3",
            "1.2.3-",
            "1.2.3-01",
            "1.2.3-a..b",
            "vv1.2.3",
            "latest",
            "1.2.x",
        ] {
            assert_eq!(parse(not), None, "{not}");
        }
    }
}
