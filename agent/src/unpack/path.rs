//! Pure: which names of an archive may become paths below the root.

use super::error::PathFault;
use super::limits::Limits;

/// The root of the archive; an entry for it is listed but changes nothing.
pub(super) const ROOT: &[u8] = b".";

/// The path without `.` components and repeated slashes, or [`ROOT`]. Bytes are kept: a name need not be UTF-8.
pub(super) fn normalise(raw: &[u8], limits: &Limits) -> Result<Vec<u8>, PathFault> {
    check_whole(raw, limits)?;
    let mut clean = Vec::with_capacity(raw.len());
    for (depth, component) in components(raw).enumerate() {
        check_component(component, limits)?;
        if depth >= limits.max_depth {
            return Err(PathFault::TooDeep { limit: limits.max_depth });
        }
        if depth > 0 {
            clean.push(b'/');
        }
        clean.extend_from_slice(component);
    }
    Ok(if clean.is_empty() { ROOT.to_vec() } else { clean })
}

/// The components that name something: none for [`ROOT`].
pub(super) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|component| !component.is_empty() && *component != b".")
}

/// A normalised path as its parent ([`ROOT`] at the top) and its last component.
pub(super) fn split_last(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (ROOT, path),
    }
}

/// What a symbolic link points to is stored, never followed; it only has to be something the kernel can store.
pub(super) fn check_symlink_target(target: &[u8], limits: &Limits) -> Result<(), PathFault> {
    if target.is_empty() {
        return Err(PathFault::Empty);
    }
    check_bytes(target, limits)
}

fn check_whole(raw: &[u8], limits: &Limits) -> Result<(), PathFault> {
    match raw.first() {
        None => Err(PathFault::Empty),
        Some(b'/') => Err(PathFault::Absolute),
        Some(_) => check_bytes(raw, limits),
    }
}

fn check_bytes(raw: &[u8], limits: &Limits) -> Result<(), PathFault> {
    if raw.contains(&0) {
        return Err(PathFault::Zero);
    }
    if raw.len() > limits.max_path_bytes {
        return Err(PathFault::TooLong { bytes: raw.len(), limit: limits.max_path_bytes });
    }
    Ok(())
}

/// `a/../b` stays inside as text, but not where `a` is a link elsewhere; nothing needs it in an archive.
fn check_component(component: &[u8], limits: &Limits) -> Result<(), PathFault> {
    if component == b".." {
        return Err(PathFault::Parent);
    }
    if component.len() > limits.max_component_bytes {
        return Err(PathFault::ComponentTooLong {
            bytes: component.len(),
            limit: limits.max_component_bytes,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(raw: &[u8]) -> Result<Vec<u8>, PathFault> {
        normalise(raw, &Limits::default())
    }

    #[test]
    fn harmless_spellings_become_one() {
        for raw in [&b"a/b"[..], b"./a/b", b"a//b", b"a/./b", b"a/b/", b"./a/b//", b"a/b/."] {
            assert_eq!(clean(raw).unwrap(), b"a/b", "{}", raw.escape_ascii());
        }
        for raw in [&b"."[..], b"./", b"././/."] {
            assert_eq!(clean(raw).unwrap(), ROOT, "{}", raw.escape_ascii());
        }
        assert_eq!(clean(b"..a/...").unwrap(), b"..a/...");
        assert_eq!(clean(b"\xff\\\n").unwrap(), b"\xff\\\n");
    }

    #[test]
    fn unsafe_spellings_are_named() {
        let table: [(&[u8], PathFault); 7] = [
            (b"", PathFault::Empty),
            (b"/a", PathFault::Absolute),
            (b"//", PathFault::Absolute),
            (b"..", PathFault::Parent),
            (b"a/../b", PathFault::Parent),
            (b"a/..", PathFault::Parent),
            (b"a\0b", PathFault::Zero),
        ];
        for (raw, fault) in table {
            assert_eq!(clean(raw), Err(fault), "{}", raw.escape_ascii());
        }
    }

    #[test]
    fn each_limit_holds_exactly() {
        let limits = Limits { max_path_bytes: 9, max_component_bytes: 4, max_depth: 3, ..Limits::default() };
        for good in [&b"aaaa/bbbb"[..], b"a/b/c"] {
            assert!(normalise(good, &limits).is_ok(), "{}", good.escape_ascii());
        }
        assert_eq!(normalise(b"aaaa/bbbb/", &limits), Err(PathFault::TooLong { bytes: 10, limit: 9 }));
        assert_eq!(normalise(b"aaaaa", &limits), Err(PathFault::ComponentTooLong { bytes: 5, limit: 4 }));
        assert_eq!(normalise(b"a/b/c/d", &limits), Err(PathFault::TooDeep { limit: 3 }));
    }

    #[test]
    fn a_path_splits_at_its_last_slash() {
        assert_eq!(split_last(b"a"), (ROOT, &b"a"[..]));
        assert_eq!(split_last(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
    }

    #[test]
    fn symlink_targets_are_free_but_storable() {
        let limits = Limits::default();
        for good in [&b"/usr/share/zoneinfo/UTC"[..], b"../../x", b"."] {
            assert_eq!(check_symlink_target(good, &limits), Ok(()));
        }
        assert_eq!(check_symlink_target(b"", &limits), Err(PathFault::Empty));
        assert_eq!(check_symlink_target(b"a\0", &limits), Err(PathFault::Zero));
        assert!(check_symlink_target(&[b'a'; 4095], &limits).is_ok());
        assert!(check_symlink_target(&[b'a'; 4096], &limits).is_err());
    }
}
