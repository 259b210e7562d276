//! What goes when the disk is full, and what stays.
//!
//! The policy is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023) with segments in the
//! place of objects. What is fetched goes into *new* segments. The oldest of these is evicted first: what was read from it
//! since moves to a *kept* segment, the rest goes, so that a scan through an image pushes out only other scans, and not what
//! every start reads. Only where new segments hold less than a tenth of the cap the oldest kept one is evicted, and there too
//! what was read since stays. A frame that is fetched again soon after it went is kept at once.
//!
//! On a recorded trace of two torch images (`cargo bench --bench eviction`, the table in FORMAT.md) starts that come again find
//! 85 % of their bytes where the cap is a quarter of all, with an exact LRU 59 %, and at no cap less than with it. The price is what
//! survives and is written again: up to four fifths of what is fetched.
//!
//! Reads are those of the disk: the memory in front of it takes the many reads of one frame that belong together.
//! Pinned frames always stay: a segment with some goes only where there is room for its copies, and one that they nearly fill,
//! which would be written again for nothing, is passed over. Where they leave no room, what comes is not kept.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use lamina_chunk::{FrameId, Sealed};

use super::index::Location;
use super::locations::key;
use super::segment::{self, Kind, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, Segment};
use super::{Disk, Writing, record_len, segment_path};
use crate::metrics::add;

/// New segments hold at least this part of the cap, as in the paper.
const NEW_PART: u64 = 10;
/// Frames that are remembered for a while after they went, 16 bytes each: 4 GB of frames of 64 KiB.
const GHOSTS_MAX: usize = 64 << 10;
/// Survivors are copied in batches of so many bytes. The last one is held in memory while the old segment is removed, so that
/// small caches need no room for copies.
const COPY_BYTES: u64 = 4 << 20;
/// A kept segment goes only where less than so many eighths of it are pinned. With all that may be pinned by a node, three
/// quarters of the cap, in such segments, they take 86 % of it, and there is still something that can go.
const PINNED_EIGHTHS: u64 = 7;

/// The watermarks, in bytes of segment files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marks {
    /// A write that would go above this evicts first.
    pub(super) high: u64,
    /// Eviction ends here.
    pub(super) low: u64,
}

impl Marks {
    /// Between the high mark and the cap there is room for the survivors of a whole segment.
    pub(super) fn of(bytes_max: u64, segment_bytes: u64) -> Self {
        let room = if segment_bytes > COPY_BYTES { 2 * segment_bytes } else { 0 };
        let high = bytes_max.saturating_sub(room);
        // small caches evict as little as they can
        let low = if segment_bytes > COPY_BYTES { high.saturating_sub(segment_bytes) } else { high };
        Self { high, low }
    }
}

/// Frames that were evicted lately.
#[derive(Default)]
pub(super) struct Ghosts {
    known: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Ghosts {
    fn insert(&mut self, id: FrameId) {
        if self.known.insert(key(id)) {
            self.order.push_back(key(id));
        }
        while self.order.len() > GHOSTS_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }

    /// Whether the frame went lately. It is not asked about twice.
    pub(super) fn remove(&mut self, id: FrameId) -> bool {
        self.known.remove(&key(id))
    }
}

impl Disk {
    /// Keeps these frames, whether they are here or still to come, until they are unpinned as often.
    pub(crate) fn pin(&self, ids: impl IntoIterator<Item = FrameId>) {
        let mut pins = self.pins.lock();
        for id in ids {
            *pins.entry(key(id)).or_default() += 1;
        }
    }

    /// Takes one pin off each.
    pub(crate) fn unpin(&self, ids: impl IntoIterator<Item = FrameId>) {
        let mut pins = self.pins.lock();
        for id in ids {
            if let Some(count) = pins.get_mut(&key(id)) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(&key(id));
                }
            }
        }
    }

    /// Evicts until a record of `record_len` bytes fits; whether it does.
    pub(super) fn make_room(&self, writing: &mut Writing, record_len: u64) -> bool {
        let needed = record_len + SEGMENT_HEADER_BYTES;
        if needed > self.bytes_max {
            return false;
        }
        let above = |mark: u64| mark.saturating_sub(needed);
        if self.used() > above(self.marks.high) {
            self.evict_down_to(writing, above(self.marks.high), above(self.marks.low));
        }
        self.used() + needed <= self.bytes_max
    }

    /// Evicts down to `low`, where more than `high` is used: whole files, then segments. Gives up where everything is pinned.
    pub(super) fn evict_down_to(&self, writing: &mut Writing, high: u64, low: u64) {
        if self.used() <= high {
            return;
        }
        while self.used() > low && self.evict_whole() {}
        // each segment is looked at a few times at most: until what was read has cooled down
        let mut rounds = 4 * (self.segments.read().len() + 1);
        while self.used() > low && rounds > 0 {
            rounds -= 1;
            let Some((number, segment)) = self.victim() else { return };
            if writing.is_active(number) {
                self.roll(writing, segment.kind);
            }
            self.evict(writing, number, &segment);
        }
    }

    /// Which segment goes first; none where all that could go is pinned.
    fn victim(&self) -> Option<(u32, Arc<Segment>)> {
        let pinned_bytes = self.pinned_bytes();
        let segments = self.segments.read();
        let new_bytes: u64 = segments
            .values()
            .filter(|segment| segment.kind == Kind::New)
            .map(|segment| segment.len.load(Ordering::Relaxed))
            .sum();
        let can_go = |number: &u32, segment: &Segment| {
            let (len, pinned) = (segment.len.load(Ordering::Relaxed), pinned_bytes.get(number));
            let is_worth_it = |pinned| segment.kind == Kind::New || 8 * pinned < PINNED_EIGHTHS * len;
            pinned.is_none_or(|pinned| is_worth_it(*pinned) && self.has_room_for_copies(len))
        };
        let oldest = |kind| {
            let of_kind =
                segments.iter().filter(|(number, segment)| segment.kind == kind && can_go(number, segment));
            of_kind.min_by_key(|(number, _)| **number)
        };
        let (first, second) = match new_bytes > self.bytes_max / NEW_PART {
            true => (Kind::New, Kind::Kept),
            false => (Kind::Kept, Kind::New),
        };
        let (number, segment) = oldest(first).or_else(|| oldest(second))?;
        Some((*number, segment.clone()))
    }

    /// The bytes of pinned records by segment. Costs a look into two tables for each pin.
    fn pinned_bytes(&self) -> HashMap<u32, u64> {
        let mut bytes = HashMap::new();
        for key in self.pins.lock().keys() {
            if let Some(location) = self.locations.find_key(*key) {
                *bytes.entry(location.segment).or_default() +=
                    RECORD_HEADER_BYTES as u64 + u64::from(location.sealed_len);
            }
        }
        bytes
    }

    /// Whether a segment of `len` bytes finds room even if all of it survives.
    fn has_room_for_copies(&self, len: u64) -> bool {
        // a segment of a larger cap takes several
        let headers = len / self.segment_bytes * SEGMENT_HEADER_BYTES;
        let before_it_goes = if len > COPY_BYTES { len } else { 0 };
        self.used() + before_it_goes + headers <= self.bytes_max
    }

    /// Removes a whole segment but for what survives. Readers that have it open finish undisturbed.
    fn evict(&self, writing: &mut Writing, number: u32, segment: &Segment) {
        let len = segment.len.load(Ordering::Relaxed);
        let (records, _) = segment::scan(&segment.file, SEGMENT_HEADER_BYTES, len);
        let (mut batch, mut batch_bytes, mut gone) = (Vec::new(), 0, Vec::new());
        for (offset, record) in records {
            let offset = u32::try_from(offset).expect("segments stay below 4 GiB");
            let (id, sealed_len, plain_len) = (record.id, record.sealed_len, record.plain_len);
            let location = Location { segment: number, offset, sealed_len, plain_len };
            let Some(heat) = self.locations.heat(id, location) else { continue };
            let pinned = self.pins.lock().contains_key(&key(id));
            let sealed = match heat > 0 || pinned {
                true => segment::read(&segment.file, offset.into(), record).ok().flatten(),
                false => None,
            };
            let Some(sealed) = sealed else {
                self.locations.forget(id, location);
                writing.ghosts.insert(id);
                gone.push(id);
                continue;
            };
            if batch_bytes + record_len(&sealed) > COPY_BYTES {
                gone.extend(self.survive(writing, std::mem::take(&mut batch), location.segment));
                batch_bytes = 0;
            }
            batch_bytes += record_len(&sealed);
            batch.push((location, id, sealed, heat.saturating_sub(1)));
        }
        self.segments.write().remove(&number);
        let removed = fs::remove_file(segment_path(&self.segments_directory, number));
        match &removed {
            Ok(()) => {
                self.counters.disk_used_bytes.fetch_sub(len, Ordering::Relaxed);
                add(&self.counters.evicted_segments, 1);
                self.counters.evicted_bytes.fetch_add(len, Ordering::Relaxed);
            }
            // its bytes stay counted, so that the cap still holds
            Err(error) => self.write_failed(error),
        }
        gone.extend(self.survive(writing, batch, number));
        self.count(self.index.forget(&gone, number));
    }

    /// Appends survivors of a segment again. Gives those that found no room.
    fn survive(
        &self,
        writing: &mut Writing,
        batch: Vec<(Location, FrameId, Sealed, u8)>,
        number: u32,
    ) -> Vec<FrameId> {
        let mut gone = Vec::new();
        for (location, id, sealed, heat) in batch {
            debug_assert_eq!(location.segment, number);
            if self.append_run(writing, Kind::Kept, &[(id, &sealed)], heat) {
                add(&self.counters.kept_frames, 1);
                continue;
            }
            self.locations.forget(id, location);
            gone.push(id);
        }
        gone
    }
}
