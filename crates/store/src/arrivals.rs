//! Packs that have come and of which no frame was opened yet.
//!
//! Opening every frame of a pack costs as much as rebuilding the layers that it is for, which happens anyway before
//! their image is taken. So a pack first only arrives; it is proved by that rebuild, or as soon as somebody asks for
//! one of its chunks, whichever comes first. Memory: about 150 bytes a chunk, until then.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use lamina_chunk::{ChunkId, PackId, PackRecord};
use parking_lot::Mutex;

/// Packs that may wait to be proved: 4,096 of 32 MiB are 128 GiB. One more is proved at once.
pub(crate) const ARRIVALS_MAX: usize = 4096;

/// The packs that wait. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrivals(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    packs: HashMap<PackId, Arc<Vec<PackRecord>>>,
    /// Which of them a chunk is in; one of them, where it is in several.
    chunks: HashMap<ChunkId, PackId>,
}

impl Arrivals {
    /// Takes a pack in. False where too many wait already.
    pub(crate) fn add(&self, pack: PackId, records: Arc<Vec<PackRecord>>) -> bool {
        let mut waiting = self.0.lock();
        if waiting.packs.len() >= ARRIVALS_MAX {
            return false;
        }
        let chunks = records.iter().flat_map(|record| &record.chunks);
        waiting.chunks.extend(chunks.map(|chunk| (chunk.id, pack)));
        waiting.packs.insert(pack, records);
        true
    }

    /// The index of a pack that waits.
    pub(crate) fn records(&self, pack: PackId) -> Option<Arc<Vec<PackRecord>>> {
        self.0.lock().packs.get(&pack).cloned()
    }

    /// The packs that wait and claim to hold one of these chunks.
    pub(crate) fn claiming(&self, ids: impl Iterator<Item = ChunkId>) -> BTreeSet<PackId> {
        let waiting = self.0.lock();
        if waiting.packs.is_empty() {
            return BTreeSet::new();
        }
        ids.filter_map(|id| waiting.chunks.get(&id).copied()).collect()
    }

    /// The pack is proved, or no good.
    pub(crate) fn remove(&self, pack: PackId) {
        let mut waiting = self.0.lock();
        let Some(records) = waiting.packs.remove(&pack) else { return };
        for chunk in records.iter().flat_map(|record| &record.chunks) {
            if waiting.chunks.get(&chunk.id) == Some(&pack) {
                waiting.chunks.remove(&chunk.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lamina_chunk::{Frame, PackedChunk};

    use super::*;

    fn records(texts: &[&[u8]]) -> Arc<Vec<PackRecord>> {
        let chunks: Vec<_> = texts.iter().map(|text| PackedChunk { id: ChunkId::of(text), len: 5 }).collect();
        let frame = Frame { offset: 0, sealed_len: 5, plain_len: 10 };
        Arc::new(vec![PackRecord { id: ChunkId::of(b"a frame"), frame, chunks }])
    }

    #[test]
    fn a_chunk_is_claimed_by_a_pack_until_the_pack_is_removed() {
        let arrivals = Arrivals::default();
        let (one, two) = (PackId::from_bytes([1; 32]), PackId::from_bytes([2; 32]));
        let ids = || [ChunkId::of(b"a"), ChunkId::of(b"b"), ChunkId::of(b"x")].into_iter();
        arrivals.add(one, records(&[b"a", b"b"]));
        arrivals.add(two, records(&[b"b"]));
        assert_eq!(arrivals.claiming(ids()), [one, two].into());
        arrivals.remove(two);
        assert_eq!(arrivals.claiming(ids()), [one].into());
        arrivals.remove(one);
        assert!(arrivals.claiming(ids()).is_empty());
    }
}
