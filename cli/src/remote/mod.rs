//! Commands that ask a server (edge).

mod args;
mod build;
mod client;
mod dead;
mod error;
mod follow;
mod lines;
mod query;
mod sse;
mod table;

pub(crate) use args::{
    Access, CancelArgs, DeadCommand, ListArgs, LogsArgs, QueueArgs, RetryArgs, ServerAddress, ShowArgs,
    default_socket, default_token,
};
pub(crate) use build::run as build;
pub(crate) use dead::run as dead;
pub(crate) use query::{cancel, list, logs, queue, retry, show};
