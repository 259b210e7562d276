//! Packs of which little lives: what is used goes on, under its old places, and the rest is gone.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_chunk::{ChunkId, Moved, PackId};
use lamina_image::{
    Descriptor, Digest, IngestOptions, LayerInput, Progress, RECIPE_ANNOTATION, Recipe, TREE_ANNOTATION,
    TREE_BYTES_ANNOTATION, derive_tree, ingest, media_type, pack_tree,
};
use lamina_store::{FsckReport, GcConfig, GcReport, Repo, Store, StoreError, StoreSink, Wrong};
use lamina_testkit::noise;
use tokio::runtime::Handle;

use crate::support::{Image, Registry, config_of, manifest_of, send, tar_of};

/// What two images share, and what each has for itself, in bytes.
const SHARED: usize = 300_000;
pub(crate) const OWN: usize = 3_000_000;

/// Collects everything that nothing leads to, at once.
pub(crate) fn at_once() -> GcConfig {
    let none = Duration::ZERO;
    GcConfig { grace: none, quarantine: none, lost_after: Duration::from_secs(5), ..GcConfig::default() }
}

/// So long after everything that was written that nothing is young.
pub(crate) fn later() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs() + 1
}

pub(crate) async fn gc(registry: &Registry) -> GcReport {
    registry.store.keeper().gc(&at_once(), later()).await.unwrap()
}

pub(crate) async fn fsck(store: &Store) -> FsckReport {
    let report = store.keeper().fsck(&|_| {}).await.unwrap();
    assert!(report.damaged.is_empty(), "{report:#?}");
    report
}

/// A registry that holds nothing of what it was sent: another process, as far as collections are concerned.
pub(crate) async fn restarted(registry: Registry) -> Registry {
    registry.store.close().await.unwrap();
    registry.restart().await
}

/// An image as `lamina push` cuts it: what the registry knows is not sent again.
pub(crate) struct Pushed {
    pub(crate) tars: Vec<Bytes>,
    pub(crate) recipes: Vec<Recipe>,
}

impl Pushed {
    /// Cuts layers, sends what is new, and the manifest under a tag of the repository `app`.
    pub(crate) async fn new(store: &Store, address: SocketAddr, tag: &str, tars: Vec<Bytes>) -> Option<Self> {
        let (cut, sink) = (tars.clone(), StoreSink::new(store.clone(), Handle::current()));
        let recipes = tokio::task::spawn_blocking(move || {
            let layers = cut.iter().map(|tar| LayerInput {
                name: "a layer".to_owned(),
                bytes: Box::new(&tar[..]),
                diff_id: None,
            });
            ingest(layers.collect(), &sink, IngestOptions::default(), &Progress::default())
        });
        let recipes = recipes.await.unwrap().ok()?;
        let (tree, config) = (Bytes::from(pack_tree(&derive_tree(&recipes).unwrap())), config_of(&tars, ""));
        for blob in recipes.iter().map(Recipe::blob).chain([&tree, &config]) {
            let path = format!("/v2/app/blobs/uploads/?digest={}", Digest::of(blob));
            let sent = send(address, Method::POST, &path, &[], blob.clone()).await;
            sent.status.is_success().then_some(())?;
        }
        let layers = recipes.iter().map(|recipe| {
            let mut layer = Descriptor::named(media_type::OCI_LAYER, recipe.diff_id(), recipe.tar_bytes());
            layer.annotations.insert(RECIPE_ANNOTATION.to_owned(), Digest::of(recipe.blob()).to_string());
            layer
        });
        let mut manifest = manifest_of(&config, layers.collect());
        manifest.annotations.insert(TREE_ANNOTATION.to_owned(), Digest::of(&tree).to_string());
        manifest.annotations.insert(TREE_BYTES_ANNOTATION.to_owned(), tree.len().to_string());
        let (path, headers) =
            (format!("/v2/app/manifests/{tag}"), [("content-type", media_type::OCI_MANIFEST)]);
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let put = send(address, Method::PUT, &path, &headers, manifest).await;
        put.status.is_success().then_some(Self { tars, recipes })
    }

    async fn to(registry: &Registry, tag: &str, tars: Vec<Bytes>) -> Self {
        Self::new(&registry.store, registry.address, tag, tars).await.expect("a push")
    }

    fn packs(&self) -> BTreeSet<PackId> {
        let frames = self.recipes.iter().flat_map(Recipe::frames);
        frames.map(|(_, place)| place.pack).collect()
    }

    /// What its manifest names beside packs.
    fn blobs(&self) -> impl Iterator<Item = Bytes> {
        let tree = Bytes::from(pack_tree(&derive_tree(&self.recipes).unwrap()));
        let recipes = self.recipes.iter().map(|recipe| recipe.blob().clone());
        recipes.chain([tree, config_of(&self.tars, "")])
    }

    /// Every layer comes byte for byte, and every frame opens.
    pub(crate) async fn is_whole(&self, store: &Store, address: SocketAddr) {
        for tar in &self.tars {
            let path = format!("/v2/app/blobs/{}", Digest::of(tar));
            let pulled = send(address, Method::GET, &path, &[], "").await.expect(StatusCode::OK);
            assert!(pulled.body == tar);
        }
        for (id, place) in self.recipes.iter().flat_map(Recipe::frames) {
            store.sealed(*place).await.unwrap().open(*id).unwrap();
        }
    }
}

/// A layer with what is shared, and something of its own.
pub(crate) fn tar(own: (u64, usize)) -> Bytes {
    tar_of(&[("lib/shared", &noise(SHARED, 1)), ("own", &noise(own.1, own.0))])
}

pub(crate) fn moved_path(repo: &str, pack: PackId) -> String {
    format!("/lamina/v1/{repo}/moved/{pack}")
}

/// Bytes of all blobs.
pub(crate) fn stored(registry: &Registry) -> u64 {
    let blobs = std::fs::read_dir(registry.directory().join("objects/blobs/sha256")).unwrap();
    blobs.map(|blob| blob.unwrap().metadata().unwrap().len()).sum()
}

pub(crate) async fn delete_tag(registry: &Registry, tag: &str) {
    let path = format!("/v2/app/manifests/{tag}");
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
}

/// Two images of one pack, and the one that brought it deleted; nothing is held.
async fn mostly_dead() -> (Registry, Pushed, PackId) {
    let registry = Registry::start().await;
    let gone = Pushed::to(&registry, "gone", vec![tar((2, OWN))]).await;
    let stays = Pushed::to(&registry, "stays", vec![tar((3, 1_000))]).await;
    let old = *gone.packs().first().unwrap();
    assert!(stays.packs().contains(&old), "nothing was shared");
    delete_tag(&registry, "gone").await;
    (restarted(registry).await, stays, old)
}

pub(crate) async fn get(registry: &Registry, path: &str) -> StatusCode {
    registry.get(path).await.status
}

#[tokio::test]
async fn of_a_pack_that_is_mostly_dead_what_is_used_is_left_and_read_under_its_old_places() {
    let (registry, stays, old) = mostly_dead().await;
    let before = stored(&registry);
    let dry = GcConfig { dry_run: true, ..at_once() };
    let dry = registry.store.keeper().gc(&dry, later()).await.unwrap();
    assert_eq!(stored(&registry), before, "a dry run wrote");
    let report = gc(&registry).await;
    assert_eq!((dry.freed, dry.repacked), (report.freed, report.repacked));
    assert_eq!(report.repacked.packs, 1, "{report:?}");
    assert!(report.repacked.bytes > OWN as u64, "{report:?}");
    let left = stored(&registry);
    // what is shared, its neighbour in the last frame, and what describes it
    assert!(before > OWN as u64 && left < (SHARED + 300_000) as u64, "{before} bytes, then {left}");
    assert_eq!(get(&registry, &format!("/v2/app/blobs/{old}")).await, StatusCode::NOT_FOUND);
    stays.is_whole(&registry.store, registry.address).await;
    assert_eq!(fsck(&registry.store).await.garbage_blobs, 0);
    // nothing is left to do, also for a process that has not seen it
    for _ in 0..2 {
        let again = gc(&registry).await;
        assert_eq!((again.freed, again.repacked, again.quarantined), Default::default());
    }
    let registry = restarted(registry).await;
    let again = gc(&registry).await;
    assert_eq!(
        (again.freed, again.repacked, stored(&registry)),
        (Default::default(), Default::default(), left)
    );
    stays.is_whole(&registry.store, registry.address).await;
}

#[tokio::test]
async fn where_a_pack_went_is_told_to_who_may_read_it_until_nothing_names_it() {
    let (registry, _, old) = mostly_dead().await;
    assert_eq!(get(&registry, &moved_path("app", old)).await, StatusCode::NOT_FOUND);
    gc(&registry).await;
    let record = registry.get(&moved_path("app", old)).await.expect(StatusCode::OK);
    let moved = Moved::parse(&record.body).unwrap();
    let new = registry.get(&format!("/v2/app/blobs/{}", moved.pack())).await.expect(StatusCode::OK);
    let records = lamina_chunk::pack_records(&new.body).unwrap();
    assert_eq!(moved.old_records(&records).len(), records.len());
    assert!(records.iter().all(|record| record.verify(&new.body).is_ok()));
    for path in [moved_path("other", old), moved_path("app", moved.pack())] {
        assert_eq!(get(&registry, &path).await, StatusCode::NOT_FOUND, "{path}");
    }
    delete_tag(&registry, "stays").await;
    let registry = restarted(registry).await;
    gc(&registry).await;
    assert_eq!(get(&registry, &moved_path("app", old)).await, StatusCode::NOT_FOUND);
    assert_eq!(stored(&registry), 0);
    fsck(&registry.store).await;
}

#[tokio::test]
async fn a_push_after_it_finds_its_chunks_in_the_new_pack() {
    let (registry, stays, old) = mostly_dead().await;
    gc(&registry).await;
    let new = follow(&registry, old).await.unwrap();
    // the process that was asked learns it by itself
    let chunk = registry.store.pack_records(new).await.unwrap()[0].chunks[0].id;
    let learnt = async {
        while registry.store.find_chunks(&[chunk]).await[0].is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), learnt).await.unwrap();
    let third = Pushed::to(&registry, "third", vec![tar((4, 1_000))]).await;
    assert!(third.packs().contains(&new) && !third.packs().contains(&old));
    // and one that comes later too
    let registry = restarted(registry).await;
    let fourth = Pushed::to(&registry, "fourth", vec![tar((5, 1_000))]).await;
    assert!(fourth.packs().contains(&new) && !fourth.packs().contains(&old));
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked, Default::default());
    for image in [&stays, &third, &fourth] {
        image.is_whole(&registry.store, registry.address).await;
    }
    fsck(&registry.store).await;
}

#[tokio::test]
async fn an_image_that_is_pushed_again_leans_on_what_was_moved() {
    let (registry, stays, old) = mostly_dead().await;
    gc(&registry).await;
    // its layers are known, also to another manifest, and in another repository that has them from nobody else
    let manifest = registry.get("/v2/app/manifests/stays").await.expect(StatusCode::OK).body;
    for blob in stays.recipes.iter().map(|recipe| recipe.blob().clone()).chain([config_of(&stays.tars, "")]) {
        registry.push_blob("other", &blob).await;
    }
    let put = registry.put_manifest("other", "t", media_type::OCI_MANIFEST, &manifest).await;
    put.expect(StatusCode::CREATED);
    let record = registry.get(&moved_path("other", old)).await.expect(StatusCode::OK);
    let new = Moved::parse(&record.body).unwrap().pack();
    assert_eq!(get(&registry, &format!("/v2/other/blobs/{new}")).await, StatusCode::OK);
    // where nothing is remembered of its layers, they are rebuilt from where the frames are now
    delete_tag(&registry, "stays").await;
    let layers = registry.directory().join("objects/layers");
    let images = registry.directory().join("objects/images");
    std::fs::remove_dir_all(layers).unwrap();
    std::fs::remove_dir_all(images).unwrap();
    let put = registry.put_manifest("app", "stays", media_type::OCI_MANIFEST, &manifest).await;
    put.expect(StatusCode::CREATED);
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked, Default::default());
    stays.is_whole(&registry.store, registry.address).await;
    fsck(&registry.store).await;
}

async fn follow(registry: &Registry, pack: PackId) -> Option<PackId> {
    let reply = registry.get(&moved_path("app", pack)).await;
    reply.status.is_success().then(|| Moved::parse(&reply.body).unwrap().pack())
}

/// Images `first`, `second` and `third` of one pack, the later ones with less of it, so that it is moved when the first one goes, and
/// its new one when the second one does.
async fn three_of_one_pack() -> (Registry, [Pushed; 2], PackId) {
    let registry = Registry::start().await;
    let (a, b, c) = (noise(1_000_000, 1), noise(1_000_000, 2), noise(6_000_000, 3));
    let first = Pushed::to(&registry, "first", vec![tar_of(&[("a", &a), ("b", &b), ("c", &c)])]).await;
    let second = Pushed::to(&registry, "second", vec![tar_of(&[("a", &a), ("b", &b), ("x", b"x")])]).await;
    let third = Pushed::to(&registry, "third", vec![tar_of(&[("a", &a[..300_000]), ("y", b"y")])]).await;
    let old = *first.packs().first().unwrap();
    assert!(second.packs().contains(&old) && third.packs().contains(&old));
    (registry, [second, third], old)
}

#[tokio::test]
async fn frames_that_were_moved_twice_are_found_over_both_moves() {
    let (mut registry, [_, third], old) = three_of_one_pack().await;
    for tag in ["first", "second"] {
        delete_tag(&registry, tag).await;
        registry = restarted(registry).await;
        assert_eq!(gc(&registry).await.repacked.packs, 1, "{tag}");
        third.is_whole(&registry.store, registry.address).await;
        fsck(&registry.store).await;
    }
    let once = follow(&registry, old).await.unwrap();
    let twice = follow(&registry, once).await.unwrap();
    assert_eq!(get(&registry, &format!("/v2/app/blobs/{once}")).await, StatusCode::NOT_FOUND);
    assert_eq!(get(&registry, &format!("/v2/app/blobs/{twice}")).await, StatusCode::OK);
    assert!(stored(&registry) < 800_000);
    let again = gc(&registry).await;
    assert_eq!((again.freed, again.repacked), Default::default());
}

/// Where the bytes of a pack and its mark are.
fn pack_files(registry: &Registry, pack: PackId) -> [std::path::PathBuf; 2] {
    let (objects, hex) = (registry.directory().join("objects"), Digest::from(pack).hex());
    [objects.join("blobs/sha256").join(&hex), objects.join("packs").join(&hex)]
}

/// Packs as they are, with their marks.
fn read_packs(
    registry: &Registry,
    packs: impl IntoIterator<Item = PackId>,
) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let files = packs.into_iter().flat_map(|pack| pack_files(registry, pack));
    files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Puts packs back as they were, like a push that cuts the same layers from nothing.
fn bring_again(files: &[(std::path::PathBuf, Vec<u8>)]) {
    for (path, bytes) in files {
        std::fs::write(path, bytes).unwrap();
    }
}

#[tokio::test]
async fn a_pack_that_comes_again_stays_where_its_frames_were_lost_on_a_later_move() {
    let (mut registry, [second, third], _) = three_of_one_pack().await;
    let manifest = registry.get("/v2/app/manifests/second").await.expect(StatusCode::OK).body;
    let blobs: Vec<Bytes> = second.blobs().collect();
    let files = read_packs(&registry, second.packs());
    for tag in ["first", "second"] {
        delete_tag(&registry, tag).await;
        registry = restarted(registry).await;
        assert_eq!(gc(&registry).await.repacked.packs, 1, "{tag}");
    }
    bring_again(&files);
    registry = restarted(registry).await;
    for blob in &blobs {
        registry.push_blob("app", blob).await;
    }
    let put = registry.put_manifest("app", "second", media_type::OCI_MANIFEST, &manifest).await;
    put.expect(StatusCode::CREATED);
    for _ in 0..2 {
        registry = restarted(registry).await;
        gc(&registry).await;
        for image in [&second, &third] {
            image.is_whole(&registry.store, registry.address).await;
        }
        fsck(&registry.store).await;
    }
}

#[tokio::test]
async fn a_pack_that_comes_again_stays_where_its_moves_lead_nowhere() {
    let (registry, stays, old) = mostly_dead().await;
    let files = read_packs(&registry, [old]);
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let new = follow(&registry, old).await.unwrap();
    // moved in its turn, to a pack that a repair has taken out
    let records = registry.store.pack_records(new).await.unwrap();
    let lost = Moved::new(PackId::from_bytes([9; 32]), records.iter().map(|record| record.frame));
    let record = registry.directory().join("objects/moved").join(Digest::from(new).hex());
    std::fs::write(record, lost.to_bytes()).unwrap();
    for path in pack_files(&registry, new) {
        std::fs::remove_file(path).unwrap();
    }
    bring_again(&files);
    let registry = restarted(registry).await;
    gc(&registry).await;
    stays.is_whole(&registry.store, registry.address).await;
}

#[tokio::test]
async fn a_new_pack_that_is_here_already_and_damaged_is_written_again() {
    let (mut registry, stays, old) = mostly_dead().await;
    let files = read_packs(&registry, [old]);
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let new = follow(&registry, old).await.unwrap();
    let [blob, _] = pack_files(&registry, new);
    let good = std::fs::read(&blob).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let longer = [&good[..], b"x"].concat();
    for bad in [&flipped, &longer, &good] {
        // as a collection leaves it that has died before it wrote the record
        bring_again(&files);
        std::fs::remove_file(registry.directory().join("objects/moved").join(Digest::from(old).hex()))
            .unwrap();
        std::fs::write(&blob, bad).unwrap();
        registry = restarted(registry).await;
        assert_eq!(gc(&registry).await.repacked.packs, 1);
        assert_eq!(follow(&registry, old).await, Some(new));
        assert!(std::fs::read(&blob).unwrap() == good);
        stays.is_whole(&registry.store, registry.address).await;
        fsck(&registry.store).await;
    }
}

#[tokio::test]
async fn what_a_push_under_way_was_told_of_is_not_moved() {
    let (registry, stays, old) = mostly_dead().await;
    let dead: ChunkId = {
        let records = registry.store.pack_records(old).await.unwrap();
        records.last().unwrap().chunks.last().unwrap().id
    };
    assert!(registry.store.find_chunks(&[dead]).await[0].is_some());
    let report = gc(&registry).await;
    assert_eq!((report.repacked, report.held > 0), (Default::default(), true), "{report:?}");
    let again = Pushed::to(&registry, "again", vec![tar((2, OWN))]).await;
    assert!(again.packs().contains(&old));
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked, Default::default(), "it lives again");
    for image in [&stays, &again] {
        image.is_whole(&registry.store, registry.address).await;
    }
    fsck(&registry.store).await;
}

#[tokio::test]
async fn packs_wait_in_quarantine_and_are_not_moved_where_nobody_wants_it() {
    let (registry, stays, _) = mostly_dead().await;
    let keeper = registry.store.keeper();
    let config = GcConfig { quarantine: Duration::from_secs(100), ..at_once() };
    let young = GcConfig { grace: Duration::from_secs(3600), ..at_once() };
    let off = GcConfig { repack_below: 0, ..at_once() };
    let low = GcConfig { repack_below: 2, ..at_once() };
    for (config, now) in [(&config, later()), (&config, later() + 50), (&young, later())] {
        assert_eq!(keeper.gc(config, now).await.unwrap().repacked, Default::default());
    }
    let before = stored(&registry);
    for config in [&off, &low] {
        assert_eq!(keeper.gc(config, later()).await.unwrap().repacked, Default::default());
    }
    assert!(stored(&registry) > before - 100_000);
    keeper.gc(&config, later()).await.unwrap();
    assert_eq!(keeper.gc(&config, later() + 101).await.unwrap().repacked.packs, 1);
    stays.is_whole(&registry.store, registry.address).await;
}

#[tokio::test]
async fn a_pack_that_a_manifest_names_itself_stays_as_it_is() {
    let registry = Registry::start().await;
    let (one, other) = (tar((2, OWN)), tar((3, 1_000)));
    let image = |tar: &Bytes| Image::of(vec![tar.clone()]);
    for (tag, tar) in [("gone", &one), ("stays", &other)] {
        let digest = registry.push("app", tag, &image(tar)).await;
        registry.converted(digest).await;
    }
    delete_tag(&registry, "gone").await;
    let digest = Digest::of(&image(&other).manifest);
    let artifact = registry.store.image(digest).await.unwrap().unwrap().artifact.unwrap().digest;
    let artifact = registry.get(&format!("/v2/app/manifests/{artifact}")).await.expect(StatusCode::OK);
    // somebody has it under a name of his own
    let put = registry.put_manifest("app", "kept", media_type::OCI_MANIFEST, &artifact.body).await;
    put.expect(StatusCode::CREATED);
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked, Default::default());
    // clients that copy what hangs on images get all that it names
    let artifact = artifact.json();
    for blob in artifact["layers"].as_array().unwrap() {
        let blob = blob["digest"].as_str().unwrap();
        assert_eq!(get(&registry, &format!("/v2/app/blobs/{blob}")).await, StatusCode::OK, "{blob}");
    }
}

#[tokio::test]
async fn a_damaged_pack_is_left_alone_and_a_damaged_record_is_named() {
    let (registry, stays, old) = mostly_dead().await;
    let objects = registry.directory().join("objects");
    let place = stays.recipes[0].frames().iter().find(|(_, place)| place.pack == old).unwrap().1;
    let blob = objects.join("blobs/sha256").join(Digest::from(old).hex());
    let good = std::fs::read(&blob).unwrap();
    let mut bad = good.clone();
    bad[place.frame.offset as usize + 5] ^= 1;
    std::fs::write(&blob, bad).unwrap();
    let report = gc(&registry).await;
    assert_eq!(report.repacked, Default::default());
    std::fs::write(&blob, good).unwrap();
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let record = objects.join("moved").join(Digest::from(old).hex());
    let good = std::fs::read(&record).unwrap();
    // in the middle of the frames
    let mut bad = good.clone();
    bad[52] ^= 1;
    std::fs::write(&record, bad).unwrap();
    let report = registry.store.keeper().fsck(&|_| {}).await.unwrap();
    let damage = report.damaged.iter().find(|damage| damage.key.starts_with("moved/")).unwrap();
    assert_eq!((damage.wrong, &damage.images[..]), (Wrong::Record, &["app:stays".to_owned()][..]));
    let refused = registry.store.keeper().gc(&at_once(), later()).await;
    assert!(matches!(refused, Err(StoreError::Unmarkable { .. })), "{refused:?}");
    // a record that is one, of frames that are elsewhere
    let moved = Moved::parse(&good).unwrap();
    let frame = |at: &lamina_chunk::MovedFrame| lamina_chunk::Frame {
        offset: at.offset,
        sealed_len: at.sealed_len,
        plain_len: at.sealed_len,
    };
    let other = Moved::new(moved.pack(), moved.frames().iter().skip(1).map(frame));
    std::fs::write(&record, other.to_bytes()).unwrap();
    let report = registry.store.keeper().fsck(&|_| {}).await.unwrap();
    let damage = report.damaged.iter().find(|damage| damage.key.starts_with("moved/"));
    assert!(damage.is_some_and(|damage| damage.wrong == Wrong::Contents), "{report:#?}");
    std::fs::write(&record, good).unwrap();
    fsck(&registry.store).await;
    // and the new pack is one that images need
    let new = objects.join("blobs/sha256").join(Digest::from(moved.pack()).hex());
    std::fs::remove_file(new).unwrap();
    let report = registry.store.keeper().fsck(&|_| {}).await.unwrap();
    let damage = report.damaged.iter().find(|damage| damage.key.starts_with("blobs/")).unwrap();
    assert_eq!((damage.wrong, &damage.images[..]), (Wrong::Missing, &["app:stays".to_owned()][..]));
}

#[tokio::test]
async fn a_new_pack_belongs_to_every_repository_that_had_the_old_one() {
    let (registry, _, old) = mostly_dead().await;
    let other: Repo = "other/name".parse().unwrap();
    registry.store.link_packs(&other, [old.into()]).await.unwrap();
    let registry = restarted(registry).await;
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    for repo in ["app", "other/name"] {
        let record = registry.get(&moved_path(repo, old)).await.expect(StatusCode::OK);
        let new = Moved::parse(&record.body).unwrap().pack();
        assert_eq!(get(&registry, &format!("/v2/{repo}/blobs/{new}")).await, StatusCode::OK, "{repo}");
    }
    fsck(&registry.store).await;
}

#[tokio::test]
async fn a_repository_that_was_given_the_old_pack_alone_gets_the_new_one_before_the_old_one_goes() {
    let (registry, _, old) = mostly_dead().await;
    let files = read_packs(&registry, [old]);
    assert_eq!(gc(&registry).await.repacked.packs, 1);
    let new = follow(&registry, old).await.unwrap();
    // as a collector leaves it that wrote the record late
    bring_again(&files);
    let links = registry.directory().join("objects/links").join(Digest::from(old).hex());
    std::fs::copy(links.join("app"), links.join("other")).unwrap();
    assert_eq!(get(&registry, &format!("/v2/other/blobs/{new}")).await, StatusCode::NOT_FOUND);
    let registry = restarted(registry).await;
    gc(&registry).await;
    assert_eq!(get(&registry, &format!("/v2/other/blobs/{old}")).await, StatusCode::NOT_FOUND);
    assert_eq!(get(&registry, &format!("/v2/other/blobs/{new}")).await, StatusCode::OK);
    fsck(&registry.store).await;
}

#[tokio::test]
async fn a_record_of_other_frames_is_no_reason_to_delete_a_pack() {
    let (registry, stays, old) = mostly_dead().await;
    let frames = stays.recipes.iter().flat_map(Recipe::frames).map(|(_, place)| *place);
    let used: BTreeSet<_> =
        frames.filter(|place| place.pack == old).map(|place| place.frame.offset).collect();
    let records = registry.store.pack_records(old).await.unwrap();
    let used = records.iter().filter(|record| used.contains(&record.frame.offset));
    // frames that are as long, of other bytes
    let files = read_packs(&registry, [old]);
    let (mut builder, mut frames) = (lamina_chunk::PackBuilder::with_capacity(0), Vec::new());
    for record in used {
        let frame = record.frame;
        let bytes = Bytes::from(vec![0; frame.sealed_len as usize]);
        let id = lamina_chunk::FrameId::of(&bytes);
        builder.push(id, &lamina_chunk::Sealed::new(bytes, frame.plain_len as usize), record.chunks.clone());
        frames.push(frame);
    }
    let (bytes, _) = builder.finish();
    let false_one = PackId::try_from(Digest::of(&bytes)).unwrap();
    let [blob, mark] = pack_files(&registry, false_one);
    std::fs::write(blob, &bytes).unwrap();
    std::fs::write(mark, "{}").unwrap();
    let moved = registry.directory().join("objects/moved");
    std::fs::create_dir_all(&moved).unwrap();
    let record = Moved::new(false_one, frames).to_bytes();
    std::fs::write(moved.join(Digest::from(old).hex()), record).unwrap();
    let registry = restarted(registry).await;
    gc(&registry).await;
    assert_eq!(read_packs(&registry, [old]), files);
    stays.is_whole(&registry.store, registry.address).await;
}
