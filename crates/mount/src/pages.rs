//! Pages for the kernel's page cache that it did not ask for (`FUSE_NOTIFY_STORE`), from a thread of their own.
//!
//! A fault that finds its page in the page cache never comes here, and each one that does costs a program some 30 µs (two
//! changes of process) on top of the data. So once a frame is in memory, the rest of what a file has in it goes along.
//!
//! The kernel stores a page under the page's lock, which a read on its way holds until it is answered. So no thread that
//! answers reads ever stores.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use fuser::{INodeNo, Notifier};
use lamina_image::{Ino, PAGE_BYTES, Tree, TreeError};

use crate::bits::Bits;
use crate::metrics::{Counters, add, one};
use crate::order::Touch;

/// Frames whose runs wait for the thread: some milliseconds of its work, and at most 8 MiB. What does not fit is left out.
const QUEUE_FRAMES: usize = 32;
/// Small files in a frame of which each may take a page more than it has bytes.
const RUNS_MAX: u64 = 256;
/// A file's part of a frame lies within this many bytes of every byte of it: the longest frame.
const FRAME_BYTES_MAX: u64 = 256 << 10;

/// Some whole pages of a file, or its end.
#[derive(Debug)]
pub(crate) struct Run {
    ino: Ino,
    offset: u64,
    bytes: Bytes,
}

/// Hands runs to the thread that stores them.
pub(crate) struct Pages {
    queue: SyncSender<Vec<Run>>,
    /// The frames that were stored.
    stored: Bits,
}

impl Pages {
    /// For frames numbered below `frames`. The receiver belongs to [`store`].
    pub(crate) fn new(frames: u32) -> (Self, Receiver<Vec<Run>>) {
        let (queue, runs) = sync_channel(QUEUE_FRAMES);
        (Self { queue, stored: Bits::new(frames) }, runs)
    }

    /// Whether a frame is asked for here for the first time.
    pub(crate) fn is_first(&self, frame: u32) -> bool {
        self.stored.set(frame)
    }

    /// Stores what `ino` has in the frame of `touch` beyond `read`, which was answered; the frame is `plain`. Returns at
    /// once; if the thread has too much to do, nothing is stored.
    pub(crate) fn store_rest(
        &self,
        tree: &Tree,
        ino: Ino,
        read: Range<u64>,
        touch: Touch,
        plain: &Bytes,
    ) -> Result<(), TreeError> {
        let runs = rest(tree, ino, read, touch, plain)?;
        self.send(runs);
        Ok(())
    }

    /// Stores all of the small files `inos`, which lie in the frame that is `plain`, as far as they are together no longer than
    /// a frame can be: files with the same contents lie there once, and may be any number. Returns at once, as above.
    pub(crate) fn store_whole(
        &self,
        tree: &Tree,
        inos: impl Iterator<Item = Ino>,
        plain: &Bytes,
    ) -> Result<(), TreeError> {
        let (mut runs, mut room) = (Vec::new(), FRAME_BYTES_MAX + RUNS_MAX * PAGE_BYTES);
        for ino in inos {
            let size = tree.inode(ino)?.size;
            let Some(left) = room.checked_sub(size.next_multiple_of(PAGE_BYTES)) else { break };
            room = left;
            for extent in tree.extents(ino, 0, size)? {
                let skip = extent?.skip as usize;
                let end = usize::try_from(size).ok().and_then(|size| skip.checked_add(size));
                // one that lies in a single frame has one extent
                if let Some(end) = end.filter(|end| *end <= plain.len()) {
                    runs.push(Run { ino, offset: 0, bytes: plain.slice(skip..end) });
                }
            }
        }
        self.send(runs);
        Ok(())
    }

    /// Stores these. Returns at once, as above.
    pub(crate) fn send(&self, runs: Vec<Run>) {
        if !runs.is_empty() {
            let _ = self.queue.try_send(runs);
        }
    }
}

/// The whole pages, or the end, that `ino` has in the frame of `touch` beyond `read`; the frame is `plain`.
fn rest(tree: &Tree, ino: Ino, read: Range<u64>, touch: Touch, plain: &Bytes) -> Result<Vec<Run>, TreeError> {
    let size = tree.inode(ino)?.size;
    let mut runs = Vec::new();
    let near = read.start.saturating_sub(FRAME_BYTES_MAX)..read.start.saturating_add(FRAME_BYTES_MAX);
    for extent in tree.extents(ino, near.start, near.end)? {
        let extent = extent?;
        let part = extent.offset..extent.offset + extent.len;
        if extent.frame != Some(touch.frame) {
            continue;
        }
        // the kernel takes whole pages only, and a short one at the end of the file
        let start = part.start.next_multiple_of(PAGE_BYTES);
        let end = if part.end == size { size } else { part.end / PAGE_BYTES * PAGE_BYTES };
        for rest in [start..end.min(read.start), start.max(read.end)..end] {
            let Some(len) = rest.end.checked_sub(rest.start).filter(|len| *len > 0) else { continue };
            let skip = u64::from(extent.skip) + (rest.start - part.start);
            let (Ok(skip), Ok(len)) = (usize::try_from(skip), usize::try_from(len)) else { continue };
            if skip + len <= plain.len() {
                runs.push(Run { ino, offset: rest.start, bytes: plain.slice(skip..skip + len) });
            }
        }
    }
    Ok(runs)
}

/// The same, but only pages of which `is_bound` says so, which is asked once by where each begins.
pub(crate) fn bound_rest(
    tree: &Tree,
    ino: Ino,
    read: Range<u64>,
    touch: Touch,
    plain: &Bytes,
    is_bound: impl Fn(u64) -> bool,
) -> Result<Vec<Run>, TreeError> {
    let runs = rest(tree, ino, read, touch, plain)?;
    Ok(runs.iter().flat_map(|run| run.among(&is_bound)).collect())
}

impl Run {
    /// Where in the file it begins, and how many bytes it has.
    pub(crate) fn place(&self) -> (u64, u32) {
        (self.offset, u32::try_from(self.bytes.len()).expect("it lies within a frame"))
    }

    /// The pages of it of which `is_bound` says so.
    fn among(&self, is_bound: impl Fn(u64) -> bool) -> Vec<Self> {
        let mut runs = Vec::<Self>::new();
        let end = self.offset + self.bytes.len() as u64;
        // what a page begins before is none of it
        let mut at = self.offset.next_multiple_of(PAGE_BYTES);
        while at < end {
            let page = at..end.min(at + PAGE_BYTES);
            if is_bound(at) {
                let within = |at: u64| usize::try_from(at - self.offset).expect("it lies within a frame");
                match runs.last_mut().filter(|run| run.offset + run.bytes.len() as u64 == at) {
                    Some(run) => run.bytes = self.bytes.slice(within(run.offset)..within(page.end)),
                    None => {
                        let bytes = self.bytes.slice(within(page.start)..within(page.end));
                        runs.push(Self { ino: self.ino, offset: at, bytes });
                    }
                }
            }
            at = page.end;
        }
        runs
    }
}

/// Stores runs until nobody can send any more. The kernel may refuse one, because the inode is not in use any more, memory is
/// short, or the mount is gone: then its pages are read in the ordinary way, if ever.
pub(crate) fn store(runs: &Receiver<Vec<Run>>, notifier: &Notifier, counters: &Arc<Counters>) {
    for Run { ino, offset, bytes } in runs.iter().flatten() {
        if notifier.store(INodeNo(ino.0), offset, &bytes).is_ok() {
            one(&counters.stores);
            add(&counters.store_bytes, bytes.len() as u64);
        }
    }
}
