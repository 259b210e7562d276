//! Writing a recipe while its tar goes by.

use std::io::Write;

use bytes::Bytes;
use lamina_chunk::{ChunkId, Place};

use super::{HEADER_BYTES, LEVEL, MAGIC, PackNumbers, Recipe, RecipeError, Step};
use crate::Digest;

/// A recipe of which not every chunk has a place yet. Literal bytes are compressed as they come: the headers of
/// 40,000 files are 30 MB of mostly zeros.
pub(crate) struct RecipeDraft {
    literals: zstd::Encoder<'static, Vec<u8>>,
    literal_bytes: u64,
    steps: Vec<Step>,
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
            Some(step) if step.chunks == 0 && step.literal_len.checked_add(len).is_some() => {
                step.literal_len += len;
            }
            _ => self.steps.push(Step { literal_len: len, chunks: 0 }),
        }
    }

    /// The next bytes of the tar are those of the chunk that the caller numbers so.
    pub(crate) fn chunk(&mut self, number: u32, len: u32) {
        self.order.push(number);
        self.tar_bytes += u64::from(len);
        match self.steps.last_mut() {
            Some(step) if step.chunks < u32::MAX => step.chunks += 1,
            _ => self.steps.push(Step { literal_len: 0, chunks: 1 }),
        }
    }

    pub(crate) fn tar_bytes(&self) -> u64 {
        self.tar_bytes
    }

    /// Writes the recipe, now that the caller knows what its numbers stand for.
    pub(crate) fn finish(
        self,
        diff_id: Digest,
        resolve: impl Fn(u32) -> (ChunkId, Place),
    ) -> Result<Recipe, RecipeError> {
        let mut own_numbers = std::collections::HashMap::new();
        let mut chunks = Vec::new();
        let order: Vec<u32> = self
            .order
            .iter()
            .map(|number| {
                *own_numbers.entry(*number).or_insert_with(|| {
                    chunks.push(resolve(*number));
                    u32::try_from(chunks.len() - 1).expect("as many as the caller's own numbers")
                })
            })
            .collect();
        let mut packs = PackNumbers::default();
        let places: Vec<[u32; 4]> = chunks
            .iter()
            .map(|(_, place)| {
                let frame = place.frame;
                [packs.number(place.pack), frame.offset, frame.sealed_len, frame.plain_len]
            })
            .collect();
        let mut tables = Vec::new();
        packs.packs.iter().for_each(|pack| tables.extend_from_slice(pack.as_bytes()));
        chunks.iter().for_each(|(id, _)| tables.extend_from_slice(id.as_bytes()));
        let words = places.iter().flatten().copied();
        let words = words.chain(self.steps.iter().flat_map(|step| [step.literal_len, step.chunks]));
        words.chain(order.iter().copied()).for_each(|word| tables.extend_from_slice(&word.to_le_bytes()));
        let tables = zstd::bulk::compress(&tables, LEVEL).expect("the output grows as needed");
        let literals = self.literals.finish().expect("a Vec takes every byte");

        let mut blob = Vec::with_capacity(HEADER_BYTES + tables.len() + literals.len());
        blob.extend_from_slice(&MAGIC);
        blob.extend_from_slice(&[0; 8]);
        blob.extend_from_slice(&self.tar_bytes.to_le_bytes());
        blob.extend_from_slice(&self.literal_bytes.to_le_bytes());
        blob.extend_from_slice(diff_id.as_bytes());
        for count in [chunks.len(), packs.packs.len(), self.steps.len(), order.len(), tables.len()] {
            let count = u32::try_from(count).map_err(|_| RecipeError::Bounds("count", count as u64))?;
            blob.extend_from_slice(&count.to_le_bytes());
        }
        blob.resize(HEADER_BYTES, 0);
        blob.extend_from_slice(&tables);
        blob.extend_from_slice(&literals);
        Recipe::parse(Bytes::from(blob))
    }
}
