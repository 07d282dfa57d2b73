//! The schema, step by step (shell).
//!
//! Each step only adds, so that replicas of the version before go on beside it; what nobody uses any more goes in
//! a later version. Both kinds have the same steps.

use sqlx::SqlSafeStr as _;
use sqlx::migrate::{Migration, MigrationType, Migrator};

const SQLITE: [(&str, &str); 3] = [
    ("record", include_str!("../../migrations/sqlite/0001_record.sql")),
    ("contexts", include_str!("../../migrations/sqlite/0002_contexts.sql")),
    ("brake", include_str!("../../migrations/sqlite/0003_brake.sql")),
];
const POSTGRES: [(&str, &str); 3] = [
    ("record", include_str!("../../migrations/postgres/0001_record.sql")),
    ("contexts", include_str!("../../migrations/postgres/0002_contexts.sql")),
    ("brake", include_str!("../../migrations/postgres/0003_brake.sql")),
];

pub(super) fn sqlite() -> Migrator {
    migrator(SQLITE)
}

pub(super) fn postgres() -> Migrator {
    migrator(POSTGRES)
}

fn migrator<const N: usize>(steps: [(&'static str, &'static str); N]) -> Migrator {
    let migration = |(number, (name, sql)): (i64, (&'static str, &'static str))| {
        Migration::new(number, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    let mut migrator = Migrator::with_migrations((1..).zip(steps).map(migration).collect());
    // A replica of this version may start while a newer one has already added to the schema.
    migrator.set_ignore_missing(true);
    migrator
}
