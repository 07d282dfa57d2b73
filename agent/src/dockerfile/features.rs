//! Pure: since which version buildah knows which part of the Dockerfile language.
//!
//! The versions are those of buildah itself. The parser is a library of its own (imagebuilder), and distributions
//! build buildah with an older one: Debian 12's 1.28.2 has 1.2.3, and the 1.33 and 1.34 of Debian and Ubuntu 24.04
//! lack what came with 1.33.

use super::{Keyword, Severity};
use crate::version::Version;

/// A part of the language.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) since: Version,
    pub(super) instead: &'static str,
}

/// The newest buildah whose sources were compared with these tables.
pub(super) const NEWEST_KNOWN: Version = Version::new(1, 45, 0);

const fn feature(name: &'static str, minor: u32, instead: &'static str) -> Feature {
    Feature { name, since: Version::new(1, minor, 0), instead }
}

pub(super) const HEREDOC: Feature =
    feature("here-documents", 33, "join the commands with `&& \\`, or copy a script from the context");
pub(super) const SYMBOLIC_CHMOD: Feature = feature("--chmod with letters", 46, "write the mode in octal");
pub(super) const RELATIVE_TARGET: Feature =
    feature("a mount target without a leading /", 29, "write the full path");
pub(super) const SECRET_ENV: Feature =
    feature("secrets as environment variables", 44, "read the file /run/secrets/<id> in the command");
pub(super) const CACHE_FROM_IMAGE: Feature =
    feature("a cache mount from an image", 39, "define a stage `FROM image AS name` and use its name");
pub(super) const ADD_GIT: Feature = feature("ADD of a git repository", 38, "clone it in a RUN step");

/// What buildah makes of a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flag {
    /// Every supported version takes it.
    Known,
    /// Some take it.
    Since(Feature),
    /// Kiln refuses it, and why.
    Refused(&'static str),
}

/// The rule for `name` (without its dashes), or `None` for a flag that no known version takes.
pub(super) fn flag(keyword: Keyword, name: &str) -> Option<Flag> {
    use Keyword::{Add, Copy, From, Healthcheck, Run};
    Some(match (keyword, name) {
        (From, "platform")
        | (Run, "mount")
        | (Add | Copy, "chown" | "chmod")
        | (Copy, "from")
        | (Healthcheck, "interval" | "timeout" | "start-period" | "retries") => Flag::Known,
        (Healthcheck, "start-interval") => {
            Flag::Since(feature("HEALTHCHECK --start-interval", 36, "leave it out"))
        }
        (Add | Copy, "link") => Flag::Since(feature("--link", 41, "leave it out")),
        (Add | Copy, "exclude") => {
            Flag::Since(feature("--exclude", 38, "name the files, or use .dockerignore"))
        }
        (Copy, "parents") => Flag::Since(feature("COPY --parents", 40, "write a COPY for each directory")),
        (Add, "checksum") => {
            Flag::Since(feature("ADD --checksum", 33, "fetch and verify the file in a RUN step"))
        }
        (Add, "keep-git-dir") => Flag::Since(feature("ADD --keep-git-dir", 46, "clone it in a RUN step")),
        (Add, "from") => Flag::Refused("use COPY --from"),
        (Run, "network") => {
            Flag::Since(feature("RUN --network", 30, "leave it out, or use `kiln build --network`"))
        }
        (Run, "security") => Flag::Refused("RUN steps get no more rights than the slot has"),
        (Run, "device") => Flag::Refused("a slot has no devices of the node"),
        _ => return None,
    })
}

/// The flags that a keyword takes in some version, for messages.
pub(super) fn flags_of(keyword: Keyword) -> Vec<String> {
    let names = [
        "platform",
        "mount",
        "network",
        "chown",
        "chmod",
        "from",
        "link",
        "exclude",
        "parents",
        "checksum",
        "keep-git-dir",
        "interval",
        "timeout",
        "start-period",
        "start-interval",
        "retries",
    ];
    let known = |name: &&str| matches!(flag(keyword, name), Some(Flag::Known | Flag::Since(_)));
    names.into_iter().filter(known).map(|name| format!("--{name}")).collect()
}

/// Whether `buildah` lacks the feature: for certain, or perhaps.
pub(super) fn lack(feature: &Feature, buildah: Version) -> Option<Severity> {
    /// Where the packages of Debian and Ubuntu caught up.
    const PACKAGED: Version = Version::new(1, 35, 0);
    if buildah < feature.since {
        return Some(Severity::Error);
    }
    let gap = Version::new(1, 33, 0) == feature.since && buildah < PACKAGED;
    gap.then_some(Severity::Warning)
}
