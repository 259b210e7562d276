//! Readahead of one mount: follows reads in files and in packs, and asks the cache for what comes next.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use lamina_cache::{Cache, Class, Source, Want};
use lamina_image::{Ino, Tree};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::contents::Contents;
use crate::metrics::{Counters, add, one};
use crate::order::{Order, Touch, want};
use crate::small::SmallFiles;
use crate::streams::Streams;
use crate::walks::Walks;
use crate::window::Window;
use crate::{MountConfig, Ramp};

/// Files followed at once, some 300 bytes each.
const FILES_MAX: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Who reads a file, in streams and in strides.
#[derive(Default)]
struct File {
    streams: Streams,
    walks: Walks,
}

/// All frames laid end to end in some order, and who reads along it.
struct Space {
    order: Arc<OnceLock<Order>>,
    sought: AtomicBool,
    streams: Mutex<Streams>,
    ramp: Ramp,
}

impl Space {
    fn new(ramp: Ramp) -> Self {
        let (order, sought, streams) = (Arc::default(), AtomicBool::new(false), Mutex::default());
        Self { order, sought, streams, ramp }
    }

    /// Lays the frames in the background, unless that was asked for before. Until it is done nothing is read ahead here.
    fn seek(&self, handle: &Handle, (tree, contents): (&Arc<Tree>, &Contents), lay: fn(&Tree) -> Order) {
        if !self.sought.swap(true, Ordering::Relaxed) {
            // whoever brings the contents stops where nobody has the tree any more
            let (laid, tree, contents) = (self.order.clone(), Arc::downgrade(tree), contents.clone());
            handle.spawn(async move {
                contents.come().await;
                let Some(tree) = tree.upgrade().filter(|tree| tree.has_contents()) else { return };
                let _ = tokio::task::spawn_blocking(move || laid.set(lay(&tree))).await;
            });
        }
    }

    /// Takes note of parts that were read: how long the longest stream is that goes on with one, and what to fetch.
    fn note(&self, touched: &[Touch]) -> (u64, Vec<u32>) {
        let Some(order) = self.order.get() else { return (0, Vec::new()) };
        let (mut run, mut fetch, mut streams) = (0, Vec::new(), self.streams.lock());
        for part in touched.iter().filter_map(|touch| order.part(*touch)) {
            let advice = streams.note(part, order.end(), self.ramp);
            fetch.extend(advice.fetch.into_iter().flat_map(|range| order.within(range)));
            run = run.max(advice.run);
        }
        (run, fetch)
    }
}

/// The readahead of one mount.
pub(crate) struct Ahead {
    pub(crate) tree: Arc<Tree>,
    pub(crate) contents: Contents,
    pub(crate) cache: Arc<Cache>,
    pub(crate) source: Arc<dyn Source>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) config: MountConfig,
    handle: Handle,
    files: Mutex<LruCache<Ino, File>>,
    packs: Space,
    /// Sought once somebody reads densely.
    paths: Space,
    window: OnceLock<Window>,
    /// Looked for when they are first asked for.
    small: Arc<OnceLock<SmallFiles>>,
    small_sought: AtomicBool,
    /// Whether what will be needed comes by itself, so that guessing only delays it.
    lean: AtomicBool,
    /// Somebody reads more in one stream than programs do when they start.
    overtakes: Notify,
    /// Whether nobody reads any more.
    over: AtomicBool,
}

impl Ahead {
    /// Starts to sort the frames in the background.
    pub(crate) fn new(
        (tree, contents): (Arc<Tree>, Contents),
        cache: Arc<Cache>,
        source: Arc<dyn Source>,
        config: MountConfig,
        handle: Handle,
    ) -> Self {
        let (packs, paths) = (Space::new(config.pack_ramp), Space::new(config.path_ramp));
        packs.seek(&handle, (&tree, &contents), Order::of_packs);
        let (counters, window, files) = (Arc::default(), OnceLock::new(), LruCache::new(FILES_MAX));
        Self {
            tree,
            contents,
            cache,
            source,
            counters,
            config,
            handle,
            files: Mutex::new(files),
            packs,
            paths,
            window,
            small: Arc::default(),
            small_sought: AtomicBool::new(false),
            lean: AtomicBool::new(false),
            overtakes: Notify::new(),
            over: AtomicBool::new(false),
        }
    }

    /// The small files; none yet when it is asked for the first time.
    pub(crate) fn small_files(&self) -> Option<&SmallFiles> {
        if !self.small_sought.swap(true, Ordering::Relaxed) {
            let (found, tree) = (self.small.clone(), self.tree.clone());
            self.handle.spawn_blocking(move || found.set(SmallFiles::of(&tree)));
        }
        self.small.get()
    }

    /// Does something in the background.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(work);
    }

    /// Says how the kernel's own readahead is set, once it is known.
    pub(crate) fn set_window(&self, window: Window) {
        let _ = self.window.set(window);
    }

    /// Whether to read nothing ahead from now on.
    pub(crate) fn set_lean(&self, lean: bool) {
        self.lean.store(lean, Ordering::Relaxed);
    }

    /// Returns once somebody has read more in one stream than programs do when they start; at once where that was before. For one who
    /// waits, once.
    pub(crate) async fn overtakes(&self) {
        self.overtakes.notified().await;
    }

    /// Reads nothing ahead any more: the mount has ended.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Whether nothing is to be read ahead.
    pub(crate) fn is_lean(&self) -> bool {
        self.lean.load(Ordering::Relaxed) || self.over.load(Ordering::Relaxed)
    }

    /// The kernel's readahead while reading is sparse, from now on.
    pub(crate) fn settle_window(&self, kb: u32) {
        if let Some(window) = self.window.get() {
            window.settle(kb);
        }
    }

    /// The frames that follow `last` in its pack, to be fetched along with `wants`, as far as the whole request stays
    /// short. None for a read at `start` that is a step of a walk through `ino`: there they were fetched already, or are
    /// passed over.
    pub(crate) fn neighbours(&self, ino: Ino, start: u64, wants: &[Want], last: u32) -> Vec<Want> {
        if self.is_lean() || self.files.lock().peek(&ino).is_some_and(|file| file.walks.is_walking(start)) {
            return Vec::new();
        }
        let asked: u64 = wants.iter().map(|want| u64::from(want.place.frame.sealed_len)).sum();
        let left = self.config.neighbour_bytes.saturating_sub(asked);
        let span = self.packs.order.get().and_then(|order| Some((order, order.span(last)?)));
        let (Some((order, span)), Some(end)) = (span, wants.last()) else { return Vec::new() };
        let mut near = Vec::new();
        for number in order.within(span.end..span.end.saturating_add(left)) {
            let Some(next) = want(&self.tree, *number) else { break };
            // one that sticks out of the bound, or lies in another pack, would cost a request of its own
            let inside = order.span(*number).is_some_and(|next| next.end <= span.end + left);
            if next.place.pack != end.place.pack || !inside {
                break;
            }
            near.push(next);
        }
        near
    }

    /// Takes note of a read of `range` in `ino`, which touched parts of frames, and fetches ahead. How many bytes the longest
    /// stream has read that it belongs to.
    pub(crate) fn note(&self, ino: Ino, range: Range<u64>, touched: &[Touch]) -> u64 {
        let Ok(inode) = self.tree.inode(ino) else { return 0 };
        let (advice, strides) = {
            let mut files = self.files.lock();
            let file = files.get_or_insert_mut(ino, File::default);
            let strides = file.walks.note(range.start);
            (file.streams.note(range, inode.size, self.config.file_ramp), strides)
        };
        // a stream has readahead of its own
        let strides = strides.filter(|_| !self.is_lean() && advice.run < self.config.file_ramp.run_min);
        for range in advice.fetch.into_iter().chain(strides) {
            let extents = self.tree.extents(ino, range.start, range.end).into_iter().flatten();
            self.fetch(extents.filter_map(|extent| extent.ok()?.frame).collect());
        }
        let mut run = advice.run;
        for space in [&self.packs, &self.paths] {
            let (here, fetch) = space.note(touched);
            self.fetch(fetch);
            run = run.max(here);
        }
        if run >= self.config.dense_run_bytes {
            self.paths.seek(&self.handle, (&self.tree, &self.contents), Order::of_paths);
        }
        if run >= self.config.path_ramp.run_min {
            self.overtakes.notify_one();
        }
        if let Some(window) = self.window.get() {
            window.note(run);
        }
        run
    }

    /// Asks for frames that nobody waits for, away from the thread that answers the kernel.
    pub(crate) fn fetch(&self, numbers: Vec<u32>) {
        if numbers.is_empty() {
            return;
        }
        one(&self.counters.aheads);
        add(&self.counters.ahead_frames, numbers.len() as u64);
        let (tree, cache, source) = (self.tree.clone(), self.cache.clone(), self.source.clone());
        self.handle.spawn(async move {
            let mut wants: Vec<Want> = numbers.iter().filter_map(|number| want(&tree, *number)).collect();
            wants.dedup();
            cache.prefetch(&source, &wants, Class::Background);
        });
    }
}
