//! The suite on PostgreSQL.

pub(crate) const KIND: crate::database::Kind = crate::database::Kind::Postgres;

#[path = "suite.rs"]
mod suite;
