//! The HTTP API, through real sockets.
#![expect(clippy::unwrap_used, reason = "tests")]

mod access;
mod builds;
mod contexts;
mod metrics;
mod scene;
mod streams;
