//! Collections that hang other artifacts on images, with the object store failing, and with a user who deletes meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use lamina_image::Digest;
use lamina_store::{GcConfig, Repo, Store, StoreConfig};
use object_store::memory::InMemory;

use super::{
    Contents, Deletes, Failing, collect_often_with_crashes, collects, delete_as_user, gc, gc_after, kept,
    push_as, serving, untag,
};
use crate::repack::tar;
use crate::support::{self, Image};

/// Two images of one pack that came by ordinary pushes, the one that brought it without its tag; and that one.
async fn mostly_dead_of_ordinary_pushes() -> (Arc<InMemory>, Image, Digest) {
    let (gone, stays) = (Image::of(vec![tar((2, 2_000_000))]), Image::of(vec![tar((3, 1_000))]));
    let full = Arc::new(InMemory::new());
    assert!(push_as(Arc::clone(&full) as _, &gone, "v0", || false).await);
    assert!(push_as(Arc::clone(&full) as _, &stays, "v1", || false).await);
    untag(&full, "v0").await;
    (full, stays, Digest::of(&gone.manifest))
}

/// The same, where somebody has tagged each manifest that is there.
async fn tagged(left: Arc<InMemory>) -> Arc<InMemory> {
    let index = tempfile::tempdir().unwrap();
    let store =
        Store::open(Arc::clone(&left) as _, StoreConfig::new(index.path().join("index"))).await.unwrap();
    let repo: Repo = "app".parse().unwrap();
    for (number, key) in Contents::read(&left).await.objects.into_keys().enumerate() {
        let Some(hex) = key.strip_prefix("repos/app/manifests/") else { continue };
        let digest: Digest = format!("sha256:{hex}").parse().unwrap();
        let tag = format!("kept-{number}").parse().unwrap();
        assert!(store.set_tag(&repo, &tag, Some(digest)).await.unwrap());
    }
    store.close().await.unwrap();
    left
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_after_any_write_of_collections_that_replace_artifacts_loses_nothing_and_they_end_the_same() {
    let (full, stays, _) = mostly_dead_of_ordinary_pushes().await;
    // the second one takes the old artifact and its pack away, and the third one finds nothing to do
    let (report, writes, left) = collect_often_with_crashes(&full, &collects(), 3).await;
    assert_eq!(report.repacked.packs, 1, "{report:?}");
    assert!(writes > 50, "collections of only {writes} writes");
    let stored: usize = kept(&Contents::read(&left).await).values().map(Bytes::len).sum();
    assert!(stored < 1_000_000, "{stored} bytes are left");
    is_served(left, &stays).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_hangs_waits_in_quarantine_whatever_write_of_the_collection_that_replaced_it_was_the_last() {
    let (full, stays, _) = mostly_dead_of_ordinary_pushes().await;
    let config = GcConfig { quarantine: Duration::from_secs(1_000), ..collects() };
    assert!(gc_after(Arc::clone(&full) as _, &config, 0).await.is_some());
    let hung = |contents: &Contents| -> Vec<String> {
        let prefix = format!("repos/app/referrers/{}/", Digest::of(&stays.manifest).hex());
        let hung = contents.objects.keys().filter(|key| key.starts_with(&prefix));
        hung.cloned().collect()
    };
    let before = hung(&Contents::read(&full).await);
    assert_eq!(before.len(), 1);
    let (mut whole, mut writes_max) = (false, 0);
    while !whole {
        let (inner, writes) = (Arc::new(full.fork()), Arc::new(AtomicUsize::new(0)));
        let (counted, deletes) = (Arc::clone(&writes), None);
        let failing = Failing { inner: Arc::clone(&inner), writes: counted, writes_max, deletes };
        whole = gc_after(Arc::new(failing), &config, 1_001).await.is_some();
        assert!(gc_after(Arc::clone(&inner) as _, &config, 1_002).await.is_some());
        assert!(gc_after(Arc::clone(&inner) as _, &config, 1_900).await.is_some());
        let contents = Contents::read(&inner).await;
        contents.check();
        assert!(hung(&contents).contains(&before[0]), "after {writes_max} writes");
        assert_eq!(hung(&contents).len(), 2, "after {writes_max} writes");
        assert!(gc_after(Arc::clone(&inner) as _, &config, 3_010).await.is_some());
        let contents = Contents::read(&inner).await;
        contents.check();
        assert_eq!(hung(&contents).len(), 1, "after {writes_max} writes");
        assert!(!hung(&contents).contains(&before[0]), "after {writes_max} writes");
        is_served(inner, &stays).await;
        writes_max += 1;
    }
    assert!(writes_max > 20, "a collection of only {writes_max} writes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_user_deletes_before_any_write_of_a_collection_that_replaces_artifacts_stays_deleted() {
    let (full, stays, gone) = mostly_dead_of_ordinary_pushes().await;
    delete_as_user(&full, gone).await;
    let config = GcConfig { keep_untagged: true, ..collects() };
    let (mut deleted, mut after, mut repacked) = (true, 0, 0);
    while deleted {
        let (inner, done) = (Arc::new(full.fork()), Arc::new(AtomicBool::new(false)));
        let deletes = Deletes { image: Digest::of(&stays.manifest), after, done: Arc::clone(&done) };
        let (deletes, writes) = (Some(deletes), Arc::default());
        let failing = Failing { inner: Arc::clone(&inner), writes, writes_max: usize::MAX, deletes };
        repacked += gc(Arc::new(failing), &config).await.unwrap().repacked.packs;
        deleted = done.load(Ordering::SeqCst);
        if deleted {
            for _ in 0..2 {
                gc(Arc::clone(&inner) as _, &config).await.unwrap();
            }
            let left = kept(&Contents::read(&inner).await).into_keys();
            let left: Vec<String> = left.filter(|key| !key.starts_with("refs/")).collect();
            assert!(left.is_empty(), "before write {after}: {left:?}");
        }
        after += 1;
    }
    assert!(repacked > 10, "it was deleted before anything was repacked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_user_deletes_from_under_a_collection_stays_deleted_whatever_write_of_it_after_that_was_the_last()
 {
    let (full, stays, gone) = mostly_dead_of_ordinary_pushes().await;
    delete_as_user(&full, gone).await;
    let (config, image) = (GcConfig { keep_untagged: true, ..collects() }, Digest::of(&stays.manifest));
    let writes = Arc::new(AtomicUsize::new(0));
    let inner = Arc::new(full.fork());
    let failing = Failing { inner, writes: Arc::clone(&writes), writes_max: usize::MAX, deletes: None };
    assert_eq!(gc(Arc::new(failing), &config).await.unwrap().repacked.packs, 1);
    let (all, mut left_behind) = (writes.load(Ordering::SeqCst), 0);
    // artifacts are hung in the end
    for (after, last) in
        (all - 24..all).flat_map(|after| (after + 1..after + 9).map(move |last| (after, last)))
    {
        let (inner, done) = (Arc::new(full.fork()), Arc::new(AtomicBool::new(false)));
        let deletes = Some(Deletes { image, after, done: Arc::clone(&done) });
        let failing =
            Failing { inner: Arc::clone(&inner), writes: Arc::default(), writes_max: last, deletes };
        gc(Arc::new(failing), &config).await;
        let hung = |contents: &Contents| {
            contents.objects.keys().filter(|key| key.starts_with("repos/app/manifests/")).count()
        };
        if !done.load(Ordering::SeqCst) || hung(&Contents::read(&inner).await) == 0 {
            continue;
        }
        left_behind += 1;
        // now and then somebody has tagged it meanwhile
        if left_behind % 8 == 1 {
            let relied_on = tagged(Arc::new(inner.fork())).await;
            gc(Arc::clone(&relied_on) as _, &config).await.unwrap();
            let left = hung(&Contents::read(&relied_on).await);
            assert!(left > 0, "deleted before write {after}, crashed after {last}: tagged, and gone");
        }
        for _ in 0..2 {
            gc(Arc::clone(&inner) as _, &config).await.unwrap();
        }
        let left = kept(&Contents::read(&inner).await).into_keys();
        let left: Vec<String> = left.filter(|key| !key.starts_with("refs/")).collect();
        assert!(left.is_empty(), "deleted before write {after}, crashed after {last}: {left:?}");
    }
    assert!(left_behind > 0, "no crash has left anything hanging");
}

/// Every layer of the image comes from what is left, also from chunks alone.
async fn is_served(left: Arc<InMemory>, image: &Image) {
    let index = tempfile::tempdir().unwrap();
    let store = Store::open(left as _, StoreConfig::new(index.path().join("index"))).await.unwrap();
    serving(&store, async |address| {
        for layer in image.tars.iter().chain(&image.layers) {
            let path = format!("/v2/app/blobs/{}", Digest::of(layer));
            let pulled = support::send(address, http::Method::GET, &path, &[], "").await;
            assert!(pulled.expect(http::StatusCode::OK).body == layer);
        }
    })
    .await;
    store.close().await.unwrap();
}
