//! The disk tier: sealed frames in segment files, and whole files beside them, never more bytes than the cap.
//!
//! Frames are only appended. Above a high watermark whole segments are evicted, down to a low one, and what they hold
//! that deserves it is appended again; `disk/evict.rs` says what that is. What is read back is a claim until it has been
//! opened. A failure of the disk is counted and costs only speed. No fsync: a crash of the machine may leave records that
//! do not verify, and those are dropped when read.

mod directory;
mod evict;
mod index;
mod lease;
mod locations;
mod open;
mod recent;
mod segment;
mod whole;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lamina_chunk::{FrameId, Sealed};
use parking_lot::{Mutex, RwLock};
use tracing::{debug, warn};

pub use self::directory::{Unfit, prepare as check_directory};
use self::evict::{Ghosts, Marks};
use self::index::{BATCH_MAX, Index, Location};
pub(crate) use self::lease::is_alone;
use self::locations::Locations;
use self::recent::Recent;
use self::segment::{Kind, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, Segment};
use self::whole::Wholes;
pub(crate) use self::whole::{Check, Room};
use crate::metrics::{Counters, add};

/// Frames go to a segment in writes of up to so many bytes: a file system takes one long one several times as fast as many
/// that are as long as a frame.
const WRITE_BYTES: u64 = 1 << 20;

/// The file in the directory that is locked by whoever owns it.
const LOCK: &str = "lock";

/// The directory of frames.
pub(crate) struct Disk {
    segments_directory: PathBuf,
    bytes_max: u64,
    segment_bytes: u64,
    marks: Marks,
    index: Index,
    locations: Locations,
    segments: RwLock<HashMap<u32, Arc<Segment>>>,
    writer: Mutex<Writing>,
    /// What must not be evicted, and how many want that.
    pins: Mutex<HashMap<u64, u32>>,
    wholes: Wholes,
    counters: Arc<Counters>,
    /// Holds the directory's lock for as long as it lives.
    lock: File,
}

/// What only the one that appends touches.
#[derive(Default)]
struct Writing {
    new: Growing,
    kept: Growing,
    next: u32,
    ghosts: Ghosts,
    recent: Recent,
}

/// The segment of one kind that grows.
#[derive(Default)]
struct Growing {
    active: Option<(u32, Arc<Segment>)>,
    /// Written to it, and not in the index yet.
    unindexed: Vec<(FrameId, Location)>,
}

impl Writing {
    fn of(&mut self, kind: Kind) -> &mut Growing {
        match kind {
            Kind::New => &mut self.new,
            Kind::Kept => &mut self.kept,
        }
    }

    fn is_active(&self, number: u32) -> bool {
        let is = |growing: &Growing| growing.active.as_ref().is_some_and(|(active, _)| *active == number);
        is(&self.new) || is(&self.kept)
    }
}

impl Disk {
    /// Whether the frame is here. Never does I/O.
    pub(crate) fn contains(&self, id: FrameId) -> bool {
        self.locations.find(id).is_some()
    }

    /// The frame, unverified: a use of it.
    pub(crate) fn read(&self, id: FrameId) -> Option<Sealed> {
        self.read_at(id, self.locations.use_of(id)?)
    }

    /// The same for who only copies it, which is no reason to keep it for longer.
    pub(crate) fn peek(&self, id: FrameId) -> Option<Sealed> {
        self.read_at(id, self.locations.find(id)?)
    }

    fn read_at(&self, id: FrameId, location: Location) -> Option<Sealed> {
        // none where it was evicted just now
        let segment = self.segments.read().get(&location.segment).cloned()?;
        let frame = segment::read(&segment.file, u64::from(location.offset), location.header(id));
        match frame {
            Ok(Some(sealed)) => Some(sealed),
            Ok(None) => {
                add(&self.counters.verify_failures, 1);
                self.locations.forget(id, location);
                None
            }
            Err(error) => {
                debug!(%id, %error, "a cached frame cannot be read");
                add(&self.counters.disk_failures, 1);
                self.locations.forget(id, location);
                None
            }
        }
    }

    /// Forgets a frame that did not verify. After a restart it is tried once more.
    pub(crate) fn forget(&self, id: FrameId) {
        if let Some(location) = self.locations.find(id) {
            self.locations.forget(id, location);
        }
    }

    /// Appends frames that are not here yet. Frames that do not fit under the cap at all, or that the disk refuses,
    /// are left out. The index learns of them a batch at a time, and of the last by [`settle`](Self::settle).
    pub(crate) fn append(&self, frames: &[(FrameId, Sealed)]) {
        let mut writing = self.writer.lock();
        let (mut run, mut run_len, mut seen) = (Vec::new(), 0, HashSet::new());
        let run_max = WRITE_BYTES.min(self.segment_bytes / 8);
        for (id, sealed) in frames {
            if self.contains(*id) || !seen.insert(*id) {
                continue;
            }
            if writing.ghosts.remove(*id) {
                self.append_or_drop(&mut writing, Kind::Kept, &[(*id, sealed)]);
                continue;
            }
            if run_len + record_len(sealed) > run_max {
                self.append_or_drop(&mut writing, Kind::New, &run);
                run.clear();
                run_len = 0;
            }
            run.push((*id, sealed));
            run_len += record_len(sealed);
        }
        self.append_or_drop(&mut writing, Kind::New, &run);
    }

    /// Appends frames with one write where there is room for all, else one by one, and drops those for which there is none.
    fn append_or_drop(&self, writing: &mut Writing, kind: Kind, frames: &[(FrameId, &Sealed)]) {
        if frames.is_empty() {
            return;
        }
        let len = frames.iter().map(|(_, sealed)| record_len(sealed)).sum();
        if self.make_room(writing, len) {
            let written = if self.append_run(writing, kind, frames, 0) { frames.len() } else { 0 };
            add(&self.counters.written_frames, written);
        } else if let [_] = frames {
            add(&self.counters.write_dropped, 1);
        } else {
            frames.chunks(1).for_each(|alone| self.append_or_drop(writing, kind, alone));
        }
    }

    /// Indexes what was written and is not indexed yet.
    pub(crate) fn settle(&self) {
        self.index_all(&mut self.writer.lock());
    }

    /// Indexes what was written and closes the index. Afterwards nothing is found here.
    pub(crate) fn close(&self) {
        self.settle();
        self.index.close();
        let _ = rustix::fs::flock(&self.lock, rustix::fs::FlockOperation::Unlock);
    }

    /// A copy of what the directory is locked by.
    pub(crate) fn lock(&self) -> io::Result<OwnedFd> {
        self.lock.as_fd().try_clone_to_owned()
    }

    /// Whether the lock of that directory is this one.
    pub(crate) fn is_locked(&self, directory: &Path) -> bool {
        let (ours, there) = (self.lock.metadata(), fs::metadata(directory.join(LOCK)));
        let same = |ours: Metadata, there: Metadata| ours.dev() == there.dev() && ours.ino() == there.ino();
        ours.is_ok_and(|ours| there.is_ok_and(|there| same(ours, there)))
    }

    /// Appends a record for each frame, all with one write, if they fit under the cap; whether they are on disk now.
    fn append_run(&self, writing: &mut Writing, kind: Kind, frames: &[(FrameId, &Sealed)], heat: u8) -> bool {
        let records_len: u64 = frames.iter().map(|(_, sealed)| record_len(sealed)).sum();
        self.roll_if_full(writing, kind, records_len);
        let header = if writing.of(kind).active.is_none() { SEGMENT_HEADER_BYTES } else { 0 };
        if self.used() + header + records_len > self.bytes_max {
            return false;
        }
        if header > 0 && !self.begin(writing, kind) {
            return false;
        }
        let Some((number, segment)) = writing.of(kind).active.clone() else { return false };
        let offset = segment.len.load(Ordering::Relaxed);
        if let Err(error) = segment::write(&segment.file, offset, frames) {
            self.write_failed(&error);
            if segment.file.set_len(offset).is_err() {
                // what lies behind is unknown: count it and begin another segment
                let len = segment.file.metadata().map_or(offset + records_len, |meta| meta.len());
                segment.len.store(len.max(offset), Ordering::Relaxed);
                self.counters.disk_used_bytes.fetch_add(len.saturating_sub(offset), Ordering::Relaxed);
                self.roll(writing, kind);
            }
            return false;
        }
        writing.recent.note(&segment, offset..offset + records_len);
        self.counters.disk_used_bytes.fetch_add(records_len, Ordering::Relaxed);
        frames.iter().for_each(|frame| self.take_in(writing.of(kind), (number, &segment), *frame, heat));
        true
    }

    /// Takes note of a record that was written to the end of a segment.
    fn take_in(
        &self,
        growing: &mut Growing,
        (number, segment): (u32, &Segment),
        (id, sealed): (FrameId, &Sealed),
        heat: u8,
    ) {
        let record = RecordHeader::of(id, sealed);
        let offset = segment.len.fetch_add(record.record_len(), Ordering::Relaxed);
        let location = Location::of(number, offset, record);
        self.locations.insert(id, location, heat);
        growing.unindexed.push((id, location));
        if growing.unindexed.len() == BATCH_MAX - 1 {
            self.index_active(growing);
        }
    }

    fn roll_if_full(&self, writing: &mut Writing, kind: Kind, record_len: u64) {
        let full = writing.of(kind).active.as_ref().is_some_and(|(_, segment)| {
            let len = segment.len.load(Ordering::Relaxed);
            len > SEGMENT_HEADER_BYTES && len + record_len > self.segment_bytes
        });
        if full {
            self.roll(writing, kind);
        }
    }

    /// Begins a new active segment.
    fn begin(&self, writing: &mut Writing, kind: Kind) -> bool {
        let number = writing.next;
        let path = segment_path(&self.segments_directory, number);
        let created = File::options().read(true).write(true).create_new(true).open(&path);
        let file = match created.and_then(|file| segment::begin(&file, kind).map(|()| file)) {
            Ok(file) => file,
            Err(error) => {
                self.write_failed(&error);
                let _ = fs::remove_file(&path);
                return false;
            }
        };
        writing.next += 1;
        let segment = Arc::new(Segment { file, len: AtomicU64::new(SEGMENT_HEADER_BYTES), kind });
        self.counters.disk_used_bytes.fetch_add(SEGMENT_HEADER_BYTES, Ordering::Relaxed);
        self.segments.write().insert(number, segment.clone());
        writing.of(kind).active = Some((number, segment));
        true
    }

    /// Ends an active segment.
    fn roll(&self, writing: &mut Writing, kind: Kind) {
        let growing = writing.of(kind);
        self.index_active(growing);
        growing.active = None;
    }

    fn index_all(&self, writing: &mut Writing) {
        self.index_active(&mut writing.new);
        self.index_active(&mut writing.kept);
    }

    fn index_active(&self, growing: &mut Growing) {
        let records = std::mem::take(&mut growing.unindexed);
        if let (false, Some((number, segment))) = (records.is_empty(), &growing.active) {
            self.count(self.index.add(&records, *number, segment.len.load(Ordering::Relaxed)));
        }
    }

    /// What the segment files and whole files take now, in bytes.
    fn used(&self) -> u64 {
        self.counters.disk_used_bytes.load(Ordering::Relaxed)
    }

    fn write_failed(&self, error: &io::Error) {
        if self.counters.disk_failures.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!(directory = %self.segments_directory.display(), %error, "the cache's disk fails; going on without");
        }
    }

    fn count<T>(&self, result: Result<T, index::IndexError>) {
        if let Err(error) = result
            && self.counters.disk_failures.fetch_add(1, Ordering::Relaxed) == 0
        {
            warn!(%error, "the cache's index fails; going on without");
        }
    }
}

/// What a frame takes in a segment, in bytes.
fn record_len(sealed: &Sealed) -> u64 {
    (RECORD_HEADER_BYTES + sealed.bytes().len()) as u64
}

/// The file of a segment.
fn segment_path(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("{number:08x}.segment"))
}

#[cfg(test)]
mod tests;
