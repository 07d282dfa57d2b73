//! What holds on each kind of database.

pub(crate) use super::KIND;

mod attempts;
mod bus;
mod cancels;
mod claims;
mod contexts;
pub(crate) mod harness;
mod heads;
mod properties;
mod reports;
mod retention;
mod silence;
mod statements;
mod submissions;
