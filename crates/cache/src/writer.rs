//! Writing behind: frames queue up, bounded in bytes, and one thread appends them to the disk. No reader ever waits
//! for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use lamina_chunk::{FrameId, Sealed};
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::disk::Disk;
use crate::metrics::{Counters, add};

/// Frames appended at once.
const BATCH_FRAMES: usize = 64;
/// Readahead waits this long for room before it gives a frame up: a disk that is stuck must not stop it for good.
const ROOM_DEADLINE: Duration = Duration::from_secs(1);
/// The disk's index is written once nothing came for so long. Until then a crash costs a longer scan.
const QUIET: Duration = Duration::from_millis(100);
/// A disk that does not take the whole queue (16 MiB) in this time is stuck, and what is queued is given up.
const DRAIN_DEADLINE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Queue {
    order: VecDeque<FrameId>,
    frames: HashMap<FrameId, Sealed>,
    bytes: usize,
    closed: bool,
    /// The thread has ended.
    ended: bool,
    /// Nothing was written for a whole deadline: nobody waits for room until something is.
    stuck: bool,
}

/// The queue, as everybody but the thread sees it.
pub(crate) struct WriteBehind {
    queue: Mutex<Queue>,
    changed: Condvar,
    room: Notify,
    bytes_max: usize,
    counters: Arc<Counters>,
}

impl WriteBehind {
    /// Starts the thread.
    pub(crate) fn start(
        disk: Arc<Disk>,
        bytes_max: usize,
        counters: Arc<Counters>,
    ) -> std::io::Result<Arc<Self>> {
        let (changed, room) = (Condvar::new(), Notify::new());
        let this = Arc::new(Self { queue: Mutex::default(), changed, room, bytes_max, counters });
        let writer = this.clone();
        std::thread::Builder::new().name("lamina-cache".to_owned()).spawn(move || {
            writer.run(&disk);
            // the disk is given back before anybody is told
            drop(disk);
            writer.queue.lock().ended = true;
            writer.changed.notify_all();
        })?;
        Ok(this)
    }

    /// A frame that is on its way to the disk.
    pub(crate) fn read(&self, id: FrameId) -> Option<Sealed> {
        self.queue.lock().frames.get(&id).cloned()
    }

    /// Forgets a frame that did not verify.
    pub(crate) fn forget(&self, id: FrameId) {
        let mut queue = self.queue.lock();
        if let Some(sealed) = queue.frames.remove(&id) {
            queue.bytes -= sealed.bytes().len();
        }
    }

    /// Queues a frame, or drops it where there is no room.
    pub(crate) fn push(&self, id: FrameId, sealed: Sealed) {
        if !self.try_push(id, &sealed) {
            add(&self.counters.write_dropped, 1);
        }
    }

    /// Queues a frame, waiting a while for room: longer where it was fetched only to be `kept`.
    pub(crate) async fn push_when_room(&self, id: FrameId, sealed: Sealed, kept: bool) {
        if self.queue.lock().stuck {
            return self.push(id, sealed);
        }
        let deadline = if kept { DRAIN_DEADLINE } else { ROOM_DEADLINE };
        let pushed = tokio::time::timeout(deadline, async {
            loop {
                let room = self.room.notified();
                if self.try_push(id, &sealed) {
                    return;
                }
                room.await;
            }
        });
        if pushed.await.is_err() {
            self.queue.lock().stuck = true;
            add(&self.counters.write_dropped, 1);
        }
    }

    /// Waits until everything queued so far is on disk, or the disk is found to be stuck; whether it is on disk.
    /// Blocks.
    pub(crate) fn flush(&self) -> bool {
        self.wait(|queue| queue.order.is_empty() && queue.frames.is_empty())
    }

    /// The same without blocking.
    pub(crate) async fn drained(&self) -> bool {
        let drained = async {
            loop {
                let changed = self.room.notified();
                if self.queue.lock().frames.is_empty() {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(DRAIN_DEADLINE, drained).await.is_ok()
    }

    /// Tells the thread to write what is queued and end; whether it has. Blocks.
    pub(crate) fn close(&self) -> bool {
        self.queue.lock().closed = true;
        self.changed.notify_all();
        self.wait(|queue| queue.ended)
    }

    fn wait(&self, mut done: impl FnMut(&Queue) -> bool) -> bool {
        let waited =
            self.changed.wait_while_for(&mut self.queue.lock(), |queue| !done(queue), DRAIN_DEADLINE);
        !waited.timed_out()
    }

    fn try_push(&self, id: FrameId, sealed: &Sealed) -> bool {
        let mut queue = self.queue.lock();
        if queue.closed || queue.frames.contains_key(&id) {
            return true;
        }
        let bytes = sealed.bytes().len();
        if queue.bytes + bytes > self.bytes_max {
            return false;
        }
        queue.bytes += bytes;
        queue.order.push_back(id);
        queue.frames.insert(id, sealed.clone());
        drop(queue);
        self.changed.notify_all();
        true
    }

    fn run(&self, disk: &Disk) {
        loop {
            let mut batch = Vec::with_capacity(BATCH_FRAMES);
            {
                let mut queue = self.queue.lock();
                let is_idle = |queue: &mut Queue| queue.order.is_empty() && !queue.closed;
                if self.changed.wait_while_for(&mut queue, is_idle, QUIET).timed_out() {
                    MutexGuard::unlocked(&mut queue, || disk.settle());
                    self.changed.wait_while(&mut queue, is_idle);
                }
                if queue.order.is_empty() {
                    return;
                }
                while batch.len() < BATCH_FRAMES {
                    let Some(id) = queue.order.pop_front() else { break };
                    batch.extend(queue.frames.get(&id).map(|sealed| (id, sealed.clone())));
                }
            }
            disk.append(&batch);
            let mut queue = self.queue.lock();
            queue.stuck = false;
            for (id, _) in &batch {
                if let Some(sealed) = queue.frames.remove(id) {
                    queue.bytes -= sealed.bytes().len();
                }
            }
            drop(queue);
            self.room.notify_waiters();
            self.changed.notify_all();
        }
    }
}
