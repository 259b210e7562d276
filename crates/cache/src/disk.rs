//! The disk tier: sealed frames in segment files, never more bytes than the cap.
//!
//! Frames are only appended. When the next one would not fit, whole segments are evicted first, the one that was
//! least recently written to or read from (after a restart: the oldest). What is read back is a claim until it has
//! been opened. A failure of the disk is counted and costs only speed. No fsync: a crash of the machine may leave
//! records that do not verify, and those are dropped when read.

mod index;
mod locations;
mod open;
mod segment;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lamina_chunk::{FrameId, Sealed};
use parking_lot::{Mutex, RwLock};
use tracing::{debug, warn};

use self::index::{BATCH_MAX, Index, Location};
use self::locations::Locations;
use self::segment::{RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, Segment};
use crate::metrics::{Counters, add};

/// The directory of frames.
pub(crate) struct Disk {
    segments_directory: PathBuf,
    bytes_max: u64,
    segment_bytes: u64,
    index: Index,
    locations: Locations,
    segments: RwLock<HashMap<u32, Arc<Segment>>>,
    writer: Mutex<Writing>,
    clock: AtomicU64,
    counters: Arc<Counters>,
    /// Holds the directory's lock for as long as it lives.
    lock: File,
}

/// What only the one that appends touches.
struct Writing {
    /// The segment that grows.
    active: Option<(u32, Arc<Segment>)>,
    next: u32,
    /// Written, and not in the index yet. All in the active segment.
    unindexed: Vec<(FrameId, Location)>,
}

impl Disk {
    /// Whether the frame is here. Never does I/O.
    pub(crate) fn contains(&self, id: FrameId) -> bool {
        self.locations.find(id).is_some()
    }

    /// The frame, unverified.
    pub(crate) fn read(&self, id: FrameId) -> Option<Sealed> {
        let location = self.locations.find(id)?;
        // none where it was evicted just now
        let segment = self.segments.read().get(&location.segment).cloned()?;
        let frame = segment::read(&segment.file, u64::from(location.offset), location.header(id));
        match frame {
            Ok(Some(sealed)) => {
                segment.used_at.store(self.tick(), Ordering::Relaxed);
                Some(sealed)
            }
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
    /// are left out.
    pub(crate) fn append(&self, frames: &[(FrameId, Sealed)]) {
        let mut writing = self.writer.lock();
        for (id, sealed) in frames {
            if self.contains(*id) {
                continue;
            }
            self.append_one(&mut writing, *id, sealed);
            if writing.unindexed.len() == BATCH_MAX - 1 {
                self.index_active(&mut writing);
            }
        }
        self.index_active(&mut writing);
    }

    /// Indexes what was written and closes the index. Afterwards nothing is found here.
    pub(crate) fn close(&self) {
        self.index_active(&mut self.writer.lock());
        self.index.close();
        let _ = rustix::fs::flock(&self.lock, rustix::fs::FlockOperation::Unlock);
    }

    fn append_one(&self, writing: &mut Writing, id: FrameId, sealed: &Sealed) {
        let record_len = (RECORD_HEADER_BYTES + sealed.bytes().len()) as u64;
        if !self.make_room(writing, record_len) {
            return;
        }
        let Some((number, segment)) = writing.active.clone() else { return };
        let (offset, record) = (segment.len.load(Ordering::Relaxed), RecordHeader::record(id, sealed));
        if let Err(error) = segment.file.write_all_at(&record, offset) {
            self.write_failed(&error);
            if segment.file.set_len(offset).is_err() {
                // what lies behind is unknown: count it and begin another segment
                let len = segment.file.metadata().map_or(offset + record_len, |meta| meta.len());
                segment.len.store(len.max(offset), Ordering::Relaxed);
                self.counters.disk_used_bytes.fetch_add(len.saturating_sub(offset), Ordering::Relaxed);
                self.roll(writing);
            }
            return;
        }
        segment.len.store(offset + record_len, Ordering::Relaxed);
        segment.used_at.store(self.tick(), Ordering::Relaxed);
        self.counters.disk_used_bytes.fetch_add(record_len, Ordering::Relaxed);
        add(&self.counters.written_frames, 1);
        let small = |len: usize| u32::try_from(len).expect("frames are at most 256 KiB");
        let location = Location {
            segment: number,
            offset: u32::try_from(offset).expect("segments stay below 4 GiB"),
            sealed_len: small(sealed.bytes().len()),
            plain_len: small(sealed.plain_len()),
        };
        self.locations.insert(id, location);
        writing.unindexed.push((id, location));
    }

    /// Rolls and evicts until a record of `record_len` bytes may be written to the active segment.
    fn make_room(&self, writing: &mut Writing, record_len: u64) -> bool {
        if record_len + SEGMENT_HEADER_BYTES > self.bytes_max {
            return false;
        }
        let full = writing.active.as_ref().is_some_and(|(_, segment)| {
            let len = segment.len.load(Ordering::Relaxed);
            len > SEGMENT_HEADER_BYTES && len + record_len > self.segment_bytes
        });
        if full {
            self.roll(writing);
        }
        loop {
            let header = if writing.active.is_none() { SEGMENT_HEADER_BYTES } else { 0 };
            let used = self.counters.disk_used_bytes.load(Ordering::Relaxed);
            if used + header + record_len <= self.bytes_max {
                break;
            }
            let active = writing.active.as_ref().map(|(number, _)| *number);
            match self.coldest(active) {
                Some(number) => self.evict(number),
                None if active.is_some() => self.roll(writing),
                None => return false,
            }
        }
        writing.active.is_some() || self.begin(writing)
    }

    /// Begins a new active segment.
    fn begin(&self, writing: &mut Writing) -> bool {
        let number = writing.next;
        let path = segment_path(&self.segments_directory, number);
        let created = File::options().read(true).write(true).create_new(true).open(&path);
        let file = match created.and_then(|file| segment::begin(&file).map(|()| file)) {
            Ok(file) => file,
            Err(error) => {
                self.write_failed(&error);
                let _ = fs::remove_file(&path);
                return false;
            }
        };
        writing.next += 1;
        let segment = Arc::new(Segment {
            file,
            len: AtomicU64::new(SEGMENT_HEADER_BYTES),
            used_at: AtomicU64::new(self.tick()),
        });
        self.counters.disk_used_bytes.fetch_add(SEGMENT_HEADER_BYTES, Ordering::Relaxed);
        self.segments.write().insert(number, segment.clone());
        writing.active = Some((number, segment));
        true
    }

    /// Ends the active segment.
    fn roll(&self, writing: &mut Writing) {
        self.index_active(writing);
        writing.active = None;
    }

    fn index_active(&self, writing: &mut Writing) {
        let records = std::mem::take(&mut writing.unindexed);
        if let (false, Some((number, segment))) = (records.is_empty(), &writing.active) {
            self.count(self.index.add(&records, *number, segment.len.load(Ordering::Relaxed)));
        }
    }

    /// The segment that was used least recently, `active` aside.
    fn coldest(&self, active: Option<u32>) -> Option<u32> {
        let segments = self.segments.read();
        let others = segments.iter().filter(|(number, _)| Some(**number) != active);
        others
            .min_by_key(|(number, segment)| (segment.used_at.load(Ordering::Relaxed), **number))
            .map(|(n, _)| *n)
    }

    /// Removes a whole segment. Readers that have it open finish undisturbed.
    fn evict(&self, number: u32) {
        let Some(segment) = self.segments.write().remove(&number) else { return };
        let len = segment.len.load(Ordering::Relaxed);
        let gone =
            self.locations.forget_segment(segment::scan(&segment.file, SEGMENT_HEADER_BYTES, len).0, number);
        self.count(self.index.forget(&gone, number));
        if let Err(error) = fs::remove_file(segment_path(&self.segments_directory, number)) {
            // its bytes stay counted, so that the cap still holds
            self.write_failed(&error);
            return;
        }
        self.counters.disk_used_bytes.fetch_sub(len, Ordering::Relaxed);
        add(&self.counters.evicted_segments, 1);
        self.counters.evicted_bytes.fetch_add(len, Ordering::Relaxed);
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    fn write_failed(&self, error: &std::io::Error) {
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

/// The file of a segment.
fn segment_path(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("{number:08x}.segment"))
}

#[cfg(test)]
mod tests;
