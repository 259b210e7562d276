//! Where each frame lies, in memory: what readers ask.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use lamina_chunk::FrameId;
use parking_lot::RwLock;

use super::index::Location;
use super::segment::RecordHeader;

/// Every frame on disk, some 40 bytes each: 20 MB for 50 GB of frames.
///
/// Only the first 8 bytes of an id are kept. Two frames that share them displace each other, which costs a fetch and
/// nothing else, since a record names its whole id.
#[derive(Default)]
pub(crate) struct Locations(RwLock<HashMap<u64, Location>>);

impl Locations {
    /// Where a frame with the beginning of this id lies.
    pub(crate) fn find(&self, id: FrameId) -> Option<Location> {
        self.0.read().get(&key(id)).copied()
    }

    pub(crate) fn insert(&self, id: FrameId, location: Location) {
        self.0.write().insert(key(id), location);
    }

    /// Forgets `id`, if it is still said to lie at `location`; whether it was.
    pub(crate) fn forget(&self, id: FrameId, location: Location) -> bool {
        match self.0.write().entry(key(id)) {
            Entry::Occupied(entry) if *entry.get() == location => {
                entry.remove();
                true
            }
            _ => false,
        }
    }

    /// Forgets the records of one segment, and says which frames are nowhere now.
    pub(crate) fn forget_segment(&self, records: Vec<(u64, RecordHeader)>, segment: u32) -> Vec<FrameId> {
        let here = |(offset, record): (u64, RecordHeader)| {
            let RecordHeader { id, sealed_len, plain_len } = record;
            let offset = u32::try_from(offset).expect("segments stay below 4 GiB");
            self.forget(id, Location { segment, offset, sealed_len, plain_len }).then_some(id)
        };
        records.into_iter().filter_map(here).collect()
    }
}

fn key(id: FrameId) -> u64 {
    u64::from_le_bytes(id.as_bytes()[..8].try_into().expect("8 bytes"))
}
