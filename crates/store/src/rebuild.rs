//! Layers' plain tars, rebuilt from recipe and chunks.
//!
//! One blocking thread walks through the recipe and makes groups of about 4 MiB; three groups at a time are read and
//! opened, and come out in order. Memory: about 40 MiB a tar, however long it is and however slowly it is taken.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, Stream, StreamExt, TryStreamExt};
use lamina_chunk::{Chunk, FrameId, PackId, Place, Sealed};
use lamina_image::{Digest, Hasher, Recipe, RecipeError, RecipePiece};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{Sender, channel};

use crate::hashing::hash;
use crate::objects::Objects;
use crate::{ByteStream, Proof, Store, StoreError, moved};

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
        let place = self.place().await;
        let groups = groups(&self.objects, recipe, range, place, |group, frames| {
            let pieces = open(group, frames, None)?;
            Ok(Bytes::from(pieces.concat()))
        });
        Ok(groups.boxed())
    }

    /// The whole plain tar, in lists of pieces as they lie in memory. What is opened on the way is shown to `proof`. Memory: up to
    /// 80 MiB.
    pub(crate) async fn rebuild_proving(
        &self,
        recipe: Arc<Recipe>,
        proof: Arc<Proof>,
    ) -> BoxStream<'static, Result<Vec<Bytes>, StoreError>> {
        let (range, place) = (0..recipe.tar_bytes(), self.place().await);
        let open = move |group: &Group, frames: &Frames| open(group, frames, Some(&proof));
        groups(&self.objects, recipe, range, place, open).boxed()
    }

    /// A place among the tars that are rebuilt at the same time.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        Some(Arc::clone(&self.rebuilding).acquire_owned().await.expect("never closed"))
    }
}

/// Rebuilds the whole plain tar that a recipe describes, and says what it hashes to. For whoever does so one tar at a
/// time: no place is waited for. Memory: up to 80 MiB.
pub(crate) async fn rebuilt_digest(objects: &Objects, recipe: Arc<Recipe>) -> Result<Digest, StoreError> {
    let range = 0..recipe.tar_bytes();
    digest_of(groups(objects, recipe, range, None, |group, frames| open(group, frames, None))).await
}

/// What a tar in lists of pieces hashes to.
pub(crate) async fn digest_of(
    tar: impl Stream<Item = Result<Vec<Bytes>, StoreError>>,
) -> Result<Digest, StoreError> {
    let (mut tar, mut hasher) = (std::pin::pin!(tar), Hasher::default());
    while let Some(pieces) = tar.try_next().await? {
        hasher = hash(hasher, pieces).await;
    }
    Ok(hasher.finish())
}

/// What `open` makes of each group, in order. The place is given back at the end.
fn groups<T: Send + 'static>(
    objects: &Objects,
    recipe: Arc<Recipe>,
    range: Range<u64>,
    place: Option<OwnedSemaphorePermit>,
    open: impl Fn(&Group, &Frames) -> Result<T, StoreError> + Clone + Send + 'static,
) -> impl Stream<Item = Result<T, StoreError>> + Send + 'static {
    let tar_bytes = recipe.tar_bytes();
    assert!(range.start <= range.end && range.end <= tar_bytes, "{range:?} of {tar_bytes}");
    let (groups, planned) = channel(1);
    tokio::task::spawn_blocking(move || plan(&recipe, range, &groups));
    let objects = objects.clone();
    let planned = stream::unfold((planned, place), |(mut planned, place)| async {
        planned.recv().await.map(|group| (group, (planned, place)))
    });
    // each group is a task, so that it goes on while the one before it is taken
    let loading = planned.map(move |group| tokio::spawn(load(objects.clone(), group, open.clone())));
    loading.buffered(GROUPS).map(|loaded| loaded.expect("loading does not panic"))
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

async fn load<T: Send + 'static>(
    objects: Objects,
    group: Result<Group, RecipeError>,
    open: impl Fn(&Group, &Frames) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let group = group?;
    let frames = read_frames(&objects, &group).await?;
    tokio::task::spawn_blocking(move || open(&group, &frames)).await.expect("opening does not panic")
}

/// Sealed frames, by pack and offset.
type Frames = BTreeMap<(PackId, u32), Bytes>;

/// The frames of a group, by place. Neighbours in a pack are read together.
async fn read_frames(objects: &Objects, group: &Group) -> Result<Frames, StoreError> {
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
        let read = moved::ranges(objects, pack, &ranges).await?;
        let read = read.ok_or(StoreError::Missing(pack.into()))?;
        frames.extend(wanted.into_keys().map(|offset| (pack, offset)).zip(read));
    }
    Ok(frames)
}

/// The bytes of a group: literals, and slices of opened frames.
fn open(group: &Group, frames: &Frames, proof: Option<&Proof>) -> Result<Vec<Bytes>, StoreError> {
    let mut plain = Vec::with_capacity(group.pieces.len());
    let mut left = usize::try_from(group.len).expect("groups are short");
    // neighbours are often taken from one frame
    let mut last: Option<(Place, Chunk)> = None;
    for piece in &group.pieces {
        let mut bytes = match piece {
            RecipePiece::Literal(bytes) => bytes.clone(),
            RecipePiece::Frame { id, place, skip, len } => {
                let opened = match last.take() {
                    Some((same, opened)) if same == *place && opened.id() == *id => opened,
                    _ => {
                        let opened = open_frame(*id, *place, frames)?;
                        proof.map_or(Ok(()), |proof| proof.opened(*place, &opened))?;
                        opened
                    }
                };
                let range = *skip as usize..*skip as usize + *len as usize;
                if range.end > opened.bytes().len() {
                    return Err(StoreError::Place { frame: *id, pack: place.pack });
                }
                let bytes = opened.bytes().slice(range);
                last = Some((*place, opened));
                bytes
            }
        };
        // of the last piece only its beginning may be wanted
        bytes.truncate(left);
        left -= bytes.len();
        plain.push(bytes);
    }
    Ok(plain)
}

fn open_frame(id: FrameId, place: Place, frames: &Frames) -> Result<Chunk, StoreError> {
    let Place { pack, frame } = place;
    let bytes = frames.get(&(pack, frame.offset)).expect("every place of the group was read");
    let bytes = bytes.get(..frame.sealed_len as usize).map(|_| bytes.slice(..frame.sealed_len as usize));
    let bytes = bytes.ok_or(StoreError::Place { frame: id, pack })?;
    let opened = Sealed::new(bytes, frame.plain_len as usize).open(id);
    opened.map_err(|error| StoreError::Frame { pack, error })
}
