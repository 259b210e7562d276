//! A push and a collection, with the object store failing from every write on, one after the other: afterwards nothing is
//! named that is not there, and the same again ends well.

mod renewed;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt, TryStreamExt};
use lamina_chunk::Moved;
use lamina_image::{Digest, Manifest, Recipe, TREE_ANNOTATION, media_type};
use lamina_registry::{RegistryConfig, serve};
use lamina_store::{
    FsckReport, GcConfig, GcReport, ImageRecord, ImageState, LayerRecord, Originals, Store, StoreConfig,
};
use lamina_testkit::noise;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
    UploadPart,
};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::repack::{Pushed, tar};
use crate::support::{self, Image};

const DEADLINE: Duration = Duration::from_secs(60);

/// Fails every write after the first `writes_max`.
#[derive(Debug)]
struct Failing {
    inner: Arc<InMemory>,
    writes: Arc<AtomicUsize>,
    writes_max: usize,
    deletes: Option<Deletes>,
}

/// What a user deletes after so many writes.
#[derive(Debug)]
struct Deletes {
    image: Digest,
    after: usize,
    done: Arc<AtomicBool>,
}

impl Failing {
    fn write(&self) -> Result<()> {
        write(&self.writes, self.writes_max)
    }
}

fn write(writes: &AtomicUsize, writes_max: usize) -> Result<()> {
    if writes.fetch_add(1, Ordering::SeqCst) < writes_max {
        return Ok(());
    }
    Err(Error::Generic { store: "failing", source: "no more writes".into() })
}

impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Failing")
    }
}

#[derive(Debug)]
struct FailingUpload {
    inner: Box<dyn MultipartUpload>,
    writes: Arc<AtomicUsize>,
    writes_max: usize,
}

#[async_trait]
impl MultipartUpload for FailingUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        match write(&self.writes, self.writes_max) {
            Ok(()) => self.inner.put_part(data),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    async fn complete(&mut self) -> Result<PutResult> {
        write(&self.writes, self.writes_max)?;
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

#[async_trait]
impl ObjectStore for Failing {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if let Some(Deletes { image, after, done }) = &self.deletes
            && self.writes.load(Ordering::SeqCst) >= *after
            && !done.swap(true, Ordering::SeqCst)
        {
            delete_as_user(&self.inner, *image).await;
        }
        self.write()?;
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.inner.put_multipart_opts(location, options).await?;
        Ok(Box::new(FailingUpload { inner, writes: Arc::clone(&self.writes), writes_max: self.writes_max }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (writes, writes_max) = (Arc::clone(&self.writes), self.writes_max);
        let counted =
            locations.map(move |location| location.and_then(|at| write(&writes, writes_max).map(|()| at)));
        self.inner.delete_stream(counted.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.write()?;
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.write()?;
        self.inner.rename_opts(from, to, options).await
    }
}

/// Pushes the image to a registry over `objects`. Waits until it has its tree, or `crashed` says that it never will.
async fn push(objects: Arc<dyn ObjectStore>, image: &Image, crashed: impl Fn() -> bool) -> bool {
    push_as(objects, image, "v1", crashed).await
}

async fn push_as(
    objects: Arc<dyn ObjectStore>,
    image: &Image,
    tag: &str,
    crashed: impl Fn() -> bool,
) -> bool {
    let index = tempfile::tempdir().unwrap();
    // opening it takes a lease
    let Ok(store) = Store::open(objects, StoreConfig::new(index.path().join("index"))).await else {
        assert!(crashed(), "a store that does not crash was not opened");
        return false;
    };
    serving(&store, async |address| {
        let pushed = send(address, image, tag).await;
        let digest = Digest::of(&image.manifest);
        let begun = Instant::now();
        let mut done = false;
        while pushed && !done && !crashed() {
            assert!(begun.elapsed() < DEADLINE, "neither converted nor crashed");
            done = store.image(digest).await.unwrap().is_some_and(|image| image.state == ImageState::Done)
                && store.jobs().await.unwrap().is_empty();
            tokio::task::yield_now().await;
        }
        done
    })
    .await
}

/// False where any request was refused.
async fn send(address: std::net::SocketAddr, image: &Image, tag: &str) -> bool {
    for blob in image.blobs() {
        let path = format!("/v2/app/blobs/uploads/?digest={}", Digest::of(blob));
        if !support::send(address, http::Method::POST, &path, &[], blob.clone()).await.status.is_success() {
            return false;
        }
    }
    let headers = [("content-type", media_type::OCI_MANIFEST)];
    let path = format!("/v2/app/manifests/{tag}");
    support::send(address, http::Method::PUT, &path, &headers, image.manifest.clone())
        .await
        .status
        .is_success()
}

/// Every object that says something of another one.
struct Contents {
    objects: BTreeMap<String, Bytes>,
}

impl Contents {
    async fn read(store: &InMemory) -> Self {
        let all: Vec<ObjectMeta> = store.list(None).try_collect().await.unwrap();
        let mut objects = BTreeMap::new();
        for meta in all {
            let bytes = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
            objects.insert(meta.location.to_string(), bytes);
        }
        Self { objects }
    }

    fn blob(&self, digest: Digest) -> &Bytes {
        let key = format!("blobs/sha256/{}", digest.hex());
        self.objects.get(&key).unwrap_or_else(|| panic!("{key} is named and not there"))
    }

    /// Whether a record says how a layer is made again, whose recipe and packs are checked with all others.
    fn is_rebuilt(&self, layer: Digest) -> bool {
        let record = self.objects.get(&format!("layers/{}", layer.hex()));
        let record = record.map(|bytes| serde_json::from_slice::<LayerRecord>(bytes).unwrap());
        record.is_some_and(|record| record.diff_id == layer)
    }

    fn of<'a, T: serde::de::DeserializeOwned>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, T)> {
        let below = self.objects.iter().filter(move |(key, _)| key.starts_with(prefix));
        below.map(|(key, bytes)| (key.rsplit('/').next().unwrap(), serde_json::from_slice(bytes).unwrap()))
    }

    /// Nothing is named that is not there.
    fn check(&self) {
        for (key, bytes) in self.objects.iter().filter(|(key, _)| key.starts_with("blobs/")) {
            assert!(key.ends_with(&Digest::of(bytes).hex()), "{key} holds other bytes");
        }
        for (tag, value) in self.of::<lamina_store::RefValue>("refs/") {
            let Some(manifest) = value.manifest else { continue };
            let link = format!("repos/app/manifests/{}", manifest.hex());
            assert!(
                self.objects.contains_key(&link),
                "tag {tag} names a manifest that is not in the repository"
            );
        }
        for (hex, _) in self.of::<lamina_store::ManifestLink>("repos/app/manifests/") {
            let manifest: Manifest = serde_json::from_slice(self.blob(digest(hex))).unwrap();
            self.blob(manifest.config.digest);
            // of an image that names its tree, layers are rebuilt from recipes
            let bound =
                manifest.annotations.get(TREE_ANNOTATION).filter(|_| manifest.artifact_type.is_none());
            for layer in manifest.layers.iter().filter(|_| bound.is_none()) {
                if !self.is_rebuilt(layer.digest) {
                    self.blob(layer.digest);
                }
            }
            for layer in manifest.layers.iter().filter(|_| bound.is_some()) {
                assert!(self.objects.contains_key(&format!("layers/{}", layer.digest.hex())));
            }
        }
        for (hex, _) in self.of::<serde_json::Value>("repos/app/referrers/") {
            assert!(self.objects.contains_key(&format!("repos/app/manifests/{hex}")), "referrer {hex}");
        }
        for (_, layer) in self.of::<LayerRecord>("layers/") {
            let recipe = Recipe::parse(self.blob(layer.recipe).clone()).unwrap();
            for (_, place) in recipe.frames() {
                let mut place = *place;
                // of a pack that was repacked the frames are in a pack of which the same holds
                while !self.objects.contains_key(&format!("packs/{}", Digest::from(place.pack).hex())) {
                    let pack = Digest::from(place.pack);
                    let moved = self.objects.get(&format!("moved/{}", pack.hex()));
                    let moved = moved.unwrap_or_else(|| panic!("pack {pack} is not proved"));
                    let moved = Moved::parse(moved).unwrap();
                    let frame = moved.at(place.frame.offset).expect("a frame that lives is moved");
                    assert_eq!(frame.sealed_len, place.frame.sealed_len);
                    place.pack = moved.pack();
                    place.frame.offset = frame.new_offset;
                }
            }
        }
        for (hex, _) in self.of::<serde_json::Value>("packs/") {
            lamina_chunk::pack_records(self.blob(digest(hex))).unwrap();
        }
        for (hex, image) in
            self.of::<ImageRecord>("images/").filter(|(_, image)| image.state == ImageState::Done)
        {
            self.blob(image.tree.unwrap().digest);
            // only one that names its tree itself has none hung on it
            let manifest: Manifest = serde_json::from_slice(self.blob(digest(hex))).unwrap();
            match image.artifact {
                Some(artifact) => drop(self.blob(artifact.digest).clone()),
                None => assert!(manifest.annotations.contains_key(TREE_ANNOTATION), "image {hex}"),
            }
        }
    }
}

fn digest(hex: &str) -> Digest {
    format!("sha256:{hex}").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_after_any_write_of_a_push_leaves_no_dangling_name() {
    let big = noise(9_000_000, 1);
    let image = Image::new(&[&[("lib/big", &big)], &[("etc/motd", b"hi"), ("lib/.wh.none", b"")]]);
    let failing = |inner: &Arc<InMemory>, writes_max| {
        let (inner, writes) = (Arc::clone(inner), Arc::new(AtomicUsize::new(0)));
        (Arc::new(Failing { inner, writes: Arc::clone(&writes), writes_max, deletes: None }), writes)
    };
    let inner = Arc::new(InMemory::new());
    let (objects, writes) = failing(&inner, usize::MAX);
    assert!(push(objects, &image, || false).await);
    let whole = writes.load(Ordering::SeqCst);
    assert!(whole > 20, "a push of only {whole} writes");
    for writes_max in 0..whole {
        let inner = Arc::new(InMemory::new());
        let (objects, writes) = failing(&inner, writes_max);
        push(objects, &image, || writes.load(Ordering::SeqCst) > writes_max).await;
        Contents::read(&inner).await.check();
        fsck(&inner).await;
        assert!(push(Arc::clone(&inner) as _, &image, || false).await, "after {writes_max} writes");
        Contents::read(&inner).await.check();
    }
}

/// The same without the processes' own words to collectors, which differ from run to run.
fn kept(contents: &Contents) -> BTreeMap<String, Bytes> {
    let ours = contents.objects.iter().filter(|(key, _)| !key.starts_with("collecting/"));
    ours.map(|(key, bytes)| (key.clone(), bytes.clone())).collect()
}

fn collects() -> GcConfig {
    let (none, lost_after) = (Duration::ZERO, Duration::from_millis(100));
    GcConfig { grace: none, quarantine: none, lost_after, ..GcConfig::default() }
}

/// Collects once over `objects`. None where that crashed.
async fn gc(objects: Arc<dyn ObjectStore>, config: &GcConfig) -> Option<GcReport> {
    gc_after(objects, config, 0).await
}

/// The same so many seconds from now.
async fn gc_after(objects: Arc<dyn ObjectStore>, config: &GcConfig, after: u64) -> Option<GcReport> {
    let index = tempfile::tempdir().unwrap();
    let opened =
        StoreConfig { poll_every: support::POLL_EVERY, ..StoreConfig::new(index.path().join("index")) };
    let store = Store::open(objects, opened).await.ok()?;
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let report = store.keeper().gc(config, now.as_secs() + 2 + after).await.ok()?;
    store.close().await.ok()?;
    Some(report)
}

/// Nothing is damaged; what nobody needs does no harm.
async fn fsck(inner: &Arc<InMemory>) -> FsckReport {
    let index = tempfile::tempdir().unwrap();
    let config = StoreConfig::new(index.path().join("index"));
    let store = Store::open(Arc::clone(inner) as _, config).await.unwrap();
    let report = store.keeper().fsck(&|_| {}).await.unwrap();
    assert!(report.damaged.is_empty(), "{report:#?}");
    store.close().await.unwrap();
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_after_any_write_of_a_collection_loses_nothing_and_the_next_one_ends_the_same() {
    let (shared, own) = (noise(300_000, 1), noise(200_000, 2));
    let stays = Image::new(&[&[("lib/shared", &shared)], &[("etc/motd", b"hi")]]);
    let goes = Image::new(&[&[("lib/shared", &shared)], &[("own", &own)]]);
    let full = Arc::new(InMemory::new());
    assert!(push_as(Arc::clone(&full) as _, &goes, "v0", || false).await);
    assert!(push_as(Arc::clone(&full) as _, &stays, "v1", || false).await);
    untag(&full, "v0").await;
    let (report, writes, _) = collect_with_crashes(&full, &collects()).await;
    assert!(report.freed.bytes > 200_000, "{report:?}");
    assert!(writes > 20, "a collection of only {writes} writes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_after_any_write_of_a_collection_that_drops_originals_leaves_them_stored_or_rebuilt() {
    let (big, own) = (noise(300_000, 1), noise(200_000, 2));
    let plain = Image::plain(&[&[("lib/big", &big)], &[("etc/motd", b"hi"), ("own", &own)]]);
    let full = Arc::new(InMemory::new());
    assert!(push_as(Arc::clone(&full) as _, &plain, "v1", || false).await);
    let drops = GcConfig { originals: Originals::Drop, ..collects() };
    let (report, writes, _) = collect_with_crashes(&full, &drops).await;
    assert_eq!(report.originals.blobs, 2);
    assert!(writes > 8, "a collection of only {writes} writes");
}

/// Collects what is in `full` with a crash after each write, one after the other. Says what a
/// collection without one did, in how many writes, and what it left.
async fn collect_with_crashes(full: &InMemory, config: &GcConfig) -> (GcReport, usize, Arc<InMemory>) {
    collect_often_with_crashes(full, config, 1).await
}

/// The same with so many collections one after the other, whose first report it gives.
async fn collect_often_with_crashes(
    full: &InMemory,
    config: &GcConfig,
    collections: usize,
) -> (GcReport, usize, Arc<InMemory>) {
    let collect = async |objects: Arc<dyn ObjectStore>| {
        let first = gc(Arc::clone(&objects), config).await?;
        for _ in 1..collections {
            gc(Arc::clone(&objects), config).await?;
        }
        Some(first)
    };
    let failing = |writes_max| {
        let (inner, writes) = (Arc::new(full.fork()), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&writes);
        let failing = Failing { inner: Arc::clone(&inner), writes: counted, writes_max, deletes: None };
        (inner, Arc::new(failing), writes)
    };
    let (left_whole, objects, writes) = failing(usize::MAX);
    let report = collect(objects).await.unwrap();
    let (whole, expected) = (writes.load(Ordering::SeqCst), kept(&Contents::read(&left_whole).await));
    for writes_max in 0..whole {
        let (inner, objects, _) = failing(writes_max);
        let _ = collect(objects).await;
        Contents::read(&inner).await.check();
        fsck(&inner).await;
        assert!(collect(Arc::clone(&inner) as _).await.is_some(), "after {writes_max} writes");
        assert_eq!(fsck(&inner).await.garbage_blobs, 0, "after {writes_max} writes");
        let left = kept(&Contents::read(&inner).await);
        let differ = |one: &BTreeMap<String, Bytes>, other: &BTreeMap<String, Bytes>| -> Vec<String> {
            let differ = one.iter().filter(|(key, bytes)| other.get(*key) != Some(bytes));
            differ.map(|(key, _)| key.clone()).collect()
        };
        let (more, less) = (differ(&left, &expected), differ(&expected, &left));
        assert!(left == expected, "after {writes_max} writes: {more:?} and not {less:?}");
    }
    (report, whole, left_whole)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_after_any_write_of_a_repack_loses_nothing_and_the_next_one_ends_the_same() {
    let (full, stays) = mostly_dead().await;
    let (report, writes, left) = collect_with_crashes(&full, &collects()).await;
    assert_eq!(report.repacked.packs, 1, "{report:?}");
    assert!(writes > 25, "a collection of only {writes} writes");
    assert!(kept(&Contents::read(&left).await).keys().any(|key| key.starts_with("moved/")));
    is_whole(left, &stays).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_after_any_write_of_a_repack_that_drops_originals_too_loses_nothing() {
    let (full, stays) = mostly_dead().await;
    let plain = Image::plain(&[&[("own", &noise(200_000, 4))]]);
    assert!(push_as(Arc::clone(&full) as _, &plain, "v2", || false).await);
    let drops = GcConfig { originals: Originals::Drop, ..collects() };
    let (report, writes, left) = collect_with_crashes(&full, &drops).await;
    assert_eq!((report.repacked.packs, report.originals.blobs), (1, 1), "{report:?}");
    assert!(writes > 25, "a collection of only {writes} writes");
    is_whole(left, &stays).await;
}

/// Deletes an image by its digest, as the registry does it for a user.
async fn delete_as_user(objects: &Arc<InMemory>, image: Digest) {
    let index = tempfile::tempdir().unwrap();
    let config = StoreConfig::new(index.path().join("index"));
    let store = Store::open(Arc::clone(objects) as _, config).await.unwrap();
    serving(&store, async |address| {
        let path = format!("/v2/app/manifests/{image}");
        let deleted = support::send(address, http::Method::DELETE, &path, &[], "").await;
        deleted.expect(http::StatusCode::ACCEPTED);
    })
    .await;
    store.close().await.unwrap();
}

async fn untag(objects: &Arc<InMemory>, tag: &str) {
    let index = tempfile::tempdir().unwrap();
    let config = StoreConfig::new(index.path().join("index"));
    let store = Store::open(Arc::clone(objects) as _, config).await.unwrap();
    store.set_tag(&"app".parse().unwrap(), &tag.parse().unwrap(), None).await.unwrap();
    store.close().await.unwrap();
}

/// Two images of one pack, and the tag of the one that brought it deleted.
async fn mostly_dead() -> (Arc<InMemory>, Pushed) {
    let (full, index) = (Arc::new(InMemory::new()), tempfile::tempdir().unwrap());
    let config = StoreConfig::new(index.path().join("index"));
    let store = Store::open(Arc::clone(&full) as _, config).await.unwrap();
    let stays = serving(&store, async |address| {
        Pushed::new(&store, address, "v0", vec![tar((2, 2_000_000))]).await.unwrap();
        Pushed::new(&store, address, "v1", vec![tar((3, 1_000))]).await.unwrap()
    })
    .await;
    store.set_tag(&"app".parse().unwrap(), &"v0".parse().unwrap(), None).await.unwrap();
    store.close().await.unwrap();
    (full, stays)
}

/// All of the image comes from what is left.
async fn is_whole(left: Arc<InMemory>, image: &Pushed) {
    let index = tempfile::tempdir().unwrap();
    let store = Store::open(left as _, StoreConfig::new(index.path().join("index"))).await.unwrap();
    serving(&store, async |address| image.is_whole(&store, address).await).await;
}

/// Does something with a registry of the store.
async fn serving<T>(store: &Store, with: impl AsyncFnOnce(std::net::SocketAddr) -> T) -> T {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let served = store.clone();
    let serving =
        tokio::spawn(serve(listener, served, RegistryConfig::default(), async { drop(stopped.await) }));
    let done = with(address).await;
    drop(stop);
    timeout(DEADLINE, serving).await.unwrap().unwrap().unwrap();
    done
}
