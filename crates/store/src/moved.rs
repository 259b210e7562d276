//! Packs that are there no more, and of which the frames that live lie in others.
//!
//! Trees and recipes name the old places for ever. So whoever finds no pack looks for the record of where it went, and goes
//! on there; that pack may have been moved in its turn. A record never changes, and goes only when nothing names the old pack
//! any more; the new pack stays as long as it. Cost: two small requests more for each pack on the way.

use std::ops::Range;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{Frame, FrameId, MOVED_BYTES_MAX, MOVES_MAX, Moved, PackId, PackRecord};
use lamina_image::Digest;

use crate::check::at;
use crate::objects::Objects;
use crate::packs::pack_records;
use crate::{Repo, Store, StoreError, keys};

/// Packs that are looked for at the same time.
const LOOKUPS: usize = 16;

/// The record of a pack; `None` where it was not moved.
pub(crate) async fn read(objects: &Objects, pack: PackId) -> Result<Option<Moved>, StoreError> {
    let Some(bytes) = objects.read(&keys::moved(pack), MOVED_BYTES_MAX as u64).await? else {
        return Ok(None);
    };
    Moved::parse(&bytes).map(Some).map_err(|error| StoreError::Moved { pack, error })
}

/// Ranges of a pack of which each lies in one frame, from wherever the frames are now. `None` where one is nowhere.
pub(crate) async fn ranges(
    objects: &Objects,
    pack: PackId,
    ranges: &[Range<u64>],
) -> Result<Option<Vec<Bytes>>, StoreError> {
    let (mut pack, mut ranges) = (pack, ranges.to_vec());
    for _ in 0..=MOVES_MAX {
        if let Some(read) = objects.ranges(&keys::blob(pack.into()), &ranges).await? {
            return Ok(Some(read));
        }
        let Some(moved) = read(objects, pack).await? else { return Ok(None) };
        for range in &mut ranges {
            let span = moved.span(range.clone());
            // all of it, and in one piece
            let Some(span) = span.filter(|span| span.parts.len() == 1) else { return Ok(None) };
            *range = span.range;
        }
        pack = moved.pack();
    }
    Ok(None)
}

/// What a pack's index says of the frames that are still there, and the pack in which they are now. All that this leans on is held.
pub(crate) async fn records(
    objects: &Objects,
    pack: PackId,
) -> Result<(Vec<PackRecord>, PackId), StoreError> {
    let (mut moves, mut at) = (Vec::new(), pack);
    loop {
        objects.hold(&keys::blob(at.into())).await?;
        match pack_records(objects, at).await {
            Ok(records) => {
                let records = moves.iter().rev().fold(records, |new, moved: &Moved| moved.old_records(&new));
                return Ok((records, at));
            }
            Err(StoreError::Missing(_)) if moves.len() < MOVES_MAX => {}
            Err(error) => return Err(error),
        }
        objects.hold(&keys::moved(at)).await?;
        let moved = read(objects, at).await?.ok_or(StoreError::Missing(pack.into()))?;
        at = moved.pack();
        moves.push(moved);
    }
}

/// The packs on the way to where the frames of a pack are now, itself first, each with its record; empty where it was not moved.
/// All is held.
async fn followed(objects: &Objects, pack: PackId) -> Result<Vec<(PackId, Moved)>, StoreError> {
    let (mut found, mut at) = (Vec::new(), pack);
    while found.len() < MOVES_MAX {
        objects.hold(&keys::blob(at.into())).await?;
        objects.hold(&keys::moved(at)).await?;
        let Some(moved) = read(objects, at).await? else { break };
        found.push((at, moved));
        at = found[found.len() - 1].1.pack();
    }
    Ok(found)
}

/// These frames as they are in the new pack; `None` where one was not moved.
fn moved_frames(frames: &[Frame], moved: &Moved) -> Option<Vec<Frame>> {
    let frame = |frame: &Frame| {
        let now = moved.at(frame.offset).filter(|now| now.sealed_len == frame.sealed_len)?;
        Some(Frame { offset: now.new_offset, ..*frame })
    };
    frames.iter().map(frame).collect()
}

impl Store {
    /// Makes packs belong to a repository, and the packs to which their frames were moved.
    ///
    /// A collector that moves a pack has condemned it, so whoever holds it sees its record, or keeps it from being moved: no
    /// repository is left with the old pack alone.
    pub async fn link_packs(
        &self,
        repo: &Repo,
        packs: impl IntoIterator<Item = Digest>,
    ) -> Result<(), StoreError> {
        let follow = |digest: Digest| async move {
            let mut found = vec![digest];
            if let Ok(pack) = PackId::try_from(digest) {
                let moves = followed(&self.objects, pack).await?;
                found.extend(moves.iter().map(|(_, moved)| Digest::from(moved.pack())));
            }
            Ok::<_, StoreError>(found)
        };
        let packs: Vec<Digest> = packs.into_iter().collect();
        let found = stream::iter(packs.into_iter().map(follow)).buffer_unordered(LOOKUPS);
        let found: Vec<Vec<Digest>> = found.try_collect().await?;
        self.link_blobs(repo, found.into_iter().flatten()).await
    }

    /// The records on the way to the pack in which these frames of a pack are now, each with the pack that it is of; none where they
    /// are where they were. All that this leans on is held.
    pub async fn moves(&self, pack: PackId, frames: &[Frame]) -> Result<Vec<(PackId, Moved)>, StoreError> {
        let (mut moves, mut frames) = (followed(&self.objects, pack).await?, frames.to_vec());
        let mut went = 0;
        while let Some(now) = moves.get(went).and_then(|(_, moved)| moved_frames(&frames, moved)) {
            (frames, went) = (now, went + 1);
        }
        moves.truncate(went);
        Ok(moves)
    }

    /// The pack to which a pack went: itself, where it was not moved.
    async fn pack_now(&self, pack: PackId) -> Result<PackId, StoreError> {
        Ok(followed(&self.objects, pack).await?.last().map_or(pack, |(_, moved)| moved.pack()))
    }

    /// Remembers where the frames of a pack of a repository are that is not here: in one that is. An older record that says something
    /// else stays, since images that were checked may lean on it, and without the old pack nobody can tell which of the two is right;
    /// but not one that leads to no pack that is here, by which nothing can be read.
    pub async fn know_moved(&self, repo: &Repo, pack: PackId, moved: &Moved) -> Result<(), StoreError> {
        let key = keys::moved(pack);
        let is_new = self.objects.create(&key, moved.to_bytes().into()).await?;
        if !is_new && read(&self.objects, pack).await?.as_ref() != Some(moved) {
            match self.blob(self.pack_now(pack).await?.into()).await? {
                Some(_) => {
                    tracing::warn!(%pack, "a pack went somewhere else by an older record, which stays")
                }
                None => self.objects.put(&key, moved.to_bytes().into()).await?,
            }
        }
        self.link_packs(repo, [pack.into()]).await
    }

    /// Whether these frames of a pack are in `now`, by its index, where these moves one after the other say that they are.
    pub async fn are_moved(
        &self,
        frames: &[(FrameId, Frame)],
        moves: &[Moved],
        now: PackId,
    ) -> Result<bool, StoreError> {
        let records = pack_records(&self.objects, now).await?;
        let records = moves.iter().rev().fold(records, |new, moved| moved.old_records(&new));
        Ok(frames.iter().all(|(id, frame)| at(&records, *id, *frame).is_some()))
    }

    /// Where the frames of a pack of a repository have gone, as [`Moved`] has the bytes; `None` where it was not moved or does
    /// not belong to the repository.
    pub async fn moved_in(&self, repo: &Repo, pack: PackId) -> Result<Option<Bytes>, StoreError> {
        let (link, record) = (keys::link(pack.into(), repo), keys::moved(pack));
        let record = self.objects.read(&record, MOVED_BYTES_MAX as u64);
        let (linked, record) = tokio::try_join!(self.objects.exists(&link), record)?;
        Ok(record.filter(|_| linked))
    }
}
