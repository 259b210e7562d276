//! Frames in memory: a bounded map, least recently used out first.
//!
//! An entry is an opened frame, or one that came along sealed and is opened when first asked for: most neighbours of a
//! demand read are never read, and opening one costs as much as fetching it over a fast link.

use lamina_chunk::{Chunk, FrameId, Sealed};
use lru::LruCache;
use parking_lot::Mutex;

use crate::metrics::{Counters, add};

#[derive(Clone)]
enum Held {
    Open(Chunk),
    Sealed(Sealed),
}

#[derive(Clone)]
struct Entry {
    held: Held,
    /// Length of the frame if it was fetched ahead and nobody has asked for it yet.
    ahead: Option<usize>,
}

impl Entry {
    fn bytes(&self) -> usize {
        match &self.held {
            Held::Open(chunk) => chunk.bytes().len(),
            Held::Sealed(sealed) => sealed.bytes().len(),
        }
    }
}

struct Entries {
    entries: LruCache<FrameId, Entry>,
    bytes: usize,
}

/// The memory tier.
pub(crate) struct Memory {
    inner: Mutex<Entries>,
    bytes_max: usize,
}

impl Memory {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { inner: Mutex::new(Entries { entries: LruCache::unbounded(), bytes: 0 }), bytes_max }
    }

    /// The frame, if it is here. A frame is opened on the way; one that does not verify is dropped and counted.
    pub(crate) fn take_out(&self, id: FrameId, counters: &Counters) -> Option<Chunk> {
        let (held, ahead) = {
            let mut inner = self.inner.lock();
            let entry = inner.entries.get_mut(&id)?;
            (entry.held.clone(), entry.ahead.take())
        };
        let chunk = match held {
            Held::Open(chunk) => chunk,
            Held::Sealed(sealed) => {
                let Ok(chunk) = sealed.open(id) else {
                    add(&counters.verify_failures, 1);
                    self.remove(id);
                    return None;
                };
                self.insert(chunk.clone(), None);
                chunk
            }
        };
        if let Some(sealed_len) = ahead {
            add(&counters.ahead_used_frames, 1);
            add(&counters.ahead_used_bytes, sealed_len);
        }
        add(&counters.memory_frames, 1);
        add(&counters.memory_bytes, chunk.bytes().len());
        Some(chunk)
    }

    pub(crate) fn contains(&self, id: FrameId) -> bool {
        self.inner.lock().entries.contains(&id)
    }

    /// Keeps a frame; `ahead` is its sealed length if nobody has asked for it yet.
    pub(crate) fn insert(&self, chunk: Chunk, ahead: Option<usize>) {
        let id = chunk.id();
        self.put(id, Entry { held: Held::Open(chunk), ahead });
    }

    /// Keeps a frame that nobody has asked for yet, unopened.
    pub(crate) fn insert_sealed(&self, id: FrameId, sealed: Sealed) {
        let ahead = Some(sealed.bytes().len());
        self.put(id, Entry { held: Held::Sealed(sealed), ahead });
    }

    pub(crate) fn remove(&self, id: FrameId) {
        let mut inner = self.inner.lock();
        if let Some(gone) = inner.entries.pop(&id) {
            inner.bytes -= gone.bytes();
        }
    }

    fn put(&self, id: FrameId, entry: Entry) {
        let mut inner = self.inner.lock();
        inner.bytes += entry.bytes();
        if let Some(old) = inner.entries.put(id, entry) {
            inner.bytes -= old.bytes();
        }
        while inner.bytes > self.bytes_max {
            let Some((_, gone)) = inner.entries.pop_lru() else { break };
            inner.bytes -= gone.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use lamina_chunk::{Level, Sealer};

    use super::*;

    fn chunk(n: u8, len: usize) -> Chunk {
        Chunk::cut(Bytes::from(vec![n; len]))
    }

    #[test]
    fn the_least_recently_used_goes_first_and_the_bound_holds() {
        let (memory, counters) = (Memory::new(250), Counters::default());
        for n in 0..2 {
            memory.insert(chunk(n, 100), None);
        }
        assert!(memory.take_out(chunk(0, 100).id(), &counters).is_some());
        memory.insert(chunk(2, 100), None);
        assert!(memory.contains(chunk(0, 100).id()) && memory.contains(chunk(2, 100).id()));
        assert!(!memory.contains(chunk(1, 100).id()));
        memory.insert(chunk(3, 300), None);
        assert!(!memory.contains(chunk(3, 300).id()), "larger than all the memory");
        assert_eq!(memory.inner.lock().bytes, 0);
    }

    #[test]
    fn a_frame_is_opened_when_asked_for_and_a_wrong_one_is_dropped() {
        let (memory, counters) = (Memory::new(1 << 20), Counters::default());
        let good = chunk(1, 5000);
        let sealed = Sealer::new(Level::default()).seal(&good);
        memory.insert_sealed(good.id(), sealed.clone());
        assert_eq!(memory.take_out(good.id(), &counters), Some(good.clone()));
        let other = chunk(2, 5000).id();
        memory.insert_sealed(other, sealed);
        assert_eq!(memory.take_out(other, &counters), None);
        assert!(!memory.contains(other));
        let seen = counters.snapshot();
        assert_eq!((seen.verify_failures, seen.ahead_used_frames, seen.memory_frames), (1, 1, 1));
        assert_eq!(memory.inner.lock().bytes, 5000);
    }
}
