//! The orchestrator on a real database: every interleaving that breaks naive designs, by name.
#![expect(clippy::unwrap_used, reason = "tests")]

mod attempts;
mod bus;
mod cancels;
mod claims;
mod harness;
mod heads;
mod properties;
mod reports;
mod retention;
mod silence;
mod submissions;

mod statements;
