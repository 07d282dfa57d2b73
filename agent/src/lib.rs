//! Kiln agent.
