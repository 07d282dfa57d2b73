//! Under which ids slots run on this machine (shell).

use nix::unistd::{Uid, User as SystemUser};

use super::wire::{IdRange, User};

/// Images use ids up to 65535 (`nobody` is 65534): a shorter range breaks `chown`.
pub const REQUIRED_IDS: u32 = 65_536;
/// The system user whose subordinate ids an agent that runs as root uses.
pub const SYSTEM_USER: &str = "kiln";

/// The ids of this machine's slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Subordinate ids.
    pub ids: IdRange,
    /// Whom a root agent becomes before it makes anything.
    pub drop_to: Option<User>,
}

/// No slot can run under the present user.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The user is not in the user database.
    #[error("user id {0} has no entry in the user database")]
    UnknownUser(u32),
    /// An agent that runs as root needs the system user.
    #[error("running as root needs the system user `{SYSTEM_USER}`, and there is none")]
    NoSystemUser,
    /// A file of subordinate ids has no long enough range for the user.
    #[error("{file} has no range of {REQUIRED_IDS} ids for user `{user}`")]
    NoRange {
        /// `/etc/subuid` or `/etc/subgid`.
        file: &'static str,
        /// The user who needs a line there.
        user: String,
    },
}

impl IdentityError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        "run `kiln doctor --print-setup`, read the script, then run it as root"
    }
}

/// The identity of slots started by this process.
pub fn discover() -> Result<Identity, IdentityError> {
    let uid = Uid::effective();
    let found = if uid.is_root() { SystemUser::from_name(SYSTEM_USER) } else { SystemUser::from_uid(uid) };
    let user = match found.ok().flatten() {
        Some(user) => user,
        None if uid.is_root() => return Err(IdentityError::NoSystemUser),
        None => return Err(IdentityError::UnknownUser(uid.as_raw())),
    };
    let first = |file: &'static str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        first_id(&text, &user.name, user.uid.as_raw())
            .ok_or_else(|| IdentityError::NoRange { file, user: user.name.clone() })
    };
    let ids =
        IdRange { first_uid: first("/etc/subuid")?, first_gid: first("/etc/subgid")?, count: REQUIRED_IDS };
    let drop_to = uid.is_root().then(|| User { uid: user.uid.as_raw(), gid: user.gid.as_raw() });
    Ok(Identity { ids, drop_to })
}

/// First id of the first range that is long enough; lines are `name-or-uid:first:count` (subuid(5)).
fn first_id(text: &str, name: &str, uid: u32) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let owner = fields.next()?;
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.trim().parse::<u32>().ok()?);
        let ours = owner == name || owner.parse() == Ok(uid);
        (ours && count >= REQUIRED_IDS).then_some(first)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_long_enough_range_of_the_user_counts() {
        let text = "other:1:65536\n# comment\nkiln:5:100\nkiln:200000:65536\n1001:300000:70000\nbad:line\n";
        assert_eq!(first_id(text, "kiln", 999), Some(200_000));
        assert_eq!(first_id(text, "builder", 1001), Some(300_000));
        assert_eq!(first_id(text, "nobody", 65_534), None);
        assert_eq!(first_id("", "kiln", 999), None);
    }
}
