//! A mount's life: from an empty directory to one again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, InitFlags, Notifier, Session, SessionACL};
use lamina_cache::{Cache, Source};
use lamina_image::{Ino, Trace, Tree};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{error, info};

use crate::ahead::Ahead;
use crate::bits::Bits;
use crate::boot::{Boot, BootFailure, BootStream, BootUse, Booting};
use crate::config::{EXACT_KB, Record};
use crate::contents::Contents;
use crate::fs::Files;
use crate::fuse::{Agreed, Fuse};
use crate::loading::Loading;
use crate::metrics::us_since;
use crate::mountpoint::{self, Device, MountPoint};
use crate::opens::Opens;
use crate::pages::{self, Pages, Run};
use crate::passthrough::{self, Passthrough};
use crate::resume::{self, Terms};
use crate::trace::Recorder;
use crate::window::Window;
use crate::{MountConfig, MountError, MountSnapshot};

/// An image, mounted. Dropping it unmounts it, lazily if it is in use: then programs that have files open keep them,
/// and its threads end with the last of these.
pub struct Mount {
    point: MountPoint,
    device: Device,
    agreed: Agreed,
    connection: Mutex<Option<OwnedFd>>,
    table: Mutex<Option<OwnedFd>>,
    passthrough: Option<Arc<Passthrough>>,
    ahead: Arc<Ahead>,
    boot: Arc<Boot>,
    booting: Notifier,
    recorder: Arc<Recorder>,
    touched: Arc<Bits>,
    config: MountConfig,
    ended: watch::Receiver<bool>,
    threads: Mutex<Option<JoinHandle<()>>>,
}

/// What another process goes on with.
#[derive(Debug)]
pub struct Kept {
    /// From [`Mount::take_connection`].
    pub connection: OwnedFd,
    /// From [`Mount::take_opens`].
    pub opens: Option<OwnedFd>,
    /// From [`Mount::terms`].
    pub terms: Terms,
}

impl Mount {
    /// Mounts `tree`: as [`attach`](Self::attach), and then [`serve`](Self::serve).
    pub fn start(
        tree: (Arc<Tree>, Contents),
        cache: Arc<Cache>,
        source: Arc<dyn Source>,
        config: MountConfig,
        handle: Handle,
    ) -> Result<Self, MountError> {
        let attached = Self::attach(&config)?;
        Self::serve(attached, tree, cache, source, config, handle)
    }

    /// Mounts something that nobody serves yet, so that whoever looks at it waits: what the kernel does for that takes a millisecond or
    /// two, in which a tree may come.
    ///
    /// Blocks for these. *Errors* leave nothing mounted.
    pub fn attach(config: &MountConfig) -> Result<Attached, MountError> {
        let point = MountPoint::check(&config.mountpoint)?;
        let connection = point.mount(&config.name)?;
        Ok(Attached { point: Some(point), connection: Some(connection) })
    }

    /// Serves `tree` where something was attached with this `config`. When it returns, the mount answers. Waiting reads run on `handle`.
    /// Of a tree of which only the names are here `contents` says when the rest is: reads wait for that.
    ///
    /// Blocks for a millisecond, never for the network. *Errors* leave nothing mounted.
    pub fn serve(
        mut attached: Attached,
        (tree, contents): (Arc<Tree>, Contents),
        cache: Arc<Cache>,
        source: Arc<dyn Source>,
        config: MountConfig,
        handle: Handle,
    ) -> Result<Self, MountError> {
        let connection = attached.connection.take().expect("taken once");
        let passthrough = config.passthrough.then(|| Passthrough::new(&tree, &cache));
        let (parts, fuse) = Parts::new((tree, contents), cache, source, config, handle, passthrough);
        let session = Session::from_fd(fuse, connection, SessionACL::All, parts.loops())
            .map_err(|cause| parts.failed(cause))?;
        parts.connect_passthrough(&session);
        let serving = parts.serve(session)?;
        let point = attached.point.take().expect("taken once");
        let device = point.device().inspect_err(|_| point.detach())?;
        Ok(serving.mount(point, device))
    }

    /// Goes on with a mount that another process served, which must have ended: `kept` is from that one, and the tree and the
    /// mount point are the same. When it returns, all readers that waited
    /// are being answered.
    ///
    /// Mounts nothing. It may have been unmounted meanwhile: then [`Mount::is_attached`] says so, and [`Mount::wait`] returns
    /// once no program has a file of it open any more.
    pub fn resume(
        tree: Arc<Tree>,
        cache: Arc<Cache>,
        source: Arc<dyn Source>,
        config: MountConfig,
        handle: Handle,
        Kept { connection, opens, terms }: Kept,
    ) -> Result<Self, MountError> {
        let point = MountPoint::taken(config.mountpoint.clone());
        let device = Device { major: terms.major_dev, minor: terms.minor_dev };
        let passthrough = config.passthrough.then(|| Passthrough::resumed(&tree, &cache, opens, &terms));
        let (parts, fuse) = Parts::new((tree, Contents::here()), cache, source, config, handle, passthrough);
        let session = resume::session(fuse, connection.as_fd(), &terms, parts.loops())
            .map_err(|cause| parts.failed(cause))?;
        parts.connect_passthrough(&session);
        if let Some(passthrough) = &parts.passthrough {
            parts.note_passthrough(passthrough.begin());
        }
        // before anything is read: what this process has read would be sent again as well, and its releases count twice
        if let Err(error) = resume::send_again(&connection) {
            error!(mountpoint = %point.path().display(), %error, "a mount is taken over, but not what was under way");
        }
        Ok(parts.serve(session)?.mount(point, device))
    }

    /// Takes away what is left at `path` of a mount with these terms, or of one that was attached and never served, that nobody can take
    /// over any more. Whether there was such a thing; what answers stays. Blocks where nobody answers, and the connection is open.
    pub fn clear(path: &Path, terms: Option<&Terms>) -> Result<bool, MountError> {
        mountpoint::clear(path, terms.map(|terms| Device { major: terms.major_dev, minor: terms.minor_dev }))
    }

    /// Its connection to the kernel, for whoever is to keep it open beyond this process, once. With [`Mount::terms`] another
    /// process goes on from there.
    pub fn take_connection(&self) -> Option<OwnedFd> {
        self.connection.lock().take()
    }

    /// What is open of it and how, for whoever is to keep it beyond this process, once. Of a passthrough mount only. The connection
    /// must not outlive it: so it is kept first.
    pub fn take_opens(&self) -> Option<OwnedFd> {
        self.table.lock().take()
    }

    /// From now on big files are opened past this process, where it is a passthrough mount. What [`Mount::take_opens`] gives must be
    /// kept by then, where the connection is. A mount that was resumed has begun already.
    pub fn begin_passthrough(&self) {
        if let Some(passthrough) = &self.passthrough {
            passthrough::note(&self.config, &self.ahead.counters, passthrough.begin());
        }
    }

    /// If big files are opened past this process: makes whole files of those that are on disk, as far as there is room. Ends early
    /// where nobody waits for it any more.
    pub async fn make_whole(&self) {
        if let Some(passthrough) = self.passthrough.as_ref().filter(|passthrough| passthrough.has_begun()) {
            passthrough.wholes.make_all().await;
        }
    }

    /// What was agreed with the kernel.
    pub fn terms(&self) -> Terms {
        let Device { major, minor } = self.device;
        let agreed = self.agreed;
        let capabilities = agreed.capabilities.bits();
        Terms { minor: agreed.minor, capabilities, major_dev: major, minor_dev: minor }
    }

    /// Whether it is still what is mounted there.
    pub fn is_attached(&self) -> bool {
        self.point.shows(self.device)
    }

    /// Where it is mounted, as an absolute path.
    pub fn mountpoint(&self) -> &Path {
        self.point.path()
    }

    /// The counters now.
    pub fn snapshot(&self) -> MountSnapshot {
        self.ahead.counters.snapshot()
    }

    /// Takes a boot pack into the kernel's page cache as it comes. Returns when all of its names and pages are there, or with why
    /// it was given up; reads are answered all the while, whatever comes. Its directories may be listed until the unmount. At
    /// most once for a mount.
    pub async fn boot(&self, stream: BootStream) -> Result<(), BootFailure> {
        // one page, which the boot pack has or has not: of two it may have one, and then neither is answered from it
        self.ahead.settle_window(EXACT_KB);
        self.ahead.set_lean(true);
        let begun = Instant::now();
        let Ahead { tree, counters, .. } = &*self.ahead;
        let (notifier, mountpoint) = (self.booting.clone(), self.point.path());
        let booting =
            Booting { tree, counters, notifier, mountpoint, boot: &self.boot, touched: &self.touched };
        let mut ended = self.ended.clone();
        let done = tokio::select! {
            done = booting.run(stream) => done,
            () = self.ahead.overtakes() => Err(BootFailure::Overtaken),
            _ = ended.wait_for(|ended| *ended) => Err(BootFailure::Refused),
        };
        if matches!(done, Err(BootFailure::Overtaken)) {
            let boot = Arc::clone(&self.boot);
            let _ = tokio::task::spawn_blocking(move || drop(boot.end_listing())).await;
        }
        counters.boot_us.store(us_since(begun), Ordering::Relaxed);
        // what is missing from now on is not in it: a boot pack of other starts must not make this one slow
        self.ahead.set_lean(false);
        let recorded = if self.recorder.is_recording() { self.config.record } else { Record::Off };
        self.ahead.settle_window(self.config.sparse_kb(recorded));
        let failed = !matches!(done, Ok(()) | Err(BootFailure::Overtaken));
        counters.boot_failed.store(failed.into(), Ordering::Relaxed);
        done
    }

    /// What became of the pages that the boot pack has stored, as far as that is seen now: `None` where there are none, or not all have
    /// come, or not to this process. Blocks for some 2 µs a page. *Errors*: it cannot be seen, as where this process has not
    /// CAP_SYS_ADMIN, or of a passthrough mount.
    pub fn boot_use(&self) -> io::Result<Option<BootUse>> {
        if self.passthrough.is_some() {
            // an open would give it the whole file instead, and drop what was stored
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel reads files of this mount by itself",
            ));
        }
        self.boot.used(self.point.path(), self.device, &self.booting)
    }

    /// The frames of all files that were read so far, or of which the boot pack brought something, each once, in no order.
    pub fn touched_frames(&self) -> Vec<u32> {
        let tree = &self.ahead.tree;
        let extents = self.touched.all().into_iter().filter_map(|ino| {
            let extents = tree.extents(Ino(ino.into()), 0, u64::MAX).ok()?;
            Some(extents.filter_map(|extent| extent.ok()?.frame))
        });
        let mut frames: Vec<u32> = extents.flatten().collect();
        frames.sort_unstable();
        frames.dedup();
        frames
    }

    /// Returns once the tree has its contents; where they are `needed`, nothing goes before them any more.
    pub async fn contents(&self, needed: bool) {
        match needed {
            true => self.ahead.contents.need().await,
            false => self.ahead.contents.come().await,
        }
    }

    /// The image's files.
    pub fn tree(&self) -> &Arc<Tree> {
        &self.ahead.tree
    }

    /// For how long the start has read nothing new; `None` before it has begun.
    pub fn quiet(&self) -> Option<Duration> {
        self.recorder.quiet(Instant::now())
    }

    /// Ends the recording of the start, and with it whatever is done for starts only. What was recorded, the first time.
    pub fn end_start(&self) -> Option<Trace> {
        self.ahead.settle_window(self.config.read_ahead_kb);
        self.ahead.set_lean(false);
        let booted = self.ahead.counters.boot_bytes.load(Ordering::Relaxed) > 0;
        self.recorder.take().map(|trace| Trace { boot: booted, ..trace })
    }

    /// Unmounts it. *Errors*: [`MountError::InUse`] unless `lazy`; a lazy one takes the mount away at once and leaves
    /// open files to who has them. [`MountError::Gone`] if somebody else unmounted it.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        let _nothing_is_open = self.boot.end_listing();
        self.point.unmount(self.device, lazy)
    }

    /// Returns once it is unmounted, by whomever, and no program has a file of it open any more.
    pub async fn wait(&self) {
        let mut ended = self.ended.clone();
        // an error means that the threads are gone as well
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = *self.ended.borrow() || self.unmount(false).is_ok();
        if !unmounted {
            let _ = self.unmount(true);
            return;
        }
        // the kernel has closed the connection, so the threads are on their way out
        if let Some(threads) = self.threads.lock().take() {
            let _ = threads.join();
        }
    }
}

/// What serves a mount, before there is a session.
struct Parts {
    ahead: Arc<Ahead>,
    boot: Arc<Boot>,
    recorder: Arc<Recorder>,
    touched: Arc<Bits>,
    runs: Receiver<Vec<Run>>,
    agreed: Arc<OnceLock<Agreed>>,
    passthrough: Option<Arc<Passthrough>>,
    config: MountConfig,
}

impl Parts {
    fn new(
        tree: (Arc<Tree>, Contents),
        cache: Arc<Cache>,
        source: Arc<dyn Source>,
        config: MountConfig,
        handle: Handle,
        passthrough: Option<io::Result<Passthrough>>,
    ) -> (Self, Fuse) {
        let ahead = Arc::new(Ahead::new(tree, cache, source, config.clone(), handle.clone()));
        let passthrough =
            passthrough.and_then(|found| passthrough::note(&config, &ahead.counters, found)).map(Arc::new);
        let (pages, runs) = Pages::new(ahead.tree.frames());
        let recorder = Arc::new(Recorder::new(config.record, ahead.tree.inodes()));
        let boot = Arc::new(Boot::default());
        let pages = Arc::new(pages);
        let touched = Arc::new(Bits::new(ahead.tree.inodes().saturating_add(1)));
        let (seen, booted, read) = (recorder.clone(), boot.clone(), touched.clone());
        let loading = Arc::new(Loading::new(ahead.clone(), boot.clone(), recorder.clone()));
        let files =
            Files { ahead: ahead.clone(), pages, boot: booted, recorder: seen, touched: read, loading };
        let agreed = Arc::new(OnceLock::new());
        let fuse = Fuse { files, handle, agreed: agreed.clone(), passthrough: passthrough.clone() };
        (Self { ahead, boot, recorder, touched, runs, agreed, passthrough, config }, fuse)
    }

    /// Finds out the rest of what passthrough takes. Where that is missing, the mount is as any other.
    fn connect_passthrough(&self, session: &Session<Fuse>) {
        if let Some(passthrough) = &self.passthrough {
            let agreed = self.agreed.get().map_or(InitFlags::empty(), |agreed| agreed.capabilities);
            self.note_passthrough(passthrough.connect(session.as_fd().try_clone_to_owned(), agreed));
        }
    }

    fn note_passthrough(&self, found: io::Result<()>) {
        passthrough::note(&self.config, &self.ahead.counters, found);
    }

    fn loops(&self) -> Config {
        let mut loops = Config::default();
        loops.n_threads = Some(self.config.threads.max(1));
        loops
    }

    fn failed(&self, cause: io::Error) -> MountError {
        failed(&self.config, cause)
    }

    /// Starts the threads.
    fn serve(self, session: Session<Fuse>) -> Result<Serving, MountError> {
        let booting = session.notifier();
        let connection = session.as_fd().try_clone_to_owned().map_err(|cause| self.failed(cause))?;
        let opens = self.passthrough.as_ref().and_then(|it| it.opens());
        let table = opens.map(Opens::table).transpose().map_err(|cause| self.failed(cause))?;
        let failed = |cause| failed(&self.config, cause);
        let (notifier, counters, runs) = (booting.clone(), self.ahead.counters.clone(), self.runs);
        // ends with the last of the file system that could send it something
        std::thread::Builder::new()
            .name("lamina-pages".to_owned())
            .spawn(move || pages::store(&runs, &notifier, &counters))
            .map_err(failed)?;
        let (ending, ended) = watch::channel(false);
        let read_ahead = self.ahead.clone();
        let threads = std::thread::Builder::new()
            .name("lamina-mount".to_owned())
            .spawn(move || {
                if let Err(error) = session.run() {
                    error!(%error, "serving a mount ended with an error");
                }
                read_ahead.end();
                ending.send_replace(true);
            })
            .map_err(failed)?;
        let agreed = *self.agreed.get().expect("a session begins with the first request");
        let Self { ahead, boot, recorder, touched, passthrough, config, .. } = self;
        let kept = (connection, table);
        Ok(Serving {
            ahead,
            boot,
            recorder,
            touched,
            passthrough,
            config,
            booting,
            agreed,
            kept,
            ended,
            threads,
        })
    }
}

fn failed(config: &MountConfig, cause: io::Error) -> MountError {
    MountError::System { action: "serve", path: config.mountpoint.clone(), cause }
}

/// What serves a mount.
struct Serving {
    ahead: Arc<Ahead>,
    boot: Arc<Boot>,
    recorder: Arc<Recorder>,
    touched: Arc<Bits>,
    passthrough: Option<Arc<Passthrough>>,
    config: MountConfig,
    booting: Notifier,
    agreed: Agreed,
    /// The connection, and the table of what is open.
    kept: (OwnedFd, Option<OwnedFd>),
    ended: watch::Receiver<bool>,
    threads: JoinHandle<()>,
}

impl Serving {
    fn mount(self, point: MountPoint, device: Device) -> Mount {
        let config = self.config;
        let sparse = config.sparse_kb(config.record);
        let dense = config.read_ahead_dense_kb;
        let window = Window::new(device.read_ahead_path(), sparse, dense, config.dense_run_bytes);
        self.ahead.set_window(window);
        info!(mountpoint = %point.path().display(), "mounted");
        Mount {
            point,
            device,
            agreed: self.agreed,
            connection: Mutex::new(Some(self.kept.0)),
            table: Mutex::new(self.kept.1),
            passthrough: self.passthrough,
            ahead: self.ahead,
            boot: self.boot,
            booting: self.booting,
            recorder: self.recorder,
            touched: self.touched,
            config,
            ended: self.ended,
            threads: Mutex::new(Some(self.threads)),
        }
    }
}

/// A mount that nobody serves yet. Dropping it takes it away.
#[derive(Debug)]
pub struct Attached {
    point: Option<MountPoint>,
    connection: Option<OwnedFd>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(point) = &self.point {
            point.detach();
        }
    }
}
