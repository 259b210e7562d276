//! The store over a real S3 server.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use lamina_image::Digest;
use lamina_store::{Repo, Storage, Store, StoreConfig, StoreError, Tag};
use lamina_testkit::noise;
use lamina_testkit::s3::S3;

async fn open(s3: &S3, prefix: &str, index: &Path) -> Result<Store, StoreError> {
    let storage = Storage::parse(&s3.url(prefix), s3.settings(), false)?;
    Store::open_storage(&storage, StoreConfig::new(index.to_owned())).await
}

async fn upload(store: &Store, repo: &Repo, bytes: &[u8]) -> Result<Digest, StoreError> {
    let mut session = store.begin_upload(repo)?;
    for piece in bytes.chunks(1 << 20) {
        session.write(Bytes::copy_from_slice(piece)).await?;
    }
    let digest = Digest::of(bytes);
    session.finish(digest).await?;
    Ok(digest)
}

async fn read(store: &Store, digest: Digest) -> Vec<u8> {
    let blob = store.blob(digest).await.unwrap().unwrap();
    let body = store.read_blob(digest, blob, 0..blob.size()).await.unwrap().into_stream();
    let frames: Vec<Bytes> = body.try_collect().await.unwrap();
    frames.concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_short_and_long_come_back_and_leave_no_upload_behind() {
    let (s3, index) = (S3::start().unwrap(), tempfile::tempdir().unwrap());
    let store = open(&s3, "some/where", index.path()).await.unwrap();
    let repo: Repo = "a/b".parse().unwrap();
    for len in [0, 1, 5 << 20, 8 << 20, (30 << 20) + 7] {
        let bytes = noise(len, 1);
        let digest = upload(&store, &repo, &bytes).await.unwrap();
        assert!(read(&store, digest).await == bytes, "{len} bytes came back as others");
    }
    let uploads = s3.objects().join("some/where/uploads");
    let left = std::fs::read_dir(uploads).map_or(0, Iterator::count);
    assert_eq!(left, 0, "uploads left");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_writers_of_two_processes_on_one_tag_one_wins_each_time() {
    let s3 = S3::start().unwrap();
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stores = [open(&s3, "x", one.path()).await.unwrap(), open(&s3, "x", other.path()).await.unwrap()];
    let (repo, tag): (Repo, Tag) = ("a".parse().unwrap(), "v1".parse().unwrap());
    for round in 0..5u8 {
        let seen = stores[0].reference(&repo, &tag).await.unwrap();
        let writers: Vec<_> = (0..8u8)
            .map(|number| {
                let (store, repo, tag) = (stores[usize::from(number % 2)].clone(), repo.clone(), tag.clone());
                let manifest = Digest::from_bytes([round * 8 + number; 32]);
                tokio::spawn(async move {
                    store.swap(&repo, &tag, seen, Some(manifest)).await.is_ok().then_some(manifest)
                })
            })
            .collect();
        let mut winners = Vec::new();
        for writer in writers {
            winners.extend(writer.await.unwrap());
        }
        for store in &stores {
            let now = store.reference(&repo, &tag).await.unwrap();
            assert_eq!(
                (winners.as_slice(), now.number),
                ([now.manifest.unwrap()].as_slice(), seen.number + 1)
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_slow_and_refuses_every_fourth_request_loses_nothing() {
    let (s3, index) = (S3::start().unwrap(), tempfile::tempdir().unwrap());
    let store = open(&s3, "", index.path()).await.unwrap();
    s3.refuse_every(4);
    s3.answer_late(Duration::from_millis(10));
    let (repo, bytes) = ("a".parse().unwrap(), noise(20 << 20, 2));
    let digest = upload(&store, &repo, &bytes).await.unwrap();
    let tag: Tag = "v1".parse().unwrap();
    for number in 0..5 {
        store.set_tag(&repo, &tag, Some(Digest::from_bytes([number; 32]))).await.unwrap();
    }
    assert!(read(&store, digest).await == bytes);
    assert_eq!(store.reference(&repo, &tag).await.unwrap().manifest, Some(Digest::from_bytes([4; 32])));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_or_bucket_is_said_at_once() {
    let (s3, index) = (S3::start().unwrap(), tempfile::tempdir().unwrap());
    let mut settings = s3.settings();
    settings.retain(|(name, _)| name != "AWS_SECRET_ACCESS_KEY");
    settings.push(("AWS_SECRET_ACCESS_KEY".to_owned(), "wrong".to_owned()));
    for (url, settings) in [(s3.url(""), settings), ("s3://nobucket/x".to_owned(), s3.settings())] {
        let storage = Storage::parse(&url, settings, false).unwrap();
        let opened = Store::open_storage(&storage, StoreConfig::new(index.path().join("index"))).await;
        let Err(error @ StoreError::Storage { .. }) = opened else { panic!("{url} was opened") };
        assert!(error.to_string().contains(&url) && !error.to_string().contains("wrong"), "{error}");
    }
}
