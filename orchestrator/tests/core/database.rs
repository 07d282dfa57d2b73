//! A fresh database of either kind for one test.

use std::path::{Path, PathBuf};

use kiln_orchestrator::store::{Clock, Server, Store, StoreError};
use sqlx::{Connection as _, Executor as _, PgConnection, SqlSafeStr as _, SqliteConnection};

/// Which kind of database the tests of a module run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// A database that ends with the test.
pub(crate) enum Database {
    Sqlite(tempfile::TempDir),
    Postgres(Fresh),
}

impl Database {
    pub(crate) async fn new(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => Self::Sqlite(tempfile::tempdir().unwrap()),
            Kind::Postgres => Self::Postgres(Fresh::new(&server()).await),
        }
    }

    /// As another process would.
    pub(crate) async fn open(&self, clock: Clock) -> Result<Store, StoreError> {
        match self {
            Self::Sqlite(folder) => Store::open(&folder.path().join("kiln.db"), clock).await,
            Self::Postgres(fresh) => Store::connect(&fresh.server(), clock).await,
        }
    }

    /// Changes it behind everybody's back.
    pub(crate) async fn execute(&self, sql: &'static str) {
        match self {
            Self::Sqlite(folder) => {
                let options =
                    sqlx::sqlite::SqliteConnectOptions::new().filename(folder.path().join("kiln.db"));
                let mut session = SqliteConnection::connect_with(&options).await.unwrap();
                session.execute(sql).await.unwrap();
                session.close().await.unwrap();
            }
            Self::Postgres(fresh) => drop(fresh.session().await.execute(sql).await.unwrap()),
        }
    }
}

/// The folder of the server that the test runner started.
fn server() -> PathBuf {
    let started = std::env::var_os("KILN_TEST_POSTGRES");
    let missing = || panic!("cargo nextest starts a PostgreSQL; else run scripts/test-postgres.sh start");
    started.unwrap_or_else(missing).into()
}

/// A database that is a copy of one with the schema, until it is dropped.
pub(crate) struct Fresh {
    folder: PathBuf,
    name: String,
}

/// Orders those who make the template.
const TEMPLATE_LOCK: &str = "SELECT pg_advisory_lock(1)";
const TEMPLATE: &str = "kiln_template";

impl Fresh {
    pub(crate) async fn new(folder: &Path) -> Self {
        template(folder).await;
        let name = format!("t{}", uuid::Uuid::new_v4().simple());
        run(folder, "postgres", &format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}")).await;
        Self { folder: folder.to_owned(), name }
    }

    /// Without a schema.
    pub(crate) async fn empty() -> Self {
        let (folder, name) = (server(), format!("t{}", uuid::Uuid::new_v4().simple()));
        run(&folder, "postgres", &format!("CREATE DATABASE {name}")).await;
        Self { folder, name }
    }

    pub(crate) fn server(&self) -> Server {
        Server { connections: 8, ..Server::new(url(&self.folder, &self.name)) }
    }

    /// What an operator, or an accident, does to this database from outside.
    pub(crate) async fn run(&self, sql: &str) {
        run(&self.folder, "postgres", &sql.replace("$name", &self.name)).await;
    }

    /// A session of somebody else.
    pub(crate) async fn session(&self) -> PgConnection {
        PgConnection::connect(&url(&self.folder, &self.name)).await.unwrap()
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        let dropped = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(run(&self.folder, "postgres", &drop));
            });
            thread.join()
        });
        assert!(dropped.is_ok() || std::thread::panicking(), "{drop}");
    }
}

fn url(folder: &Path, name: &str) -> String {
    format!("postgres:///{name}?user=kiln&host={}", folder.display())
}

async fn run(folder: &Path, database: &str, sql: &str) {
    let mut connection = PgConnection::connect(&url(folder, database)).await.unwrap();
    connection.execute(sqlx::AssertSqlSafe(sql.to_owned()).into_sql_str()).await.unwrap();
    connection.close().await.unwrap();
}

/// Makes the database that all others are copies of, unless somebody did.
async fn template(folder: &Path) {
    let mut connection = PgConnection::connect(&url(folder, "postgres")).await.unwrap();
    // Until this session ends.
    connection.execute(TEMPLATE_LOCK).await.unwrap();
    let made = sqlx::query("SELECT 1 FROM pg_database WHERE datname = 'kiln_template' AND datistemplate");
    if made.fetch_optional(&mut connection).await.unwrap().is_none() {
        connection.execute("CREATE DATABASE kiln_template").await.unwrap();
        let store = Store::connect(&Server::new(url(folder, TEMPLATE)), Clock::System).await.unwrap();
        store.close().await;
        // Its last sessions are on their way out.
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'kiln_template'";
        while sqlx::query_scalar::<_, i64>(sessions).fetch_one(&mut connection).await.unwrap() > 0 {
            tokio::task::yield_now().await;
        }
        let mark = "ALTER DATABASE kiln_template WITH IS_TEMPLATE true ALLOW_CONNECTIONS false";
        connection.execute(mark).await.unwrap();
    }
    connection.close().await.unwrap();
}
