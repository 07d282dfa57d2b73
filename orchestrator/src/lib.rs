//! The orchestrator: records builds, gives them to agents, and decides what may be published.
//!
//! The record in the database decides everything; messages are hints. What happens to a build is decided by
//! the pure functions of [`decide`] and [`schedule`]; everything else loads, calls them, and saves.

pub mod amnesty;
pub mod api;
pub mod build;
pub mod config;
pub mod contexts;
pub mod control;
pub mod core;
pub mod decide;
pub mod entropy;
pub mod error;
mod ingest;
mod lease;
pub mod logs;
pub mod metrics;
mod outbox;
pub mod policy;
pub mod run;
pub mod schedule;
pub mod store;
pub mod submit;
pub mod sweep;
pub mod topology;
