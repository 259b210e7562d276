//! Walking through a recipe in the order of its tar.

use std::io::Read;

use bytes::Bytes;
use lamina_chunk::{FrameId, Place};

use super::{Recipe, RecipeError};

/// Literal bytes come in pieces of at most 1 MiB.
const LITERAL_BYTES: usize = 1 << 20;

/// The next bytes of a tar. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecipePiece {
    /// These bytes, at most 1 MiB.
    Literal(Bytes),
    /// A part of a frame's plaintext.
    Frame {
        /// Which.
        id: FrameId,
        /// Where it lies.
        place: Place,
        /// Bytes of its plaintext before the part.
        skip: u32,
        /// Bytes of the part. Both together are at most the frame's plaintext.
        len: u32,
    },
}

/// The pieces of a tar from some byte on.
pub struct Pieces<'a> {
    recipe: &'a Recipe,
    literals: Option<zstd::Decoder<'a, &'a [u8]>>,
    step: usize,
    literal_left: u32,
    pieces_left: u32,
    next_piece: usize,
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
        Self { recipe, literals, step: 0, literal_left: 0, pieces_left: 0, next_piece: 0, skip: from }
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
            } else if self.pieces_left > 0 {
                self.pieces_left -= 1;
                let piece = self.recipe.pieces[self.next_piece];
                self.next_piece += 1;
                let (id, place) = self.recipe.frame(piece.frame)?;
                if self.skip < u64::from(piece.len) {
                    let skipped = u32::try_from(self.skip).expect("less than a piece's length");
                    self.skip = 0;
                    let (skip, len) = (piece.skip + skipped, piece.len - skipped);
                    return Ok(Some(RecipePiece::Frame { id, place, skip, len }));
                }
                self.skip -= u64::from(piece.len);
            } else {
                let Some(step) = self.recipe.steps.get(self.step) else { return Ok(None) };
                self.step += 1;
                (self.literal_left, self.pieces_left) = (step.literal_len, step.pieces);
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
            (self.step, self.literal_left, self.pieces_left) = (usize::MAX, 0, 0);
        }
        step.transpose()
    }
}
