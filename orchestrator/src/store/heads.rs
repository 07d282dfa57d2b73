//! The newest committed build of every target (shell).

use kiln_protocol::id::{Pool, SubmitSeq};
use kiln_protocol::{BuildId, Digest, Target};
use uuid::Uuid;

use super::{Row, Statement, StoreError, Tx, parse};
use crate::build::{Head, Micros};

/// A tag that is to be looked at again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recheck {
    /// The tag.
    pub target: Target,
    /// The build that it should show.
    pub build: BuildId,
    /// Its digest.
    pub digest: Digest,
    /// How often it was looked at since the head changed.
    pub rechecks: u32,
}

const HEAD: &str = "SELECT submit_seq, build FROM tag_heads WHERE target = $1";
const UPSERT: &str = "INSERT INTO tag_heads (target, submit_seq, build, digest, rechecks) VALUES ($1, $2, $3, $4, 0) \
    ON CONFLICT (target) DO UPDATE SET submit_seq = excluded.submit_seq, build = excluded.build, \
    digest = excluded.digest, rechecks = 0, \
    recheck_at = CASE WHEN tag_heads.recheck_at IS NULL THEN tag_heads.recheck_at ELSE $5 END WHERE excluded.submit_seq > tag_heads.submit_seq";
const REMEMBER: &str =
    "INSERT INTO tag_history (target, digest, build, at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING";
const KNOWN: &str = "SELECT 1 FROM tag_history WHERE target = $1 AND digest = $2";
const WATCH: &str = "UPDATE tag_heads SET recheck_at = $2, rechecks = $3 WHERE target = $1";
const DUE: Statement = Statement {
    sqlite: "SELECT h.target, h.build, h.digest, h.rechecks FROM tag_heads AS h \
        JOIN builds AS b ON b.id = h.build WHERE h.recheck_at <= $1 AND b.pool = $2 ORDER BY h.recheck_at LIMIT 1",
    postgres: "SELECT h.target, h.build, h.digest, h.rechecks FROM tag_heads AS h \
        JOIN builds AS b ON b.id = h.build WHERE h.recheck_at <= $1 AND b.pool = $2 ORDER BY h.recheck_at LIMIT 1 \
        FOR UPDATE OF h SKIP LOCKED",
};
pub(super) const STATEMENTS: &[&str] = &[HEAD, UPSERT, REMEMBER, KNOWN, WATCH];
pub(super) const EACH: &[Statement] = &[DUE];

impl Tx {
    /// The newest committed build of a target.
    pub async fn head(&mut self, target: &Target) -> Result<Option<Head>, StoreError> {
        let row = self.inner.query(HEAD).bind(target.to_string()).fetch_optional().await?;
        let head = |row: Row| {
            let build: Uuid = row.try_get("build")?;
            let submit_seq = SubmitSeq(row.try_get("submit_seq")?);
            Ok(Head { submit_seq, build: BuildId::from_uuid(build) })
        };
        row.map(head).transpose()
    }

    /// Makes a build the newest of a target, unless a newer one is. A tag that is watched is looked at again at
    /// this time.
    pub async fn take_head(
        &mut self,
        target: &Target,
        submit_seq: SubmitSeq,
        build: BuildId,
        digest: &Digest,
        look_at: Micros,
    ) -> Result<(), StoreError> {
        let name = target.to_string();
        let upsert = self.inner.query(UPSERT).bind(&name).bind(submit_seq.0).bind(build.as_uuid());
        upsert.bind(digest.as_str()).bind(look_at).execute().await?;
        let remember = self.inner.query(REMEMBER).bind(&name).bind(digest.as_str()).bind(build.as_uuid());
        remember.bind(self.now).execute().await?;
        Ok(())
    }

    /// Whether Kiln ever committed this digest for this target.
    pub async fn is_ours(&mut self, target: &Target, digest: &Digest) -> Result<bool, StoreError> {
        let query = self.inner.query(KNOWN).bind(target.to_string()).bind(digest.as_str());
        Ok(query.fetch_optional().await?.is_some())
    }

    /// Has a tag looked at again at this time; `None` when nothing can be wrong with it any more.
    pub async fn recheck_at(
        &mut self,
        target: &Target,
        at: Option<Micros>,
        rechecks: u32,
    ) -> Result<(), StoreError> {
        let query = self.inner.query(WATCH).bind(target.to_string()).bind(at).bind(i64::from(rechecks));
        query.execute().await?;
        Ok(())
    }

    /// A tag that is to be looked at now, of a build that this pool may touch.
    pub async fn due_recheck(&mut self, pool: &Pool) -> Result<Option<Recheck>, StoreError> {
        let query = self.inner.query(DUE).bind(self.now).bind(pool.as_str());
        query.fetch_optional().await?.as_ref().map(recheck).transpose()
    }
}

fn recheck(row: &Row) -> Result<Recheck, StoreError> {
    let (build, rechecks): (Uuid, i64) = (row.try_get("build")?, row.try_get("rechecks")?);
    Ok(Recheck {
        target: parse("target", row.try_get("target")?)?,
        build: BuildId::from_uuid(build),
        digest: parse("digest", row.try_get("digest")?)?,
        rechecks: u32::try_from(rechecks).unwrap_or(u32::MAX),
    })
}
