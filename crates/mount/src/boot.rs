//! A boot pack on its way into the kernel's page cache.
//!
//! The table comes first, so that it is known which pages will come and with which frame. Then, at the same time: names are
//! looked up through the mount, since the kernel takes pages only for inodes that it knows; ranges of frames are fetched, a few
//! at once and in order; frames are opened and verified; one thread stores the runs of one frame after the other.
//!
//! A read of pages that are on their way waits for their frame if that is near, and is answered from the opened frame, never by
//! way of the thread that stores: that may be waiting for this very read, which holds the pages' locks. A wait has a bound; then,
//! and for everything else, the read goes the ordinary way. So whatever happens to a boot pack, reads are answered.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fuser::{INodeNo, Notifier};
use futures_util::stream::{self, StreamExt};
use lamina_cache::{Class, Source, SourceError};
use lamina_chunk::PackId;
use lamina_image::{
    BOOT_BYTES_MAX, BOOT_HEAD_BYTES, BootError, BootFrame, BootHead, BootPack, BootTable, Ino, Tree,
};
use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::metrics::{Counters, add, one};

/// Bytes asked for first: the head and most tables, in one round trip.
const FIRST_BYTES: u64 = 192 << 10;
/// Frames are asked for together up to this many bytes, and so many requests are on their way: what fills 1 Gbit/s up to a round
/// trip of 12 ms, and delays a read of something else by that at worst.
const RANGE_BYTES: u64 = 512 << 10;
const RANGES: usize = 3;
/// Opened frames that wait to be stored, at most 1 MiB each. A read waits for a frame that is no further away than this
/// from the last one stored: at 1 Gbit/s each takes 3 ms, and what a program reads next comes with it. Then there is room for
/// that frame even while the thread that stores waits for the read.
const OPENED: usize = 16;
/// And no longer than this.
const NEAR: Duration = Duration::from_millis(100);
/// How long frames are kept for reads after they were stored: the kernel asks for what it had locked meanwhile.
const KEPT: usize = 4;

/// Why a boot pack was given up. The mount goes on without.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BootFailure {
    /// It is not what it should be.
    #[error(transparent)]
    Bad(#[from] BootError),
    /// Its length makes no sense.
    #[error("a boot pack of {0} bytes")]
    Length(u64),
    /// It does not come.
    #[error("the boot pack does not come: {0}")]
    Source(#[from] SourceError),
    /// The mount is gone, or the kernel takes no pages.
    #[error("the kernel takes no pages")]
    Refused,
}

/// Where pages that come lie.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    len: u32,
    frame: u32,
    skip: u32,
}

/// What is known of a boot pack that comes.
struct Coming {
    frames: Vec<BootFrame>,
    /// Runs of each file, sorted by offset.
    files: HashMap<Ino, Vec<Place>>,
    /// Frames opened and not given up yet.
    opened: Mutex<HashMap<u32, Bytes>>,
    /// How many frames were opened, from the first on; all of them once it has ended, however.
    progress: watch::Sender<usize>,
    /// How many frames were stored.
    stored: AtomicUsize,
    /// How many frames were opened when a read waited in vain, and none came meanwhile.
    stalled: AtomicUsize,
    blob: PackId,
}

/// The boot pack of one mount, if it has one.
#[derive(Default)]
pub(crate) struct Boot(std::sync::OnceLock<Arc<Coming>>);

/// What a boot pack has of a read.
pub(crate) enum Booted {
    /// All of it.
    Here(Bytes),
    /// All of it, soon.
    Near(Waiting),
    /// All of it, in a frame that was here: the kernel has dropped the pages since.
    Again(Dropped),
    /// All of it, but not soon.
    Far,
    /// Not all.
    Not,
}

/// A read of pages that were stored, and that the kernel does not have any more.
pub(crate) struct Dropped {
    coming: Arc<Coming>,
    parts: Vec<Place>,
}

/// A read that waits for a frame.
pub(crate) struct Waiting {
    coming: Arc<Coming>,
    parts: Vec<Place>,
    last: u32,
}

impl Boot {
    /// What it has of `ino` from `offset` to before `end`, which must not lie behind the end of the file. Never waits.
    pub(crate) fn read(&self, ino: Ino, offset: u64, end: u64) -> Booted {
        let Some(coming) = self.0.get() else { return Booted::Not };
        let Some(parts) = coming.parts(ino, offset, end) else { return Booted::Not };
        if let Some(bytes) = coming.assemble(&parts) {
            return Booted::Here(bytes);
        }
        let (first, last) = parts
            .iter()
            .fold((u32::MAX, 0), |(first, last), part| (first.min(part.frame), last.max(part.frame)));
        let (opened, stored) = (*coming.progress.borrow(), coming.stored.load(Ordering::Relaxed));
        if (last as usize) < stored {
            return match first == last {
                true => Booted::Again(Dropped { coming: coming.clone(), parts }),
                false => Booted::Far,
            };
        }
        // a part that was opened, and is not here, comes no more
        let comes = parts
            .iter()
            .all(|part| part.frame as usize >= opened || coming.opened.lock().contains_key(&part.frame));
        let stalled = coming.stalled.load(Ordering::Relaxed) == opened;
        match comes && !stalled && (last as usize) < stored.saturating_add(OPENED) {
            true => Booted::Near(Waiting { coming: coming.clone(), parts, last }),
            false => Booted::Far,
        }
    }
}

impl Dropped {
    /// The bytes, from where boot packs are kept, if they can be had.
    pub(crate) async fn bytes(self, source: &Arc<dyn Source>) -> Option<Bytes> {
        let Self { coming, parts } = self;
        let number = parts.first()?.frame;
        let frame = coming.frames.get(number as usize)?.clone();
        let range = frame.offset..frame.offset + u64::from(frame.sealed_len);
        let sealed = source.fetch(coming.blob, range, Class::Boot).await.ok()?;
        let plain = tokio::task::spawn_blocking(move || frame.open(&sealed)).await.ok()?.ok()?;
        let mut opened = coming.opened.lock();
        if opened.len() >= KEPT && *coming.progress.borrow() == usize::MAX {
            opened.clear();
        }
        opened.insert(number, plain);
        drop(opened);
        coming.assemble(&parts)
    }
}

impl Waiting {
    /// The bytes, if they come in time.
    pub(crate) async fn bytes(self) -> Option<Bytes> {
        let mut progress = self.coming.progress.subscribe();
        let before = *progress.borrow();
        let come = timeout(NEAR, progress.wait_for(|opened| *opened > self.last as usize)).await;
        let come = come.map(|come| come.is_ok());
        if come.is_err() && *progress.borrow() == before {
            // nobody waits again until something comes
            self.coming.stalled.store(before, Ordering::Relaxed);
        }
        (come == Ok(true)).then(|| self.coming.assemble(&self.parts)).flatten()
    }
}

impl Coming {
    fn new(blob: PackId, table: &BootTable) -> Self {
        let mut files: HashMap<Ino, Vec<Place>> = HashMap::new();
        for (frame, number) in table.frames.iter().zip(0u32..) {
            for run in &table.runs[frame.runs.clone()] {
                let place = Place { offset: run.offset, len: run.len, frame: number, skip: run.skip };
                files.entry(run.ino).or_default().push(place);
            }
        }
        files.values_mut().for_each(|places| places.sort_unstable_by_key(|place| place.offset));
        Self {
            frames: table.frames.clone(),
            files,
            opened: Mutex::default(),
            progress: watch::Sender::new(0),
            stored: AtomicUsize::new(0),
            stalled: AtomicUsize::new(usize::MAX - 1),
            blob,
        }
    }

    /// The parts of runs that are exactly these bytes.
    fn parts(&self, ino: Ino, offset: u64, end: u64) -> Option<Vec<Place>> {
        let places = self.files.get(&ino)?;
        let mut next = places.partition_point(|place| place.offset + u64::from(place.len) <= offset);
        let (mut at, mut parts) = (offset, Vec::new());
        while at < end {
            let place = places.get(next).filter(|place| place.offset <= at)?;
            let inside = u32::try_from(at - place.offset).ok()?;
            let len = u32::try_from((end - at).min(u64::from(place.len - inside))).ok()?;
            parts.push(Place { offset: at, len, frame: place.frame, skip: place.skip + inside });
            at += u64::from(len);
            next += 1;
        }
        Some(parts)
    }

    fn assemble(&self, parts: &[Place]) -> Option<Bytes> {
        let opened = self.opened.lock();
        let part = |part: &Place| {
            let (skip, len) = (part.skip as usize, part.len as usize);
            // the table was checked: runs fill their frames exactly
            Some(opened.get(&part.frame)?.slice(skip..skip + len))
        };
        if let [one] = parts {
            return part(one);
        }
        let pieces = parts.iter().map(part).collect::<Option<Vec<Bytes>>>()?;
        Some(pieces.concat().into())
    }

    fn opened(&self, number: u32, plain: Bytes) {
        self.opened.lock().insert(number, plain);
        self.progress.send_replace(number as usize + 1);
    }
}

/// What boot needs of a mount.
pub(crate) struct Booting<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) source: &'a Arc<dyn Source>,
    pub(crate) counters: &'a Arc<Counters>,
    pub(crate) notifier: Notifier,
    pub(crate) mountpoint: &'a Path,
    pub(crate) boot: &'a Boot,
}

impl Booting<'_> {
    /// Fetches and stores a boot pack. Returns when everything is in the page cache, or with what went wrong.
    pub(crate) async fn run(self, pack: BootPack) -> Result<(), BootFailure> {
        let (table, first) = self.table(pack).await?;
        let coming = Arc::new(Coming::new(pack.pack(), &table));
        if self.boot.0.set(coming.clone()).is_err() {
            return Ok(());
        }
        let _ended = Ended(coming.clone());
        let known = self.look_up(table.names.clone());
        let (frames, queue) = mpsc::channel(OPENED);
        let storing = self.store(coming.clone(), table.runs, known, queue);
        let fetched = self.fetch(pack, first, &coming, frames).await;
        let stored = storing.await.map_err(|_| BootFailure::Refused)?;
        fetched.and(stored)
    }

    async fn range(&self, pack: BootPack, range: Range<u64>) -> Result<Bytes, BootFailure> {
        let bytes = self.source.fetch(pack.pack(), range, Class::Boot).await?;
        add(&self.counters.boot_bytes, bytes.len() as u64);
        Ok(bytes)
    }

    /// A range of which some bytes may have come with the first.
    async fn rest(&self, pack: BootPack, come: &Bytes, range: Range<u64>) -> Result<Bytes, BootFailure> {
        let len = come.len() as u64;
        if range.start >= len {
            return self.range(pack, range).await;
        }
        let at = usize::try_from(range.start).expect("below a length in memory");
        let end = usize::try_from(range.end.min(len)).expect("not above a length in memory");
        let mut bytes = come[at..end].to_vec();
        if range.end > len {
            bytes.extend_from_slice(&self.range(pack, len..range.end).await?);
        }
        Ok(bytes.into())
    }

    /// What is in the pack, and its first bytes.
    async fn table(&self, pack: BootPack) -> Result<(BootTable, Bytes), BootFailure> {
        let head_bytes = BOOT_HEAD_BYTES as u64;
        if !(head_bytes..=BOOT_BYTES_MAX).contains(&pack.bytes) {
            return Err(BootFailure::Length(pack.bytes));
        }
        let first = self.range(pack, 0..FIRST_BYTES.min(pack.bytes)).await?;
        let head = BootHead::parse(first.get(..BOOT_HEAD_BYTES).unwrap_or(&[]), pack.tree)?;
        let end = head_bytes + head.table_len() as u64;
        if end > pack.bytes {
            return Err(BootFailure::Length(pack.bytes));
        }
        let mut sealed = first[BOOT_HEAD_BYTES..].to_vec();
        if (first.len() as u64) < end {
            sealed.extend_from_slice(&self.range(pack, first.len() as u64..end).await?);
        }
        sealed.truncate(head.table_len());
        let table = head.table(&sealed, self.tree)?;
        let frames_end = table.frames.last().map_or(end, |last| last.offset + u64::from(last.sealed_len));
        if frames_end == pack.bytes { Ok((table, first)) } else { Err(BootFailure::Length(pack.bytes)) }
    }

    /// Looks names up through the mount, found or not: the kernel then knows them and the inodes.
    fn look_up(&self, names: Vec<String>) -> tokio::task::JoinHandle<()> {
        let (path, counters) = (self.mountpoint.to_owned(), self.counters.clone());
        tokio::task::spawn_blocking(move || {
            let Ok(root) = rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            else {
                return;
            };
            let look = |root: &OwnedFd, name: &str| rustix::fs::statat(root, name, AtFlags::SYMLINK_NOFOLLOW);
            for name in &names {
                // a name that is not there is known not to be there afterwards
                let _ = look(&root, name);
                one(&counters.boot_names);
            }
        })
    }

    /// Fetches and opens frames in order, and hands them on.
    async fn fetch(
        &self,
        pack: BootPack,
        come: Bytes,
        coming: &Arc<Coming>,
        queue: mpsc::Sender<(u32, Bytes)>,
    ) -> Result<(), BootFailure> {
        let groups = groups(&coming.frames);
        let come = &come;
        let mut sealed = stream::iter(groups)
            .map(|group| async move {
                let of = &coming.frames[group.clone()];
                let (first, last) = (&of[0], &of[of.len() - 1]);
                let range = first.offset..last.offset + u64::from(last.sealed_len);
                let bytes = self.rest(pack, come, range).await?;
                let of: Vec<BootFrame> = of.to_vec();
                let opened = tokio::task::spawn_blocking(move || open(&of, &bytes)).await;
                Ok::<_, BootFailure>((group.start, opened.map_err(|_| BootFailure::Refused)??))
            })
            .buffered(RANGES);
        while let Some(opened) = sealed.next().await {
            let (start, opened) = opened?;
            for (plain, number) in opened.into_iter().zip(start..) {
                let number = u32::try_from(number).expect("as many as the head's 32 bits");
                // for the reads that wait, before anything that may block
                coming.opened(number, plain.clone());
                if queue.send((number, plain)).await.is_err() {
                    return Err(BootFailure::Refused);
                }
            }
        }
        Ok(())
    }

    /// Stores frames, once the names are known, until no more come.
    fn store(
        &self,
        coming: Arc<Coming>,
        runs: Vec<lamina_image::BootRun>,
        known: tokio::task::JoinHandle<()>,
        mut queue: mpsc::Receiver<(u32, Bytes)>,
    ) -> tokio::task::JoinHandle<Result<(), BootFailure>> {
        let (notifier, counters) = (self.notifier.clone(), self.counters.clone());
        let handle = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || {
            // a panic there would have been about one name
            let _ = handle.block_on(known);
            while let Some((number, plain)) = queue.blocking_recv() {
                for run in &runs[coming.frames[number as usize].runs.clone()] {
                    let (skip, len) = (run.skip as usize, run.len as usize);
                    let stored = notifier.store(INodeNo(run.ino.0), run.offset, &plain[skip..skip + len]);
                    if let Err(error) = stored {
                        one(&counters.boot_refused);
                        // the connection is gone; everything else is about one run
                        if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) {
                            return Err(BootFailure::Refused);
                        }
                        continue;
                    }
                    one(&counters.boot_stored_runs);
                    add(&counters.boot_stored_bytes, len as u64);
                }
                coming.stored.store(number as usize + 1, Ordering::Relaxed);
                if let Some(old) = number.checked_sub(u32::try_from(KEPT).expect("few")) {
                    coming.opened.lock().remove(&old);
                }
            }
            Ok(())
        })
    }
}

/// Tells waiting reads when a boot pack has ended, however.
struct Ended(Arc<Coming>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.progress.send_replace(usize::MAX);
        self.0.opened.lock().clear();
    }
}

/// Frames that are asked for together.
fn groups(frames: &[BootFrame]) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (number, frame) in frames.iter().enumerate() {
        let len = u64::from(frame.sealed_len);
        match groups.last_mut() {
            Some(group) if bytes + len <= RANGE_BYTES => group.end = number + 1,
            _ => {
                groups.push(number..number + 1);
                bytes = 0;
            }
        }
        bytes += len;
    }
    groups
}

/// Opens frames that came in one piece.
fn open(frames: &[BootFrame], bytes: &[u8]) -> Result<Vec<Bytes>, BootFailure> {
    let start = frames.first().map_or(0, |first| first.offset);
    let one = |frame: &BootFrame| {
        let from = usize::try_from(frame.offset - start).unwrap_or(usize::MAX);
        let sealed = bytes.get(from..from.saturating_add(frame.sealed_len as usize)).unwrap_or(&[]);
        Ok(frame.open(sealed)?)
    };
    frames.iter().map(one).collect()
}
