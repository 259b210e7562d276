//! The daemon's state: its cache, its trees, its mounts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lamina_cache::{Cache, CacheConfig, Source};
use lamina_image::{CommandKey, Digest, Platform, Tree};
use lamina_mount::{BootRoom, BootRooms, Contents, Mount, MountConfig, MountError, Record, Terms};
use lamina_wire::proto::{MountRecord, MountRequest, MountResponse, UnmountResponse};
use lamina_wire::{ClientConfig, Reference};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;
use tracing::field::Empty;
use tracing::{Instrument, Span, debug_span, info_span, warn};

use crate::boot_files::{BootFiles, KeptBoot, KeptSource};
use crate::fill::{Fills, PAUSED, Policy};
use crate::held::Held;
use crate::image::{Begun, Wish};
use crate::known::Known;
use crate::owner::{self, Owner};
use crate::pins::Pins;
use crate::records::{Records, image_record};
use crate::resolve::{Resolved, resolve};
use crate::sources::{Hosts, Mirrors, Sources};
use crate::spans::{Within, failed};
use crate::start::{Chosen, ComingBoot, Report, Starting};
use crate::tree::{Around, Turns};
use crate::trees::Trees;
use crate::turn::turn;
use crate::untold::Untold;
use crate::{Found, KeptTraces, NodeError};

/// One daemon takes no more mounts.
const MOUNTS_MAX: usize = 4096;
/// What the cache directory's lock is called where it is kept.
const LOCK: &str = "lock";
/// How long an unmount waits for the kernel to let go of what is mounted nowhere any more. A mount namespace that was made
/// meanwhile may have a copy, and keep it for ever.
const COPIES: Duration = Duration::from_secs(3);
/// A mount is at rest so long after its start.
const AT_REST: Duration = Duration::from_secs(10);
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
    /// The kernel's readahead while reading is sparse, in KiB; `None` for what was measured to be best.
    pub read_ahead_kb: Option<u32>,
    /// Whether the mounts that it has at its end come again with the next daemon of the cache.
    pub permanent: bool,
}

/// The daemon.
pub struct Node {
    pub(crate) config: NodeConfig,
    pub(crate) cache: Arc<Cache>,
    pub(crate) hosts: Hosts,
    pub(crate) known: Known,
    pub(crate) fills: Fills,
    pub(crate) pins: Pins,
    pub(crate) trees: Trees,
    boot_files: BootFiles,
    boot_rooms: BootRooms,
    pub(crate) mounts: Mutex<BTreeMap<PathBuf, Mounted>>,
    /// Directories that are being mounted on.
    reserved: Mutex<BTreeSet<PathBuf>>,
    pub(crate) records: Records,
    pub(crate) held: Held,
    /// Whether what goes now is to come again with the next daemon.
    ending: AtomicBool,
    /// Whether another program is to take this one's place.
    pub(crate) replaced: AtomicBool,
    /// Trees that are mounted: two mounts of an image share one.
    pub(crate) loaded: Mutex<BTreeMap<Digest, (std::sync::Weak<Tree>, Contents)>>,
    /// Mounts, and requests that are being answered: what keeps the daemon from ending.
    count: watch::Sender<usize>,
    untold: Untold,
}

/// Something that the daemon is busy with, until it is dropped.
pub(crate) struct Busy(Arc<Node>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
}

/// A mount, as its daemon knows it.
pub(crate) struct Mounted {
    pub(crate) mount: Arc<Mount>,
    /// Its record's.
    pub(crate) number: u64,
    pub(crate) record: MountRecord,
    /// What becomes of its trace, where it is recorded until the unmount.
    pub(crate) report: Option<watch::Receiver<Option<Report>>>,
    /// How it came here, if not by a request to this process.
    pub(crate) restored: &'static str,
    /// The boot pack that was found for its start.
    pub(crate) chosen: Arc<OnceLock<Chosen>>,
    /// What its start is part of.
    pub(crate) within: Within,
}

/// What a request asks of whom.
pub(crate) struct Asked {
    pub(crate) reference: Reference,
    pub(crate) sources: Sources,
    /// How many requests it took so far.
    pub(crate) requests: u32,
    /// For a boot pack, if there is one.
    pub(crate) room: Option<BootRoom>,
    /// What comes already.
    pub(crate) begun: Option<Begun>,
}

impl Asked {
    /// Nothing yet.
    pub(crate) fn new(reference: Reference, sources: Sources) -> Self {
        Self { reference, sources, requests: 0, room: None, begun: None }
    }
}

/// A directory that one request has taken, until it is dropped.
struct Reserved(Arc<Node>, PathBuf);

impl Drop for Reserved {
    fn drop(&mut self) {
        self.0.reserved.lock().remove(&self.1);
    }
}

/// Whether a mount is to have a boot pack. That is the registry's word, so an image that must be bound does without.
fn wants_boot(request: &MountRequest) -> bool {
    !request.no_boot && !request.record && !request.require_bound
}

/// The command that a mount is for.
fn command_of(request: &MountRequest) -> Result<Option<CommandKey>, NodeError> {
    let named = Some(request.command.as_str()).filter(|command| !command.is_empty());
    Ok(named.map(str::parse).transpose()?)
}

fn with_terms(record: MountRecord, terms: &Terms) -> MountRecord {
    MountRecord {
        fuse_minor: terms.minor,
        fuse_capabilities: terms.capabilities,
        device_major: terms.major_dev,
        device_minor: terms.minor_dev,
        ..record
    }
}

impl Node {
    /// Opens the cache and the trees beside it. What `held` has kept of a daemon that died is left to [`Node::restore`]. Blocks.
    pub fn open(config: NodeConfig, held: Held, handle: Handle) -> Result<Self, NodeError> {
        let part = |name| config.cache.directory.join(name);
        let failed = |path| move |error| NodeError::File { path, error };
        // a dead daemon's lock is ours, even where it cannot quite die
        let lock = held.find(LOCK).map(|lock| lock.try_clone()).transpose().map_err(failed(part(LOCK)))?;
        // it locks and checks the directory, so it comes first
        let cache = Arc::new(Cache::open_locked(config.cache.clone(), lock, handle)?);
        held.keep(LOCK, cache.lock().map_err(failed(part(LOCK)))?);
        let trees = Trees::open(part("trees"))?;
        let boot_files = BootFiles::open(part("boot"), config.cache.bytes_max / BOOT_PART);
        let boot_files = boot_files.map_err(failed(part("boot")))?;
        let known = Known::open(part("images")).map_err(failed(part("images")))?;
        let records = Records::open(&config.cache.directory)?;
        let hosts = Hosts::new(config.client.clone(), config.mirrors.clone());
        let pins = Pins::open(part("pins"), config.cache.bytes_max).map_err(failed(part("pins")))?;
        pins.restore(&cache, &trees);
        let (count, _) = watch::channel(0);
        let fills = Fills::new(held.find(PAUSED).is_some());
        Ok(Self {
            config,
            cache,
            hosts,
            known,
            fills,
            pins,
            trees,
            boot_files,
            boot_rooms: BootRooms::prepare(),
            mounts: Mutex::default(),
            reserved: Mutex::default(),
            records,
            held,
            ending: AtomicBool::new(false),
            replaced: AtomicBool::new(false),
            loaded: Mutex::default(),
            count,
            untold: Untold::default(),
        })
    }

    /// How many mounts there are and requests being answered, now and whenever that changes.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    /// Whether a mount is being made now, or has not all of its tree: the next daemon would have to ask for that before it could answer
    /// anything.
    pub(crate) fn is_mounting(&self) -> bool {
        let is_coming =
            |tree: &std::sync::Weak<Tree>| tree.upgrade().is_some_and(|tree| !tree.has_contents());
        !self.reserved.lock().is_empty() || self.loaded.lock().values().any(|(tree, _)| is_coming(tree))
    }

    /// Has the contents of all trees come first now, and waits for them, for no longer than `within`.
    pub(crate) async fn need_contents(&self, within: Duration) {
        let coming: Vec<Contents> =
            self.loaded.lock().values().map(|(_, contents)| contents.clone()).collect();
        let _ = timeout(within, join_all(coming.iter().map(Contents::need))).await;
    }

    pub(crate) fn cache(&self) -> Arc<Cache> {
        Arc::clone(&self.cache)
    }

    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        self.count.send_modify(|count| *count += 1);
        Busy(Arc::clone(self))
    }

    /// Mounts an image. When it returns, the mount answers, and outlives this process where it has a holder.
    pub async fn mount(self: &Arc<Self>, request: MountRequest) -> Result<MountResponse, NodeError> {
        let span = info_span!(
            "mount",
            image = request.reference,
            directory = request.directory,
            manifest = Empty,
            tree = Empty,
            offline = Empty,
            otel.status_description = Empty
        );
        let mounted = self.mount_new(request).instrument(span.clone()).await;
        mounted.inspect_err(|error| failed(&span, error))
    }

    async fn mount_new(self: &Arc<Self>, request: MountRequest) -> Result<MountResponse, NodeError> {
        let begun = Instant::now();
        if self.mounts.lock().len() >= MOUNTS_MAX {
            return Err(NodeError::TooManyMounts(MOUNTS_MAX));
        }
        Policy::of(&request.fill)?;
        let command = command_of(&request)?;
        if request.record && request.passthrough {
            return Err(NodeError::Request("what the kernel reads by itself cannot be recorded".to_owned()));
        }
        let owner_began = match request.owner {
            0 => 0,
            pid => Owner::find(pid).map_err(|error| NodeError::Owner { pid, error })?.began,
        };
        let _reserved = self.reserve(Path::new(&request.directory))?;
        let mut asked = self.ask(&request)?;
        // while the processors wait for the network, though there may be no boot pack
        asked.room = wants_boot(&request).then(|| self.boot_rooms.take());
        let span = Span::current();
        asked.sources.within.begin(span.clone());
        let Asked { sources, reference, .. } = &asked;
        sources.spare();
        // of what the kernel reads past the node all of the tree must be there first
        let start = wants_boot(&request) && !request.passthrough;
        let (platform, require_bound) = (&self.config.platform, request.require_bound);
        let wish = Wish { platform, require_bound, start, command: command.as_ref() };
        let resolved = resolve(sources, &self.known, reference, wish, self.config.cache.deadline);
        let Resolved { found, offline, remembered, begun: comes } = resolved.await?;
        asked.begun = comes;
        asked.requests = found.requests;
        let (manifest, tree) = (found.manifest.to_string(), found.tree.to_string());
        span.record("manifest", &manifest).record("tree", &tree).record("offline", offline.is_some());
        let record = MountRecord {
            image: Some(image_record(&asked.reference.to_string(), &found)),
            request: Some(request),
            owner_began,
            ..MountRecord::default()
        };
        let number = self.records.number();
        let made = self.make(number, record, &mut asked, &found, "").await;
        if made.is_err() {
            self.records.forget_mount(number);
        }
        made?;
        if let Some(remembered) = remembered {
            let _ = remembered.await;
        }
        let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(MountResponse {
            manifest,
            tree,
            elapsed_us,
            requests: asked.requests,
            offline: offline.unwrap_or_default(),
        })
    }

    /// Mounts an image that was found, and remembers it as `record` under `number`.
    pub(crate) async fn make(
        self: &Arc<Self>,
        number: u64,
        mut record: MountRecord,
        asked: &mut Asked,
        found: &Found,
        restored: &'static str,
    ) -> Result<(), NodeError> {
        record.mounted = false;
        let request = record.request.clone().unwrap_or_default();
        let (starting, kept) = self.starting(asked, found, &request)?;
        // while the tree comes: only what is mounted must be on record
        let saving = self.remember_soon(number, record.clone());
        let source: Arc<dyn Source> = Arc::new(KeptSource(kept));
        // the tree's names begin before it, since the mount waits for them, and its contents come behind it
        let (turns, Around { ahead, coming, before_contents }) = Turns::new();
        let (unpacking, unpacked) = turn();
        let boot = match wants_boot(&request) {
            true => {
                let room = asked.room.take().unwrap_or_else(|| self.boot_rooms.take());
                let begun = asked.begun.as_mut().and_then(Begun::take_boot);
                starting.stream_boot(Arc::clone(&source), begun, room, (ahead, unpacked), before_contents)
            }
            false => ComingBoot::none(),
        };
        let config = self.mount_config(&asked.reference, &request);
        let failed = AtomicBool::new(false);
        // while the last of the names is unpacked; not before all of them have come, so that nothing is there that does not answer while a
        // registry does not
        let attaching = async {
            coming.over().await;
            let _ = saving.await;
            if failed.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let config = config.clone();
            let attaching = blocking(move || Mount::attach(&config)).instrument(debug_span!("attach"));
            attaching.await.map(Some)
        };
        let bringing = async {
            let tree = match request.passthrough {
                // what is open past the node is never asked for again
                true => self.tree(asked, found, turns).await.map(|tree| (tree, Contents::here())),
                false => self.tree_names(asked, found, turns).await,
            };
            failed.store(tree.is_err(), Ordering::Relaxed);
            drop(unpacking);
            tree
        };
        // both to their ends, so that nothing is attached, or on record, after an error was answered
        let (tree, attached) = tokio::join!(bringing, attaching);
        let (tree, Some(attached)) = (tree?, attached?) else { unreachable!("nothing has failed") };
        let (cache, handle) = (Arc::clone(&self.cache), Handle::current());
        let serving = blocking(move || Mount::serve(attached, tree, cache, source, config, handle));
        let mount = Arc::new(serving.instrument(debug_span!("serve")).await?);
        self.hold(number, &mount);
        record = MountRecord { mounted: true, ..with_terms(record, &mount.terms()) };
        self.remember(number, &record);
        let report = request.record.then_some(None);
        let chosen = Arc::clone(&starting.chosen);
        let within = starting.within.clone();
        let mounted = Mounted { mount, number, record, report: None, restored, chosen, within };
        // not before it is held and remembered: a daemon that is killed while its boot waits for the mount leaves that to the next
        let booted = starting.boot(&mounted.mount, boot);
        self.keep(mounted, report, starting, booted);
        Ok(())
    }

    /// What a request asks of whom.
    pub(crate) fn ask(&self, request: &MountRequest) -> Result<Asked, NodeError> {
        let reference: Reference = request.reference.parse()?;
        let sources = self.hosts.sources(&reference, request.plain_http)?;
        Ok(Asked::new(reference, sources))
    }

    pub(crate) fn starting(
        &self,
        asked: &Asked,
        found: &Found,
        request: &MountRequest,
    ) -> Result<(Starting, Arc<KeptBoot>), NodeError> {
        let Asked { sources, reference, .. } = asked;
        sources.are_of(found.manifest);
        let kept = Arc::new(KeptBoot::new(sources.clone(), self.boot_files.clone()));
        let starting = Starting {
            client: sources.registry(),
            repository: reference.repository.clone(),
            manifest: found.manifest,
            tree: found.tree,
            command: command_of(request)?,
            until_unmount: request.record,
            kept: Arc::clone(&kept),
            traces: KeptTraces::new(self.config.cache.directory.join("traces")),
            chosen: Arc::default(),
            within: sources.within.clone(),
        };
        Ok((starting, kept))
    }

    pub(crate) fn mount_config(&self, reference: &Reference, request: &MountRequest) -> MountConfig {
        let mut config = MountConfig::new(PathBuf::from(&request.directory));
        config.name = reference.to_string();
        config.read_ahead_kb = self.config.read_ahead_kb.unwrap_or(config.read_ahead_kb);
        config.record = match (request.record, request.no_trace) {
            (true, _) => Record::Exact,
            (false, false) => Record::Start,
            (false, true) => Record::Off,
        };
        config.passthrough = request.passthrough;
        if request.passthrough {
            // what the kernel reads by itself would be missing from the trace, and then from everybody's boot pack
            config.record = Record::Off;
        }
        config
    }

    /// Remembers a mount beyond this process's end, if the disk lets it. Nobody waits for the disk. What ends with this process
    /// by design is not remembered.
    pub(crate) fn remember(self: &Arc<Self>, number: u64, record: &MountRecord) {
        if !self.held.is_held() {
            return;
        }
        if let Err(error) = self.records.save_mount(number, record) {
            warn!(%error, "a mount is not remembered: it ends if this process is killed");
            return;
        }
        let node = Arc::clone(self);
        spawn_blocking(move || node.records.sync_mount(number));
    }

    /// The same without waiting at all. Ends when it is remembered.
    fn remember_soon(self: &Arc<Self>, number: u64, record: MountRecord) -> JoinHandle<()> {
        let node = Arc::clone(self);
        spawn_blocking(move || node.remember(number, &record))
    }

    /// Takes a directory for one request. *Errors*: another one has it.
    fn reserve(self: &Arc<Self>, directory: &Path) -> Result<Reserved, NodeError> {
        if !self.reserved.lock().insert(directory.to_owned()) {
            return Err(NodeError::Mount(MountError::Occupied(directory.to_owned())));
        }
        Ok(Reserved(Arc::clone(self), directory.to_owned()))
    }

    /// Remembers a mount, and forgets it when it is gone, whoever unmounted it. Where its start is recorded until the unmount,
    /// `report` is what is known of that so far.
    pub(crate) fn keep(
        self: &Arc<Self>,
        mut mounted: Mounted,
        report: Option<Option<Report>>,
        starting: Starting,
        booted: JoinHandle<()>,
    ) {
        // nobody who only unmounts waits for a registry
        let known = report.clone().flatten();
        let (started, watched) = watch::channel(known.clone());
        let (mount, number) = (Arc::clone(&mounted.mount), mounted.number);
        let request = mounted.record.request.clone().unwrap_or_default();
        if !request.no_trace {
            self.untold.begin(number, &mount, &watched);
        }
        mounted.report = report.is_some().then_some(watched);
        let path = mount.mountpoint().to_owned();
        let owner = owner::ended(request.owner, mounted.record.owner_began);
        if !mounted.record.detached {
            self.mounts.lock().insert(path.clone(), mounted);
        }
        self.fill_mount(&mount, &request, starting.manifest);
        let busy = self.busy();
        let node = Arc::clone(self);
        tokio::spawn(async move {
            let life = async {
                let report = starting.see(Arc::clone(&mount), booted).await;
                started.send_replace(Some(known.unwrap_or(report)));
                node.untold.end(number);
                if timeout(AT_REST, mount.wait()).await.is_err() {
                    node.trees.let_go();
                    mount.wait().await;
                }
            };
            let mut life = pin!(life);
            tokio::select! {
                () = &mut life => {}
                () = owner => {
                    // an error means that somebody was faster; what has taken its place there since is not its owner's
                    let _ = node.unmount_where(&path, true, |there| Arc::ptr_eq(there, &mount)).await;
                    life.await;
                }
            }
            node.forget(&path, &mount);
            node.let_go(number);
            if !node.ending.load(Ordering::Relaxed) {
                node.records.forget_mount(number);
            }
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

    /// Unmounts a directory. If a start was recorded on it until now, this returns when the registry was told.
    pub async fn unmount(
        self: &Arc<Self>,
        directory: &Path,
        lazy: bool,
    ) -> Result<UnmountResponse, NodeError> {
        self.unmount_where(directory, lazy, |_| true).await
    }

    /// The same, if it is the mount that is meant: the same directory may have been mounted again meanwhile.
    async fn unmount_where(
        self: &Arc<Self>,
        directory: &Path,
        lazy: bool,
        is_meant: impl FnOnce(&Arc<Mount>) -> bool,
    ) -> Result<UnmountResponse, NodeError> {
        let mounted = self.mounts.lock().get(directory).filter(|it| is_meant(&it.mount)).map(|it| {
            (Arc::clone(&it.mount), it.report.clone(), it.number, it.record.clone(), it.within.clone())
        });
        let (mount, report, number, record, within) =
            mounted.ok_or_else(|| NodeError::NotMounted(directory.to_owned()))?;
        let waiting = Arc::clone(&mount);
        blocking(move || mount.unmount(lazy)).await?;
        // this may be the end of the daemon: what was done is to be told before
        within.end();
        let held = lazy || timeout(COPIES, waiting.wait()).await.is_err();
        // a daemon that ends now, and has yet to tell of the start, must not leave it to the next one
        if !self.ending.load(Ordering::Relaxed) {
            match held {
                true => self.remember(number, &MountRecord { detached: true, ..record }),
                false => self.records.forget_mount(number),
            }
        }
        self.forget(directory, &waiting);
        let Some(mut report) = report.filter(|_| !held) else {
            return Ok(UnmountResponse { held, ..UnmountResponse::default() });
        };
        let report =
            report.wait_for(Option::is_some).await.ok().and_then(|report| report.clone()).unwrap_or_default();
        let trace_refused = report.refused.unwrap_or_default();
        let (trace_names, trace_pages, trace_kept) = (report.names, report.pages, report.kept);
        Ok(UnmountResponse { trace_names, trace_pages, trace_refused, trace_kept, held })
    }

    /// Unmounts everything, lazily where something is in use. Used at the end. A daemon that stays remembers what it had.
    pub async fn unmount_all(self: &Arc<Self>) {
        self.ending.store(self.config.permanent, Ordering::Relaxed);
        let mounts: Vec<PathBuf> = self.mounts.lock().keys().cloned().collect();
        for directory in mounts {
            if let Err(error) = self.unmount(&directory, false).await {
                tracing::warn!(directory = %directory.display(), %error, "in use at the end, unmounted lazily");
                let _ = self.unmount(&directory, true).await;
            }
        }
        self.untold.told().await;
    }
}

/// Runs what blocks where blocking is allowed.
pub(crate) async fn blocking<T, E, F>(work: F) -> Result<T, NodeError>
where
    T: Send + 'static,
    E: Into<NodeError> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    spawn_blocking(work).await.expect("the work does not panic").map_err(Into::into)
}
