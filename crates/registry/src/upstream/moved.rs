//! Packs that the upstream has repacked: the pack where their frames are now comes, and then the record that leads there.
//!
//! The record is the upstream's word. It is kept only if the frames that the image's recipes name are where it says, by the new
//! pack's index: another one may come later, and it would be too late for that. The image is checked once all of it has come.

use std::sync::Arc;

use bytes::Bytes;
use lamina_chunk::{Frame, FrameId, MOVES_MAX, Moved, PackId};
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

    /// Sees to it that a pack is here, or what lives of it, these frames among that.
    pub(super) async fn bring_pack(
        self: &Arc<Self>,
        repo: &Repo,
        pack: PackId,
        frames: Vec<(FrameId, Frame)>,
    ) -> Result<(), ApiError> {
        let (mut packs, mut moves, mut now) = (Vec::new(), Vec::new(), pack);
        while let Err(error) = self.bring_blob(repo, Digest::from(now)).await {
            let is_absent = matches!(error.root(), ApiError::BlobUnknown(_)) && moves.len() < MOVES_MAX;
            let moved = if is_absent { self.moved(repo, now).await? } else { None };
            let Some((moved, _)) = moved else { return Err(error) };
            packs.push(std::mem::replace(&mut now, moved.pack()));
            moves.push(moved);
        }
        if !moves.is_empty() && !self.store.are_moved(&frames, &moves, now).await? {
            let url = self.client.base().to_owned();
            let reason = format!("the frames of {pack} have not gone where it says, into {now}");
            return Err(WireError::Answer { url, reason }.into());
        }
        for (old, moved) in packs.into_iter().zip(moves).rev() {
            self.store.know_moved(repo, old, &moved).await?;
        }
        Ok(())
    }
}
