//! A boot pack's bytes, from the first to the last.
//!
//! One request, one stream: the next frame always comes at the full rate of the link, where several ranges at once would share it
//! and all come late.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use lamina_cache::{Class, Source, SourceError};
use lamina_image::BootPack;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::BootFailure;

/// Bytes that have come and that nobody has taken yet: what 1 Gbit/s carries in 70 ms, longer than it takes to unpack a tree of
/// 100,000 files and mount it.
const HELD_BYTES: usize = 8 << 20;
/// Pieces that hold them; a piece is some 10 to 100 KiB.
const HELD_PIECES: usize = 1024;
/// A stream that breaks off goes on where it did, so many times.
const TRIES: usize = 3;

/// A boot pack that is being fetched. Dropping it ends that.
#[derive(Debug)]
pub(super) struct Fetching {
    pieces: mpsc::Receiver<Result<Bytes, SourceError>>,
    room: Arc<Semaphore>,
    /// What was taken from `pieces` and not from here.
    held: BytesMut,
    taken: u64,
    task: JoinHandle<()>,
}

impl Fetching {
    /// Begins to fetch `pack` from `source`, with one request. Must be called inside a tokio runtime.
    pub(super) fn start(pack: BootPack, source: Arc<dyn Source>) -> Self {
        let (sender, pieces) = mpsc::channel(HELD_PIECES);
        let room = Arc::new(Semaphore::new(HELD_BYTES));
        let task = tokio::spawn(fetch(pack, source, sender, Arc::clone(&room)));
        Self { pieces, room, held: BytesMut::new(), taken: 0, task }
    }

    /// How many bytes were taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// The next `len` bytes. Cancelling it loses none.
    pub(super) async fn take(&mut self, len: usize) -> Result<Bytes, BootFailure> {
        while self.held.len() < len {
            let Some(piece) = self.pieces.recv().await else {
                return Err(BootFailure::Length(self.taken + self.held.len() as u64));
            };
            let piece = piece?;
            self.room.add_permits(permits(&piece));
            self.held.extend_from_slice(&piece);
        }
        self.taken += len as u64;
        Ok(self.held.split_to(len).freeze())
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The part of [`HELD_BYTES`] that a piece takes: one that is longer takes all.
fn permits(piece: &Bytes) -> usize {
    piece.remaining().min(HELD_BYTES)
}

/// Fetches all of it, as fast as there is room.
async fn fetch(
    pack: BootPack,
    source: Arc<dyn Source>,
    pieces: mpsc::Sender<Result<Bytes, SourceError>>,
    room: Arc<Semaphore>,
) {
    let (mut at, mut tries) = (0, 0);
    while at < pack.bytes {
        let error = match part(pack, &source, &mut at, &pieces, &room).await {
            Ok(()) => return,
            Err(error) => error,
        };
        tries += 1;
        if tries >= TRIES || !matches!(error, SourceError::Unreachable { .. }) {
            let _ = pieces.send(Err(error)).await;
            return;
        }
    }
}

/// One request for what is behind `at`, which moves along. Fine when there is no more, or nobody to take it.
async fn part(
    pack: BootPack,
    source: &Arc<dyn Source>,
    at: &mut u64,
    pieces: &mpsc::Sender<Result<Bytes, SourceError>>,
    room: &Semaphore,
) -> Result<(), SourceError> {
    let mut answer = source.stream(pack.pack(), *at..pack.bytes, Class::Boot).await?;
    while let Some(piece) = answer.next().await.transpose()? {
        let wanted = u32::try_from(permits(&piece)).expect("a few MiB");
        // nobody closes it
        let Ok(permit) = room.acquire_many(wanted).await else { return Ok(()) };
        permit.forget();
        *at += piece.len() as u64;
        if pieces.send(Ok(piece)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}
