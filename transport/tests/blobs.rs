//! What every store of blobs must do, run on each of them, and what is left in a folder.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::{Duration, SystemTime};

use kiln_protocol::Digest;
use kiln_transport::blobs::{BlobError, BlobWriter, Blobs};
use sha2::Digest as _;
use tempfile::TempDir;

const LIMIT: u64 = 1 << 20;

fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(sha2::Sha256::digest(bytes).into())
}

async fn written(blobs: &Blobs, expected: Digest, bytes: &[u8]) -> BlobWriter {
    let mut writer = blobs.put(expected, LIMIT).await.unwrap();
    for chunk in bytes.chunks(1000) {
        writer.write(chunk).await.unwrap();
    }
    writer
}

async fn put(blobs: &Blobs, bytes: &[u8]) -> Digest {
    let digest = digest_of(bytes);
    let size = written(blobs, digest.clone(), bytes).await.finish().await.unwrap();
    assert_eq!(size, bytes.len() as u64);
    digest
}

async fn get(blobs: &Blobs, digest: &Digest) -> Option<Vec<u8>> {
    let mut reader = blobs.open(digest).await.unwrap()?;
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.chunk().await.unwrap() {
        bytes.extend_from_slice(&chunk);
    }
    assert_eq!(reader.size(), bytes.len() as u64);
    Some(bytes)
}

async fn what_is_put_is_there_until_deleted(blobs: &Blobs) {
    let bytes: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8).collect();
    let digest = digest_of(&bytes);
    assert_eq!(get(blobs, &digest).await, None);
    assert_eq!(blobs.size(&digest).await.unwrap(), None);
    put(blobs, &bytes).await;
    assert_eq!(get(blobs, &digest).await.unwrap(), bytes);
    assert_eq!(blobs.size(&digest).await.unwrap(), Some(200_000));
    assert!(blobs.delete(&digest).await.unwrap());
    assert_eq!(get(blobs, &digest).await, None);
    assert!(!blobs.delete(&digest).await.unwrap());
}

async fn an_empty_blob_is_a_blob(blobs: &Blobs) {
    let digest = put(blobs, b"").await;
    assert_eq!(get(blobs, &digest).await.unwrap(), b"");
}

async fn wrong_bytes_are_refused(blobs: &Blobs) {
    let expected = digest_of(b"right");
    let error = written(blobs, expected.clone(), b"wrong").await.finish().await.unwrap_err();
    let BlobError::Mismatch { expected: named, actual } = error else { panic!("{error}") };
    assert_eq!((named, actual), (expected.clone(), digest_of(b"wrong")));
    assert_eq!(get(blobs, &expected).await, None);
}

async fn the_limit_holds_to_the_byte(blobs: &Blobs) {
    let bytes = b"0123456789";
    let mut writer = blobs.put(digest_of(bytes), 10).await.unwrap();
    writer.write(bytes).await.unwrap();
    writer.finish().await.unwrap();
    let mut writer = blobs.put(digest_of(bytes), 9).await.unwrap();
    writer.write(&bytes[..9]).await.unwrap();
    let error = writer.write(&bytes[9..]).await.unwrap_err();
    assert!(matches!(error, BlobError::TooLarge { limit: 9, .. }), "{error}");
}

async fn an_unfinished_blob_is_nowhere(blobs: &Blobs) {
    let digest = digest_of(b"abandoned");
    let writer = written(blobs, digest.clone(), b"abandoned").await;
    assert_eq!(get(blobs, &digest).await, None);
    assert_eq!(blobs.list().await.unwrap(), []);
    drop(writer);
    assert_eq!(blobs.list().await.unwrap(), []);
}

async fn the_list_names_everything(blobs: &Blobs) {
    let before = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let mut expected = vec![(put(blobs, b"a").await, 1), (put(blobs, b"bb").await, 2)];
    put(blobs, b"a").await;
    expected.sort();
    let listed = blobs.list().await.unwrap();
    assert!(listed.iter().all(|blob| blob.stored_at > before), "{listed:?}");
    assert_eq!(listed.into_iter().map(|blob| (blob.digest, blob.size)).collect::<Vec<_>>(), expected);
}

async fn a_reader_outlives_a_delete(blobs: &Blobs) {
    let bytes = vec![7; 300_000];
    let digest = put(blobs, &bytes).await;
    let mut reader = blobs.open(&digest).await.unwrap().unwrap();
    let mut count = reader.chunk().await.unwrap().unwrap().len();
    blobs.delete(&digest).await.unwrap();
    while let Some(chunk) = reader.chunk().await.unwrap() {
        assert!(chunk.len() <= 64 * 1024);
        count += chunk.len();
    }
    assert_eq!(count, bytes.len());
}

async fn uploads_of_one_blob_do_not_meet(blobs: &Blobs) {
    let bytes = vec![9; 100_000];
    tokio::join!(put(blobs, &bytes), put(blobs, &bytes), put(blobs, &bytes));
    assert_eq!(get(blobs, &digest_of(&bytes)).await.unwrap(), bytes);
}

/// Runs every case on one kind of store.
macro_rules! conformance {
    ($store:ident, $make:path, [$($case:ident),* $(,)?]) => {
        mod $store {
            $(
                #[tokio::test]
                async fn $case() {
                    let (_guard, blobs) = $make().await;
                    super::$case(&blobs).await;
                }
            )*
        }
    };
}

conformance!(
    directory,
    super::in_directory,
    [
        what_is_put_is_there_until_deleted,
        an_empty_blob_is_a_blob,
        wrong_bytes_are_refused,
        the_limit_holds_to_the_byte,
        an_unfinished_blob_is_nowhere,
        the_list_names_everything,
        a_reader_outlives_a_delete,
        uploads_of_one_blob_do_not_meet,
    ]
);

async fn in_directory() -> (TempDir, Blobs) {
    let root = tempfile::tempdir().unwrap();
    let blobs = Blobs::directory(&root.path().join("deep").join("blobs")).await.unwrap();
    (root, blobs)
}

/// Names of all files of a store.
fn files(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("deep/blobs/sha256")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn only_finished_blobs_leave_files() {
    let (root, blobs) = in_directory().await;
    let digest = put(&blobs, b"kept").await;
    drop(written(&blobs, digest_of(b"dropped"), b"dropped").await);
    written(&blobs, digest_of(b"right"), b"wrong").await.finish().await.unwrap_err();
    assert_eq!(files(root.path()), [digest.hex()]);
}

#[tokio::test]
async fn a_damaged_blob_is_healed_by_the_next_upload() {
    let (root, blobs) = in_directory().await;
    let digest = put(&blobs, b"whole").await;
    std::fs::write(root.path().join("deep/blobs/sha256").join(digest.hex()), b"damaged").unwrap();
    put(&blobs, b"whole").await;
    assert_eq!(get(&blobs, &digest).await.unwrap(), b"whole");
}

#[tokio::test]
async fn what_a_killed_upload_left_is_swept_when_it_is_old() {
    let (root, blobs) = in_directory().await;
    let digest = put(&blobs, b"kept").await;
    let left = root.path().join("deep/blobs/sha256/.tmp-left");
    std::fs::write(&left, b"half").unwrap();
    let written = left.metadata().unwrap().modified().unwrap();
    assert_eq!(blobs.sweep(written + Duration::from_mins(59)).await.unwrap(), 0);
    assert_eq!(blobs.sweep(written + Duration::from_mins(61)).await.unwrap(), 1);
    assert_eq!(files(root.path()), [digest.hex()]);
}

#[tokio::test]
async fn others_cannot_look_into_the_store() {
    use std::os::unix::fs::PermissionsExt as _;
    let (root, _blobs) = in_directory().await;
    let mode = root.path().join("deep/blobs").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "mode {mode:o}");
}

#[tokio::test]
async fn a_store_that_cannot_be_made_names_its_folder() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let error = Blobs::directory(&file).await.unwrap_err();
    assert!(error.to_string().contains("/file/sha256"), "{error}");
    assert!(!error.is_disk_full());
}
