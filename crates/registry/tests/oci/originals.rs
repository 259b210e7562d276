//! Layers that are dropped once their image is converted, and rebuilt for whoever asks.

use std::path::PathBuf;
use std::time::Duration;

use futures_util::TryStreamExt;
use http::{Method, StatusCode};
use lamina_image::{Descriptor, Digest, media_type};
use lamina_store::{GcConfig, GcReport, ImageState, Originals, Store, StoreConfig, Wrong};
use lamina_testkit::noise;

use crate::support::{Image, Registry, config_of, manifest_of, run};

/// Drops and collects everything that can go, at once.
fn drops() -> GcConfig {
    let none = Duration::ZERO;
    let lost_after = Duration::from_secs(5);
    GcConfig { grace: none, quarantine: none, originals: Originals::Drop, lost_after, ..GcConfig::default() }
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs()
}

async fn gc(registry: &Registry, config: &GcConfig) -> GcReport {
    registry.store.keeper().gc(config, now() + 1).await.unwrap()
}

fn image() -> Image {
    let (big, small) = (noise(3_000_000, 1), noise(200_000, 2));
    Image::plain(&[&[("lib/big", &big), ("etc/motd", b"hi")], &[("lib/small", &small), ("again", &big)]])
}

/// A registry that has the image under `app:one`, converted, and that holds nothing of it.
async fn pushed(image: &Image) -> Registry {
    let registry = Registry::start().await;
    let digest = registry.push("app", "one", image).await;
    registry.converted(digest).await;
    restarted(registry).await
}

async fn restarted(registry: Registry) -> Registry {
    registry.store.close().await.unwrap();
    registry.restart().await
}

fn stored(registry: &Registry, digest: Digest) -> PathBuf {
    registry.directory().join("objects/blobs/sha256").join(digest.hex())
}

fn path_of(digest: Digest) -> String {
    format!("/v2/app/blobs/{digest}")
}

fn layers(image: &Image) -> Vec<Digest> {
    image.layers.iter().map(|layer| Digest::of(layer)).collect()
}

async fn pulls(registry: &Registry, image: &Image) {
    let manifest = registry.get("/v2/app/manifests/one").await.expect(StatusCode::OK);
    assert_eq!(manifest.body, image.manifest);
    for blob in image.blobs() {
        let pulled = registry.get(&path_of(Digest::of(blob))).await.expect(StatusCode::OK);
        assert!(pulled.body == *blob, "other bytes came back");
    }
}

/// Nothing is damaged.
async fn is_whole(registry: &Registry) {
    let report = registry.store.keeper().fsck(&|_| {}).await.unwrap();
    assert!(report.damaged.is_empty(), "{report:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_layers_are_dropped_once_and_come_back_whole_and_in_parts() {
    let image = image();
    let registry = pushed(&image).await;
    let report = gc(&registry, &drops()).await;
    let bytes: usize = image.layers.iter().map(|layer| layer.len()).sum();
    assert_eq!((report.originals.blobs, report.originals.bytes), (2, bytes as u64), "{report:?}");
    assert_eq!((report.freed, report.unproven), (report.originals, 0), "{report:?}");
    for (layer, digest) in image.layers.iter().zip(layers(&image)) {
        assert!(!stored(&registry, digest).exists());
        let head = registry.send(Method::HEAD, &path_of(digest), &[], "").await.expect(StatusCode::OK);
        assert_eq!(head.header("content-length"), layer.len().to_string());
        assert_eq!(head.header("docker-content-digest"), digest.to_string());
        let (len, middle) = (layer.len(), layer.len() / 2);
        for (range, expected) in [
            ("bytes=0-0".to_owned(), 0..1),
            (format!("bytes={middle}-{}", middle + 99_999), middle..(middle + 100_000).min(len)),
            (format!("bytes={}-", len - 5), len - 5..len),
            ("bytes=-700".to_owned(), len - 700..len),
        ] {
            let part = registry.send(Method::GET, &path_of(digest), &[("range", &range)], "").await;
            let part = part.expect(StatusCode::PARTIAL_CONTENT);
            assert!(part.body == layer.slice(expected.clone()), "{range}");
            let said = format!("bytes {}-{}/{len}", expected.start, expected.end - 1);
            assert_eq!(part.header("content-range"), said);
        }
    }
    pulls(&registry, &image).await;
    is_whole(&registry).await;
    let status = registry.get(&format!("/lamina/v1/app/images/{}", Digest::of(&image.manifest))).await;
    assert_eq!(status.json()["rebuilt"], serde_json::json!(layers(&image)));
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry, &drops()).await.freed, Default::default(), "there is nothing more to drop");
    pulls(&registry, &image).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_dropped_where_originals_are_kept_and_no_compressed_layer_ever() {
    let plain = image();
    let registry = pushed(&plain).await;
    let keep = GcConfig { originals: Originals::Keep, ..drops() };
    assert_eq!(gc(&registry, &keep).await.freed, Default::default());
    assert!(layers(&plain).iter().all(|layer| stored(&registry, *layer).exists()));
    let gzip = Image::new(&[&[("etc/motd", b"hi")]]);
    let registry = pushed(&gzip).await;
    assert_eq!(gc(&registry, &drops()).await.freed, Default::default());
    assert!(layers(&gzip).iter().all(|layer| stored(&registry, *layer).exists()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_dropped_of_an_image_that_waits_for_its_tree_or_has_got_none() {
    let image = image();
    let (directory, _stopped) = pushed(&image).await.stop().await;
    let store = Store::open_directory(&directory, StoreConfig::new(directory.join("index"))).await.unwrap();
    let (digest, repo) = (Digest::of(&image.manifest), "other".parse().unwrap());
    store.put_job(digest, &repo).await.unwrap();
    let keeper = store.keeper();
    let waiting = keeper.gc(&drops(), now() + 1).await;
    assert_eq!(waiting.unwrap().originals, Default::default());
    store.delete_job(digest, &repo).await.unwrap();
    store.close().await.unwrap();
    assert_eq!(keeper.gc(&drops(), now() + 1).await.unwrap().originals.blobs, 2);

    // the config promises another tar, so there is no recipe
    let mut false_one = Image::plain(&[&[("etc/motd", b"hi")]]);
    let config = config_of(&[b"another".as_slice().into()], "");
    let layer = Descriptor::of(media_type::OCI_LAYER, &false_one.layers[0]);
    false_one.manifest = serde_json::to_vec(&manifest_of(&config, vec![layer])).unwrap().into();
    false_one.config = config;
    let registry = pushed(&false_one).await;
    assert_eq!(gc(&registry, &drops()).await.originals, Default::default());
    pulls(&registry, &false_one).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_cannot_be_made_again_stays_and_a_dry_run_says_so() {
    let image = image();
    let registry = pushed(&image).await;
    // the second layer needs nothing that the first has not, but for its own file
    let record = registry.store.layer(layers(&image)[1]).await.unwrap().unwrap();
    let recipe = registry.store.recipe(record.recipe).await.unwrap();
    let (_, place) = recipe.frames()[0];
    let pack = stored(&registry, place.pack.into());
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[usize::try_from(place.frame.end()).unwrap() - 1] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let registry = restarted(registry).await;
    let dry = gc(&registry, &GcConfig { dry_run: true, ..drops() }).await;
    assert!(layers(&image).iter().all(|layer| stored(&registry, *layer).exists()), "a dry run dropped");
    let wet = gc(&registry, &drops()).await;
    assert!(wet.unproven >= 1, "{wet:?}");
    assert_eq!(
        (dry.freed, dry.quarantined, dry.originals, dry.unproven),
        (wet.freed, wet.quarantined, wet.originals, wet.unproven)
    );
    assert!(stored(&registry, layers(&image)[1]).exists());
    pulls(&registry, &image).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_says_what_the_next_run_drops() {
    let image = image();
    let registry = pushed(&image).await;
    let dry = gc(&registry, &GcConfig { dry_run: true, ..drops() }).await;
    assert!(layers(&image).iter().all(|layer| stored(&registry, *layer).exists()));
    let wet = gc(&registry, &drops()).await;
    assert_eq!(dry.originals.blobs, 2);
    assert_eq!((dry.freed, dry.quarantined, dry.originals), (wet.freed, wet.quarantined, wet.originals));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn originals_are_dropped_after_grace_and_quarantine_and_not_while_a_client_builds_on_them() {
    let image = image();
    let registry = pushed(&image).await;
    let keeper = registry.store.keeper();
    let graceful = GcConfig { grace: Duration::from_secs(3600), ..drops() };
    assert_eq!(keeper.gc(&graceful, now()).await.unwrap().quarantined, Default::default());
    let patient = GcConfig { quarantine: Duration::from_secs(100), ..drops() };
    let first = keeper.gc(&patient, now() + 1).await.unwrap();
    assert_eq!((first.originals.blobs, first.quarantined.blobs), (0, 2), "{first:?}");
    registry.send(Method::HEAD, &path_of(layers(&image)[0]), &[], "").await.expect(StatusCode::OK);
    let second = keeper.gc(&patient, now() + 200).await.unwrap();
    assert_eq!((second.originals.blobs, second.held), (1, 1), "{second:?}");
    assert!(stored(&registry, layers(&image)[0]).exists());
    pulls(&registry, &image).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_layer_can_be_pushed_again_and_mounted_elsewhere() {
    let image = image();
    let registry = pushed(&image).await;
    gc(&registry, &drops()).await;
    let layer = layers(&image)[0];
    let mount = format!("/v2/elsewhere/blobs/uploads/?mount={layer}&from=app");
    registry.send(Method::POST, &mount, &[], "").await.expect(StatusCode::CREATED);
    let mounted = registry.get(&format!("/v2/elsewhere/blobs/{layer}")).await.expect(StatusCode::OK);
    assert!(mounted.body == image.layers[0]);
    // a client that does not ask before it sends
    let digest = registry.push("app", "one", &image).await;
    registry.converted(digest).await;
    assert!(stored(&registry, layer).exists());
    pulls(&registry, &image).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry, &drops()).await.originals.blobs, 2);
    pulls(&registry, &image).await;
    // another image of the same layers, whose conversion reads none of them
    let config = config_of(&image.tars, "another");
    let descriptors = image.layers.iter().map(|layer| Descriptor::of(media_type::OCI_LAYER, layer));
    let manifest = serde_json::to_vec(&manifest_of(&config, descriptors.collect())).unwrap();
    registry.push_blob("app", &config).await;
    let put = registry.put_manifest("app", "two", media_type::OCI_MANIFEST, &manifest).await;
    put.expect(StatusCode::CREATED);
    assert_eq!(registry.converted(Digest::of(&manifest)).await.counts.layers_known, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_looked_before_a_layer_was_dropped_reads_it_after() {
    let image = image();
    let registry = pushed(&image).await;
    let digest = layers(&image)[0];
    let seen = registry.store.blob(digest).await.unwrap().unwrap();
    gc(&registry, &drops()).await;
    assert!(!stored(&registry, digest).exists());
    let read = registry.store.read_blob(digest, seen, 1000..seen.size()).await.unwrap().into_stream();
    let read: Vec<bytes::Bytes> = read.try_collect().await.unwrap();
    assert!(read.concat() == image.layers[0][1000..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_named_as_something_else_too_stays() {
    let image = image();
    let registry = pushed(&image).await;
    let layer = Descriptor::of("application/octet-stream", &image.layers[0]);
    let manifest = manifest_of(&image.config, vec![layer]);
    let manifest = lamina_image::Manifest { artifact_type: Some("application/x".to_owned()), ..manifest };
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let put = registry.put_manifest("app", "artifact", media_type::OCI_MANIFEST, &manifest).await;
    put.expect(StatusCode::CREATED);
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry, &drops()).await.originals.blobs, 1);
    assert!(stored(&registry, layers(&image)[0]).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fsck_rebuilds_what_was_dropped_and_where_it_cannot_names_the_images_and_a_push_mends_it() {
    let image = image();
    let registry = pushed(&image).await;
    gc(&registry, &drops()).await;
    is_whole(&registry).await;
    // the record of one layer leads to the recipe of the other
    let records = registry.directory().join("objects/layers");
    let [one, other] = [0, 1].map(|at| records.join(layers(&image)[at].hex()));
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&one).unwrap()).unwrap();
    let stranger: serde_json::Value = serde_json::from_slice(&std::fs::read(other).unwrap()).unwrap();
    record["recipe"] = stranger["recipe"].clone();
    record["tar_bytes"] = stranger["tar_bytes"].clone();
    std::fs::write(&one, record.to_string()).unwrap();
    let report = registry.store.keeper().fsck(&|_| {}).await.unwrap();
    let damage = &report.damaged[..];
    assert_eq!(damage.len(), 1, "{report:#?}");
    assert_eq!((damage[0].wrong, &damage[0].images[..]), (Wrong::Missing, &["app:one".to_owned()][..]));
    assert_eq!(damage[0].key, format!("blobs/sha256/{}", layers(&image)[0].hex()));
    assert!(damage[0].remedy.contains("push"), "{damage:?}");

    let registry = repaired(registry).await;
    let lost = registry.send(Method::HEAD, &path_of(layers(&image)[0]), &[], "").await;
    lost.expect(StatusCode::NOT_FOUND);
    registry.push("app", "one", &image).await;
    pulls(&registry, &image).await;
    is_whole(&registry).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_dropped_layers_need_is_asked_for_with_its_images_and_a_push_makes_all_anew() {
    let image = image();
    let registry = pushed(&image).await;
    gc(&registry, &drops()).await;
    let record = registry.store.layer(layers(&image)[0]).await.unwrap().unwrap();
    let pack = registry.store.recipe(record.recipe).await.unwrap().frames()[0].1.pack;
    let path = stored(&registry, pack.into());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let report = registry.store.keeper().fsck(&|_| {}).await.unwrap();
    assert_eq!(report.damaged.len(), 1, "{report:#?}");
    assert!(report.damaged[0].images.contains(&"app:one".to_owned()), "{report:#?}");
    assert!(report.damaged[0].remedy.contains("push"), "{report:#?}");

    let registry = repaired(registry).await;
    let lost = registry.send(Method::HEAD, &path_of(layers(&image)[0]), &[], "").await;
    lost.expect(StatusCode::NOT_FOUND);
    let digest = registry.push("app", "one", &image).await;
    let record = registry.converted(digest).await;
    assert_eq!((record.state, record.counts.layers_cut), (ImageState::Done, 2));
    let referrers = registry.get(&format!("/v2/app/referrers/{digest}")).await.json();
    assert_eq!(referrers["manifests"].as_array().unwrap().len(), 1, "one tree: {referrers}");
    pulls(&registry, &image).await;
    is_whole(&registry).await;
}

/// Repaired while it was stopped: something is left that has to be pushed.
async fn repaired(registry: Registry) -> Registry {
    registry.store.close().await.unwrap();
    let (directory, stopped) = registry.stop().await;
    let store = Store::open_directory(&directory, StoreConfig::new(directory.join("index"))).await.unwrap();
    assert_eq!(store.keeper().repair(&store, &|_| {}).await.unwrap().left(), 1);
    store.close().await.unwrap();
    drop(store);
    stopped.start().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_gets_back_what_it_pushed_after_it_was_dropped() {
    let image = image();
    let there = tempfile::tempdir().unwrap();
    image.write_layout(there.path());
    let registry = Registry::start().await;
    let source = format!("oci:{}:v1", there.path().display());
    let copy = ["copy", "--preserve-digests", "--dest-tls-verify=false"];
    let name = registry.reference("app:one");
    run("skopeo", &[&copy[..], &[&source, &name]].concat()).await;
    registry.converted(Digest::of(&image.manifest)).await;
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry, &drops()).await.originals.blobs, 2);
    let back = tempfile::tempdir().unwrap();
    let copy = ["copy", "--preserve-digests", "--src-tls-verify=false"];
    let target = format!("oci:{}:v1", back.path().display());
    run("skopeo", &[&copy[..], &[&registry.reference("app:one"), &target]].concat()).await;
    for blob in image.blobs().chain([&image.manifest]) {
        let pulled = std::fs::read(back.path().join("blobs/sha256").join(Digest::of(blob).hex())).unwrap();
        assert!(pulled == *blob);
    }
}
