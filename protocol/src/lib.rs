//! Words that every part of Kiln shares: ids, digests, reasons, states, messages, the build request and its
//! result.
//!
//! Pure: no I/O, no clock, no randomness except in the named constructors of ids.

pub mod api;
pub mod digest;
pub mod envelope;
pub mod glob;
pub mod id;
pub mod message;
pub mod reason;
pub mod request;
pub mod result;
pub mod setting;
pub mod spec;
pub mod state;
pub mod target;
pub mod topology;
pub mod verdict;

pub use digest::Digest;
pub use id::BuildId;
pub use reason::Reason;
pub use spec::BuildSpec;
pub use state::State;
pub use target::Target;
