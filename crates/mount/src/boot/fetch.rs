//! A boot pack's bytes, from the first to the last.
//!
//! One request, one stream: the next frame always comes at the full rate of the link, where several ranges at once would share it
//! and all come late.

use std::sync::Arc;

use bytes::{Buf, Bytes};
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
    /// What was taken from `pieces` and not from here: what comes next,
    begun: Vec<u8>,
    /// and behind it.
    rest: Bytes,
    taken: u64,
    task: JoinHandle<()>,
}

impl Fetching {
    /// Begins to fetch `pack` from `source`, with one request. Must be called inside a tokio runtime.
    pub(super) fn start(pack: BootPack, source: Arc<dyn Source>) -> Self {
        let (sender, pieces) = mpsc::channel(HELD_PIECES);
        let room = Arc::new(Semaphore::new(HELD_BYTES));
        let task = tokio::spawn(fetch(pack, source, sender, Arc::clone(&room)));
        Self { pieces, room, begun: Vec::new(), rest: Bytes::new(), taken: 0, task }
    }

    /// How many bytes were taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// The next `len` bytes: copied, once, where they came in more than one piece. Cancelling it loses none, if as many are asked for again.
    pub(super) async fn take(&mut self, len: usize) -> Result<Bytes, BootFailure> {
        loop {
            let missing = len - self.begun.len();
            if self.rest.len() >= missing {
                self.taken += len as u64;
                let last = self.rest.split_to(missing);
                if self.begun.is_empty() {
                    return Ok(last);
                }
                self.begun.extend_from_slice(&last);
                return Ok(std::mem::take(&mut self.begun).into());
            }
            self.begun.reserve_exact(missing);
            self.begun.extend_from_slice(&self.rest);
            self.rest.clear();
            let Some(piece) = self.pieces.recv().await else {
                return Err(BootFailure::Length(self.taken + self.begun.len() as u64));
            };
            self.rest = piece?;
            self.room.add_permits(permits(&self.rest));
        }
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn what_is_taken_is_what_came_in_whatever_pieces() {
        let (sender, pieces) = mpsc::channel(HELD_PIECES);
        let (room, task) = (Arc::new(Semaphore::new(HELD_BYTES)), tokio::spawn(async {}));
        let mut fetching = Fetching { pieces, room, begun: Vec::new(), rest: Bytes::new(), taken: 0, task };
        let send = |piece: &'static [u8]| sender.try_send(Ok(Bytes::from_static(piece))).expect("room");
        [&b"abcd"[..], b"ef", b"", b"g", b"hij"].into_iter().for_each(send);
        for expected in ["abc", "defgh", "", "ij"] {
            assert_eq!(fetching.take(expected.len()).await.expect("it is there"), expected);
        }
        assert_eq!(fetching.taken(), 10);
        send(b"kl");
        assert!(fetching.take(3).now_or_never().is_none(), "it has not come");
        send(b"mno");
        assert_eq!(fetching.take(3).await.expect("nothing was lost"), "klm");
        drop(sender);
        assert!(matches!(fetching.take(3).await, Err(BootFailure::Length(15))), "the end");
    }
}
