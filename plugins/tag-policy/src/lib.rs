//! Kiln policy: which tags a repository may have, and which never move. The rules are in [`policy`]; this file
//! only names the parts.

pub mod pattern;
pub mod policy;
pub mod settings;
pub mod version;

// The contract's names are no names for a linker of this machine, where only the rules are tested.
#[cfg(target_family = "wasm")]
mod guest;
