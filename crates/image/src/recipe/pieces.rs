//! Walking through a recipe in the order of its tar.

use std::io::Read;

use bytes::Bytes;
use lamina_chunk::{ChunkId, Place};

use super::{Recipe, RecipeError};

/// Literal bytes come in pieces of at most 1 MiB.
const LITERAL_BYTES: usize = 1 << 20;

/// The next bytes of a tar. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecipePiece {
    /// These bytes, at most 1 MiB.
    Literal(Bytes),
    /// The plaintext of a chunk, from byte `skip` on.
    Chunk {
        /// Which.
        id: ChunkId,
        /// Where its frame lies.
        place: Place,
        /// How many of its bytes come before where the walk began; 0 but for the first piece.
        skip: u32,
    },
}

/// The pieces of a tar from some byte on.
pub struct Pieces<'a> {
    recipe: &'a Recipe,
    literals: Option<zstd::Decoder<'a, &'a [u8]>>,
    step: usize,
    literal_left: u32,
    chunks_left: u32,
    next_chunk: usize,
    skip: u64,
}

impl std::fmt::Debug for Pieces<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pieces(step {} of {})", self.step, self.recipe.steps.len())
    }
}

impl<'a> Pieces<'a> {
    pub(super) fn new(recipe: &'a Recipe, from: u64) -> Self {
        let literals = zstd::Decoder::with_buffer(&recipe.literals[..]).ok();
        Self { recipe, literals, step: 0, literal_left: 0, chunks_left: 0, next_chunk: 0, skip: from }
    }

    fn step(&mut self) -> Result<Option<RecipePiece>, RecipeError> {
        loop {
            if self.literal_left > 0 {
                let literal = self.literal()?;
                let skip = usize::try_from(self.skip).unwrap_or(usize::MAX).min(literal.len());
                self.skip -= skip as u64;
                if skip < literal.len() {
                    return Ok(Some(RecipePiece::Literal(literal.slice(skip..))));
                }
            } else if self.chunks_left > 0 {
                self.chunks_left -= 1;
                let (id, place) = self.recipe.chunk(self.recipe.order[self.next_chunk])?;
                self.next_chunk += 1;
                let len = place.frame.plain_len;
                if self.skip < u64::from(len) {
                    let skip = u32::try_from(self.skip).expect("less than a chunk's length");
                    self.skip = 0;
                    return Ok(Some(RecipePiece::Chunk { id, place, skip }));
                }
                self.skip -= u64::from(len);
            } else {
                let Some(step) = self.recipe.steps.get(self.step) else { return Ok(None) };
                self.step += 1;
                (self.literal_left, self.chunks_left) = (step.literal_len, step.chunks);
            }
        }
    }

    fn literal(&mut self) -> Result<Bytes, RecipeError> {
        let damaged = RecipeError::Compressed("literal bytes");
        let mut bytes = vec![0; LITERAL_BYTES.min(self.literal_left as usize)];
        self.literals.as_mut().ok_or(damaged)?.read_exact(&mut bytes).map_err(|_| damaged)?;
        self.literal_left -= u32::try_from(bytes.len()).expect("at most 1 MiB");
        Ok(Bytes::from(bytes))
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<RecipePiece, RecipeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            // say it once, then end
            (self.step, self.literal_left, self.chunks_left) = (usize::MAX, 0, 0);
        }
        step.transpose()
    }
}
