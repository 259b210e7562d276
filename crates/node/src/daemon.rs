//! The daemon's state: its cache, its trees, its mounts.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use lamina_cache::{Cache, CacheConfig, Source};
use lamina_image::{Digest, Platform, Tree};
use lamina_mount::{BootStream, Mount, MountConfig, Record};
use lamina_wire::proto::{
    MountRequest, MountResponse, MountStats, SourceStats, StatsResponse, UnmountResponse,
};
use lamina_wire::{Client, ClientConfig, Reference};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::boot_files::{BootFiles, KeptBoot, KeptSource};
use crate::known::Known;
use crate::resolve::resolve;
use crate::sources::{Hosts, Mirrors, Sources, State};
use crate::start::{Report, Starting};
use crate::trees::Trees;
use crate::{Found, NodeError};

/// One daemon takes no more mounts.
const MOUNTS_MAX: usize = 4096;
/// A tree's blob over 1 GiB is refused: some ten million files.
const TREE_BLOB_BYTES_MAX: u64 = 1 << 30;

/// A tree that takes longer to come is given up: the largest one over 100 Mbit/s.
const TREE: Duration = Duration::from_secs(90);
/// Boot packs get this part of what the cache may take, beside it.
const BOOT_PART: u64 = 10;

/// How a daemon is set up.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The cache, and beside it the trees and the socket.
    pub cache: CacheConfig,
    /// How registries are spoken to.
    pub client: ClientConfig,
    /// Who else has what a registry has.
    pub mirrors: Mirrors,
    /// Which image of an index is taken.
    pub platform: Platform,
    /// The kernel's readahead while a start runs, in KiB; `None` for what was measured to be best.
    pub read_ahead_kb: Option<u32>,
}

/// The daemon.
pub struct Node {
    config: NodeConfig,
    cache: Arc<Cache>,
    hosts: Hosts,
    known: Known,
    trees: Trees,
    boot_files: BootFiles,
    mounts: Mutex<BTreeMap<PathBuf, Mounted>>,
    /// Trees that are mounted: two mounts of an image share one.
    loaded: Mutex<BTreeMap<Digest, std::sync::Weak<Tree>>>,
    /// Mounts, and requests that are being answered: what keeps the daemon from ending.
    count: watch::Sender<usize>,
}

/// Something that the daemon is busy with, until it is dropped.
pub(crate) struct Busy(Arc<Node>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
}

struct Mounted {
    mount: Arc<Mount>,
    reference: String,
    manifest: Digest,
    /// What becomes of its trace, where it is recorded until the unmount.
    report: Option<watch::Receiver<Option<Report>>>,
}

impl Node {
    /// Opens the cache and the trees beside it. Blocks.
    pub fn open(config: NodeConfig, handle: Handle) -> Result<Self, NodeError> {
        // it locks and checks the directory, so it comes first
        let cache = Arc::new(Cache::open(config.cache.clone(), handle)?);
        let trees = Trees::open(config.cache.directory.join("trees"))?;
        let part = |name| config.cache.directory.join(name);
        let failed = |path| move |error| NodeError::File { path, error };
        let boot_files = BootFiles::open(part("boot"), config.cache.bytes_max / BOOT_PART);
        let boot_files = boot_files.map_err(failed(part("boot")))?;
        let known = Known::open(part("images")).map_err(failed(part("images")))?;
        let hosts = Hosts::new(config.client, config.mirrors.clone());
        let (count, _) = watch::channel(0);
        Ok(Self {
            config,
            cache,
            hosts,
            known,
            trees,
            boot_files,
            mounts: Mutex::default(),
            loaded: Mutex::default(),
            count,
        })
    }

    /// How many mounts there are and requests being answered, now and whenever that changes.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        self.count.send_modify(|count| *count += 1);
        Busy(Arc::clone(self))
    }

    /// Mounts an image. When it returns, the mount answers.
    pub async fn mount(self: &Arc<Self>, request: MountRequest) -> Result<MountResponse, NodeError> {
        let begun = Instant::now();
        if self.mounts.lock().len() >= MOUNTS_MAX {
            return Err(NodeError::TooManyMounts(MOUNTS_MAX));
        }
        let reference: Reference = request.reference.parse()?;
        let sources = self.hosts.sources(&reference, request.plain_http)?;
        let (platform, deadline) = (&self.config.platform, self.config.cache.deadline);
        let resolved =
            resolve(&sources, &self.known, &reference, platform, request.require_bound, deadline).await?;
        let found = resolved.found;
        let mut requests = found.requests;
        let kept = Arc::new(KeptBoot::new(sources.clone(), self.boot_files.clone()));
        let starting = Starting {
            client: sources.registry(),
            repository: reference.repository.clone(),
            manifest: found.manifest,
            tree: found.tree,
            until_unmount: request.record,
            kept: Arc::clone(&kept),
        };
        // a boot pack is the registry's word, so an image that must be bound does without
        let boot = !request.no_boot && !request.record && !request.require_bound;
        let boot = boot.then(|| starting.find_boot());
        let tree = self.tree(&sources, &reference, &found, &mut requests).await?;
        let source: Arc<dyn Source> = Arc::new(KeptSource(kept));
        // behind the tree, which the mount waits for
        let boot = boot.map(|found| Starting::stream_boot(found, Arc::clone(&source)));
        let mut config = MountConfig::new(PathBuf::from(&request.directory));
        config.name = reference.to_string();
        config.read_ahead_kb = self.config.read_ahead_kb.unwrap_or(config.read_ahead_kb);
        config.record = match (request.record, request.no_trace) {
            (true, _) => Record::Exact,
            (false, false) => Record::Start,
            (false, true) => Record::Off,
        };
        let (cache, handle) = (Arc::clone(&self.cache), Handle::current());
        let mount = blocking(move || Mount::start(tree, cache, source, config, handle)).await?;
        self.keep(Arc::new(mount), &reference, starting, boot);
        let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (manifest, tree) = (found.manifest.to_string(), found.tree.to_string());
        let offline = resolved.offline.unwrap_or_default();
        Ok(MountResponse { manifest, tree, elapsed_us, requests, offline })
    }

    /// Remembers a mount, and forgets it when it is gone, whoever unmounted it.
    fn keep(
        self: &Arc<Self>,
        mount: Arc<Mount>,
        reference: &Reference,
        starting: Starting,
        boot: Option<JoinHandle<Option<BootStream>>>,
    ) {
        let path = mount.mountpoint().to_owned();
        let (started, report) = watch::channel(None);
        // nobody who only unmounts waits for a registry
        let report = starting.until_unmount.then_some(report);
        let (reference, manifest) = (reference.to_string(), starting.manifest);
        let mounted = Mounted { mount: Arc::clone(&mount), reference, manifest, report };
        self.mounts.lock().insert(path.clone(), mounted);
        let busy = self.busy();
        let node = Arc::clone(self);
        tokio::spawn(async move {
            let report = starting.see(Arc::clone(&mount), boot).await;
            started.send_replace(Some(report));
            mount.wait().await;
            node.forget(&path, &mount);
            drop(busy);
        });
    }

    /// Forgets a mount that is gone.
    fn forget(&self, path: &Path, mount: &Arc<Mount>) {
        let mut mounts = self.mounts.lock();
        // the same directory may have been mounted again meanwhile
        if mounts.get(path).is_some_and(|mounted| Arc::ptr_eq(&mounted.mount, mount)) {
            mounts.remove(path);
        }
    }

    async fn tree(
        &self,
        sources: &Sources,
        reference: &Reference,
        found: &Found,
        requests: &mut u32,
    ) -> Result<Arc<Tree>, NodeError> {
        let digest = found.tree;
        if let Some(tree) = self.loaded.lock().get(&digest).and_then(std::sync::Weak::upgrade) {
            return Ok(tree);
        }
        let trees = self.trees.clone();
        let local = blocking(move || Ok::<_, NodeError>(trees.load(digest))).await?;
        let tree = match local {
            Some(tree) => tree,
            None => {
                *requests += 1;
                let (repository, trees) = (&reference.repository, &self.trees);
                sources
                    .ask(TREE, |client| async move {
                        if let Some(tree) = self.receive_tree(&client, repository, digest).await {
                            return Ok(tree);
                        }
                        // once more, with retries, with an error that says why, and without a disk if there is no other way
                        let blob = client.blob(repository, digest, TREE_BLOB_BYTES_MAX).await?;
                        let (trees, name) = (trees.clone(), reference.to_string());
                        blocking(move || trees.store(&name, digest, &blob)).await
                    })
                    .await?
            }
        };
        let tree = Arc::new(tree);
        let mut loaded = self.loaded.lock();
        loaded.retain(|_, tree| tree.strong_count() > 0);
        loaded.insert(digest, Arc::downgrade(&tree));
        Ok(tree)
    }

    /// Unpacks a tree while it comes; `None` if anything goes wrong.
    async fn receive_tree(&self, client: &Client, repository: &str, digest: Digest) -> Option<Tree> {
        let blob = client.blob_stream(repository, digest).await.ok()?;
        if blob.len.is_none_or(|len| len > TREE_BLOB_BYTES_MAX) {
            return None;
        }
        let reader = SyncIoBridge::new(StreamReader::new(blob.bytes.map_err(io::Error::other)));
        let trees = self.trees.clone();
        let received = tokio::task::spawn_blocking(move || trees.receive(digest, reader)).await.ok()?;
        received.inspect_err(|error| tracing::debug!(tree = %digest, %error, "a tree did not come")).ok()
    }

    /// Unmounts a directory. If a start was recorded on it until now, this returns when the registry was told.
    pub async fn unmount(&self, directory: &Path, lazy: bool) -> Result<UnmountResponse, NodeError> {
        let mounted = self.mounts.lock().get(directory).map(|it| (Arc::clone(&it.mount), it.report.clone()));
        let (mount, report) = mounted.ok_or_else(|| NodeError::NotMounted(directory.to_owned()))?;
        let waiting = Arc::clone(&mount);
        blocking(move || mount.unmount(lazy)).await?;
        if !lazy {
            waiting.wait().await;
        }
        self.forget(directory, &waiting);
        let Some(mut report) = report.filter(|_| !lazy) else { return Ok(UnmountResponse::default()) };
        let report =
            report.wait_for(Option::is_some).await.ok().and_then(|report| report.clone()).unwrap_or_default();
        let trace_refused = report.refused.unwrap_or_default();
        Ok(UnmountResponse { trace_names: report.names, trace_pages: report.pages, trace_refused })
    }

    /// Unmounts everything, lazily where something is in use. Used at the end.
    pub async fn unmount_all(&self) {
        let mounts: Vec<PathBuf> = self.mounts.lock().keys().cloned().collect();
        for directory in mounts {
            if let Err(error) = self.unmount(&directory, false).await {
                tracing::warn!(directory = %directory.display(), %error, "in use at the end, unmounted lazily");
                let _ = self.unmount(&directory, true).await;
            }
        }
    }

    /// All counters.
    pub fn stats(&self) -> StatsResponse {
        let named = |counters: Vec<(&'static str, u64)>| {
            counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        };
        let mounts = self.mounts.lock();
        let mounts = mounts.iter().map(|(directory, mounted)| MountStats {
            directory: directory.display().to_string(),
            reference: mounted.reference.clone(),
            manifest: mounted.manifest.to_string(),
            counters: named(mounted.mount.snapshot().named()),
        });
        let mounts = mounts.collect();
        let sources = self.hosts.all().into_iter().map(|(url, host)| {
            let (state, reason, away_ms) = match host.state() {
                State::Here => ("here", String::new(), 0),
                State::Doubted => ("doubted", String::new(), 0),
                State::Away(since, reason) => ("away", reason, since.elapsed().as_millis()),
            };
            let away_ms = u64::try_from(away_ms).unwrap_or(u64::MAX);
            SourceStats {
                url,
                state: state.to_owned(),
                reason,
                away_ms,
                counters: named(host.counters.named()),
            }
        });
        let cache = named(self.cache.snapshot().named());
        StatsResponse { pid: std::process::id(), cache, mounts, sources: sources.collect() }
    }
}

/// Runs what blocks where blocking is allowed.
async fn blocking<T, E, F>(work: F) -> Result<T, NodeError>
where
    T: Send + 'static,
    E: Into<NodeError> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.expect("the work does not panic").map_err(Into::into)
}
