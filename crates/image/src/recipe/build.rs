//! Writing a recipe while its tar goes by.

use std::collections::{HashMap, HashSet};
use std::io::Write;

use bytes::Bytes;
use lamina_chunk::{ChunkPlace, FrameId, Place};

use super::{HEADER_BYTES, LEVEL, MAGIC, PackNumbers, Recipe, RecipeError, Step};
use crate::Digest;
use crate::tar::Piece;

/// A recipe whose chunks have only numbers yet, and no places. Literal bytes are compressed as they come: the headers of
/// 40,000 files are 30 MB of mostly zeros.
pub(crate) struct RecipeDraft {
    literals: zstd::Encoder<'static, Vec<u8>>,
    literal_bytes: u64,
    /// How many literal bytes, and how many chunks after them.
    steps: Vec<Step>,
    /// The caller's number of each chunk, in the order of the tar.
    order: Vec<u32>,
    tar_bytes: u64,
}

impl RecipeDraft {
    pub(crate) fn new() -> Self {
        Self {
            literals: zstd::Encoder::new(Vec::new(), LEVEL).expect("a level zstd knows"),
            literal_bytes: 0,
            steps: Vec::new(),
            order: Vec::new(),
            tar_bytes: 0,
        }
    }

    /// The next bytes of the tar, kept as they are.
    pub(crate) fn literal(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.literals.write_all(bytes).expect("a Vec takes every byte");
        self.literal_bytes += bytes.len() as u64;
        self.tar_bytes += bytes.len() as u64;
        let len = u32::try_from(bytes.len()).expect("literals come in small pieces");
        match self.steps.last_mut() {
            Some(step) if step.pieces == 0 && step.literal_len.checked_add(len).is_some() => {
                step.literal_len += len;
            }
            _ => self.steps.push(Step { literal_len: len, pieces: 0 }),
        }
    }

    /// The next bytes of the tar are those of the chunk that the caller numbers so.
    pub(crate) fn chunk(&mut self, number: u32, len: u32) {
        self.order.push(number);
        self.tar_bytes += u64::from(len);
        match self.steps.last_mut() {
            Some(step) if step.pieces < u32::MAX => step.pieces += 1,
            _ => self.steps.push(Step { literal_len: 0, pieces: 1 }),
        }
    }

    pub(crate) fn tar_bytes(&self) -> u64 {
        self.tar_bytes
    }

    /// Writes the recipe, now that the caller knows where its chunks are. Chunks that follow each other in one frame
    /// become one piece.
    pub(crate) fn finish(
        mut self,
        diff_id: Digest,
        resolve: impl Fn(u32) -> ChunkPlace,
    ) -> Result<Recipe, RecipeError> {
        let mut frames = FrameTable::default();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut order = self.order.iter();
        for step in &mut self.steps {
            let first = pieces.len();
            for number in order.by_ref().take(step.pieces as usize) {
                let chunk = resolve(*number);
                let piece = Piece { frame: frames.number(&chunk)?, skip: chunk.skip, len: chunk.len };
                match pieces[first..].last_mut() {
                    Some(last) if last.frame == piece.frame && last.skip + last.len == piece.skip => {
                        last.len += piece.len;
                    }
                    _ => pieces.push(piece),
                }
            }
            step.pieces = small(pieces.len() - first)?;
        }
        let tables = tables(&frames.frames, &self.steps, &pieces);
        let packs = frames.packs();
        let literals = self.literals.finish().expect("a Vec takes every byte");

        let mut blob = Vec::with_capacity(HEADER_BYTES + tables.len() + literals.len());
        blob.extend_from_slice(&MAGIC);
        blob.extend_from_slice(&[0; 8]);
        blob.extend_from_slice(&self.tar_bytes.to_le_bytes());
        blob.extend_from_slice(&self.literal_bytes.to_le_bytes());
        blob.extend_from_slice(diff_id.as_bytes());
        for count in [frames.frames.len(), packs, self.steps.len(), pieces.len(), tables.len()] {
            blob.extend_from_slice(&small(count)?.to_le_bytes());
        }
        blob.resize(HEADER_BYTES, 0);
        blob.extend_from_slice(&tables);
        blob.extend_from_slice(&literals);
        Recipe::parse(Bytes::from(blob))
    }
}

fn small(count: usize) -> Result<u32, RecipeError> {
    u32::try_from(count).map_err(|_| RecipeError::Bounds("count", count as u64))
}

/// Frames in the order of first use.
#[derive(Default)]
struct FrameTable {
    numbers: HashMap<FrameId, u32>,
    frames: Vec<(FrameId, Place)>,
}

impl FrameTable {
    fn number(&mut self, chunk: &ChunkPlace) -> Result<u32, RecipeError> {
        let next = small(self.frames.len())?;
        let number = *self.numbers.entry(chunk.frame_id).or_insert(next);
        if number == next {
            self.frames.push((chunk.frame_id, chunk.place));
        }
        Ok(number)
    }

    fn packs(&self) -> usize {
        self.frames.iter().map(|(_, place)| place.pack).collect::<HashSet<_>>().len()
    }
}

/// The compressed tables: packs, frame ids, places, steps, pieces.
fn tables(frames: &[(FrameId, Place)], steps: &[Step], pieces: &[Piece]) -> Vec<u8> {
    let mut packs = PackNumbers::default();
    let places: Vec<[u32; 4]> = frames
        .iter()
        .map(|(_, Place { pack, frame })| {
            [packs.number(*pack), frame.offset, frame.sealed_len, frame.plain_len]
        })
        .collect();
    let mut tables = Vec::new();
    packs.packs.iter().for_each(|pack| tables.extend_from_slice(pack.as_bytes()));
    frames.iter().for_each(|(id, _)| tables.extend_from_slice(id.as_bytes()));
    let words = places.iter().flatten().copied();
    let words = words.chain(steps.iter().flat_map(|step| [step.literal_len, step.pieces]));
    let words = words.chain(pieces.iter().flat_map(|piece| [piece.frame, piece.skip, piece.len]));
    words.for_each(|word| tables.extend_from_slice(&word.to_le_bytes()));
    zstd::bulk::compress(&tables, LEVEL).expect("the output grows as needed")
}
