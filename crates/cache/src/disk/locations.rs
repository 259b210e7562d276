//! Where each frame lies, in memory: what readers ask. And how often they did.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU8, Ordering};

use lamina_chunk::FrameId;
use parking_lot::RwLock;

use super::index::Location;

/// Reads are counted up to this many: enough to outlive so many rounds of eviction.
const HEAT_MAX: u8 = 3;

/// Every frame on disk, some 45 bytes each: 23 MB for 50 GB of frames.
///
/// Only the first 8 bytes of an id are kept. Two frames that share them displace each other, which costs a fetch and
/// nothing else, since a record names its whole id.
#[derive(Default)]
pub(crate) struct Locations(RwLock<HashMap<u64, Held>>);

struct Held {
    location: Location,
    /// How often it was read from disk since it was written, or last survived.
    heat: AtomicU8,
}

impl Locations {
    /// Where a frame with the beginning of this id lies.
    pub(crate) fn find(&self, id: FrameId) -> Option<Location> {
        self.find_key(key(id))
    }

    /// The same by what stands for it.
    pub(super) fn find_key(&self, key: u64) -> Option<Location> {
        Some(self.0.read().get(&key)?.location)
    }

    /// The same for somebody who reads it.
    pub(crate) fn use_of(&self, id: FrameId) -> Option<Location> {
        let held = self.0.read();
        let held = held.get(&key(id))?;
        let heat = held.heat.load(Ordering::Relaxed);
        if heat < HEAT_MAX {
            // two readers at once may count as one
            held.heat.store(heat + 1, Ordering::Relaxed);
        }
        Some(held.location)
    }

    /// How often the frame was read, if it lies at `location`.
    pub(crate) fn heat(&self, id: FrameId, location: Location) -> Option<u8> {
        let held = self.0.read();
        let held = held.get(&key(id)).filter(|held| held.location == location)?;
        Some(held.heat.load(Ordering::Relaxed))
    }

    pub(crate) fn insert(&self, id: FrameId, location: Location, heat: u8) {
        self.0.write().insert(key(id), Held { location, heat: heat.into() });
    }

    /// Forgets `id`, if it is still said to lie at `location`; whether it was.
    pub(crate) fn forget(&self, id: FrameId, location: Location) -> bool {
        match self.0.write().entry(key(id)) {
            Entry::Occupied(entry) if entry.get().location == location => {
                entry.remove();
                true
            }
            _ => false,
        }
    }
}

/// What stands for a frame in tables.
pub(super) fn key(id: FrameId) -> u64 {
    u64::from_le_bytes(id.as_bytes()[..8].try_into().expect("8 bytes"))
}
