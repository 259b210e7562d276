//! The tar of a layer, cut into chunks while it goes by.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use bytes::Bytes;
use lamina_chunk::{CHUNK_BYTES_MAX, Chunk, ChunkId, next_cut};

use super::reader::{Blocks, Counted, channel, pump};
use super::{
    BATCH_BYTES, BATCH_CHUNKS, Batch, Failure, IngestError, IngestOptions, LayerInput, NewChunk, Progress,
};
use crate::recipe::RecipeDraft;
use crate::tar::{Piece, TarError, TarSource, read_tar};
use crate::{Digest, Hasher};

/// What follows the end of an archive is kept, up to 64 MiB: tars are padded to their block size, not more.
const TRAILER_BYTES_MAX: u64 = 64 << 20;

/// Cuts the layers of one image, giving every distinct chunk a number.
pub(super) struct Cutter<'a> {
    progress: &'a Progress,
    numbers: HashMap<ChunkId, u32>,
    sequence: u64,
}

impl<'a> Cutter<'a> {
    pub(super) fn new(progress: &'a Progress) -> Self {
        Self { progress, numbers: HashMap::new(), sequence: 0 }
    }

    /// Cuts one layer and sends its new chunks on in batches.
    pub(super) fn layer(
        &mut self,
        layer: LayerInput<'_>,
        options: IngestOptions,
        batches: &SyncSender<Batch>,
        failure: &Failure,
    ) -> Result<(RecipeDraft, Digest), IngestError> {
        let name = layer.name;
        let progress = self.progress;
        let (draft, diff_id) = thread::scope(|scope| {
            let (to_cutter, blocks) = channel();
            let believed = layer.diff_id.filter(|_| options.is_checked_after);
            let (to_hasher, hasher) = match believed {
                Some(_) => (None, None),
                None => {
                    let (to_hasher, plain) = sync_channel::<Bytes>(4);
                    (Some(to_hasher), Some(scope.spawn(move || hash(&plain))))
                }
            };
            let compressed = Counted(layer.bytes, &progress.read);
            scope.spawn(move || pump(compressed, &to_cutter, to_hasher.as_ref()));
            let mut stream = Stream {
                blocks,
                pending: VecDeque::new(),
                ended: false,
                limit: options.tar_bytes_max,
                draft: RecipeDraft::new(),
                batch: Vec::new(),
                batch_bytes: 0,
                cutter: self,
                batches,
                failure,
            };
            let read = read_tar(&mut stream, |_| Ok(())).and_then(|()| stream.trailer());
            stream.send_batch();
            let draft = read.map(|()| stream.draft);
            // the blocks are dropped now, so the reader ends and then the hasher
            drop(stream.blocks);
            let hashed = hasher.map(|hasher| hasher.join().expect("hashing does not panic"));
            (draft, believed.or(hashed).expect("what is not believed is hashed"))
        });
        if progress.stop.load(Ordering::Relaxed) {
            return Err(IngestError::Stopped);
        }
        let draft = draft.map_err(|error| IngestError::Layer { layer: name.clone(), error })?;
        match layer.diff_id {
            Some(expected) if expected != diff_id => {
                Err(IngestError::DiffId { layer: name, expected, found: diff_id })
            }
            _ => Ok((draft, diff_id)),
        }
    }
}

fn hash(plain: &Receiver<Bytes>) -> Digest {
    let mut hasher = Hasher::default();
    plain.iter().for_each(|block| hasher.update(&block));
    hasher.finish()
}

/// The plain tar on its way from the reader into recipe and batches.
struct Stream<'a, 'b> {
    blocks: Blocks,
    pending: VecDeque<Bytes>,
    ended: bool,
    limit: u64,
    draft: RecipeDraft,
    batch: Vec<NewChunk>,
    batch_bytes: usize,
    cutter: &'a mut Cutter<'b>,
    batches: &'a SyncSender<Batch>,
    failure: &'a Failure,
}

impl Stream<'_, '_> {
    /// Makes sure that `want` bytes are pending, if the stream has as many. Says how many there are, up to that.
    fn fill(&mut self, want: usize) -> Result<usize, TarError> {
        let mut have: usize = self.pending.iter().map(Bytes::len).sum();
        while have < want && !self.ended {
            match self.blocks.recv() {
                Ok(block) => {
                    let block = block?;
                    have += block.len();
                    self.check_limits(block.len())?;
                    self.pending.push_back(block);
                }
                Err(_) => self.ended = true,
            }
        }
        Ok(have.min(want))
    }

    fn check_limits(&self, more: usize) -> Result<(), TarError> {
        Progress::add(&self.cutter.progress.tar, more);
        if self.draft.tar_bytes() > self.limit {
            let name = "the whole layer".to_owned();
            return Err(TarError::TooLarge { name, what: "a plain tar", limit: self.limit });
        }
        let stop: &AtomicBool = &self.cutter.progress.stop;
        if stop.load(Ordering::Relaxed) || self.failure.is_set() {
            return Err(TarError::Read(io::Error::other("stopped")));
        }
        Ok(())
    }

    /// The next `len` pending bytes in one piece, without taking them, and what follows them in memory. Copied only where they
    /// lie in two blocks.
    fn window(&self, len: usize) -> Bytes {
        match self.pending.front() {
            None => Bytes::new(),
            Some(front) if front.len() >= len => front.clone(),
            Some(_) => {
                let mut joined = Vec::with_capacity(len);
                for block in &self.pending {
                    let part = (len - joined.len()).min(block.len());
                    joined.extend_from_slice(&block[..part]);
                }
                Bytes::from(joined)
            }
        }
    }

    fn take(&mut self, mut len: usize) {
        while len > 0 {
            let front = self.pending.front_mut().expect("no more is taken than was there");
            let part = front.len().min(len);
            bytes::Buf::advance(front, part);
            len -= part;
            if front.is_empty() {
                self.pending.pop_front();
            }
        }
    }

    /// Everything behind the end mark, as literal bytes.
    fn trailer(&mut self) -> Result<(), TarError> {
        let end = self.draft.tar_bytes();
        loop {
            let len = self.fill(1 << 20)?;
            if len == 0 {
                return Ok(());
            }
            if self.draft.tar_bytes() - end > TRAILER_BYTES_MAX {
                let name = "what follows its end".to_owned();
                return Err(TarError::TooLarge { name, what: "a trailer", limit: TRAILER_BYTES_MAX });
            }
            self.draft.literal(&self.window(len)[..len]);
            self.take(len);
        }
    }

    /// Names the first `len` bytes of a window.
    fn chunk(&mut self, window: Bytes, len: usize) -> Piece {
        let chunk = Chunk::cut(window.slice(..len));
        let len = u32::try_from(len).expect("chunks are at most 256 KiB");
        let id = chunk.id();
        Progress::add(&self.cutter.progress.chunks, 1);
        let next = u32::try_from(self.cutter.numbers.len()).expect("2^32 chunks are 256 TiB");
        let number = *self.cutter.numbers.entry(id).or_insert(next);
        if number == next {
            self.batch_bytes += len as usize;
            self.batch.push(NewChunk { number, chunk, window });
            if self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH_CHUNKS {
                self.send_batch();
            }
        }
        self.draft.chunk(number, len);
        Piece { frame: number, skip: 0, len }
    }

    fn send_batch(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let batch = Batch { sequence: self.cutter.sequence, chunks: std::mem::take(&mut self.batch) };
        self.cutter.sequence += 1;
        self.batch_bytes = 0;
        // where the sealers are gone, the failure says why, and the next block read stops this thread too
        let _ = self.batches.send(batch);
    }
}

impl TarSource for Stream<'_, '_> {
    fn framing(&mut self, len: usize) -> Result<Vec<u8>, TarError> {
        let have = self.fill(len)?;
        let window = self.window(have);
        let framing = &window[..have];
        self.draft.literal(framing);
        self.take(have);
        Ok(framing.to_vec())
    }

    fn contents(&mut self, len: u64) -> Result<Vec<Piece>, TarError> {
        let mut pieces = Vec::new();
        let mut left = len;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES_MAX);
            if self.fill(want)? < want {
                return Err(TarError::Truncated(self.position()));
            }
            let window = self.window(want);
            let whole = want as u64 == left;
            let cut = next_cut(&window[..want], pieces.is_empty(), whole)
                .expect("the window is full or reaches the end");
            pieces.push(self.chunk(window, cut));
            self.take(cut);
            left -= cut as u64;
        }
        Ok(pieces)
    }

    fn position(&self) -> u64 {
        self.draft.tar_bytes()
    }
}
