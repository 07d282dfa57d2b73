//! The orchestrator: records builds, gives them to agents, and decides what may be published.
//!
//! The record in the database decides everything; messages are hints. What happens to a build is decided by
//! the pure functions of [`decide`] and [`schedule`]; everything else loads, calls them, and saves.

pub mod build;
pub mod decide;
pub mod schedule;
pub mod store;
