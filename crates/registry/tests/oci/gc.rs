//! Collections beside a registry that is at work.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_image::{Digest, media_type};
use lamina_store::{GcConfig, GcReport, StoreConfig, StoreError};
use lamina_testkit::noise;

use crate::support::{Image, Registry};

/// Collects everything that nothing leads to, at once.
fn at_once() -> GcConfig {
    let none = Duration::ZERO;
    GcConfig { grace: none, quarantine: none, lost_after: Duration::from_secs(5), ..GcConfig::default() }
}

/// So long after everything that was written that nothing is young.
fn later() -> u64 {
    now() + 1
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs()
}

async fn gc(registry: &Registry) -> GcReport {
    registry.store.keeper().gc(&at_once(), later()).await.unwrap()
}

/// A registry that holds nothing of what it was sent: another process, as far as collections are concerned.
async fn restarted(registry: Registry) -> Registry {
    registry.store.close().await.unwrap();
    registry.restart().await
}

/// Every object, with its contents.
fn objects(directory: &Path) -> BTreeMap<String, Bytes> {
    let mut found = BTreeMap::new();
    let mut open = vec![directory.join("objects")];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => drop(found.insert(path.display().to_string(), std::fs::read(&path).unwrap().into())),
            }
        }
    }
    found.retain(|key, _| !key.contains("/collecting/"));
    found
}

fn images() -> (Image, Image) {
    let (shared, one, other) = (noise(300_000, 1), noise(400_000, 2), noise(500_000, 3));
    let base: &[(&str, &[u8])] = &[("lib/shared", &shared)];
    (Image::new(&[base, &[("one", &one)]]), Image::new(&[base, &[("other", &other)]]))
}

async fn delete_tag(registry: &Registry, tag: &str) {
    let path = format!("/v2/app/manifests/{tag}");
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
}

async fn pulls(registry: &Registry, image: &Image, tag: &str) {
    let manifest = registry.get(&format!("/v2/app/manifests/{tag}")).await.expect(StatusCode::OK);
    assert_eq!(manifest.body, image.manifest);
    for blob in image.blobs() {
        let pulled =
            registry.get(&format!("/v2/app/blobs/{}", Digest::of(blob))).await.expect(StatusCode::OK);
        assert!(pulled.body == *blob);
    }
}

#[tokio::test]
async fn what_a_deleted_tag_alone_led_to_is_freed_and_nothing_else() {
    let registry = Registry::start().await;
    let (one, other) = images();
    let (gone, kept) = (registry.push("app", "one", &one).await, registry.push("app", "other", &other).await);
    registry.converted(gone).await;
    let record = registry.converted(kept).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.freed.bytes, 0, "everything is tagged");
    delete_tag(&registry, "one").await;
    let registry = restarted(registry).await;
    let report = gc(&registry).await;
    assert!(report.freed.bytes > 400_000 && report.freed.manifests == 2, "{report:?}");
    // what lives of the pack that both were cut into is in another one; the old one goes with the artifact that names it
    assert_eq!((report.repacked.packs, gc(&registry).await.repacked.packs), (1, 0));
    pulls(&registry, &other, "other").await;
    let tree = record.tree.unwrap().digest;
    registry.get(&format!("/v2/app/blobs/{tree}")).await.expect(StatusCode::OK);
    let referrers = registry.get(&format!("/v2/app/referrers/{kept}")).await.json();
    assert_eq!(referrers["manifests"].as_array().unwrap().len(), 1);
    registry.get(&format!("/v2/app/manifests/{gone}")).await.expect(StatusCode::NOT_FOUND);
    let own = Digest::of(&one.layers[1]);
    registry.get(&format!("/v2/app/blobs/{own}")).await.expect(StatusCode::NOT_FOUND);
    let fsck = registry.store.keeper().fsck(&|_| {}).await.unwrap();
    assert_eq!((fsck.damaged.len(), fsck.garbage_blobs), (0, 0), "{fsck:?}");
    assert_eq!(gc(&registry).await.freed, Default::default());
    // and it comes again as if it had never been there
    registry.push("app", "one", &one).await;
    registry.converted(gone).await;
    pulls(&registry, &one, "one").await;
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_says_what_the_next_run_frees() {
    let registry = Registry::start().await;
    let digest = registry.push("app", "one", &images().0).await;
    registry.converted(digest).await;
    delete_tag(&registry, "one").await;
    let registry = restarted(registry).await;
    let before = objects(registry.directory());
    let dry = GcConfig { dry_run: true, ..at_once() };
    let dry = registry.store.keeper().gc(&dry, later()).await.unwrap();
    assert!(objects(registry.directory()) == before, "a dry run wrote");
    let wet = gc(&registry).await;
    assert!(dry.freed.bytes > 0);
    assert_eq!((dry.freed, dry.quarantined), (wet.freed, wet.quarantined));
}

#[tokio::test]
async fn garbage_goes_when_its_quarantine_is_over_and_not_if_it_was_tagged_again() {
    let registry = Registry::start().await;
    let (one, other) = images();
    for (tag, image) in [("one", &one), ("other", &other)] {
        let digest = registry.push("app", tag, image).await;
        registry.converted(digest).await;
        delete_tag(&registry, tag).await;
    }
    let registry = restarted(registry).await;
    let config = GcConfig { quarantine: Duration::from_secs(100), ..at_once() };
    let keeper = registry.store.keeper();
    let first = keeper.gc(&config, later()).await.unwrap();
    assert_eq!(first.freed.bytes, 0);
    let headers = [("content-type", media_type::OCI_MANIFEST)];
    let again = registry.send(Method::PUT, "/v2/app/manifests/other", &headers, other.manifest.clone()).await;
    again.expect(StatusCode::CREATED);
    assert_eq!(keeper.gc(&config, later() + 50).await.unwrap().freed.bytes, 0);
    let last = keeper.gc(&config, later() + 101).await.unwrap();
    assert!(last.freed.bytes > 400_000 && last.quarantined.bytes == 0, "{first:?} {last:?}");
    pulls(&registry, &other, "other").await;
}

#[tokio::test]
async fn what_is_young_stays() {
    let registry = Registry::start().await;
    let digest = registry.push("app", "one", &images().0).await;
    registry.converted(digest).await;
    delete_tag(&registry, "one").await;
    let registry = restarted(registry).await;
    let config = GcConfig { grace: Duration::from_secs(3600), ..at_once() };
    let report = registry.store.keeper().gc(&config, now()).await.unwrap();
    assert_eq!((report.freed.bytes, report.quarantined.bytes), (0, 0));
}

#[tokio::test]
async fn what_a_client_was_told_is_there_stays_until_it_has_pushed() {
    let registry = Registry::start().await;
    let (one, _) = images();
    let digest = registry.push("app", "one", &one).await;
    registry.converted(digest).await;
    delete_tag(&registry, "one").await;
    let registry = restarted(registry).await;
    for blob in one.blobs() {
        let path = format!("/v2/app/blobs/{}", Digest::of(blob));
        registry.send(Method::HEAD, &path, &[], "").await.expect(StatusCode::OK);
    }
    let report = gc(&registry).await;
    assert!(report.held >= 3 && report.freed.bytes > 0, "{report:?}");
    let headers = [("content-type", media_type::OCI_MANIFEST)];
    let pushed = registry.send(Method::PUT, "/v2/app/manifests/two", &headers, one.manifest.clone()).await;
    pushed.expect(StatusCode::CREATED);
    pulls(&registry, &one, "two").await;
    registry.converted(digest).await;
    gc(&registry).await;
    pulls(&registry, &one, "two").await;
}

#[tokio::test]
async fn chunks_that_a_client_was_told_of_stay() {
    let registry = Registry::start().await;
    let (one, _) = images();
    let digest = registry.push("app", "one", &one).await;
    registry.converted(digest).await;
    let layer = registry.store.layer(Digest::of(&one.layers[1])).await.unwrap().unwrap();
    let recipe = registry.store.recipe(layer.recipe).await.unwrap();
    let (_, place) = recipe.frames()[0];
    let records = registry.store.pack_records(place.pack).await.unwrap();
    delete_tag(&registry, "one").await;
    let registry = restarted(registry).await;
    let chunk = records[0].chunks[0].id;
    assert!(registry.store.find_chunks(&[chunk]).await[0].is_some());
    gc(&registry).await;
    assert!(registry.store.find_chunks(&[chunk]).await[0].is_some());
    assert!(registry.store.blob(place.pack.into()).await.unwrap().is_some());
    let registry = restarted(registry).await;
    gc(&registry).await;
    assert_eq!(registry.store.find_chunks(&[chunk]).await, [None], "the index names a pack that is gone");
    assert!(registry.store.blob(place.pack.into()).await.unwrap().is_none());
}

#[tokio::test]
async fn untagged_manifests_stay_where_that_is_wanted() {
    let registry = Registry::start().await;
    let (one, other) = images();
    let old = registry.push("app", "v1", &one).await;
    let new = registry.push("app", "v1", &other).await;
    registry.converted(old).await;
    registry.converted(new).await;
    let registry = restarted(registry).await;
    let keep = GcConfig { keep_untagged: true, ..at_once() };
    assert_eq!(registry.store.keeper().gc(&keep, later()).await.unwrap().freed.manifests, 0);
    registry.get(&format!("/v2/app/manifests/{old}")).await.expect(StatusCode::OK);
    // whoever was just told that it is there may build on it, so it is held until the process ends
    let registry = restarted(registry).await;
    gc(&registry).await;
    registry.get(&format!("/v2/app/manifests/{old}")).await.expect(StatusCode::NOT_FOUND);
    pulls(&registry, &other, "v1").await;
}

#[tokio::test]
async fn nothing_is_collected_while_a_manifest_is_damaged() {
    let registry = Registry::start().await;
    let (one, other) = images();
    let digest = registry.push("app", "one", &one).await;
    let gone = registry.push("app", "other", &other).await;
    registry.converted(digest).await;
    registry.converted(gone).await;
    delete_tag(&registry, "other").await;
    let registry = restarted(registry).await;
    let blob = registry.directory().join("objects/blobs/sha256").join(digest.hex());
    std::fs::write(blob, "{}").unwrap();
    let before = objects(registry.directory());
    let refused = registry.store.keeper().gc(&at_once(), later()).await;
    assert!(matches!(refused, Err(StoreError::Unmarkable { .. })), "{refused:?}");
    assert!(objects(registry.directory()) == before);
}

#[tokio::test]
async fn what_others_call_a_recipe_and_is_none_stops_no_collection() {
    let registry = Registry::start().await;
    let (one, other) = images();
    let digest = registry.push("app", "one", &one).await;
    registry.converted(digest).await;
    for blob in other.blobs() {
        registry.push_blob("app", blob).await;
    }
    let mut manifest: lamina_image::Manifest = serde_json::from_slice(&other.manifest).unwrap();
    let none = Digest::of(&other.config).to_string();
    manifest.layers[0].annotations.insert(lamina_image::RECIPE_ANNOTATION.to_owned(), none);
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let put = registry.put_manifest("app", "other", media_type::OCI_MANIFEST, &manifest).await;
    put.expect(StatusCode::CREATED);
    registry.converted(Digest::of(&manifest)).await;
    delete_tag(&registry, "one").await;
    let registry = restarted(registry).await;
    assert!(gc(&registry).await.freed.bytes > 400_000);
}

#[tokio::test]
async fn a_process_that_never_answers_is_taken_for_dead_and_one_collection_runs_at_a_time() {
    let registry = Registry::start().await;
    let digest = registry.push("app", "one", &images().0).await;
    registry.converted(digest).await;
    delete_tag(&registry, "one").await;
    let registry = restarted(registry).await;
    let dead = registry.directory().join("objects/collecting/leases/dead");
    std::fs::write(&dead, r#"{"seen":0,"held":[]}"#).unwrap();
    let patient = GcConfig { lost_after: Duration::from_secs(2), ..at_once() };
    let (one, other) = (registry.store.keeper(), registry.store.keeper());
    let first = tokio::spawn({
        let patient = patient.clone();
        async move { one.gc(&patient, later()).await }
    });
    let list = registry.directory().join("objects/collecting/condemned");
    while std::fs::read_dir(&list).map_or(0, Iterator::count) == 0 {
        tokio::task::yield_now().await;
    }
    let second = other.gc(&GcConfig { lost_after: Duration::from_secs(20), ..patient }, later()).await;
    let first = first.await.unwrap();
    assert!(first.as_ref().is_ok_and(|report| report.freed.bytes > 0), "{first:?}");
    // it waited for the first one, or saw it at work
    assert!(
        matches!(second, Err(StoreError::Collected)) || second.is_ok_and(|report| report.freed.bytes == 0)
    );
    assert!(!dead.exists());
}

#[tokio::test]
async fn two_processes_on_one_directory_are_refused_also_with_an_index_each() {
    let registry = Registry::start().await;
    let other = tempfile::tempdir().unwrap();
    let opened = lamina_store::Store::open_directory(
        registry.directory(),
        StoreConfig::new(other.path().join("index")),
    )
    .await;
    assert!(matches!(opened, Err(StoreError::InUse(_))), "{opened:?}");
}
