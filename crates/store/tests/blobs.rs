//! Uploads, packs and the index, without HTTP.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use lamina_chunk::{Chunk, ChunkId, Level, PackBuilder, PackId, PackedChunk, Sealer};
use lamina_image::Digest;
use lamina_store::{Repo, Store, StoreConfig, StoreError};
use tokio::time::Instant;

fn pack(seed: u8) -> (PackId, Bytes, ChunkId) {
    let mut builder = PackBuilder::default();
    let mut sealer = Sealer::new(Level::default());
    let mut last = None;
    for number in 0..20u8 {
        let chunk = Chunk::cut(Bytes::from(vec![seed.wrapping_add(number); 40_000]));
        let chunks = vec![PackedChunk { id: chunk.id(), len: 40_000 }];
        builder.push(chunk.id(), &sealer.seal(&chunk), chunks);
        last = Some(chunk.id());
    }
    let (bytes, _) = builder.finish();
    (PackId::try_from(Digest::of(&bytes)).unwrap(), bytes, last.unwrap())
}

async fn upload(store: &Store, bytes: Bytes) -> Result<u64, StoreError> {
    let repo: Repo = "a".parse().unwrap();
    let mut session = store.begin_upload(&repo)?;
    session.write(bytes.clone()).await?;
    session.finish(Digest::of(&bytes)).await
}

async fn open(directory: &std::path::Path) -> Store {
    Store::open_directory(directory, StoreConfig::new(directory.join("index"))).await.unwrap()
}

#[tokio::test]
async fn chunks_of_an_uploaded_pack_are_found_also_when_the_index_is_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let (id, bytes, chunk) = pack(1);
    let store = open(directory.path()).await;
    upload(&store, bytes).await.unwrap();
    let place = store.find_chunks(&[chunk]).await[0].unwrap();
    assert_eq!(place.place.pack, id);
    drop(store);
    std::fs::remove_dir_all(directory.path().join("index")).unwrap();
    let store = open(directory.path()).await;
    assert_eq!(store.find_chunks(&[chunk]).await, [Some(place)]);
}

#[tokio::test]
async fn a_pack_that_came_before_a_restart_is_still_found_by_its_chunks() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).await;
    let (id, bytes, chunk) = pack(3);
    upload(&store, bytes).await.unwrap();
    assert!(!store.is_pack(id.into()).await.unwrap(), "nobody has asked for it yet");
    drop(store);
    let store = open(directory.path()).await;
    assert_eq!(store.find_chunks(&[chunk]).await[0].unwrap().place.pack, id);
    assert!(store.is_pack(id.into()).await.unwrap());
}

#[tokio::test]
async fn a_damaged_pack_is_a_blob_and_nothing_more() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).await;
    let (_, bytes, chunk) = pack(2);
    let mut damaged = bytes.to_vec();
    damaged[3] ^= 0x40;
    let digest = Digest::of(&damaged);
    upload(&store, damaged.into()).await.unwrap();
    assert!(store.blob(digest).await.unwrap().is_some());
    assert!(!store.is_pack(digest).await.unwrap());
    assert_eq!(store.find_chunks(&[chunk]).await, [None]);
    let refused = store.admit_pack(digest.try_into().unwrap()).await;
    assert!(matches!(refused, Err(StoreError::Frame { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_long_upload_comes_back_in_any_range_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).await;
    let bytes: Vec<u8> = (0..40_000_000u32).map(|number| (number / 7).to_le_bytes()[0]).collect();
    let bytes = Bytes::from(bytes);
    let digest = Digest::of(&bytes);
    let mut session = store.begin_upload(&"a".parse().unwrap()).unwrap();
    for piece in bytes.chunks(333_333) {
        session.write(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    session.finish(digest).await.unwrap();
    let blob = store.blob(digest).await.unwrap().unwrap();
    for range in [0..40_000_000, 5..6, 1_048_575..20_000_001, 7..7] {
        let read: Vec<Bytes> = store
            .read_blob(digest, blob, range.clone())
            .await
            .unwrap()
            .into_stream()
            .try_collect()
            .await
            .unwrap();
        let last = read.len().saturating_sub(1);
        assert!(read[..last].iter().all(|frame| frame.len() == 1 << 20), "small frames");
        let start = usize::try_from(range.start).unwrap();
        assert!(read.concat() == bytes[start..usize::try_from(range.end).unwrap()], "{range:?}");
    }
    assert_eq!(std::fs::read_dir(directory.path().join("objects/uploads")).unwrap().count(), 0);
}

#[tokio::test]
async fn uploads_are_bounded_and_expire() {
    let directory = tempfile::tempdir().unwrap();
    let config = StoreConfig {
        uploads_max: 2,
        upload_idle_max: Duration::from_secs(60),
        blob_bytes_max: 10_000_000,
        ..StoreConfig::new(directory.path().join("index"))
    };
    let store = Store::open_directory(directory.path(), config).await.unwrap();
    let repo: Repo = "a".parse().unwrap();
    let mut first = store.begin_upload(&repo).unwrap();
    let second = store.begin_upload(&repo).unwrap();
    assert!(matches!(store.begin_upload(&repo), Err(StoreError::UploadsFull(2))));
    first.write(vec![0; 9_000_000].into()).await.unwrap();
    let refused = first.write(vec![0; 2_000_000].into()).await;
    assert!(matches!(refused, Err(StoreError::TooLarge { .. })));
    let id = first.id();
    assert!(matches!(store.resume_upload(&repo, id), Err(StoreError::UploadBusy(_))));
    drop(first);
    assert_eq!(store.resume_upload(&repo, id).unwrap().received(), 9_000_000);
    assert_eq!(store.expire_uploads(Instant::now()).await, 0);
    assert_eq!(
        store.expire_uploads(Instant::now() + Duration::from_secs(61)).await,
        1,
        "one is still in use"
    );
    assert!(matches!(store.resume_upload(&repo, id), Err(StoreError::UploadUnknown(_))));
    assert_eq!(std::fs::read_dir(directory.path().join("objects/uploads")).unwrap().count(), 0);
    second.cancel().await;
}

#[tokio::test]
async fn files_of_a_crashed_upload_are_removed_at_the_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let left = directory.path().join("objects/uploads/left#1");
    std::fs::create_dir_all(left.parent().unwrap()).unwrap();
    std::fs::write(&left, b"half").unwrap();
    drop(open(directory.path()).await);
    assert!(!left.exists());
}

#[tokio::test]
async fn two_processes_never_share_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let first = open(directory.path()).await;
    let config = StoreConfig::new(directory.path().join("index"));
    let second = Store::open_directory(directory.path(), config).await;
    assert!(matches!(second, Err(StoreError::InUse(_))));
    let _ = Arc::new(first);
}
