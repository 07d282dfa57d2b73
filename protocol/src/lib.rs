//! Words that every part of Kiln shares: ids, digests, reasons, the build request and its result.
//!
//! Pure: no I/O, no clock, no randomness except in the named constructors of ids.

pub mod digest;
pub mod id;
pub mod reason;
pub mod request;
pub mod result;

pub use digest::Digest;
pub use id::BuildId;
pub use reason::Reason;
