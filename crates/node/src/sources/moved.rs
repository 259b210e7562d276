//! Packs that their registry has repacked: trees name the old places for ever, and the frames are in other packs now.
//!
//! Who has not got a pack is asked once where it went, and a registry to which the image was only copied for what the artifact
//! carries that hangs on it. From then on that is where its frames are asked for, in one range, since
//! they are neighbours there too; what lay between them is gone, and comes as zeros that nobody asked for: frames are verified by
//! their names.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::unfold;
use lamina_cache::{Pieces, SourceError};
use lamina_chunk::{MOVED_BYTES_MAX, MOVES_MAX, Moved, MovedPart, PackId};
use lamina_image::{Digest, Document, media_type};
use lamina_wire::{Client, Version, WireError};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

/// Packs of one image that are remembered: some 10 KiB each, 64 GiB of packs.
const MOVED_MAX: usize = 1024;
/// Frames of them in all, of 12 bytes: 12 MiB. Usual packs are far from it; a record may be of half a million frames.
const FRAMES_MAX: usize = 1 << 20;
/// Artifacts of an image that are looked at for where a pack went: one, and another one while both hang, and on registries where
/// clients keep the list themselves also some that are there no more.
const ARTIFACTS_MAX: usize = 16;
/// What is gone comes in pieces of this.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Where a pack went, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) moved: Arc<Moved>,
    /// The host, by position.
    pub(super) by: usize,
    /// The artifact that carries the record, where the host knows nothing of it itself.
    pub(super) artifact: Option<Digest>,
}

/// Where packs of an image went.
#[derive(Debug, Default)]
pub(super) struct MovedPacks {
    /// The image's manifest, once it is found.
    image: OnceLock<Digest>,
    packs: Mutex<HashMap<PackId, Arc<OnceCell<Told>>>>,
    doubted: AtomicBool,
    /// Artifacts of which a record led nowhere, or to wrong bytes, at most [`ARTIFACTS_MAX`]; the last one last.
    disbelieved: Mutex<Vec<Digest>>,
}

impl MovedPacks {
    /// The image has this manifest.
    pub(super) fn are_of(&self, image: Digest) {
        // a mount has one image
        let _ = self.image.set(image);
    }

    /// Where a pack went by an artifact of the image, and by which, for a host that knows nothing of it itself; `None` where none says
    /// so. What is no record is as good as none, and those that were found false before are asked last: what they say may be right
    /// by now. Three requests, where there is one artifact.
    pub(super) async fn carried(
        &self,
        client: &Client,
        repository: &str,
        pack: PackId,
    ) -> Result<Option<(Moved, Digest)>, WireError> {
        let Some(image) = self.image.get() else { return Ok(None) };
        let listed = client.referrers(repository, *image, media_type::TREE).await?;
        let mut artifacts: Vec<Digest> =
            listed.iter().take(ARTIFACTS_MAX).map(|listed| listed.digest).collect();
        {
            let disbelieved = self.disbelieved.lock();
            artifacts.sort_by_key(|artifact| disbelieved.iter().position(|it| it == artifact));
        }
        let mut failed = None;
        for artifact in artifacts {
            match carried_by(client, repository, artifact, pack).await {
                Ok(Some(moved)) => return Ok(Some((moved, artifact))),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%artifact, %pack, %error, "asking the next");
                    // one that comes wrong or is not there may be so for ever; whoever did not answer may be asked again
                    let is_lasting = error.is_unserved()
                        || matches!(error, WireError::WrongBytes { .. } | WireError::Length { .. });
                    failed = failed.or(Some(error).filter(|_| !is_lasting));
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    /// Where a pack went, if that was asked and answered.
    pub(super) fn known(&self, pack: PackId) -> Option<Told> {
        self.packs.lock().get(&pack)?.get().cloned()
    }

    /// Where a pack went, by what `ask` says: it is asked once, however many want to know. An answer is remembered, an error
    /// is not.
    pub(super) async fn learn<E>(
        &self,
        pack: PackId,
        ask: impl Future<Output = Result<Told, E>>,
    ) -> Result<Told, E> {
        let cell = {
            let mut packs = self.packs.lock();
            let known = packs.values().filter_map(|cell| cell.get());
            let frames: usize = known.map(|told| told.moved.frames().len()).sum();
            if (packs.len() >= MOVED_MAX || frames >= FRAMES_MAX) && !packs.contains_key(&pack) {
                packs.clear();
            }
            Arc::clone(packs.entry(pack).or_default())
        };
        cell.get_or_try_init(|| ask).await.cloned()
    }

    /// Forgets where it went, and all packs on the way: some answer leads nowhere, or to other bytes. Gives who had said so; if those
    /// were artifacts, others are asked first from now on.
    pub(super) fn forget(&self, pack: PackId) -> Vec<usize> {
        let (mut packs, mut at, mut tellers) = (self.packs.lock(), Some(pack), Vec::new());
        for _ in 0..=MOVES_MAX {
            let Some(cell) = at.and_then(|pack| packs.remove(&pack)) else { break };
            let Some(told) = cell.get() else { break };
            at = Some(told.moved.pack());
            tellers.push(told.by);
            told.artifact.into_iter().for_each(|artifact| self.disbelieve(artifact));
        }
        tellers
    }

    fn disbelieve(&self, artifact: Digest) {
        let mut disbelieved = self.disbelieved.lock();
        disbelieved.retain(|it| *it != artifact);
        disbelieved.push(artifact);
        let surplus = disbelieved.len().saturating_sub(ARTIFACTS_MAX);
        disbelieved.drain(..surplus);
    }

    /// How many artifacts were found false.
    pub(super) fn disbelieved(&self) -> usize {
        self.disbelieved.lock().len()
    }

    /// From now on only the registry is asked.
    pub(super) fn doubt(&self) {
        self.doubted.store(true, Ordering::Relaxed);
    }

    /// Whether some answer led nowhere, or to wrong bytes.
    pub(super) fn is_doubted(&self) -> bool {
        self.doubted.load(Ordering::Relaxed)
    }
}

/// Where a pack went by an artifact; `None` where it does not say.
async fn carried_by(
    client: &Client,
    repository: &str,
    artifact: Digest,
    pack: PackId,
) -> Result<Option<Moved>, WireError> {
    let artifact = client.manifest(repository, &Version::Digest(artifact)).await?;
    let document = Document::parse(&artifact.media_type, &artifact.bytes);
    let Ok(Document::Manifest(manifest)) = document else { return Ok(None) };
    let record = manifest.layers.iter().find(|layer| layer.moved_pack() == Some(pack));
    let Some(record) = record else { return Ok(None) };
    let bytes = client.blob(repository, record.digest, MOVED_BYTES_MAX as u64).await?;
    Ok(Moved::parse(&bytes).inspect_err(|error| tracing::debug!(%pack, %error, "a record is none")).ok())
}

/// A part of an old pack, from what comes of the new one.
pub(super) fn spread(pieces: Pieces, parts: Vec<MovedPart>) -> Pieces {
    let origin = pieces.origin;
    let state = (Some(pieces), Bytes::new(), parts.into_iter(), MovedPart::Gone(0));
    let bytes = unfold(state, |(mut pieces, mut piece, mut parts, mut part)| async move {
        loop {
            match part {
                MovedPart::Gone(0) | MovedPart::Kept(0) => part = parts.next()?,
                MovedPart::Gone(left) => {
                    let len = ZEROS.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    part = MovedPart::Gone(left - len as u64);
                    return Some((Ok(Bytes::from_static(&ZEROS[..len])), (pieces, piece, parts, part)));
                }
                MovedPart::Kept(left) if !piece.is_empty() => {
                    let len = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    part = MovedPart::Kept(left - len as u64);
                    let next = piece.split_to(len);
                    return Some((Ok(next), (pieces, piece, parts, part)));
                }
                MovedPart::Kept(_) => match pieces.as_mut()?.next().await? {
                    Ok(more) => piece = more,
                    Err(error) => return Some((Err::<_, SourceError>(error), (None, piece, parts, part))),
                },
            }
        }
    });
    Pieces::new(bytes.boxed()).from(origin)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::TryStreamExt;
    use futures_util::future::join_all;
    use lamina_chunk::Frame;

    use super::*;

    const OLD: PackId = PackId::from_bytes([1; 32]);
    const NEW: PackId = PackId::from_bytes([2; 32]);

    fn moved() -> Moved {
        Moved::new(NEW, [Frame { offset: 3, sealed_len: 2, plain_len: 2 }])
    }

    fn told() -> Told {
        Told { moved: Arc::new(moved()), by: 0, artifact: None }
    }

    #[tokio::test]
    async fn what_is_gone_comes_as_zeros_around_what_stayed() {
        let parts =
            vec![MovedPart::Gone(3), MovedPart::Kept(2), MovedPart::Gone(100_000), MovedPart::Kept(3)];
        let halves = ["a", "bcd", "e"].map(|piece| Ok(Bytes::from_static(piece.as_bytes())));
        let pieces = Pieces::new(futures_util::stream::iter(halves).boxed()).from(7);
        let spread = spread(pieces, parts);
        assert_eq!(spread.origin, 7);
        let whole = spread.try_collect::<Vec<Bytes>>().await.unwrap().concat();
        assert_eq!((&whole[..5], &whole[100_005..]), (&b"\0\0\0ab"[..], &b"cde"[..]));
        assert!(whole[5..100_005].iter().all(|byte| *byte == 0));
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_ends_in_its_error() {
        let pieces = [Ok(Bytes::from_static(b"a")), Err(SourceError::Missing(NEW))];
        let pieces = Pieces::new(futures_util::stream::iter(pieces).boxed());
        let came: Vec<_> = spread(pieces, vec![MovedPart::Kept(2), MovedPart::Gone(5)]).collect().await;
        assert!(matches!(&came[..], [Ok(first), Err(SourceError::Missing(NEW))] if first == "a"), "{came:?}");
    }

    #[tokio::test]
    async fn many_readers_ask_once_and_errors_are_not_remembered() {
        let (packs, asked) = (MovedPacks::default(), AtomicUsize::new(0));
        let ask = |answer: Result<Told, ()>| {
            let asked = &asked;
            async move {
                asked.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                answer
            }
        };
        assert_eq!(packs.learn(OLD, ask(Err(()))).await, Err(()));
        assert_eq!(packs.known(OLD), None);
        let answers = join_all((0..9).map(|_| packs.learn(OLD, ask(Ok(told()))))).await;
        assert!(answers.iter().all(|answer| *answer == Ok(told())));
        assert_eq!((asked.load(Ordering::Relaxed), packs.known(OLD)), (2, Some(told())));
        packs.forget(OLD);
        assert_eq!(packs.known(OLD), None);
    }

    #[tokio::test]
    async fn who_forgets_a_pack_forgets_the_packs_on_its_way_and_hears_who_spoke_of_them() {
        let packs = MovedPacks::default();
        let frame = Frame { offset: 0, sealed_len: 2, plain_len: 2 };
        let next = Moved::new(PackId::from_bytes([3; 32]), [frame]);
        packs.learn(OLD, async { Ok::<_, ()>(told()) }).await.unwrap();
        packs
            .learn(NEW, async { Ok::<_, ()>(Told { moved: Arc::new(next), by: 1, artifact: None }) })
            .await
            .unwrap();
        assert_eq!(packs.forget(OLD), [0, 1]);
        assert_eq!((packs.known(OLD), packs.known(NEW)), (None, None));
        // of one that nobody moved nobody has said anything
        assert!(packs.forget(OLD).is_empty());
    }

    #[tokio::test]
    async fn artifacts_that_were_found_false_are_remembered_once_each_and_only_the_last_ones() {
        let packs = MovedPacks::default();
        let artifact = |number: usize| Digest::of(&number.to_le_bytes());
        for number in (0..2 * ARTIFACTS_MAX).chain([ARTIFACTS_MAX]) {
            let told = Told { artifact: Some(artifact(number)), ..told() };
            packs.learn(OLD, async { Ok::<_, ()>(told) }).await.unwrap();
            packs.forget(OLD);
        }
        let last = (ARTIFACTS_MAX + 1..2 * ARTIFACTS_MAX).chain([ARTIFACTS_MAX]).map(artifact);
        assert_eq!(*packs.disbelieved.lock(), last.collect::<Vec<_>>());
    }
}
