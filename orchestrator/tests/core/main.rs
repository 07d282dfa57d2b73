//! The orchestrator on a real database: every interleaving that breaks naive designs, by name. All of it runs on each
//! kind of database.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::duplicate_mod, reason = "every test runs on each kind of database")]

mod database;
mod postgres;
mod sqlite;
