//! The cache: memory, then disk, then a source.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lamina_chunk::{Chunk, FrameId, Sealed};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::disk::Disk;
use crate::fetch::{self, Leg, Want};
use crate::flight::{Boarding, Flights, Waiter};
use crate::memory::Memory;
use crate::metrics::{Counters, Snapshot, add};
use crate::writer::WriteBehind;
use crate::{CacheConfig, CacheError, Class, Source};

/// A reader asks again after this long, then twice as long each time,
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// up to this long: a source that is back is found soon, and one that fails at once is not asked all the time. A source
/// that knows when it is back holds its answer until then.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Events of this target say for what the cache was asked that memory does not have, in order: what `benches/eviction` replays.
const ASKED: &str = "lamina_cache::asked";

/// Where a node gets bytes. One for each process and directory; all mounts share it.
///
/// Dropping it writes what is queued (at most `write_behind_bytes`) and gives the directory up.
pub struct Cache {
    shared: Arc<Shared>,
}

/// What tasks of the cache share.
pub(crate) struct Shared {
    pub(crate) config: CacheConfig,
    pub(crate) handle: Handle,
    pub(crate) memory: Memory,
    pub(crate) flights: Flights,
    pub(crate) writer: Arc<WriteBehind>,
    pub(crate) counters: Arc<Counters>,
    disk: Arc<Disk>,
    slots: [Arc<Semaphore>; 4],
    /// Requests under way of the classes above filling, those that queue included.
    pub(crate) busy: watch::Sender<usize>,
}

impl Cache {
    /// Opens the directory, creating it where it is missing. Fetches will run on `handle`.
    ///
    /// *Errors*: [`CacheError::Busy`] if another process owns the directory, [`CacheError::Directory`] if it cannot
    /// be read and written. A damaged index or segment is repaired, not an error. Blocks: see `disk/open.rs` for what
    /// it costs.
    pub fn open(config: CacheConfig, handle: Handle) -> Result<Self, CacheError> {
        Self::open_locked(config, None, handle)
    }

    /// The same for a process that follows one that died: with the `lock` of that one, from [`Cache::lock`], the directory
    /// belongs to this one, even if a thread of the other cannot end yet.
    pub fn open_locked(
        config: CacheConfig,
        lock: Option<OwnedFd>,
        handle: Handle,
    ) -> Result<Self, CacheError> {
        let counters = Arc::new(Counters::default());
        let disk = Arc::new(Disk::open(&config.directory, config.bytes_max, lock, counters.clone())?);
        let writer = WriteBehind::start(disk.clone(), config.write_behind_bytes, counters.clone()).map_err(
            |cause| CacheError::Directory { directory: config.directory.clone(), cause: Arc::new(cause) },
        )?;
        let in_flight = config.in_flight;
        let slots = [in_flight.fill, in_flight.background, in_flight.boot, in_flight.demand]
            .map(|slots| Arc::new(Semaphore::new(slots.max(1))));
        let memory = Memory::new(config.memory_bytes);
        let (flights, (busy, _)) = (Flights::default(), watch::channel(0));
        let shared = Shared { config, handle, memory, flights, writer, counters, disk, slots, busy };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// How long a reader waits, at most.
    pub fn deadline(&self) -> Duration {
        self.shared.config.deadline
    }

    /// The frame, if it is in memory. Opens a frame that came along (about 60 µs for 64 KiB), never does I/O.
    pub fn try_memory(&self, id: FrameId) -> Option<Chunk> {
        self.shared.memory.take_out(id, &self.shared.counters)
    }

    /// The frame, if it is in memory or on disk. Reads the disk, never the network.
    pub fn try_local(&self, id: FrameId) -> Option<Chunk> {
        self.try_memory(id).or_else(|| {
            let chunk = self.shared.read_disk(id)?;
            tracing::trace!(target: ASKED, %id);
            self.shared.memory.insert(chunk.clone(), None);
            Some(chunk)
        })
    }

    /// Whether the frame is in memory, on disk, or on its way. An answer for planning: it may be out of date at once.
    pub fn is_near(&self, id: FrameId) -> bool {
        self.shared.memory.contains(id) || self.shared.flights.contains(id) || self.shared.on_disk(id)
    }

    /// The frames of `wants`, in order, from wherever they are nearest. `neighbours` are asked for in the same
    /// requests where they lie near, and kept, but not waited for.
    ///
    /// One request for each frame however many readers, and requests go on when this future is dropped. *Errors*: the
    /// first that any of them had; the rest is still fetched. Never waits longer than the deadline.
    pub async fn fetch(
        &self,
        source: &Arc<dyn Source>,
        wants: &[Want],
        neighbours: &[Want],
        class: Class,
    ) -> Result<Vec<Chunk>, CacheError> {
        let begun = Instant::now();
        let seats = self.shared.board(source, wants, neighbours, class);
        let deadline = self.shared.config.deadline;
        let mut chunks = Vec::with_capacity(wants.len());
        for (seat, want) in seats.into_iter().zip(wants) {
            let waiter = match seat {
                Seat::Here(chunk) => {
                    chunks.push(chunk);
                    continue;
                }
                Seat::Waiting(waiter) => waiter,
            };
            let _waiting = (class == Class::Demand).then(|| Waits::begin(&self.shared.counters));
            let left = deadline.saturating_sub(begun.elapsed());
            let landed = timeout(left, self.landed(waiter, source, want, class)).await;
            chunks.push(landed.map_err(|_| CacheError::Deadline { id: want.id, waited: deadline })??);
            if class == Class::Demand {
                self.shared.waited(begun);
            }
        }
        Ok(chunks)
    }

    /// Begins to fetch `wants` and returns at once. Frames that are near already are left where they are. One that nobody
    /// has asked for when it comes is kept as it came, and verified by whoever reads it: by then it may have left the memory, and
    /// would be opened twice. The first of each answer is opened at once, so that a source that sends wrong bytes is noticed.
    pub fn prefetch(&self, source: &Arc<dyn Source>, wants: &[Want], class: Class) {
        drop(self.shared.board(source, &[], wants, class));
    }

    /// Brings `wants` to disk, and returns once those that are not there yet have come and verified: how many bytes of frames
    /// came. What is there already was verified when it came, or will be when it is read. Slower than readers, whom it leaves
    /// the link. *Errors*: the first; the others are fetched all the same. A disk that does not take them is no error here: see
    /// [`Cache::is_on_disk`].
    pub async fn fill(&self, source: &Arc<dyn Source>, wants: &[Want]) -> Result<u64, CacheError> {
        let far: Vec<Want> = wants.iter().filter(|want| !self.shared.on_disk(want.id)).copied().collect();
        let seats = self.shared.board(source, &far, &[], Class::Fill);
        let (mut come, mut first) = (0, Ok(()));
        for (seat, want) in seats.into_iter().zip(&far) {
            let Seat::Waiting(mut waiter) = seat else { continue };
            match waiter.landed().await {
                Ok(_) => come += u64::from(want.place.frame.sealed_len),
                Err(error) => first = first.and(Err(error)),
            }
        }
        first.map(|()| come)
    }

    /// Returns when nobody reads from a source, nor reads ahead.
    pub async fn idle(&self) {
        // the sender lives as long as this does
        let _ = self.shared.busy.subscribe().wait_for(|busy| *busy == 0).await;
    }

    /// Whether the frame is on disk, where it is there after a crash of this process as well.
    pub fn is_on_disk(&self, id: FrameId) -> bool {
        self.shared.disk.contains(id)
    }

    /// Keeps these frames on disk, whether they are here or still to come, until they are unpinned as often. They are not
    /// fetched. Bound what is pinned: what is not pinned has only the rest of the disk.
    pub fn pin(&self, ids: impl IntoIterator<Item = FrameId>) {
        self.shared.disk.pin(ids);
    }

    /// Takes one pin off each of these frames.
    pub fn unpin(&self, ids: impl IntoIterator<Item = FrameId>) {
        self.shared.disk.unpin(ids);
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// What says that the directory is this process's: as long as a copy of it is open, no other takes the directory but by
    /// [`Cache::open_locked`].
    pub fn lock(&self) -> io::Result<OwnedFd> {
        self.shared.disk.lock()
    }

    /// Whether its directory is still found where it was opened. Where somebody has moved it away, what is there now may be
    /// another process's.
    pub fn is_in_place(&self) -> bool {
        self.shared.disk.is_locked(&self.shared.config.directory)
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { disk_max_bytes: self.shared.config.bytes_max, ..self.shared.counters.snapshot() }
    }

    /// Waits until what was fetched so far is on disk, or the disk is found to be stuck; whether it is on disk. Blocks
    /// for 20 s at most.
    pub fn flush(&self) -> bool {
        self.shared.writer.flush()
    }

    /// The same without blocking.
    pub async fn flushed(&self) -> bool {
        self.shared.writer.drained().await
    }

    /// Waits for a frame until whoever calls this gives up. A fetch that failed for another mount's source is tried with
    /// this one; a reader tries again as long as that may help.
    async fn landed(
        &self,
        mut waiter: Waiter,
        source: &Arc<dyn Source>,
        want: &Want,
        class: Class,
    ) -> Result<Chunk, CacheError> {
        let (mut pause, mut again) = (PAUSE_MIN, false);
        loop {
            let error = match waiter.landed().await {
                Ok(chunk) => return Ok(chunk),
                Err(error) => error,
            };
            let own = Arc::ptr_eq(&waiter.flight.source, source);
            let hopeful = !own || error.is_passing();
            if !hopeful || (class != Class::Demand && (own || again)) {
                return Err(error);
            }
            if own || again {
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            again = true;
            match self.shared.board(source, std::slice::from_ref(want), &[], class).pop() {
                Some(Seat::Here(chunk)) => return Ok(chunk),
                Some(Seat::Waiting(next)) => waiter = next,
                None => return Err(error),
            }
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // a disk that is stuck holds its locks: the process ends without it
        if self.shared.writer.close() {
            self.shared.disk.close();
        }
    }
}

/// Counts a reader for as long as it waits.
struct Waits<'a>(&'a Counters);

impl<'a> Waits<'a> {
    fn begin(counters: &'a Counters) -> Self {
        add(&counters.waiting, 1);
        Self(counters)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A frame asked for: here, or waited for.
enum Seat {
    Here(Chunk),
    Waiting(Waiter),
}

impl Shared {
    /// The slots of a class.
    pub(crate) fn slots(&self, class: Class) -> &Arc<Semaphore> {
        match class {
            Class::Fill => &self.slots[0],
            Class::Background => &self.slots[1],
            Class::Boot => &self.slots[2],
            Class::Demand => &self.slots[3],
        }
    }

    pub(crate) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Whether the frame is on disk or on its way there.
    pub(crate) fn on_disk(&self, id: FrameId) -> bool {
        self.writer.read(id).is_some() || self.disk.contains(id)
    }

    /// Reads and opens a frame from disk. One that does not verify is forgotten and counted.
    pub(crate) fn read_disk(&self, id: FrameId) -> Option<Chunk> {
        let sealed = self.writer.read(id).or_else(|| self.disk.read(id))?;
        self.opened(id, sealed)
    }

    /// The same for a copy of it beside the frames.
    pub(crate) fn peek_disk(&self, id: FrameId) -> Option<Chunk> {
        let sealed = self.writer.read(id).or_else(|| self.disk.peek(id))?;
        self.opened(id, sealed)
    }

    fn opened(&self, id: FrameId, sealed: Sealed) -> Option<Chunk> {
        let Ok(chunk) = sealed.open(id) else {
            add(&self.counters.verify_failures, 1);
            self.writer.forget(id);
            self.disk.forget(id);
            return None;
        };
        add(&self.counters.disk_frames, 1);
        add(&self.counters.disk_bytes, chunk.bytes().len());
        Some(chunk)
    }

    /// Finds, joins or begins the flight of each frame, and starts those that are new.
    fn board(
        self: &Arc<Self>,
        source: &Arc<dyn Source>,
        wants: &[Want],
        neighbours: &[Want],
        class: Class,
    ) -> Vec<Seat> {
        let (mut seats, mut fresh, mut urged) = (Vec::with_capacity(wants.len()), Vec::new(), Vec::new());
        let demand = class == Class::Demand;
        for &want in wants {
            // what is in memory may not be on disk
            let take = || match class {
                Class::Fill => None,
                _ => self.memory.take_out(want.id, &self.counters),
            };
            // most are found without the lock on the flights, under which opening one would hold up all others
            if let Some(chunk) = take() {
                seats.push(Seat::Here(chunk));
                continue;
            }
            let waiter = match self.flights.board(want.id, source, take) {
                Boarding::Here(chunk) => {
                    seats.push(Seat::Here(chunk));
                    continue;
                }
                Boarding::Joined(waiter) => {
                    add(&self.counters.joined, 1);
                    if demand && waiter.flight.urge() {
                        urged.push(Leg { want, flight: waiter.flight.clone(), needed: true });
                    }
                    waiter
                }
                Boarding::Fresh(waiter) => {
                    if demand {
                        waiter.flight.urge();
                    }
                    let sealed_len = want.place.frame.sealed_len;
                    tracing::trace!(target: ASKED, id = %want.id, sealed_len, ?class);
                    fresh.push(Leg { want, flight: waiter.flight.clone(), needed: true });
                    waiter
                }
            };
            seats.push(Seat::Waiting(waiter));
        }
        for &want in neighbours {
            if self.memory.contains(want.id) || self.on_disk(want.id) {
                continue;
            }
            if let Boarding::Fresh(waiter) = self.flights.board(want.id, source, || None) {
                let sealed_len = want.place.frame.sealed_len;
                match demand {
                    true => tracing::trace!(target: ASKED, id = %want.id, sealed_len, class = "Along"),
                    false => tracing::trace!(target: ASKED, id = %want.id, sealed_len, ?class),
                }
                fresh.push(Leg { want, flight: waiter.flight, needed: false });
            }
        }
        fetch::start(self, fresh, class);
        fetch::start(self, urged, Class::Demand);
        seats
    }

    fn waited(&self, since: Instant) {
        let us = usize::try_from(since.elapsed().as_micros()).unwrap_or(usize::MAX);
        add(&self.counters.waits, 1);
        add(&self.counters.wait_us_total, us);
        self.counters.wait_us_max.fetch_max(us as u64, std::sync::atomic::Ordering::Relaxed);
    }
}
