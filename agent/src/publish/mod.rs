//! Publishing, in a short-lived process of its own (shell).
//!
//! Credentials that may push exist nowhere else while they are used: not beside the code that reads what slots
//! wrote, not in an argument, an environment or a log.
//!
//! ```text
//! agent ── stdin: one order, then open ──► publish process ──► registry
//!       ◄─ stdout: progress, one answer ──
//! ```
//! One process does one thing and ends. If the agent dies, its end of the pipe closes, and a thread of the
//! process that does nothing else kills it, whatever the others wait for.

mod child;
mod order;
mod process;

pub use process::{PublishError, Publisher, Target};

/// First argument of the process image that publishes.
pub const PUBLISH_ARGUMENT: &str = "__publish";

/// The entry of the publish process. Call it first in `main`, before any thread exists, when the first argument
/// is [`PUBLISH_ARGUMENT`]. Returns the exit code of the process.
pub fn publish_main() -> i32 {
    child::run()
}
