//! The brake on believing agents dead (shell).

use super::{StoreError, Tx, json, to_json};
use crate::amnesty::Brake;

/// An update, so that it is held until the transaction ends wherever rows are what is locked.
const TAKE: &str = "UPDATE brake SET version = version + 1 WHERE id = 1 RETURNING silenced";
const SAVE: &str = "UPDATE brake SET silenced = $1 WHERE id = 1";
pub(super) const STATEMENTS: &[&str] = &[TAKE, SAVE];

impl Tx {
    /// Who was believed dead lately. Nobody else decides about that until this transaction ends.
    pub async fn brake(&mut self) -> Result<Brake, StoreError> {
        let row = self.inner.query(TAKE).fetch_one().await?;
        json("silenced", row.try_get("silenced")?)
    }

    /// Remembers who is believed dead.
    pub async fn save_brake(&mut self, brake: &Brake) -> Result<(), StoreError> {
        self.inner.query(SAVE).bind(to_json("silenced", brake)?).execute().await?;
        Ok(())
    }
}
