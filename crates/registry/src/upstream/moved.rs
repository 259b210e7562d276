//! Packs that the upstream has repacked: the pack where their frames are now comes, and then the record that leads there.
//!
//! The record is the upstream's word, like a recipe: an image that leans on it is checked once all of it has come.

use std::sync::Arc;

use bytes::Bytes;
use lamina_chunk::{MOVES_MAX, Moved, PackId};
use lamina_image::Digest;
use lamina_store::Repo;
use lamina_wire::WireError;

use super::Upstream;
use crate::ApiError;

impl Upstream {
    /// Where the frames of a pack have gone, as the upstream says it; `None` where it knows nothing of it. Waits for its turn
    /// like who fetches a blob: a record may be of 6 MiB.
    pub(crate) async fn moved(&self, repo: &Repo, pack: PackId) -> Result<Option<(Moved, Bytes)>, ApiError> {
        let _place = self.fetches.acquire().await.expect("never closed");
        let bytes = match self.client.moved(repo.as_str(), pack).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_unserved() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let wrong = |error: lamina_chunk::MovedError| {
            let url = self.client.base().to_owned();
            WireError::Answer { url, reason: format!("where the frames of {pack} have gone: {error}") }
        };
        Ok(Some((Moved::parse(&bytes).map_err(wrong)?, bytes)))
    }

    /// Sees to it that a pack is here, or what lives of it.
    pub(super) async fn bring_pack(self: &Arc<Self>, repo: &Repo, pack: PackId) -> Result<(), ApiError> {
        let (mut moves, mut at) = (Vec::new(), pack);
        while let Err(error) = self.bring_blob(repo, Digest::from(at)).await {
            let is_absent = matches!(error.root(), ApiError::BlobUnknown(_)) && moves.len() < MOVES_MAX;
            let moved = if is_absent { self.moved(repo, at).await? } else { None };
            let Some((moved, _)) = moved else { return Err(error) };
            let old = std::mem::replace(&mut at, moved.pack());
            moves.push((old, moved));
        }
        for (old, moved) in moves.into_iter().rev() {
            self.store.know_moved(repo, old, &moved).await?;
        }
        Ok(())
    }
}
