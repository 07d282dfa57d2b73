//! Harness of the end-to-end suites: real buildah, a real registry, real faults (edge).
//!
//! Everything that it starts ends with the test process, even if that one is killed.
#![expect(clippy::unwrap_used, reason = "a harness fails its test by panicking")]
#![expect(clippy::missing_panics_doc, reason = "a harness fails its test by panicking")]

pub mod base;
pub mod harbor;
pub mod http;
pub mod image;
pub mod intercept;
pub mod kiln;
pub mod lab;
pub mod leftovers;
pub mod plain;
pub mod plugin;
pub mod process;
pub mod proxy;
pub mod rabbit;
pub mod registry;
pub mod resolver;
pub mod server;
pub mod site;
pub mod tools;
pub mod tree;
pub mod world;
