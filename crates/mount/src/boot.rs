//! A boot pack on its way into the kernel's page cache.
//!
//! It comes in one stream ([`BootStream`]), which begins before there is a mount, and of which frames are verified and opened as
//! they come, a few side by side. The table is first, so that it is known which pages will come and with which frame. Once there is a
//! mount, at the same time: all files of the pack are made known, since the kernel takes pages only for inodes that it knows, and then
//! the names of the start through it, those of one directory together; one thread stores the runs of one frame after the other, each as
//! soon as its file is known. Directories that the start listed are listed before their names, where that costs little, and otherwise
//! after all names, when nothing waits for it.
//!
//! A read of pages that are on their way waits for their frame if that is near, and is answered from the opened frame, never by
//! way of the thread that stores: that may be waiting for this very read, which holds the pages' locks. A wait has a bound; then,
//! and for everything else, the read goes the ordinary way. So whatever happens to a boot pack, reads are answered.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use lamina_cache::{Class, Source, SourceError};
use lamina_chunk::PackId;
use lamina_image::{BootError, BootFrame, BootTable, Ino};
use parking_lot::{Mutex, MutexGuard};
use tokio::time::timeout;
use tracing::trace;

pub(crate) use self::brought::{BROUGHT, is_brought};
use self::crew::Crew;
use self::opened::Opened;
pub(crate) use self::run::Booting;
pub use self::stream::{BootRoom, BootRooms, BootStream};
pub use self::used::BootUse;
use self::wanted::Wanted;

mod brought;
mod buffers;
mod crew;
mod fetch;
mod known;
mod names;
mod opened;
mod run;
mod stream;
mod used;
mod wanted;

/// Opened frames that wait to be stored, at most 1 MiB each. A read waits for a frame that is no further away than this
/// from the last one stored: at 1 Gbit/s each takes 3 ms, and what a program reads next comes with it. Then there is room for
/// that frame even while the thread that stores waits for the read.
const OPENED: usize = 16;
/// And no longer than this.
const NEAR: Duration = Duration::from_millis(100);
/// How long frames are kept for reads after they were stored, in frames of full length: the kernel asks for what it had locked meanwhile.
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
    /// More is read in one stream than programs read when they start, so what comes before it is asked for is only in the way.
    #[error("more is read in one stream than a start does")]
    Overtaken,
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
    /// Each file once, the first needed first.
    order: Vec<Ino>,
    opened: Arc<Opened>,
    /// The threads that open and store them.
    crew: Arc<Crew>,
    /// How many frames were stored.
    stored: AtomicUsize,
    /// Up to which frame programs have read what was not stored yet.
    read: AtomicUsize,
    /// How many frames were opened when a read waited in vain, and none came meanwhile.
    stalled: AtomicUsize,
    blob: PackId,
}

/// The boot pack of one mount, if it has one.
#[derive(Default)]
pub(crate) struct Boot {
    coming: OnceLock<Arc<Coming>>,
    /// The thread that looks up what the boot pack names, or lists, by its number; 0 where there is none.
    asker: AtomicU32,
    /// The same of the thread that looks at what was used.
    looker: AtomicU32,
    listing: Mutex<Listing>,
    /// How many wait for the listing to be let go.
    ending: AtomicUsize,
    wanted: Wanted,
}

/// The boot's directories being listed. Who holds the root keeps the mount in use, so it is here, where it can be taken away.
#[derive(Default)]
enum Listing {
    /// Names come first.
    #[default]
    NotYet,
    /// Below this, one directory after the other.
    Below(OwnedFd),
    /// It was the last, or the mount is to go.
    Over,
}

/// While this lives the boot opens nothing of the mount.
pub(crate) struct Unlisted<'a> {
    _listing: MutexGuard<'a, Listing>,
}

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
    /// Whether a request of the kernel is the boot's own, and so none of the start's. `pid` is the request's, which is the
    /// number of the thread that asks, or 0 where that is in no process namespace of the mount's.
    pub(crate) fn asks(&self, pid: u32) -> bool {
        pid != 0 && [&self.asker, &self.looker].iter().any(|asks| asks.load(Ordering::Relaxed) == pid)
    }

    /// Lists no more directories, now and later. Blocks for as long as one request takes, or one look at a MiB, and then nothing is open of
    /// the boot's any more, nor will be while what is returned lives.
    pub(crate) fn end_listing(&self) -> Unlisted<'_> {
        self.ending.fetch_add(1, Ordering::Relaxed);
        let mut listing = self.listing.lock();
        self.ending.fetch_sub(1, Ordering::Relaxed);
        *listing = Listing::Over;
        Unlisted { _listing: listing }
    }

    /// Whether somebody waits for what the boot has open.
    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed) > 0
    }

    /// Whether it brings this byte of a file, or brought it.
    pub(crate) fn has(&self, ino: Ino, offset: u64) -> bool {
        let Some(coming) = self.coming.get() else { return false };
        let comes = !coming.opened.has_ended();
        let brings = |part: &Place| comes || (part.frame as usize) < coming.stored.load(Ordering::Relaxed);
        coming.parts(ino, offset, offset.saturating_add(1)).is_some_and(|parts| parts.iter().all(brings))
    }

    /// What it has of `ino` from `offset` to before `end`, which must not lie behind the end of the file. Never waits.
    pub(crate) fn read(&self, ino: Ino, offset: u64, end: u64) -> Booted {
        let Some(coming) = self.coming.get() else { return Booted::Not };
        let Some(parts) = coming.parts(ino, offset, end) else { return Booted::Not };
        let (first, last) = parts
            .iter()
            .fold((u32::MAX, 0), |(first, last), part| (first.min(part.frame), last.max(part.frame)));
        if let Some(bytes) = coming.assemble(&parts) {
            trace!(frame = last, "read before it is stored");
            coming.is_read(last as usize + 1);
            return Booted::Here(bytes);
        }
        let (opened, stored) = (coming.opened.count(), coming.stored.load(Ordering::Relaxed));
        if (last as usize) < stored {
            return match first == last {
                true => Booted::Again(Dropped { coming: coming.clone(), parts }),
                false => Booted::Far,
            };
        }
        // a part that was opened, and is not here, comes no more
        let comes = parts
            .iter()
            .all(|part| part.frame as usize >= opened || coming.opened.frames().contains_key(&part.frame));
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
        coming.opened.add_again(number, plain);
        coming.assemble(&parts)
    }
}

impl Waiting {
    /// The bytes, if they come in time.
    pub(crate) async fn bytes(self) -> Option<Bytes> {
        let Self { coming, parts, last } = self;
        trace!(frame = last, opened = coming.opened.count(), "a read waits");
        let (_awaited, before) = (coming.crew.awaited(), coming.opened.count());
        let come = timeout(NEAR, coming.opened.wait(last)).await.is_ok();
        if !come && coming.opened.count() == before {
            // nobody waits again until something comes
            coming.stalled.store(before, Ordering::Relaxed);
        }
        trace!(frame = last, come, "a read waited");
        come.then(|| coming.assemble(&parts)).flatten()
    }
}

impl Coming {
    fn new(stream: &BootStream, table: &BootTable) -> Self {
        let (mut files, mut order) = (HashMap::<Ino, Vec<Place>>::new(), Vec::new());
        for (frame, number) in table.frames.iter().zip(0u32..) {
            for run in &table.runs[frame.runs.clone()] {
                let place = Place { offset: run.offset, len: run.len, frame: number, skip: run.skip };
                let places = files.entry(run.ino).or_default();
                if places.is_empty() {
                    order.push(run.ino);
                }
                places.push(place);
            }
        }
        files.values_mut().for_each(|places| places.sort_unstable_by_key(|place| place.offset));
        Self {
            frames: table.frames.clone(),
            files,
            order,
            opened: Arc::clone(stream.opened()),
            crew: Arc::clone(stream.crew()),
            stored: AtomicUsize::new(0),
            read: AtomicUsize::new(0),
            stalled: AtomicUsize::new(usize::MAX - 1),
            blob: stream.pack().pack(),
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

    /// A program asks for pages of one of the first `frames`, which are opened.
    fn is_read(&self, frames: usize) {
        let ahead = frames > self.stored.load(Ordering::Relaxed);
        if ahead && self.read.fetch_max(frames, Ordering::Relaxed) < frames {
            self.set_late();
        }
    }

    /// The first `frames` are stored.
    fn has_stored(&self, frames: usize) {
        self.stored.store(frames, Ordering::Relaxed);
        self.set_late();
    }

    /// Whoever comes last sees what both have done, since each looks under a lock.
    fn set_late(&self) {
        self.crew.set_late(|| self.read.load(Ordering::Relaxed) > self.stored.load(Ordering::Relaxed));
    }

    fn assemble(&self, parts: &[Place]) -> Option<Bytes> {
        let opened = self.opened.frames();
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
}
