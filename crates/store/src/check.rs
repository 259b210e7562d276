//! Recipes that somebody else made, checked before anyone relies on them.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{Frame, FrameId, PackId};
use lamina_image::{Digest, Hasher, Recipe};

use crate::{Store, StoreError};

/// Packs whose indexes are read at the same time.
const PACKS: usize = 4;

impl Store {
    /// Checks that each frame of a recipe lies where the recipe says, in a pack of which every frame was opened.
    /// Packs that were never opened are opened now.
    ///
    /// Cost: the indexes of the packs that it names; no frames of packs that were opened before.
    ///
    /// # Errors
    /// [`StoreError::Place`], [`StoreError::Missing`], [`StoreError::Pack`] and [`StoreError::Frame`] where it does
    /// not hold.
    pub async fn check_places(&self, recipe: &Recipe) -> Result<(), StoreError> {
        let mut packs = BTreeMap::<PackId, Vec<(FrameId, Frame)>>::new();
        for (id, place) in recipe.frames() {
            packs.entry(place.pack).or_default().push((*id, place.frame));
        }
        let check = |(pack, claims): (PackId, Vec<(FrameId, Frame)>)| async move {
            self.admit_pack(pack).await?;
            let records = self.pack_records(pack).await?;
            let lies = |(id, frame): &(FrameId, Frame)| {
                let found = records.binary_search_by_key(&frame.offset, |record| record.frame.offset);
                found.is_ok_and(|at| records[at].id == *id && records[at].frame == *frame)
            };
            match claims.iter().find(|claim| !lies(claim)) {
                Some((frame, _)) => Err(StoreError::Place { frame: *frame, pack }),
                None => Ok(()),
            }
        };
        stream::iter(packs.into_iter().map(check)).buffer_unordered(PACKS).try_collect().await
    }

    /// Rebuilds the whole tar of a recipe once, to see that it hashes to what the recipe says.
    ///
    /// Cost: every chunk read and opened, and the tar hashed: a second for each GiB on two cores.
    ///
    /// # Errors
    /// [`StoreError::Digest`] where it hashes to something else.
    pub async fn check_rebuilds(&self, recipe: &Arc<Recipe>) -> Result<(), StoreError> {
        let expected: Digest = recipe.diff_id();
        let mut tar = self.rebuild(Arc::clone(recipe), 0..recipe.tar_bytes()).await?;
        let mut hasher = Hasher::default();
        while let Some(frame) = tar.try_next().await? {
            let hashed = tokio::task::spawn_blocking(move || {
                hasher.update(&frame);
                hasher
            });
            hasher = hashed.await.expect("hashing does not panic");
        }
        let found = hasher.finish();
        if found == expected { Ok(()) } else { Err(StoreError::Digest { expected, found }) }
    }
}
