//! Where on disk each frame lies, as it was last known: a sled database that only saves a scan at the next open.
//! Everything in it is rebuilt from the segments when it is missing, damaged, or behind.
//!
//! It is read once, at open, and then only written, by one thread: databases of this version are known to hang when
//! several threads use them at once, and a reader must never hang.
//!
//! Two kinds of keys: a frame's id (32 bytes) to its [`Location`], and `segment` with a number (11 bytes) to how far
//! that segment is indexed. A batch carries both, so that after a crash only the tail is scanned again.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use lamina_chunk::FrameId;
use parking_lot::RwLock;
use tracing::warn;

use super::segment::RecordHeader;

/// Entries in one batch, the checkpoint included. Batches of 1,000 were measured to take gigabytes of memory.
pub(crate) const BATCH_MAX: usize = 100;
/// The database's own cache, in bytes. It is no cap on its memory, but small is enough: the system caches too.
const CACHE_BYTES: u64 = 16 << 20;
/// Opening takes 0.6 s for 5 million entries; a database that takes this long is broken, and scanning is faster.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);
/// The layout of keys and values; another one is thrown away.
const STAMP: &[u8] = b"lamina cache index 1";
const STAMP_KEY: &[u8] = b"format";

/// The record of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) segment: u32,
    pub(crate) offset: u32,
    pub(crate) sealed_len: u32,
    pub(crate) plain_len: u32,
}

impl Location {
    /// Where a record lies that begins at `offset`, which panics beyond 4 GiB: no segment is that long.
    pub(crate) fn of(segment: u32, offset: u64, record: RecordHeader) -> Self {
        let RecordHeader { sealed_len, plain_len, .. } = record;
        let offset = u32::try_from(offset).expect("segments stay below 4 GiB");
        Self { segment, offset, sealed_len, plain_len }
    }

    /// What the record's header must say.
    pub(crate) fn header(&self, id: FrameId) -> RecordHeader {
        RecordHeader { id, sealed_len: self.sealed_len, plain_len: self.plain_len }
    }

    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (at, word) in [self.segment, self.offset, self.sealed_len, self.plain_len].iter().enumerate() {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 16] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Some(Self { segment: word(0), offset: word(4), sealed_len: word(8), plain_len: word(12) })
    }
}

/// The index failed. It is worked without, until the next open.
#[derive(Debug, thiserror::Error)]
#[error("the cache's index failed: {0}")]
pub(crate) struct IndexError(String);

impl From<sled::Error> for IndexError {
    fn from(error: sled::Error) -> Self {
        Self(error.to_string())
    }
}

/// The database, until it is closed.
pub(crate) struct Index(RwLock<Option<sled::Db>>);

impl Index {
    /// Opens the index in `path`, or an empty one where that cannot be done. Never takes longer than about twice
    /// [`OPEN_DEADLINE`].
    pub(crate) fn open(path: &Path) -> Result<Self, IndexError> {
        let db = match open_guarded(path) {
            Ok(db) => db,
            Err(error) => {
                warn!(%error, "the cache's index is thrown away and rebuilt");
                let aside = path.with_extension("bad");
                let _ = fs::remove_dir_all(&aside);
                if fs::rename(path, &aside).is_ok() {
                    let _ = fs::remove_dir_all(&aside);
                }
                open_guarded(path)?
            }
        };
        Ok(Self(RwLock::new(Some(db))))
    }

    /// An index that finds nothing, for when none can be opened.
    pub(crate) fn none() -> Self {
        Self(RwLock::new(None))
    }

    /// Everything it knows, in no order. Entries of a kind that it does not have are left out.
    pub(crate) fn entries(&self) -> Result<Vec<(FrameId, Location)>, IndexError> {
        self.with(|db| {
            let mut entries = Vec::new();
            for entry in db.iter() {
                let (key, value) = entry?;
                let id: Result<[u8; 32], _> = key.as_ref().try_into();
                if let (Ok(id), Some(location)) = (id, Location::from_bytes(&value)) {
                    entries.push((FrameId::from_bytes(id), location));
                }
            }
            Ok(entries)
        })
    }

    /// Adds fewer than [`BATCH_MAX`] records of `segment`, and notes that it is indexed up to `end`.
    pub(crate) fn add(
        &self,
        records: &[(FrameId, Location)],
        segment: u32,
        end: u64,
    ) -> Result<(), IndexError> {
        assert!(records.len() < BATCH_MAX, "{} records in a batch", records.len());
        self.with(|db| {
            let mut batch = sled::Batch::default();
            for (id, location) in records {
                batch.insert(&id.as_bytes()[..], &location.to_bytes()[..]);
            }
            batch.insert(&checkpoint_key(segment)[..], &end.to_le_bytes()[..]);
            Ok(db.apply_batch(batch)?)
        })
    }

    /// How far `segment` is indexed, in bytes.
    pub(crate) fn indexed(&self, segment: u32) -> Result<Option<u64>, IndexError> {
        self.with(|db| {
            let value = db.get(checkpoint_key(segment))?;
            Ok(value.and_then(|value| Some(u64::from_le_bytes(value.as_ref().try_into().ok()?))))
        })
    }

    /// Forgets frames, and how far `segment` is indexed.
    pub(crate) fn forget(&self, frames: &[FrameId], segment: u32) -> Result<(), IndexError> {
        // the checkpoint goes first: without it the segment is scanned, should it still be there
        self.with(|db| Ok(db.remove(checkpoint_key(segment)).map(|_| ())?))?;
        for some in frames.chunks(BATCH_MAX) {
            self.with(|db| {
                let mut batch = sled::Batch::default();
                some.iter().for_each(|id| batch.remove(&id.as_bytes()[..]));
                Ok(db.apply_batch(batch)?)
            })?;
        }
        Ok(())
    }

    /// Closes the database; afterwards nothing is found.
    pub(crate) fn close(&self) {
        if let Some(db) = self.0.write().take() {
            // a panic on a full disk must not take the process along
            let _ = catch_unwind(AssertUnwindSafe(move || {
                let _ = db.flush();
                drop(db);
            }));
        }
    }

    /// Runs `act`, turning a panic of the database into an error.
    fn with<T: Default>(
        &self,
        act: impl FnOnce(&sled::Db) -> Result<T, IndexError>,
    ) -> Result<T, IndexError> {
        let guard = self.0.read();
        let Some(db) = guard.as_ref() else { return Ok(T::default()) };
        catch_unwind(AssertUnwindSafe(|| act(db)))
            .unwrap_or_else(|_| Err(IndexError("the database panicked".to_owned())))
    }
}

fn checkpoint_key(segment: u32) -> [u8; 11] {
    let mut key = *b"segment\0\0\0\0";
    key[7..].copy_from_slice(&segment.to_be_bytes());
    key
}

/// Opens on a thread of its own, since the database may panic or never return on what a crash left.
fn open_guarded(path: &Path) -> Result<sled::Db, IndexError> {
    let (path, (opened, open)) = (path.to_owned(), sync_channel(1));
    std::thread::Builder::new()
        .name("lamina-index".to_owned())
        .spawn(move || {
            let result = catch_unwind(|| {
                let db = sled::Config::new()
                    .path(path)
                    .cache_capacity(CACHE_BYTES)
                    .flush_every_ms(Some(1000))
                    .open()?;
                match db.get(STAMP_KEY)? {
                    Some(stamp) if stamp.as_ref() == STAMP => {}
                    None if db.is_empty() => {
                        db.insert(STAMP_KEY, STAMP)?;
                    }
                    _ => return Err(IndexError("it has another format".to_owned())),
                }
                Ok(db)
            });
            let result = result.unwrap_or_else(|_| Err(IndexError("it panicked while opening".to_owned())));
            let _ = opened.send(result);
        })
        .map_err(|error| IndexError(error.to_string()))?;
    open.recv_timeout(OPEN_DEADLINE)
        .unwrap_or_else(|_| Err(IndexError(format!("it did not open within {OPEN_DEADLINE:?}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_index_is_replaced_by_an_empty_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("index");
        fs::create_dir(&path).expect("created");
        for name in ["db", "conf"] {
            fs::write(path.join(name), [0xab; 5000]).expect("written");
        }
        let index = Index::open(&path).expect("opened");
        let id = FrameId::of(b"x");
        assert_eq!(index.entries().expect("read"), []);
        let location = Location { segment: 1, offset: 16, sealed_len: 3, plain_len: 4 };
        index.add(&[(id, location)], 1, 83).expect("added");
        assert_eq!(index.entries().expect("read"), [(id, location)]);
        assert_eq!(index.indexed(1).expect("found"), Some(83));
        index.forget(&[id], 1).expect("forgotten");
        assert_eq!(index.entries().expect("read"), []);
        assert_eq!(index.indexed(1).expect("found"), None);
    }
}
