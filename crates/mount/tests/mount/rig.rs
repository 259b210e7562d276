//! An image in memory, mounted for real.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lamina_cache::{Cache, CacheConfig, Class, Pieces, Source, SourceError};
use lamina_chunk::{ChunkId, ChunkPlace, FrameId, PackId, PackRecord, Place, Sealed};
use lamina_image::{
    BootPack, ChunkSink, Digest, IngestOptions, Ino, LayerInput, Profile, Progress, SinkError, Trace,
    TraceRun, Tree, build_boot, derive_tree, ingest,
};
use lamina_mount::{BootFailure, BootRooms, BootStream, Contents, Mount, MountConfig, MountError, Record};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

/// What the tree's blob is said to be.
pub(crate) const TREE: Digest = Digest::from_bytes([7; 32]);

/// Packs in memory, as sink and as source.
#[derive(Default)]
pub(crate) struct Packs {
    packs: Mutex<HashMap<PackId, Bytes>>,
    index: Mutex<HashMap<ChunkId, ChunkPlace>>,
    pub(crate) requests: AtomicU64,
    pub(crate) bytes: AtomicU64,
    /// Answers nothing.
    pub(crate) down: AtomicBool,
    /// Answers other bytes.
    pub(crate) lies: AtomicBool,
    /// Where there is one, each answer takes a permit.
    pub(crate) gate: Option<Semaphore>,
    /// A blob of which nothing comes.
    pub(crate) silent: Mutex<Option<PackId>>,
}

impl Packs {
    /// Serves another blob as well.
    pub(crate) fn add(&self, blob: Bytes) -> Digest {
        let digest = Digest::of(&blob);
        self.packs.lock().insert(digest.try_into().unwrap(), blob);
        digest
    }

    /// Packs whose answers wait at the gate.
    pub(crate) fn gated() -> Self {
        Self { gate: Some(Semaphore::new(0)), ..Self::default() }
    }
}

impl ChunkSink for Packs {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        let index = self.index.lock();
        Ok(ids.iter().map(|id| index.get(id).copied()).collect())
    }

    fn put(&self, pack: PackId, bytes: Bytes, records: &[PackRecord]) -> Result<(), SinkError> {
        self.index.lock().extend(records.iter().flat_map(|record| record.places(pack)));
        self.packs.lock().insert(pack, bytes);
        Ok(())
    }
}

impl Source for Packs {
    fn stream(
        &self,
        pack: PackId,
        range: Range<u64>,
        _class: Class,
    ) -> BoxFuture<'_, Result<Pieces, SourceError>> {
        async move {
            self.requests.fetch_add(1, Ordering::SeqCst);
            if *self.silent.lock() == Some(pack) {
                std::future::pending::<()>().await;
            }
            if let Some(gate) = &self.gate {
                gate.acquire().await.expect("open").forget();
            }
            if self.down.load(Ordering::SeqCst) {
                return Err(SourceError::Missing(pack));
            }
            let start = usize::try_from(range.start).expect("small");
            let end = usize::try_from(range.end).expect("small");
            let body = self.packs.lock().get(&pack).ok_or(SourceError::Missing(pack))?.slice(start..end);
            self.bytes.fetch_add(body.len() as u64, Ordering::SeqCst);
            if self.lies.load(Ordering::SeqCst) {
                return Ok(Pieces::whole(body.iter().map(|byte| byte ^ 0x55).collect()));
            }
            Ok(Pieces::whole(body))
        }
        .boxed()
    }
}

/// A layer's tar, built entry by entry.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// Adds an entry; `change` has the last word on its header.
    pub(crate) fn entry(
        mut self,
        kind: tar::EntryType,
        path: &[u8],
        contents: &[u8],
        change: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        // the raw field takes names that are not UTF-8
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, contents).expect("appended");
        self
    }

    pub(crate) fn file(self, path: &str, contents: &[u8]) -> Self {
        self.entry(tar::EntryType::Regular, path.as_bytes(), contents, |_| {})
    }

    pub(crate) fn link(self, kind: tar::EntryType, path: &str, target: &str) -> Self {
        self.entry(kind, path.as_bytes(), b"", |header| header.set_link_name(target).expect("short"))
    }

    /// PAX records for the entry that follows.
    pub(crate) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).expect("appended");
        self
    }

    fn finish(self) -> Vec<u8> {
        self.0.into_inner().expect("finished")
    }
}

/// A mounted image. Fields are dropped in order: the mount first.
pub(crate) struct Rig {
    pub(crate) mount: Option<Mount>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) packs: Arc<Packs>,
    pub(crate) tree: Arc<Tree>,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) directory: tempfile::TempDir,
}

impl Rig {
    pub(crate) fn new(layer: Layer) -> Self {
        Self::with(layer, Packs::default())
    }

    pub(crate) fn with(layer: Layer, packs: Packs) -> Self {
        Self::of(&[layer.finish()], packs)
    }

    /// An image of these tars, the lowest first.
    pub(crate) fn of(tars: &[Vec<u8>], packs: Packs) -> Self {
        let input = |tar| LayerInput { name: "layer".to_owned(), bytes: Box::new(tar), diff_id: None };
        let inputs = tars.iter().map(|tar| input(&tar[..])).collect();
        let recipes = ingest(inputs, &packs, IngestOptions::default(), &Progress::default());
        let tree = derive_tree(&recipes.expect("taken in")).expect("merged");
        let tree = Arc::new(Tree::open(tree.into()).expect("a tree"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("mnt")).expect("created");
        let mut config = CacheConfig::new(directory.path().join("cache"), 256 << 20);
        config.deadline = Duration::from_secs(10);
        let cache = Arc::new(Cache::open(config, runtime.handle().clone()).expect("opened"));
        let mut rig = Self { mount: None, cache, packs: Arc::new(packs), tree, runtime, directory };
        let config = MountConfig::new(rig.path(""));
        rig.mount = Some(rig.start(config).expect("mounting needs root and /dev/fuse"));
        rig
    }

    pub(crate) fn start(&self, config: MountConfig) -> Result<Mount, MountError> {
        self.start_with((self.tree.clone(), Contents::here()), config)
    }

    pub(crate) fn start_with(
        &self,
        tree: (Arc<Tree>, Contents),
        config: MountConfig,
    ) -> Result<Mount, MountError> {
        let handle = self.runtime.handle().clone();
        Mount::start(tree, self.cache.clone(), self.packs.clone(), config, handle)
    }

    /// The same, mounted anew, to record its start.
    pub(crate) fn recording(mut self) -> Self {
        self.mount().unmount(false).expect("unmounted");
        self.ended();
        let config = MountConfig { record: Record::Start, ..MountConfig::new(self.path("")) };
        self.mount = Some(self.start(config).expect("mounted again"));
        self
    }

    /// A path in the mount.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        let mnt = self.directory.path().join("mnt");
        if path.is_empty() { mnt } else { mnt.join(path) }
    }

    /// A boot pack of these files, whole and in this order, served beside the packs.
    pub(crate) fn boot_pack(&self, files: &[&str]) -> Bytes {
        self.boot_pack_listing(files, &[])
    }

    /// The same of a start that listed these directories.
    pub(crate) fn boot_pack_listing(&self, files: &[&str], dirs: &[&str]) -> Bytes {
        let runs = files.iter().map(|path| {
            let inode = fs::metadata(self.path(path)).expect("there");
            TraceRun { ino: Ino(inode.ino()), first: 0, pages: inode.len().div_ceil(4096) }
        });
        let mut names = vec![(Ino::ROOT, b"not there".to_vec())];
        let ino = |path: &&str| Ino(fs::metadata(self.path(path)).expect("there").ino());
        names.extend(dirs.iter().map(|dir| (ino(dir), b".".to_vec())));
        let trace = Trace { runs: runs.collect(), names, boot: false };
        let profile = Profile::of_trace(&self.tree, &trace).expect("a profile");
        let open = |id: FrameId, place: Place| {
            let (start, len) = (place.frame.offset as usize, place.frame.sealed_len as usize);
            let bytes = self.packs.packs.lock()[&place.pack].slice(start..start + len);
            Sealed::new(bytes, place.frame.plain_len as usize).open(id)
        };
        build_boot(&self.tree, TREE, &profile, open).expect("built").expect("not empty").into()
    }

    /// Boots from these bytes; they may be anything.
    pub(crate) fn boot(&self, blob: &Bytes) -> Result<(), BootFailure> {
        self.boot_once(blob, std::future::ready(()))
    }

    /// The same once the processors are free.
    pub(crate) fn boot_once(
        &self,
        blob: &Bytes,
        free: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), BootFailure> {
        self.boot_from(self.stream(blob, free))
    }

    /// These bytes, on their way.
    pub(crate) fn stream(&self, blob: &Bytes, free: impl Future<Output = ()> + Send + 'static) -> BootStream {
        let pack = BootPack { blob: self.packs.add(blob.clone()), bytes: blob.len() as u64, tree: TREE };
        let _inside = self.runtime.enter();
        BootStream::start(pack, self.packs.clone(), BootRooms::prepare().take(), free)
    }

    /// Boots from what is on its way.
    pub(crate) fn boot_from(&self, stream: BootStream) -> Result<(), BootFailure> {
        self.runtime.block_on(self.mount().boot(stream))
    }

    /// The kernel's readahead for files that are opened now, in KiB.
    pub(crate) fn window(&self) -> u32 {
        let device = fs::metadata(self.path("")).expect("the root").dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        fs::read_to_string(path).expect("a number").trim().parse().expect("a number")
    }

    pub(crate) fn mount(&self) -> &Mount {
        self.mount.as_ref().expect("mounted")
    }

    /// Waits until the mount has ended.
    pub(crate) fn ended(&self) {
        let ended = self
            .runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), self.mount().wait()).await });
        ended.expect("it did not end");
    }
}

/// Bytes that do not compress, another sequence for each seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let block = |n: u64| *ChunkId::of(&[seed.to_le_bytes(), n.to_le_bytes()].concat()).as_bytes();
    (0..).flat_map(block).take(len).collect()
}

/// Whether anything is mounted at `path`.
pub(crate) fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("read");
    mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str())
}

/// Waits for something that other threads bring about.
pub(crate) fn until(what: &str, true_yet: impl Fn() -> bool) {
    let begun = Instant::now();
    while !true_yet() {
        assert!(begun.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::yield_now();
    }
}
