//! The big files of a passthrough mount as whole files of the cache: found for an open, and made by a thread of low priority.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Weak};

use lamina_cache::{Cache, Made, Part, WholeId};
use lamina_image::{Extent, FileKind, Ino, Tree, TreeError};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tracing::debug;

/// Smaller files are better off in the page cache: an open with a backing file takes 12 to 18 µs, one without 8.
pub(crate) const BIG_BYTES: u64 = 1 << 20;
/// Files that wait to be made. What does not fit is asked for again by its next open.
const QUEUE_FILES: usize = 256;
/// The thread gets a tenth of what a program gets of a processor that both want (`sched_prio_to_weight` of the kernel), and not less,
/// since `--eager` waits for it.
const NICE: i32 = 10;

/// The big files of one mount.
pub(crate) struct Wholes {
    tree: Arc<Tree>,
    cache: Arc<Cache>,
    big_bytes: u64,
    /// What each big file is called in the cache, once the thread has found that out; none where its part of the tree is damaged.
    ids: Mutex<HashMap<Ino, Option<WholeId>>>,
    queue: SyncSender<Wish>,
    queued: Mutex<HashSet<Ino>>,
    /// What is wished for of all files. The thread looks at it after whatever comes out of the queue.
    all: Mutex<All>,
}

/// What the thread is to do.
#[derive(Clone, Copy, Debug)]
enum Wish {
    /// Make this one.
    One(Ino),
    /// Look at what is wished for of all.
    All,
}

#[derive(Default)]
struct All {
    /// Check those that are there.
    check: bool,
    /// Make all for which there is room, as long as any of these waits, and tell them.
    make: Vec<oneshot::Sender<()>>,
}

impl Wholes {
    /// Starts the thread, for files of `big_bytes` and more. It ends with the last of what this gives.
    pub(crate) fn start(tree: Arc<Tree>, cache: Arc<Cache>, big_bytes: u64) -> std::io::Result<Arc<Self>> {
        let (queue, wishes) = sync_channel(QUEUE_FILES);
        let (ids, queued, all) = (Mutex::default(), Mutex::default(), Mutex::default());
        let this = Arc::new(Self { tree, cache, big_bytes, ids, queue, queued, all });
        let weak = Arc::downgrade(&this);
        std::thread::Builder::new().name("lamina-whole".to_owned()).spawn(move || {
            // the number 0 means the thread that asks; it goes on as it is where that is refused
            let _ = rustix::process::setpriority_process(None, NICE);
            name_all(&weak);
            while let Ok(wish) = wishes.recv()
                && make(&weak, wish).is_some()
            {}
        })?;
        Ok(this)
    }

    /// Whether the file is one of these.
    pub(crate) fn is_big(&self, ino: Ino) -> bool {
        let inode = self.tree.inode(ino);
        inode.is_ok_and(|inode| inode.kind() == FileKind::Regular && inode.size >= self.big_bytes)
    }

    /// The whole file, if it is there, was checked, and the thread has come across it. Waits for no bytes.
    pub(crate) fn find(&self, ino: Ino) -> Option<File> {
        let known = self.ids.lock().get(&ino).copied();
        self.cache.whole(known??)
    }

    /// Has it made, if its frames are here by then. Returns at once.
    pub(crate) fn ask(&self, ino: Ino) {
        if self.queued.lock().insert(ino) && self.queue.try_send(Wish::One(ino)).is_err() {
            self.queued.lock().remove(&ino);
        }
    }

    /// Has all of them made whose frames are here, as long as there is room; returns once they are. When nobody waits for this any
    /// more no further one is made.
    pub(crate) async fn make_all(&self) {
        let (done, made) = oneshot::channel();
        {
            let mut all = self.all.lock();
            all.make.retain(|waiting| !waiting.is_closed());
            all.make.push(done);
        }
        self.look_at_all();
        // an error means that the thread has ended, or is about to
        let _ = made.await;
    }

    /// Has those checked that are there already. Returns at once.
    pub(crate) fn check(&self) {
        self.all.lock().check = true;
        self.look_at_all();
    }

    fn look_at_all(&self) {
        // where the queue is full the thread will look without; where there is no thread any more nobody shall wait for it
        if let Err(TrySendError::Disconnected(_)) = self.queue.try_send(Wish::All) {
            self.all.lock().make.clear();
        }
    }

    /// What the file is called. The first time costs about 1 ms for each GiB of it.
    fn id(&self, ino: Ino) -> Option<WholeId> {
        if let Some(known) = self.ids.lock().get(&ino) {
            return *known;
        }
        let id = self.hash(ino);
        *self.ids.lock().entry(ino).or_insert(id.inspect_err(|error| debug!(?ino, %error, "not whole")).ok())
    }

    fn hash(&self, ino: Ino) -> Result<WholeId, TreeError> {
        for extent in self.extents(ino)? {
            self.part(extent?)?;
        }
        Ok(WholeId::of(self.parts(ino)))
    }

    fn extents(&self, ino: Ino) -> Result<impl Iterator<Item = Result<Extent, TreeError>>, TreeError> {
        self.tree.extents(ino, 0, u64::MAX)
    }

    fn part(&self, extent: Extent) -> Result<Part, TreeError> {
        let frame = extent.frame.map(|number| self.tree.frame(number)).transpose()?;
        Ok(Part { frame: frame.map(|(id, _)| id), skip: extent.skip, len: extent.len })
    }

    /// The parts of a file that was seen to be sound.
    fn parts(&self, ino: Ino) -> impl Iterator<Item = Part> {
        let extents = self.extents(ino).into_iter().flatten();
        extents.map_while(|extent| self.part(extent.ok()?).ok())
    }
}

/// Finds out what each big file is called, before anything is made: what comes to be opened meanwhile is not found.
fn name_all(wholes: &Weak<Wholes>) {
    let inodes = wholes.upgrade().map_or(0, |this| this.tree.inodes());
    for ino in (0..inodes).map(Ino::from_index) {
        let Some(this) = wholes.upgrade() else { return };
        if this.is_big(ino) {
            this.id(ino);
        }
    }
}

/// Does what is wished for; none where nobody can wish any more.
fn make(wholes: &Weak<Wholes>, wish: Wish) -> Option<()> {
    if let Wish::One(ino) = wish {
        wholes.upgrade()?.queued.lock().remove(&ino);
        make_one(wholes, ino, |_| true, || true);
    }
    let this = wholes.upgrade()?;
    let (All { check, make }, inodes) = (std::mem::take(&mut *this.all.lock()), this.tree.inodes());
    drop(this);
    let is_waited_for = || make.iter().any(|waiting| !waiting.is_closed());
    for ino in (0..inodes).map(Ino::from_index) {
        if !check && !is_waited_for() {
            break;
        }
        make_one(wholes, ino, |is_here| check && is_here || is_waited_for(), || check || is_waited_for());
    }
    for waiting in make {
        // an error means that this one does not wait
        let _ = waiting.send(());
    }
    Some(())
}

/// Makes or checks one that is `wanted`, which is asked whether it is there, for as long as it `is_wanted`.
fn make_one(wholes: &Weak<Wholes>, ino: Ino, wanted: impl Fn(bool) -> bool, is_wanted: impl Fn() -> bool) {
    let Some(this) = wholes.upgrade().filter(|this| this.is_big(ino)) else { return };
    let (Some(id), Ok(inode)) = (this.id(ino), this.tree.inode(ino)) else { return };
    if !wanted(this.cache.has_whole(id)) {
        return;
    }
    // this thread is one of those that keep it
    let is_wanted = || wholes.strong_count() > 1 && is_wanted();
    let made = this.cache.make_whole(id, inode.size, || this.parts(ino), is_wanted);
    if made != Made::Ready {
        debug!(?ino, ?made, "a file has no whole one");
    }
}
