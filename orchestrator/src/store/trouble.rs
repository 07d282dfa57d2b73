//! What a simulation does to a record (edge). Nobody else gives a record any trouble.

use std::any::Any;
use std::io;

use futures_util::future::BoxFuture;

use super::StoreError;

/// The right to use the record, until it is dropped.
pub type Turn = Box<dyn Any + Send + Sync>;

/// Decides when the record may be used, and which commits go wrong.
pub trait Trouble: std::fmt::Debug + Send + Sync {
    /// Waits for the next turn. One turn at a time makes the order of transactions repeatable.
    fn turn(&self) -> BoxFuture<'_, Turn>;

    /// What becomes of the commit that is about to happen.
    fn fate(&self) -> Fate;
}

/// What becomes of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It lasts, and the caller hears so.
    Kept,
    /// It is lost, and the caller hears so.
    Lost,
    /// It lasts, and the caller hears that it failed.
    Unheard,
}

impl Fate {
    pub(super) fn before(self) -> Result<(), StoreError> {
        if self == Self::Lost { Err(failed("the database went away before the commit")) } else { Ok(()) }
    }

    pub(super) fn after(self) -> Result<(), StoreError> {
        if self == Self::Unheard { Err(failed("no answer to the commit came in time")) } else { Ok(()) }
    }
}

fn failed(what: &'static str) -> StoreError {
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, what)).into()
}
