//! Pure: which mounts a build may have.
//!
//! The slot is what keeps a RUN step from the node; these rules only make sure that a file that asks for more is
//! refused before anything runs, with a line number. They also name the options that buildah does not know, or
//! that make it crash.

use super::Severity;
use super::check::Findings;
use super::features::{self, CACHE_FROM_IMAGE, RELATIVE_TARGET, SECRET_ENV};
use super::mounts::Mount;
use crate::version::Version;

/// The options of the mount types were compared with this version; a later one may know more.
const OPTIONS_VERIFIED: Version = Version::new(1, 29, 0);

const PROPAGATION: [&str; 10] =
    ["bind-propagation", "shared", "rshared", "private", "rprivate", "slave", "rslave", "Z", "z", "U"];
const EVERYWHERE: [&str; 6] = ["type", "target", "ro", "nosuid", "nodev", "noexec"];
const BIND: [&str; 5] = ["from", "source", "rw", "bind-nonrecursive", "consistency"];
const CACHE: [&str; 8] = ["from", "source", "rw", "id", "sharing", "mode", "uid", "gid"];
const TMPFS: [&str; 3] = ["tmpcopyup", "tmpfs-mode", "tmpfs-size"];
const SECRET: [&str; 8] = ["type", "target", "id", "required", "mode", "uid", "gid", "env"];
/// buildah crashes or fails where these have no value.
const NEED_A_VALUE: [&str; 12] = [
    "type",
    "target",
    "from",
    "source",
    "id",
    "sharing",
    "mode",
    "uid",
    "gid",
    "required",
    "env",
    "bind-propagation",
];

/// Checks the mounts of one RUN. Values are expanded.
pub(super) fn check(mounts: &[Mount], buildah: Version, out: &mut Findings) {
    let mut last_kind = "bind";
    for mount in mounts {
        if mount.get("type").is_none() && last_kind != "bind" {
            // buildah keeps the type of the mount before (seen with 1.28.2).
            out.error(mount.line, "a mount without a type after one of another type", "write `type=bind`");
        }
        last_kind = mount.kind();
        check_mount(mount, buildah, out);
    }
}

fn check_mount(mount: &Mount, buildah: Version, out: &mut Findings) {
    let line = mount.line;
    match mount.kind() {
        "bind" => check_source(mount, out),
        "cache" => check_cache(mount, buildah, out),
        "secret" => check_secret(mount, buildah, out),
        "tmpfs" => {}
        "ssh" => {
            out.error(
                line,
                "Kiln has no ssh agent for a build",
                "give a deploy key with `--mount=type=secret`",
            );
            return;
        }
        kind => {
            let message = format!("there is no mount type `{kind}`");
            out.error(line, message, "the types are bind, cache, secret and tmpfs");
            return;
        }
    }
    check_options(mount, buildah, out);
    if mount.kind() != "secret" {
        check_target(mount, buildah, out);
    }
}

fn check_options(mount: &Mount, buildah: Version, out: &mut Findings) {
    for (name, value) in &mount.fields {
        if NEED_A_VALUE.contains(&name.as_str()) && value.as_ref().is_none_or(String::is_empty) {
            let hint = if name == "required" { "write `required=true`" } else { "write `option=value`" };
            out.error(mount.line, format!("the mount option {name} needs a value"), hint);
        } else if !knows(mount.kind(), name) {
            let severity = if buildah < OPTIONS_VERIFIED { Severity::Error } else { Severity::Warning };
            let message =
                format!("buildah {buildah} may not know the option {name} of a {} mount", mount.kind());
            out.push(mount.line, severity, message, instead_of(mount.kind(), name));
        }
    }
}

fn knows(kind: &str, name: &str) -> bool {
    let shared = EVERYWHERE.contains(&name);
    match kind {
        "bind" => shared || BIND.contains(&name) || PROPAGATION.contains(&name),
        "cache" => shared || CACHE.contains(&name) || PROPAGATION.contains(&name),
        "tmpfs" => shared || TMPFS.contains(&name),
        _ => SECRET.contains(&name),
    }
}

fn instead_of(kind: &str, name: &str) -> &'static str {
    match (kind, name) {
        ("tmpfs", "size") => "write tmpfs-size",
        ("secret", "source") => "write id",
        _ => "leave it out",
    }
}

fn check_target(mount: &Mount, buildah: Version, out: &mut Findings) {
    let line = mount.line;
    let Some(target) = mount.get("target") else {
        return out.error(line, "a mount without a target", "write `target=/path`");
    };
    if has_parent(target) {
        out.error(line, format!("the mount target `{target}` contains `..`"), "write the full path");
    }
    if !target.is_empty() && !target.starts_with('/') {
        out.lacks(line, &RELATIVE_TARGET, buildah);
    }
}

/// A source in the context must be relative, one in an image or stage may be absolute: it is looked up there.
fn check_source(mount: &Mount, out: &mut Findings) {
    let Some(source) = mount.get("source") else { return };
    if has_parent(source) {
        let message = format!("the mount source `{source}` contains `..`");
        out.error(mount.line, message, "name a path within the context or the stage");
    } else if source.starts_with('/') && mount.get("from").is_none() {
        let message = format!("the mount source `{source}` is absolute");
        out.error(mount.line, message, "write it relative to the context, `.` for all of it");
    }
}

fn check_cache(mount: &Mount, buildah: Version, out: &mut Findings) {
    check_source(mount, out);
    // Without an id buildah takes the target, cleaned of `..`, for the directory: safe, as targets are checked.
    if let Some(id) = mount.get("id").filter(|id| !is_plain(id)) {
        let message = format!("the cache id `{id}` is not a plain name");
        out.error(mount.line, message, "begin with a letter or digit and go on with these, `_`, `-` and `.`");
    }
    match mount.get("sharing") {
        None | Some("" | "shared" | "locked") => {}
        Some(other) => out.error(
            mount.line,
            format!("buildah does not know the cache sharing `{other}`"),
            "write `sharing=locked`",
        ),
    }
    let from_image = mount.get("from").filter(|from| out.is_image(mount.line, from));
    if from_image.is_some() {
        out.lacks(mount.line, &CACHE_FROM_IMAGE, buildah);
    }
}

fn check_secret(mount: &Mount, buildah: Version, out: &mut Findings) {
    match mount.get("id") {
        None => out.error(mount.line, "a secret mount without an id", "write `id=name`"),
        // The id becomes part of a path outside of the image.
        Some(id) if !id.is_empty() && !is_plain(id) => {
            let message = format!("the secret id `{id}` is not a plain name");
            out.error(
                mount.line,
                message,
                "begin with a letter or digit and go on with these, `_`, `-` and `.`",
            );
        }
        Some(_) => {}
    }
    if mount.get("target").is_some_and(has_parent) {
        out.error(mount.line, "the secret target contains `..`", "write the full path");
    }
    if mount.get("env").is_some() {
        out.lacks(mount.line, &SECRET_ENV, buildah);
    }
}

fn has_parent(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

/// Names that are one component of a path and nothing else.
fn is_plain(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
}

/// Whether the tables are older than `buildah`.
pub(super) fn is_newer_than_known(buildah: Version) -> bool {
    buildah > features::NEWEST_KNOWN
}
