//! A recipe as the source of a tar reader: contents are named, never fetched.

use std::io::Read;

use super::Recipe;
use crate::tar::{Piece, TarError, TarSource};

/// Feeds a recipe to [`read_tar`](crate::read_tar). Frames are numbered as in [`Recipe::frames`].
pub(crate) struct RecipeSource<'a> {
    recipe: &'a Recipe,
    literals: zstd::Decoder<'a, &'a [u8]>,
    step: usize,
    literal_left: u32,
    pieces_left: u32,
    next_piece: usize,
    position: u64,
}

impl<'a> RecipeSource<'a> {
    pub(crate) fn new(recipe: &'a Recipe) -> Result<Self, TarError> {
        let literals = zstd::Decoder::with_buffer(&recipe.literals[..])?;
        let (step, next_piece) = (0, 0);
        Ok(Self { recipe, literals, step, literal_left: 0, pieces_left: 0, next_piece, position: 0 })
    }

    /// Goes to the next step where this one is used up. False at the end.
    fn advance(&mut self) -> bool {
        while self.literal_left == 0 && self.pieces_left == 0 {
            let Some(step) = self.recipe.steps.get(self.step) else { return false };
            self.step += 1;
            (self.literal_left, self.pieces_left) = (step.literal_len, step.pieces);
        }
        true
    }
}

impl TarSource for RecipeSource<'_> {
    fn framing(&mut self, len: usize) -> Result<Vec<u8>, TarError> {
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len && self.advance() {
            if self.literal_left == 0 {
                return Err(TarError::Recipe(self.position));
            }
            let part = (len - filled).min(self.literal_left as usize);
            self.literals.read_exact(&mut bytes[filled..filled + part])?;
            self.literal_left -= u32::try_from(part).expect("at most what is left");
            self.position += part as u64;
            filled += part;
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn contents(&mut self, len: u64) -> Result<Vec<Piece>, TarError> {
        let mut pieces = Vec::new();
        let mut left = len;
        while left > 0 {
            if !self.advance() || self.literal_left > 0 {
                return Err(TarError::Recipe(self.position));
            }
            let piece = self.recipe.pieces[self.next_piece];
            left = left.checked_sub(u64::from(piece.len)).ok_or(TarError::Recipe(self.position))?;
            self.next_piece += 1;
            self.pieces_left -= 1;
            self.position += u64::from(piece.len);
            pieces.push(piece);
        }
        Ok(pieces)
    }

    fn position(&self) -> u64 {
        self.position
    }
}
