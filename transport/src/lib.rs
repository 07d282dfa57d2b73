//! What carries messages and blobs between the parts of Kiln.
//!
//! [`Bus`] carries messages with the semantics of AMQP 0.9.1. A message is a hint: whoever uses a bus must be
//! able to bear that any message is lost, comes twice or comes late.

pub mod amqp;
mod backoff;
pub mod blobs;
mod bus;
pub mod crash;
mod delivery;
mod error;
pub mod memory;
mod message;
pub mod topic;
pub mod topology;

pub use amqp::AmqpSettings;
pub use backoff::Backoff;
pub use blobs::Blobs;
pub use bus::{Bus, ConnectionState, ConnectionWatch};
pub use crash::CrashPoint;
pub use delivery::{Consumer, Delivery};
pub use error::BusError;
pub use memory::{Fault, FaultRates, Faults, MemoryBroker};
pub use message::{FIRST_DEATH_QUEUE, FIRST_DEATH_REASON, MAX_BODY, MAX_HEADERS, Message, Published};
pub use topology::Topology;
