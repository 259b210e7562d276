//! Layers' plain tars, rebuilt from recipe and chunks.
//!
//! One blocking thread walks through the recipe and makes groups of about 4 MiB; three groups at a time are read and
//! opened, and come out in order. Memory: about 40 MiB a tar, however long it is and however slowly it is taken.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use lamina_chunk::{Chunk, FrameId, PackId, Place, Sealed};
use lamina_image::{Recipe, RecipeError, RecipePiece};
use tokio::sync::mpsc::{Sender, channel};

use crate::objects::Objects;
use crate::{ByteStream, Proof, Store, StoreError, keys};

/// Plain bytes in a group: long against what it costs to start a read.
const GROUP_BYTES: u64 = 4 << 20;
/// Plain bytes of the frames that a group's pieces are taken from: a recipe may take a byte of each.
const FRAME_BYTES_MAX: u64 = 16 << 20;
/// Groups on their way.
const GROUPS: usize = 3;

/// The next bytes of a tar.
#[derive(Debug, Default)]
struct Group {
    pieces: Vec<RecipePiece>,
    /// How many bytes of them count; less than they hold only in the last group.
    len: u64,
    /// Plain bytes of the frames that have to be opened for them.
    frame_bytes: u64,
}

impl Store {
    /// A part of the plain tar that the recipe describes. The range must lie inside. Waits where eight tars are being
    /// rebuilt already.
    pub async fn rebuild(&self, recipe: Arc<Recipe>, range: Range<u64>) -> Result<ByteStream, StoreError> {
        self.rebuild_proving(recipe, range, None).await
    }

    /// The same, and what is opened on the way is shown to `proof`.
    pub(crate) async fn rebuild_proving(
        &self,
        recipe: Arc<Recipe>,
        range: Range<u64>,
        proof: Option<Arc<Proof>>,
    ) -> Result<ByteStream, StoreError> {
        assert!(
            range.start <= range.end && range.end <= recipe.tar_bytes(),
            "{range:?} of {}",
            recipe.tar_bytes()
        );
        let permit = Arc::clone(&self.rebuilding).acquire_owned().await.expect("never closed");
        let (groups, planned) = channel(1);
        tokio::task::spawn_blocking(move || plan(&recipe, range, &groups));
        let objects = self.objects.clone();
        let planned = stream::unfold((planned, permit), |(mut planned, permit)| async {
            planned.recv().await.map(|group| (group, (planned, permit)))
        });
        // each group is a task, so that it goes on while the one before it is taken
        let loading = planned.map(move |group| tokio::spawn(load(objects.clone(), group, proof.clone())));
        Ok(loading.buffered(GROUPS).map(|loaded| loaded.expect("loading does not panic")).boxed())
    }
}

/// Walks through the recipe until the range ends or nobody listens any more.
fn plan(recipe: &Recipe, range: Range<u64>, groups: &Sender<Result<Group, RecipeError>>) {
    let mut left = range.end - range.start;
    let mut group = Group::default();
    let mut pieces = recipe.pieces(range.start);
    while left > 0 {
        let piece = match pieces.next() {
            Some(Ok(piece)) => piece,
            Some(Err(error)) => return drop(groups.blocking_send(Err(error))),
            None => unreachable!("a parsed recipe adds up to its tar's length"),
        };
        left -= group.push(piece, left);
        if (group.is_full() || left == 0) && groups.blocking_send(Ok(std::mem::take(&mut group))).is_err() {
            return;
        }
    }
}

impl Group {
    /// Adds a piece, of which at most `left` bytes count. Says how many do.
    fn push(&mut self, piece: RecipePiece, left: u64) -> u64 {
        let len = match &piece {
            RecipePiece::Literal(bytes) => bytes.len() as u64,
            RecipePiece::Frame { place, len, .. } => {
                let again = matches!(self.pieces.last(), Some(RecipePiece::Frame { place: last, .. }) if last == place);
                self.frame_bytes += if again { 0 } else { u64::from(place.frame.plain_len) };
                u64::from(*len)
            }
        };
        self.pieces.push(piece);
        self.len += len.min(left);
        len.min(left)
    }

    fn is_full(&self) -> bool {
        self.len >= GROUP_BYTES || self.frame_bytes >= FRAME_BYTES_MAX
    }
}

async fn load(
    objects: Objects,
    group: Result<Group, RecipeError>,
    proof: Option<Arc<Proof>>,
) -> Result<Bytes, StoreError> {
    let group = group?;
    let frames = read_frames(&objects, &group).await?;
    let opened = tokio::task::spawn_blocking(move || open(&group, &frames, proof.as_deref()));
    opened.await.expect("opening does not panic")
}

/// The frames of a group, by place. Neighbours in a pack are read together.
async fn read_frames(objects: &Objects, group: &Group) -> Result<BTreeMap<(PackId, u32), Bytes>, StoreError> {
    let mut wanted = BTreeMap::<PackId, BTreeMap<u32, u64>>::new();
    for piece in &group.pieces {
        if let RecipePiece::Frame { place: Place { pack, frame }, .. } = piece {
            let end = wanted.entry(*pack).or_default().entry(frame.offset).or_default();
            *end = frame.end().max(*end);
        }
    }
    let mut frames = BTreeMap::new();
    for (pack, wanted) in wanted {
        let ranges: Vec<_> = wanted.iter().map(|(offset, end)| u64::from(*offset)..*end).collect();
        let read = objects.ranges(&keys::blob(pack.into()), &ranges).await?;
        let read = read.ok_or(StoreError::Missing(pack.into()))?;
        frames.extend(wanted.into_keys().map(|offset| (pack, offset)).zip(read));
    }
    Ok(frames)
}

fn open(
    group: &Group,
    frames: &BTreeMap<(PackId, u32), Bytes>,
    proof: Option<&Proof>,
) -> Result<Bytes, StoreError> {
    let len = usize::try_from(group.len).expect("groups are short");
    let mut plain = Vec::with_capacity(len + lamina_chunk::CHUNK_BYTES_MAX);
    // neighbours are often taken from one frame
    let mut last: Option<(Place, Chunk)> = None;
    for piece in &group.pieces {
        let (id, place, skip, len) = match piece {
            RecipePiece::Literal(bytes) => {
                plain.extend_from_slice(bytes);
                continue;
            }
            RecipePiece::Frame { id, place, skip, len } => (*id, *place, *skip as usize, *len as usize),
        };
        let opened = match last.take() {
            Some((same, opened)) if same == place && opened.id() == id => opened,
            _ => {
                let opened = open_frame(id, place, frames)?;
                proof.map_or(Ok(()), |proof| proof.opened(place, &opened))?;
                opened
            }
        };
        let bytes = opened.bytes().get(skip..skip + len);
        plain.extend_from_slice(bytes.ok_or(StoreError::Place { frame: id, pack: place.pack })?);
        last = Some((place, opened));
    }
    plain.truncate(len);
    Ok(Bytes::from(plain))
}

fn open_frame(
    id: FrameId,
    place: Place,
    frames: &BTreeMap<(PackId, u32), Bytes>,
) -> Result<Chunk, StoreError> {
    let Place { pack, frame } = place;
    let bytes = frames.get(&(pack, frame.offset)).expect("every place of the group was read");
    let bytes = bytes.get(..frame.sealed_len as usize).map(|_| bytes.slice(..frame.sealed_len as usize));
    let bytes = bytes.ok_or(StoreError::Place { frame: id, pack })?;
    let opened = Sealed::new(bytes, frame.plain_len as usize).open(id);
    opened.map_err(|error| StoreError::Frame { pack, error })
}
