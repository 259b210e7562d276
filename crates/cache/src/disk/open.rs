//! Opening the directory: the lock, the index, and what a crash left.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lamina_chunk::FrameId;
use parking_lot::{Mutex, RwLock};
use rustix::fs::FlockOperation;
use tracing::{info, warn};

use super::evict::Marks;
use super::index::{BATCH_MAX, Index, Location};
use super::locations::Locations;
use super::segment::{self, Kind, SEGMENT_HEADER_BYTES, Segment};
use super::whole::Wholes;
use super::{Disk, LOCK, Writing, directory, segment_path};
use crate::CacheError;
use crate::metrics::{Counters, add};

/// A segment is this part of the cap, so that evicting one loses little and few files are open,
const SEGMENTS_PER_CAP: u64 = 64;
/// but not so small that it holds only one frame,
const SEGMENT_BYTES_MIN: u64 = 64 << 10;
/// nor so large that offsets overflow.
const SEGMENT_BYTES_MAX: u64 = 2 << 30;

impl Disk {
    /// Takes the directory over: locks it, cuts what a crash left torn, brings the index up to date, and evicts until
    /// the cap holds.
    ///
    /// Cost: with a good index a `stat` a segment; else one small read for each record that is not indexed.
    pub(crate) fn open(
        directory: &Path,
        bytes_max: u64,
        inherited: Option<OwnedFd>,
        counters: Arc<Counters>,
    ) -> Result<Self, CacheError> {
        let failed =
            |cause| CacheError::Directory { directory: directory.to_owned(), cause: Arc::new(cause) };
        let segments_directory = directory.join("segments");
        directory::prepare(directory)?;
        let lock = lock(directory, inherited)?;
        directory::stamp(directory);
        fs::create_dir_all(&segments_directory).map_err(failed)?;
        let index = Index::open(&directory.join("index")).unwrap_or_else(|error| {
            warn!(%error, "no index can be made; the cache works without its disk");
            add(&counters.disk_failures, 1);
            Index::none()
        });
        let segment_bytes = (bytes_max / SEGMENTS_PER_CAP).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
        let disk = Self {
            segments_directory,
            bytes_max,
            index,
            locations: Locations::default(),
            segments: RwLock::default(),
            marks: Marks::of(bytes_max, segment_bytes),
            segment_bytes,
            writer: Mutex::new(Writing { next: 1, ..Writing::default() }),
            pins: Mutex::default(),
            wholes: Wholes::new(directory.join("whole")),
            counters,
            lock,
        };
        let mut scanned = Vec::new();
        for number in disk.numbers().map_err(failed)? {
            scanned.extend(disk.adopt(number).map_err(failed)?);
        }
        disk.load(scanned);
        disk.adopt_wholes();
        {
            let mut writing = disk.writer.lock();
            disk.evict_down_to(&mut writing, disk.marks.high, disk.marks.low);
        }
        disk.resume();
        Ok(disk)
    }

    /// The numbers of the segments in the directory, ascending.
    fn numbers(&self) -> io::Result<Vec<u32>> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.segments_directory)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".segment"));
            numbers.extend(number.and_then(|digits| u32::from_str_radix(digits, 16).ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Takes one segment in, and gives what the index does not know of it yet. A file that is no segment is removed.
    fn adopt(&self, number: u32) -> io::Result<Vec<(FrameId, Location)>> {
        let path = segment_path(&self.segments_directory, number);
        let file = File::options().read(true).write(true).open(&path)?;
        let len = file.metadata()?.len();
        self.writer.lock().next = number.saturating_add(1);
        let Some(kind) = segment::begins(&file).filter(|_| len <= u64::from(u32::MAX)) else {
            info!(path = %path.display(), "removing a file that is no segment");
            fs::remove_file(&path)?;
            return Ok(Vec::new());
        };
        let indexed = self.index.indexed(number).unwrap_or_default();
        let from = indexed.filter(|indexed| (SEGMENT_HEADER_BYTES..=len).contains(indexed));
        let (records, end) = segment::scan(&file, from.unwrap_or(SEGMENT_HEADER_BYTES), len);
        if end < len {
            info!(path = %path.display(), bytes = len - end, "cutting the torn end of a segment");
            file.set_len(end)?;
        }
        let records: Vec<_> = records
            .iter()
            .map(|&(offset, record)| (record.id, Location::of(number, offset, record)))
            .collect();
        for (batch, indexed) in batches(&records, end) {
            self.count(self.index.add(batch, number, indexed));
        }
        let segment = Segment { file, len: AtomicU64::new(end), kind };
        self.segments.write().insert(number, Arc::new(segment));
        self.counters.disk_used_bytes.fetch_add(end, Ordering::Relaxed);
        Ok(records)
    }

    /// Takes over what the index knows of segments that are here, and what was scanned. The index is not asked again.
    fn load(&self, scanned: Vec<(FrameId, Location)>) {
        let known = self.index.entries().unwrap_or_else(|error| {
            self.count::<()>(Err(error));
            Vec::new()
        });
        let segments = self.segments.read();
        for (id, location) in known.into_iter().chain(scanned) {
            let end = u64::from(location.offset) + location.header(id).record_len();
            let segment = segments.get(&location.segment);
            if segment.is_some_and(|segment| end <= segment.len.load(Ordering::Relaxed)) {
                self.locations.insert(id, location, 0);
            }
        }
    }

    /// Goes on with the newest segment of each kind while it is not full.
    fn resume(&self) {
        let segments = self.segments.read();
        let mut writing = self.writer.lock();
        for kind in [Kind::New, Kind::Kept] {
            let of_kind = segments.iter().filter(|(_, segment)| segment.kind == kind);
            if let Some((number, segment)) = of_kind.max_by_key(|(number, _)| **number)
                && segment.len.load(Ordering::Relaxed) < self.segment_bytes
            {
                writing.of(kind).active = Some((*number, segment.clone()));
            }
        }
    }
}

/// Scanned records in batches for the index, each with how far the segment is indexed with it. Later batches may be lost where
/// the process is killed: no batch says that theirs are there.
fn batches(records: &[(FrameId, Location)], end: u64) -> impl Iterator<Item = (&[(FrameId, Location)], u64)> {
    let next = records.chunks(BATCH_MAX - 1).skip(1).map(|batch| u64::from(batch[0].1.offset));
    records.chunks(BATCH_MAX - 1).zip(next.chain([end]))
}

/// Makes this process the owner of the directory: by the `inherited` lock of one that died, where there is one.
fn lock(directory: &Path, inherited: Option<OwnedFd>) -> Result<File, CacheError> {
    let failed = |cause| CacheError::Directory { directory: directory.to_owned(), cause: Arc::new(cause) };
    let path = directory.join(LOCK);
    let mut file = match inherited {
        Some(lock) => File::from(lock),
        None => {
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?
        }
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            let known = file.read_to_string(&mut pid).is_ok() && !pid.trim().is_empty();
            let pid = known.then(|| pid.trim().to_owned());
            return Err(CacheError::Busy { directory: directory.to_owned(), pid });
        }
        Err(error) => return Err(failed(error.into())),
    }
    // a full disk must not keep the cache from opening: the pid is for people
    let pid = format!("{}\n", std::process::id());
    let _ = file.set_len(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0));
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_batch_says_that_records_of_a_later_one_are_indexed() {
        let records: Vec<_> = (0..250u32)
            .map(|n| {
                let location = Location { segment: 1, offset: 16 + n * 100, sealed_len: 56, plain_len: 60 };
                (FrameId::of(&n.to_le_bytes()), location)
            })
            .collect();
        let batches: Vec<_> =
            batches(&records, 25_016).map(|(batch, indexed)| (batch.len(), indexed)).collect();
        assert_eq!(batches, [(99, 16 + 99 * 100), (99, 16 + 198 * 100), (52, 25_016)]);
    }
}
