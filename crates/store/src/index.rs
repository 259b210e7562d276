//! Which chunk lies where: a sled database that caches the indexes of all packs.
//!
//! It promises nothing: what it does not know is stored once more, and what it says is checked against the pack
//! before anyone relies on it. On any error it answers "unknown", and it is built anew at the next start.
//!
//! sled 0.34 is kept on a short lead: batches of at most 100, since 1,000 took 11 GiB of memory; opened in a thread of
//! its own under a deadline, since a damaged database may panic or hang there; and at most one to two million chunks,
//! some 100 GB of distinct plaintext. Cost: 10 to 20 µs a lookup.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use lamina_chunk::{ChunkId, ChunkPlace, Frame, FrameId, PackId, PackRecord, Place};
use parking_lot::RwLock;

use crate::StoreError;

/// Bumped whenever the layout of the values changes: a database with another stamp is thrown away.
const STAMP: &[u8] = b"chunk->pack,offset,sealed,plain,skip,len,frame;2";
const BATCH: usize = 100;
/// sled's own cache; its memory is about half as much again.
const CACHE_BYTES: u64 = 64 << 20;
/// How long one that was closed may stay locked: jobs of sled's threads go on after the database was dropped.
const UNLOCKS_WITHIN: Duration = Duration::from_secs(2);
/// A file that says: build me anew.
const BROKEN: &str = "broken";

#[derive(Debug)]
pub(crate) struct Index {
    directory: PathBuf,
    chunks: sled::Tree,
    /// Number to id: a pack stands here only once all its chunks are in.
    packs: sled::Tree,
    names: RwLock<Names>,
    broken: AtomicBool,
}

/// The packs, as in the database.
#[derive(Debug, Default)]
struct Names {
    ids: HashMap<u32, PackId>,
    numbers: HashMap<PackId, u32>,
    next: u32,
}

impl Index {
    /// Opens the index on a blocking thread.
    pub(crate) async fn open_async(directory: PathBuf, within: Duration) -> Result<Self, StoreError> {
        let opened = tokio::task::spawn_blocking(move || Self::open(&directory, within));
        opened.await.expect("opening catches panics")
    }

    /// Opens the index, or makes an empty one where what is there cannot be used. Blocks.
    pub(crate) fn open(directory: &Path, within: Duration) -> Result<Self, StoreError> {
        Self::open_unlocked(directory, within, UNLOCKS_WITHIN)
    }

    fn open_unlocked(
        directory: &Path,
        within: Duration,
        unlocks_within: Duration,
    ) -> Result<Self, StoreError> {
        if directory.join(BROKEN).exists() {
            discard(directory)?;
        }
        let is_locked = |reason: &String| reason.contains("could not acquire lock");
        let mut opened = open_guarded(directory, within);
        if opened.as_ref().is_err_and(is_locked) {
            wait_until_unlocked(directory, unlocks_within);
            opened = open_guarded(directory, within);
        }
        let first = match opened {
            Ok(index) => return Ok(index),
            Err(reason) if is_locked(&reason) => {
                return Err(StoreError::Index { path: directory.display().to_string(), reason });
            }
            Err(reason) => reason,
        };
        tracing::warn!(index = %directory.display(), reason = first, "the chunk index is thrown away and built anew");
        discard(directory)?;
        let again = open_guarded(directory, within);
        again.map_err(|reason| StoreError::Index { path: directory.display().to_string(), reason })
    }

    /// Whether all chunks of a pack are in.
    pub(crate) fn has(&self, pack: PackId) -> bool {
        self.names.read().numbers.contains_key(&pack)
    }

    /// Takes in the chunks of a pack whose frames were all opened. Blocks.
    pub(crate) fn add(&self, pack: PackId, records: &[PackRecord]) {
        if self.has(pack) {
            return;
        }
        let number = {
            let mut names = self.names.write();
            names.next += 1;
            names.next - 1
        };
        match self.write(number, pack, records) {
            Ok(()) => {
                let mut names = self.names.write();
                names.ids.insert(number, pack);
                names.numbers.insert(pack, number);
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Forgets a pack: its chunks are unknown from now on. Blocks.
    pub(crate) fn remove(&self, pack: PackId) {
        let number = self.names.read().numbers.get(&pack).copied();
        let Some(number) = number else { return };
        {
            let mut names = self.names.write();
            names.ids.remove(&number);
            names.numbers.remove(&pack);
        }
        // its chunks' entries have a number without a name, and are overwritten when they come again
        if let Err(error) = self.packs.remove(number.to_be_bytes()) {
            self.fail(&error);
        }
    }

    /// Forgets every pack but these. Blocks.
    pub(crate) fn retain(&self, packs: &HashSet<PackId>) {
        let known: Vec<PackId> = self.names.read().numbers.keys().copied().collect();
        known.into_iter().filter(|pack| !packs.contains(pack)).for_each(|pack| self.remove(pack));
    }

    /// Where each chunk lies, in the order of `ids`. Blocks.
    pub(crate) fn find(&self, ids: &[ChunkId]) -> Vec<Option<ChunkPlace>> {
        let names = self.names.read();
        ids.iter().map(|id| self.find_one(&names, *id)).collect()
    }

    fn find_one(&self, names: &Names, id: ChunkId) -> Option<ChunkPlace> {
        let value = match self.chunks.get(id.as_bytes()) {
            Ok(value) => value?,
            Err(error) => {
                self.fail(&error);
                return None;
            }
        };
        let (number, place) = decode(id, &value)?;
        // chunks of a pack that was not wholly taken in before a crash have a number without a name
        let pack = *names.ids.get(&number)?;
        Some(ChunkPlace { place: Place { pack, frame: place.place.frame }, ..place })
    }

    fn write(&self, number: u32, pack: PackId, records: &[PackRecord]) -> sled::Result<()> {
        let places: Vec<_> = records.iter().flat_map(|record| record.places(pack)).collect();
        for places in places.chunks(BATCH) {
            let mut batch = sled::Batch::default();
            for (id, place) in places {
                batch.insert(id.as_bytes(), encode(*id, number, place));
            }
            self.chunks.apply_batch(batch)?;
        }
        self.packs.insert(number.to_be_bytes(), pack.as_bytes())?;
        Ok(())
    }

    fn fail(&self, error: &sled::Error) {
        if !self.broken.swap(true, Ordering::Relaxed) {
            tracing::warn!(index = %self.directory.display(), %error, "the chunk index failed; the next start builds it anew");
            // where even this fails, the next open finds out by itself
            let _ = std::fs::write(self.directory.join(BROKEN), error.to_string());
        }
    }
}

/// Six words, and the frame's name where it is not the chunk's.
fn encode(id: ChunkId, number: u32, here: &ChunkPlace) -> Vec<u8> {
    let frame = here.place.frame;
    let words = [number, frame.offset, frame.sealed_len, frame.plain_len, here.skip, here.len];
    let mut value: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    if here.frame_id != id {
        value.extend_from_slice(here.frame_id.as_bytes());
    }
    value
}

/// The pack's number, and the place in a pack without a name.
fn decode(id: ChunkId, value: &[u8]) -> Option<(u32, ChunkPlace)> {
    let (words, frame_id) = value.split_first_chunk::<24>()?;
    let word = |at: usize| u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]]);
    let frame_id = match frame_id {
        [] => id,
        other => FrameId::from_bytes(other.try_into().ok()?),
    };
    let frame = Frame { offset: word(4), sealed_len: word(8), plain_len: word(12) };
    let place = Place { pack: PackId::from_bytes([0; 32]), frame };
    Some((word(0), ChunkPlace { frame_id, place, skip: word(16), len: word(20) }))
}

/// Opens the database in a thread of its own. What it says when it does not open is for a log.
fn open_guarded(directory: &Path, within: Duration) -> Result<Index, String> {
    let (answer, opened) = sync_channel(1);
    let directory = directory.to_owned();
    let opener = std::thread::Builder::new().name("index-open".to_owned());
    let spawned = opener.spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| load(&directory)));
        let result = result.unwrap_or_else(|_| Err("it panicked while it was opened".to_owned()));
        // nobody waits any more after the deadline
        let _ = answer.send(result);
    });
    spawned.map_err(|error| error.to_string())?;
    opened.recv_timeout(within).unwrap_or_else(|_| Err(format!("it did not open within {within:?}")))
}

/// Waits for whoever has the database open, as long as closing it may take.
fn wait_until_unlocked(directory: &Path, within: Duration) {
    let Ok(file) = std::fs::File::open(directory.join("db")) else { return };
    let (free, freed) = sync_channel(1);
    let waiter = std::thread::Builder::new().name("lamina-index-lock".to_owned());
    // where it stays locked, the thread waits on and whoever wanted to open it ends
    let waiting = waiter.spawn(move || {
        let _ = file.lock();
        drop(file);
        let _ = free.send(());
    });
    if waiting.is_ok() {
        let _ = freed.recv_timeout(within);
    }
}

fn load(directory: &Path) -> Result<Index, String> {
    let text = |error: sled::Error| error.to_string();
    let config = sled::Config::new().path(directory).cache_capacity(CACHE_BYTES).flush_every_ms(Some(1000));
    let db = config.open().map_err(text)?;
    match db.insert("stamp", STAMP).map_err(text)? {
        Some(stamp) if stamp != STAMP => return Err("it is of another version".to_owned()),
        None if db.was_recovered() => return Err("it has no stamp".to_owned()),
        _ => {}
    }
    let (chunks, packs) = (db.open_tree("chunks").map_err(text)?, db.open_tree("packs").map_err(text)?);
    let mut names = Names::default();
    for entry in &packs {
        let (number, pack) = entry.map_err(text)?;
        let number = number.as_ref().try_into().map_err(|_| "a pack's number is damaged")?;
        let number = u32::from_be_bytes(number);
        let pack = PackId::from_bytes(pack.as_ref().try_into().map_err(|_| "a pack's id is damaged")?);
        names.ids.insert(number, pack);
        names.numbers.insert(pack, number);
        names.next = names.next.max(number + 1);
    }
    // numbers of packs that were half taken in must not be given again
    names.next += 1_000;
    let (names, broken) = (RwLock::new(names), AtomicBool::new(false));
    Ok(Index { directory: directory.to_owned(), chunks, packs, names, broken })
}

/// Moves the directory away before deleting it: a hung opener may still hold its files.
fn discard(directory: &Path) -> Result<(), StoreError> {
    let mut away = directory.as_os_str().to_owned();
    away.push(format!(".broken-{}", uuid::Uuid::new_v4()));
    let moved = std::fs::rename(directory, &away);
    moved.map_err(|error| StoreError::Index {
        path: directory.display().to_string(),
        reason: error.to_string(),
    })?;
    if let Err(error) = std::fs::remove_dir_all(&away) {
        tracing::warn!(path = %Path::new(&away).display(), %error, "the old chunk index is still there; delete it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use lamina_chunk::PackedChunk;

    use super::*;

    /// Frames of one chunk and of two, in turn.
    fn records(count: u32) -> Vec<PackRecord> {
        let chunk = |number: u32, len| PackedChunk { id: ChunkId::of(&number.to_le_bytes()), len };
        let record = |number: u32| {
            let frame = Frame { offset: number * 10, sealed_len: 10, plain_len: 20 };
            match number % 2 {
                0 => PackRecord { id: chunk(number, 20).id, frame, chunks: vec![chunk(number, 20)] },
                _ => {
                    let chunks = vec![chunk(number, 5), chunk(number + 1_000_000, 15)];
                    PackRecord { id: ChunkId::of(b"a frame"), frame, chunks }
                }
            }
        };
        (0..count).map(record).collect()
    }

    const PACK: PackId = PackId::from_bytes([7; 32]);
    const WITHIN: Duration = Duration::from_secs(60);

    #[test]
    fn what_was_added_is_found_also_after_a_reopen() {
        let directory = tempfile::tempdir().unwrap();
        let records = records(1_234);
        let places: Vec<_> = records.iter().flat_map(|record| record.places(PACK)).collect();
        let ids: Vec<ChunkId> = places.iter().map(|(id, _)| *id).collect();
        let index = Index::open(directory.path(), WITHIN).unwrap();
        index.add(PACK, &records);
        drop(index);
        let index = Index::open(directory.path(), WITHIN).unwrap();
        assert!(index.has(PACK));
        let expected: Vec<_> = places.iter().map(|(_, place)| Some(*place)).collect();
        assert_eq!(index.find(&ids), expected);
        assert_eq!(index.find(&[ChunkId::of(b"other")]), [None]);
    }

    #[test]
    fn a_damaged_database_is_replaced_by_an_empty_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index");
        let index = Index::open(&path, WITHIN).unwrap();
        index.add(PACK, &records(10));
        drop(index);
        for file in ["conf", "db"] {
            std::fs::write(path.join(file), b"this is no database at all").unwrap();
        }
        let index = Index::open(&path, WITHIN).unwrap();
        assert!(!index.has(PACK));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn whoever_just_closed_the_index_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        drop(Index::open(directory.path(), WITHIN).unwrap());
        let last = std::fs::File::open(directory.path().join("db")).unwrap();
        last.lock().unwrap();
        let path = directory.path().to_owned();
        let waiting = std::thread::spawn(move || Index::open_unlocked(&path, WITHIN, WITHIN));
        let locked = Index::open_unlocked(directory.path(), WITHIN, Duration::ZERO);
        assert!(matches!(locked, Err(StoreError::Index { .. })), "{locked:?}");
        drop(last);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_second_process_is_told_that_the_index_is_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let first = Index::open(directory.path(), WITHIN).unwrap();
        first.add(PACK, &records(3));
        let second = Index::open_unlocked(directory.path(), WITHIN, Duration::ZERO);
        assert!(matches!(second, Err(StoreError::Index { .. })));
        assert!(first.has(PACK));
    }
}
