//! Recipes that somebody else made, checked before anyone relies on them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{Chunk, ChunkError, ChunkId, Frame, FrameId, PackId, PackRecord, Place};
use lamina_image::{Digest, Recipe};
use parking_lot::Mutex;

use crate::rebuild::digest_of;
use crate::{Store, StoreError, keys, moved};

/// Packs whose indexes are read at the same time.
const PACKS: usize = 4;

/// What the check of one image's recipes has shown of the packs that they name.
#[derive(Debug, Default)]
pub struct Proof(Mutex<Shown>);

#[derive(Debug, Default)]
struct Shown {
    packs: HashMap<PackId, Arc<Vec<PackRecord>>>,
    /// Those of them that were moved, and where to.
    moved: HashMap<PackId, PackId>,
    /// Frames that were opened, by pack and offset.
    opened: HashSet<(PackId, u32)>,
}

impl Proof {
    fn records(&self, pack: PackId) -> Option<Arc<Vec<PackRecord>>> {
        self.0.lock().packs.get(&pack).cloned()
    }

    /// A frame was opened under its name: now its chunks are checked against the pack's index, once.
    pub(crate) fn opened(&self, place: Place, frame: &Chunk) -> Result<(), StoreError> {
        let Place { pack, frame: Frame { offset, .. } } = place;
        if self.0.lock().opened.contains(&(pack, offset)) {
            return Ok(());
        }
        let wrong = StoreError::Place { frame: frame.id(), pack };
        let Some(records) = self.records(pack) else { return Err(wrong) };
        let Some(record) = at(&records, frame.id(), place.frame) else { return Err(wrong) };
        let mut start = 0;
        for chunk in &record.chunks {
            let end = start + chunk.len as usize;
            let bytes = frame.bytes().get(start..end);
            // a frame of one chunk was just opened under the same name
            let same = chunk.id == record.id || bytes.is_some_and(|bytes| ChunkId::of(bytes) == chunk.id);
            if !same {
                return Err(StoreError::Frame { pack, error: ChunkError::WrongBytes(chunk.id) });
            }
            start = end;
        }
        self.0.lock().opened.insert((pack, offset));
        Ok(())
    }
}

/// The record of a frame in its pack's index.
pub(crate) fn at(records: &[PackRecord], id: FrameId, frame: Frame) -> Option<&PackRecord> {
    let found = records.binary_search_by_key(&frame.offset, |record| record.frame.offset).ok()?;
    records.get(found).filter(|record| record.id == id && record.frame == frame)
}

impl Store {
    /// Checks that each frame of a recipe lies where the recipe says, by the indexes of the packs.
    ///
    /// Cost: the indexes of the packs that the proof has not seen; no frames.
    ///
    /// # Errors
    /// [`StoreError::Place`], [`StoreError::Missing`] and [`StoreError::Pack`] where it does not hold.
    pub async fn check_places(&self, recipe: &Recipe, proof: &Proof) -> Result<(), StoreError> {
        let mut packs = BTreeMap::<PackId, Vec<(FrameId, Frame)>>::new();
        for (id, place) in recipe.frames() {
            packs.entry(place.pack).or_default().push((*id, place.frame));
        }
        let check = |(pack, claims): (PackId, Vec<(FrameId, Frame)>)| async move {
            self.objects.hold(&keys::blob(pack.into())).await?;
            let records = match proof.records(pack).or_else(|| self.arrivals.records(pack)) {
                Some(records) => records,
                None => {
                    let (records, now) = moved::records(&self.objects, pack).await?;
                    if now != pack {
                        proof.0.lock().moved.insert(pack, now);
                    }
                    Arc::new(records)
                }
            };
            if let Some((frame, _)) = claims.iter().find(|(id, frame)| at(&records, *id, *frame).is_none()) {
                return Err(StoreError::Place { frame: *frame, pack });
            }
            proof.0.lock().packs.insert(pack, records);
            Ok(())
        };
        stream::iter(packs.into_iter().map(check)).buffer_unordered(PACKS).try_collect().await
    }

    /// Rebuilds the whole tar of a recipe once, to see that it hashes to what the recipe says. Its places must have
    /// been checked under the same proof.
    ///
    /// Cost: every frame read and opened, and the tar hashed: a second for each GiB on two cores.
    ///
    /// # Errors
    /// [`StoreError::Digest`] where it hashes to something else, [`StoreError::Frame`] where a pack is damaged.
    pub async fn check_rebuilds(&self, recipe: &Arc<Recipe>, proof: &Arc<Proof>) -> Result<(), StoreError> {
        let expected: Digest = recipe.diff_id();
        let tar = self.rebuild_proving(Arc::clone(recipe), Arc::clone(proof)).await;
        let found = digest_of(tar).await?;
        if found == expected { Ok(()) } else { Err(StoreError::Digest { expected, found }) }
    }

    /// Makes the chunks of all packs under the proof known. Of packs that the recipes did not use up, the remaining
    /// frames are opened now.
    ///
    /// # Errors
    /// [`StoreError::Frame`] where one of those is damaged.
    pub async fn conclude(&self, proof: &Proof) -> Result<(), StoreError> {
        let (packs, moved): (Vec<_>, Vec<PackId>) = {
            let shown = proof.0.lock();
            let whole = |pack: PackId, records: &[PackRecord]| {
                records.iter().all(|record| shown.opened.contains(&(pack, record.frame.offset)))
            };
            let packs = shown.packs.iter().filter(|(pack, _)| !shown.moved.contains_key(pack));
            let packs =
                packs.map(|(pack, records)| (*pack, Arc::clone(records), whole(*pack, records))).collect();
            (packs, shown.moved.values().copied().collect())
        };
        for now in moved {
            self.admit_pack(now).await?;
        }
        let conclude = |(pack, records, whole): (PackId, Arc<Vec<PackRecord>>, bool)| async move {
            if whole && !self.is_pack(pack.into()).await? {
                return self.prove_pack(pack, records).await;
            }
            self.admit_pack(pack).await
        };
        stream::iter(packs.into_iter().map(conclude)).buffer_unordered(PACKS).try_collect().await
    }
}
