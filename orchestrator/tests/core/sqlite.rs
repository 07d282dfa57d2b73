//! The suite on SQLite.

pub(crate) const KIND: crate::database::Kind = crate::database::Kind::Sqlite;

#[path = "suite.rs"]
mod suite;
