//! The suite on PostgreSQL, and what only happens there.

pub(crate) const KIND: crate::database::Kind = crate::database::Kind::Postgres;

mod outages;
mod replicas;
#[path = "suite.rs"]
mod suite;
