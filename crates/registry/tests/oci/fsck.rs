//! Checks and repairs, with one thing damaged at a time.

use std::path::PathBuf;

use http::{Method, StatusCode};
use lamina_image::{Digest, media_type};
use lamina_store::{FsckReport, ImageState, Store, StoreConfig, Wrong};
use lamina_testkit::noise;

use crate::support::{Image, Registry};

/// A registry with one converted image under the tag `one`, and everything of it by name.
struct Rig {
    registry: Registry,
    image: Image,
    digest: Digest,
    tree: Digest,
    recipe: Digest,
    pack: Digest,
}

impl Rig {
    async fn new() -> Self {
        let registry = Registry::start().await;
        let big = noise(700_000, 5);
        let image = Image::new(&[&[("lib/big", &big)], &[("etc/motd", b"hello")]]);
        let digest = registry.push("app", "one", &image).await;
        let tree = registry.converted(digest).await.tree.unwrap().digest;
        let layer = registry.store.layer(Digest::of(&image.layers[0])).await.unwrap().unwrap();
        let recipe = registry.store.recipe(layer.recipe).await.unwrap();
        let pack = recipe.frames()[0].1.pack.into();
        Self { registry, image, digest, tree, recipe: layer.recipe, pack }
    }

    fn blob(&self, digest: Digest) -> PathBuf {
        self.registry.directory().join("objects/blobs/sha256").join(digest.hex())
    }

    /// Changes one byte in the middle of a blob.
    fn damage(&self, digest: Digest) {
        let mut bytes = std::fs::read(self.blob(digest)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        std::fs::write(self.blob(digest), bytes).unwrap();
    }

    async fn fsck(&self) -> FsckReport {
        self.registry.store.keeper().fsck(&|_| {}).await.unwrap()
    }

    /// The one thing that is damaged.
    async fn damaged(&self, key: &str) -> lamina_store::Damage {
        let report = self.fsck().await;
        let damaged: Vec<&str> = report.damaged.iter().map(|damage| damage.key.as_str()).collect();
        assert_eq!(damaged, [key], "{report:#?}");
        report.damaged[0].clone()
    }

    /// Repairs with the registry stopped, and starts it again.
    async fn repaired(self) -> (Self, FsckReport) {
        let Self { registry, image, digest, tree, recipe, pack } = self;
        let (directory, stopped) = registry.stop().await;
        let store =
            Store::open_directory(&directory, StoreConfig::new(directory.join("index"))).await.unwrap();
        let report = store.keeper().repair(&store, &|_| {}).await.unwrap();
        store.close().await.unwrap();
        drop(store);
        let registry = stopped.start().await;
        (Self { registry, image, digest, tree, recipe, pack }, report)
    }

    async fn is_whole(&self) {
        for blob in self.image.blobs() {
            let path = format!("/v2/app/blobs/{}", Digest::of(blob));
            let pulled = self.registry.get(&path).await.expect(StatusCode::OK);
            assert!(pulled.body == *blob);
        }
        assert_eq!(self.registry.converted(self.digest).await.state, ImageState::Done);
        let report = self.fsck().await;
        assert!(report.damaged.is_empty(), "{report:#?}");
    }
}

#[tokio::test]
async fn a_good_store_is_hashed_whole_and_nothing_is_said_of_it() {
    let rig = Rig::new().await;
    let report = rig.fsck().await;
    assert!(report.damaged.is_empty(), "{report:#?}");
    let on_disk: u64 = std::fs::read_dir(rig.blob(rig.digest).parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert_eq!(report.bytes, on_disk);
    assert_eq!((report.manifests, report.garbage_blobs), (2, 0), "image and tree artifact");
}

#[tokio::test]
async fn a_damaged_pack_recipe_or_tree_is_made_again_by_converting() {
    for part in ["pack", "recipe", "tree"] {
        let rig = Rig::new().await;
        let digest = match part {
            "pack" => rig.pack,
            "recipe" => rig.recipe,
            _ => rig.tree,
        };
        rig.damage(digest);
        let damage = rig.damaged(&format!("blobs/sha256/{}", digest.hex())).await;
        assert_eq!(damage.wrong, Wrong::Bytes);
        assert!(damage.images.contains(&"app:one".to_owned()), "{part}: {damage:?}");
        assert_eq!(damage.reason.contains("of its"), part == "pack", "{damage:?}");
        let (rig, report) = rig.repaired().await;
        assert_eq!(report.left(), 0, "{part}: {report:#?}");
        rig.is_whole().await;
        assert!(rig.registry.directory().join("objects/damaged/blobs/sha256").join(digest.hex()).exists());
    }
}

#[tokio::test]
async fn a_record_that_does_not_parse_is_made_again() {
    for kind in ["images", "layers"] {
        let rig = Rig::new().await;
        let name = if kind == "images" { rig.digest } else { Digest::of(&rig.image.layers[1]) };
        let path = rig.registry.directory().join("objects").join(kind).join(name.hex());
        std::fs::write(&path, "{\"").unwrap();
        assert_eq!(rig.damaged(&format!("{kind}/{}", name.hex())).await.wrong, Wrong::Record);
        let (rig, report) = rig.repaired().await;
        assert_eq!(report.left(), 0, "{kind}: {report:#?}");
        rig.is_whole().await;
    }
}

#[tokio::test]
async fn a_lost_layer_is_asked_for_and_the_push_run_again_completes() {
    let rig = Rig::new().await;
    let layer = Digest::of(&rig.image.layers[0]);
    rig.damage(layer);
    let damage = rig.damaged(&format!("blobs/sha256/{}", layer.hex())).await;
    assert_eq!(damage.images, ["app:one"]);
    assert!(damage.remedy.contains("push"), "{damage:?}");
    let (rig, report) = rig.repaired().await;
    assert_eq!(report.left(), 1);
    let path = format!("/v2/app/blobs/{layer}");
    rig.registry.send(Method::HEAD, &path, &[], "").await.expect(StatusCode::NOT_FOUND);
    rig.registry.push("app", "one", &rig.image).await;
    rig.is_whole().await;
}

#[tokio::test]
async fn a_missing_blob_is_missed_and_a_blob_too_many_is_garbage() {
    let rig = Rig::new().await;
    rig.registry.push_blob("app", &noise(10_000, 9).into()).await;
    let report = rig.fsck().await;
    assert_eq!((report.damaged.len(), report.garbage_blobs, report.garbage_bytes), (0, 1, 10_000));
    std::fs::remove_file(rig.blob(rig.tree)).unwrap();
    let damage = rig.damaged(&format!("blobs/sha256/{}", rig.tree.hex())).await;
    assert_eq!(damage.wrong, Wrong::Missing);
    let (rig, report) = rig.repaired().await;
    assert_eq!(report.left(), 0, "{report:#?}");
    rig.is_whole().await;
}

#[tokio::test]
async fn a_damaged_tag_goes_back_to_the_value_before() {
    let rig = Rig::new().await;
    let other = rig.image.relabelled("other");
    let digest = rig.registry.push("app", "one", &other).await;
    rig.registry.converted(digest).await;
    let values = rig.registry.directory().join("objects/refs/app/one");
    std::fs::write(values.join(format!("{:020}", 2)), "").unwrap();
    let damage = rig.damaged(&format!("refs/app/one/{:020}", 2)).await;
    assert_eq!(damage.images, ["app:one"]);
    let (rig, report) = rig.repaired().await;
    assert_eq!(report.left(), 0);
    let manifest = rig.registry.get("/v2/app/manifests/one").await.expect(StatusCode::OK);
    assert_eq!(Digest::of(&manifest.body), rig.digest);
    let headers = [("content-type", media_type::OCI_MANIFEST)];
    let again =
        rig.registry.send(Method::PUT, "/v2/app/manifests/one", &headers, other.manifest.clone()).await;
    again.expect(StatusCode::CREATED);
}
