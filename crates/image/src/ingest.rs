//! The pipeline that turns layers into packs and recipes.
//!
//! Budget for 1 GiB of plaintext on one core: inflate 2.4 s, sha256 0.7 s, cut 0.5 s, BLAKE3 0.2 s, seal 3 s, sha256
//! of the packs 0.4 s. So everything runs at once, in threads with short bounded queues between them:
//!
//! ```text
//! read, inflate ─┬─ sha256 (the diff ID)
//!                └─ tar, cut, name ── known? seal ×N ── pack ── put ×2
//! ```
//!
//! New chunks that were cut one after the other are sealed together, up to 256 KiB a frame: zstd finds more in a longer
//! window. Frames stand in packs in the order of the tar, however many sealers there are. Memory: about 250 MiB, whatever the
//! size of a layer.

mod cutter;
mod packer;
mod reader;

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use bytes::Bytes;
use lamina_chunk::{
    CHUNK_BYTES_MAX, Chunk, ChunkId, ChunkPlace, FrameId, Level, PackId, PackRecord, PackedChunk, Sealed,
    Sealer,
};

use crate::{Digest, Recipe, RecipeError, TarError};
use cutter::Cutter;
use packer::{FinishedPack, Packer};
pub use reader::Compression;

/// What a sink says when it fails.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Where chunks go: a registry over HTTP, or a store.
pub trait ChunkSink: Sync {
    /// Where each of these chunks already is, in the same order. At most [`BATCH_CHUNKS`] ids a call.
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError>;

    /// Makes a pack durable. The records are what its index says. Called from two threads.
    fn put(&self, pack: PackId, bytes: Bytes, records: &[PackRecord]) -> Result<(), SinkError>;
}

/// Chunks in one question to a sink: 1,024 × 32 B.
pub const BATCH_CHUNKS: usize = 1024;
/// Plaintext in one batch: 8 MiB, 20 ms of sealing, long against a round trip.
const BATCH_BYTES: usize = 8 << 20;
/// A pack is closed at 32 MiB: half of what is allowed, and two on their way cost 64 MiB of memory.
const PACK_TARGET_BYTES: usize = 32 << 20;

/// One layer to take in.
pub struct LayerInput<'a> {
    /// What to call it in messages.
    pub name: String,
    /// Its bytes, compressed or not.
    pub bytes: Box<dyn Read + Send + 'a>,
    /// The sha256 that its plain tar must have, hashed and compared unless that happens later
    /// ([`IngestOptions::is_checked_after`]); `None` where nobody has said.
    pub diff_id: Option<Digest>,
}

impl std::fmt::Debug for LayerInput<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerInput({})", self.name)
    }
}

/// How to take layers in.
#[derive(Clone, Copy, Debug)]
pub struct IngestOptions {
    /// How hard to compress.
    pub level: Level,
    /// Threads that seal; as many as there are cores, and one more to cover round trips.
    pub sealers: usize,
    /// A layer whose plain tar is longer, in bytes, is refused: a bomb.
    pub tar_bytes_max: u64,
    /// Whether whoever gets the recipes rebuilds and hashes each layer before relying on it, as a Lamina registry does. What a layer is
    /// said to hash to is believed here then, and costs nothing.
    pub is_checked_after: bool,
}

impl Default for IngestOptions {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        Self { level: Level::default(), sealers: cores + 1, tar_bytes_max: 1 << 40, is_checked_after: false }
    }
}

/// What has happened so far, for whoever watches. All counts only grow.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes read, as compressed.
    pub read: AtomicU64,
    /// Bytes of plain tar.
    pub tar: AtomicU64,
    /// Chunks cut, each time one occurs.
    pub chunks: AtomicU64,
    /// Distinct chunks that the sink lacked.
    pub new: AtomicU64,
    /// Distinct chunks that it had.
    pub known: AtomicU64,
    /// Plaintext bytes of the distinct chunks that the sink lacked.
    pub new_bytes: AtomicU64,
    /// Bytes of packs handed to the sink and taken by it.
    pub sent: AtomicU64,
    /// Set by the watcher to make the pipeline stop with [`IngestError::Stopped`].
    pub stop: AtomicBool,
}

impl Progress {
    fn add(count: &AtomicU64, by: usize) {
        count.fetch_add(by as u64, Ordering::Relaxed);
    }
}

/// Why layers were not taken in.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// A layer is damaged. Another try with the same bytes will not help.
    #[error("{layer}: {error}")]
    Layer {
        /// The layer's name.
        layer: String,
        /// What is wrong with it.
        #[source]
        error: TarError,
    },
    /// A layer is not what the image's config says it is.
    #[error("{layer}: its plain tar is {found}, but the image's config says {expected}")]
    DiffId {
        /// The layer's name.
        layer: String,
        /// As the config has it.
        expected: Digest,
        /// As it is.
        found: Digest,
    },
    /// The sink failed. Whether another try helps is for the sink to say.
    #[error("{0}")]
    Sink(#[source] SinkError),
    /// The layer does not fit a recipe.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The watcher asked for it.
    #[error("stopped")]
    Stopped,
}

/// Takes layers in, one after the other, and gives a recipe for each, in order. When it returns, every pack that
/// they name is durable. Blocks until then; call it where blocking is allowed.
pub fn ingest(
    layers: Vec<LayerInput<'_>>,
    sink: &dyn ChunkSink,
    options: IngestOptions,
    progress: &Progress,
) -> Result<Vec<Recipe>, IngestError> {
    let places = Places::default();
    let failure = Failure::default();
    let stages = Stages { sink, options, progress, places: &places, failure: &failure };
    let mut cutter = Cutter::new(progress);
    let drafts = thread::scope(|scope| {
        // two batches wait for a sealer, and two for the packer
        let (batches, waiting) = sync_channel::<Batch>(2);
        let (done, sealed) = sync_channel::<SealedBatch>(2);
        let (packs, finished) = sync_channel(0);
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..options.sealers.max(1) {
            let (waiting, done) = (Arc::clone(&waiting), done.clone());
            scope.spawn(move || stages.seal(&waiting, &done));
        }
        let finished = Arc::new(Mutex::new(finished));
        for _ in 0..2 {
            let finished = Arc::clone(&finished);
            scope.spawn(move || stages.put(&finished));
        }
        scope.spawn(move || Packer::new(PACK_TARGET_BYTES, packs).run(&sealed));
        // from here on only the threads hold them: when a stage ends, its neighbours notice
        drop((waiting, done, finished));
        layers
            .into_iter()
            .map(|layer| cutter.layer(layer, options, &batches, &failure))
            .collect::<Result<Vec<_>, _>>()
    });
    let drafts = match failure.into_first() {
        Some(first) => return Err(first),
        None => drafts?,
    };
    let places = places.into_inner();
    let resolve = |number: u32| places[number as usize];
    drafts.into_iter().map(|(draft, diff_id)| Ok(draft.finish(diff_id, resolve)?)).collect()
}

/// New chunks on their way, in the order in which they were cut, each with its number.
struct Batch {
    sequence: u64,
    chunks: Vec<NewChunk>,
}

/// A chunk that this image has not had before.
struct NewChunk {
    number: u32,
    chunk: Chunk,
    /// The chunk's bytes and what follows them in memory, which may be the next chunk's.
    window: Bytes,
}

/// What of a batch the sink lacks.
struct SealedBatch {
    sequence: u64,
    frames: Vec<NewFrame>,
}

/// Neighbouring chunks, sealed together.
struct NewFrame {
    id: FrameId,
    sealed: Sealed,
    chunks: Vec<PackedChunk>,
    /// The number of each chunk.
    numbers: Vec<u32>,
}

/// What the threads share.
#[derive(Clone, Copy)]
struct Stages<'a> {
    sink: &'a dyn ChunkSink,
    options: IngestOptions,
    progress: &'a Progress,
    places: &'a Places,
    failure: &'a Failure,
}

impl Stages<'_> {
    /// Asks which chunks are known and seals the others, until no more batches come.
    fn seal(self, waiting: &Mutex<Receiver<Batch>>, done: &SyncSender<SealedBatch>) {
        let mut sealer = Sealer::new(self.options.level);
        while let Some(batch) = receive(waiting) {
            let sealed = match self.seal_batch(&mut sealer, batch) {
                Ok(sealed) => sealed,
                Err(error) => return self.failure.set(IngestError::Sink(error)),
            };
            if done.send(sealed).is_err() {
                return;
            }
        }
    }

    fn seal_batch(&self, sealer: &mut Sealer, batch: Batch) -> Result<SealedBatch, SinkError> {
        let ids: Vec<ChunkId> = batch.chunks.iter().map(|new| new.chunk.id()).collect();
        let known = self.sink.known(&ids)?;
        if known.len() != ids.len() {
            return Err(format!("asked for {} chunks and got {} answers", ids.len(), known.len()).into());
        }
        let mut new = Vec::new();
        for (chunk, place) in batch.chunks.into_iter().zip(known) {
            let len = chunk.chunk.bytes().len();
            match place {
                // a place of another length would make a recipe that does not add up
                Some(place) if place.is_possible() && place.len as usize == len => {
                    Progress::add(&self.progress.known, 1);
                    self.places.set(chunk.number, place);
                }
                _ => {
                    Progress::add(&self.progress.new, 1);
                    Progress::add(&self.progress.new_bytes, len);
                    new.push(chunk);
                }
            }
        }
        let frames = neighbours(&new).map(|chunks| seal_frame(sealer, chunks)).collect();
        Ok(SealedBatch { sequence: batch.sequence, frames })
    }

    /// Names finished packs and hands them to the sink, until no more come.
    fn put(self, finished: &Mutex<Receiver<FinishedPack>>) {
        while let Some(pack) = receive(finished) {
            let id = PackId::try_from(Digest::of(&pack.bytes)).expect("a sha256");
            let len = pack.bytes.len();
            if let Err(error) = self.sink.put(id, pack.bytes, &pack.records) {
                return self.failure.set(IngestError::Sink(error));
            }
            Progress::add(&self.progress.sent, len);
            let places = pack.records.iter().flat_map(|record| record.places(id));
            for (number, (_, place)) in pack.numbers.iter().zip(places) {
                self.places.set(*number, place);
            }
        }
    }
}

/// Runs of chunks, each of at most 256 KiB together.
fn neighbours(chunks: &[NewChunk]) -> impl Iterator<Item = &[NewChunk]> {
    let mut rest = chunks;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|new| {
            bytes += new.chunk.bytes().len();
            bytes <= CHUNK_BYTES_MAX
        });
        let (run, later) = rest.split_at(fits.count());
        rest = later;
        (!run.is_empty()).then_some(run)
    })
}

fn seal_frame(sealer: &mut Sealer, chunks: &[NewChunk]) -> NewFrame {
    let whole = match chunks {
        [alone] => alone.chunk.clone(),
        several => Chunk::cut(joined(several)),
    };
    let packed = |chunk: &Chunk| {
        let len = u32::try_from(chunk.bytes().len()).expect("chunks are at most 256 KiB");
        PackedChunk { id: chunk.id(), len }
    };
    NewFrame {
        id: whole.id(),
        sealed: sealer.seal(&whole),
        chunks: chunks.iter().map(|new| packed(&new.chunk)).collect(),
        numbers: chunks.iter().map(|new| new.number).collect(),
    }
}

/// The bytes of chunks, one behind the other. Not copied where they lie so already, as those of one file do.
fn joined(chunks: &[NewChunk]) -> Bytes {
    let len = chunks.iter().map(|new| new.chunk.bytes().len()).sum();
    let lie_so = chunks
        .windows(2)
        .all(|pair| std::ptr::eq(pair[0].chunk.bytes().as_ptr_range().end, pair[1].chunk.bytes().as_ptr()));
    match chunks.first() {
        // as far as the window reaches it is one piece of memory, so what lies there is the chunks
        Some(first) if lie_so && first.window.len() >= len => first.window.slice(..len),
        _ => {
            let parts: Vec<&[u8]> = chunks.iter().map(|new| &new.chunk.bytes()[..]).collect();
            Bytes::from(parts.concat())
        }
    }
}

fn receive<T>(channel: &Mutex<Receiver<T>>) -> Option<T> {
    channel.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// Where each chunk is, by its number.
#[derive(Default)]
struct Places(Mutex<Vec<Option<ChunkPlace>>>);

impl Places {
    fn set(&self, number: u32, place: ChunkPlace) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = number as usize;
        if places.len() <= number {
            places.resize(number + 1, None);
        }
        places[number] = Some(place);
    }

    fn into_inner(self) -> Vec<ChunkPlace> {
        let places = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let found = places.into_iter().collect::<Option<_>>();
        found.expect("without a failure every chunk was either known or put")
    }
}

/// The first thing that went wrong in any thread.
#[derive(Default)]
struct Failure(Mutex<Option<IngestError>>);

impl Failure {
    fn set(&self, error: IngestError) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn is_set(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn into_first(self) -> Option<IngestError> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
