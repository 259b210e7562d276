//! Recipes: how to rebuild one layer's exact tar from literal bytes and frames.
//!
//! A recipe holds everything of the tar but file contents, and where the frames of those lie. So it is also the
//! shortest description of a layer: [`read_tar`](crate::read_tar) over a recipe gives the layer's entries without
//! touching a single frame. `FORMAT.md` has the bytes.

mod build;
mod pieces;
mod source;

use std::collections::HashMap;
use std::io::Read;

use bytes::Bytes;
use lamina_chunk::{Frame, FrameId, PackId, Place};

use crate::Digest;
use crate::tar::Piece;

pub(crate) use build::RecipeDraft;
pub use pieces::{Pieces, RecipePiece};
pub(crate) use source::RecipeSource;

const MAGIC: [u8; 8] = *b"LAMRECI1";
const HEADER_BYTES: usize = 96;
/// Tables over 256 MiB are refused: enough for five million pieces, a layer of 300 GiB.
const TABLE_BYTES_MAX: u64 = 256 << 20;
const LEVEL: i32 = 3;

/// Why bytes are not a recipe. Another try with the same bytes will not help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    /// The magic is missing or of another version, or the lengths contradict.
    #[error("not a recipe: bad header")]
    Header,
    /// The tables or the literal bytes do not decompress to what the header says.
    #[error("the recipe is damaged: its {0} do not decompress")]
    Compressed(&'static str),
    /// Something points outside its table, or the parts do not add up to the tar.
    #[error("the recipe is damaged: {0} {1} is out of bounds")]
    Bounds(&'static str, u64),
}

/// One run of literal bytes, and how many pieces of frames follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    literal_len: u32,
    pieces: u32,
}

/// How to rebuild one layer's tar.
#[derive(Clone, Debug)]
pub struct Recipe {
    blob: Bytes,
    diff_id: Digest,
    tar_bytes: u64,
    literal_bytes: u64,
    frames: Vec<(FrameId, Place)>,
    steps: Vec<Step>,
    /// In the order of the tar.
    pieces: Vec<Piece>,
    literals: Bytes,
}

impl Recipe {
    /// Reads a recipe, checking that every number in it is inside its table and that all adds up. Literal bytes
    /// stay compressed. Memory: 100 bytes a frame.
    pub fn parse(blob: Bytes) -> Result<Self, RecipeError> {
        let header = blob.get(..HEADER_BYTES).ok_or(RecipeError::Header)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        if header[..8] != MAGIC || header[8..16] != [0; 8] || header[84..] != [0; 12] {
            return Err(RecipeError::Header);
        }
        let (frames, packs, steps, pieces) = (word(64), word(68), word(72), word(76));
        let tables_end = HEADER_BYTES + word(80) as usize;
        let literals = blob.get(tables_end..).map(|_| blob.slice(tables_end..)).ok_or(RecipeError::Header)?;
        let expected =
            u64::from(packs) * 32 + u64::from(frames) * 48 + u64::from(steps) * 8 + u64::from(pieces) * 12;
        let tables = decompress(&blob[HEADER_BYTES..tables_end], expected)?;
        let mut tables = Table(&tables);
        let packs: Vec<PackId> = (0..packs).map(|_| PackId::from_bytes(tables.take())).collect();
        let ids: Vec<FrameId> = (0..frames).map(|_| FrameId::from_bytes(tables.take())).collect();
        let frames =
            ids.into_iter().map(|id| Ok((id, tables.place(&packs)?))).collect::<Result<Vec<_>, _>>()?;
        let steps = (0..steps).map(|_| Step { literal_len: tables.word(), pieces: tables.word() }).collect();
        let pieces = (0..pieces)
            .map(|_| Piece { frame: tables.word(), skip: tables.word(), len: tables.word() })
            .collect();
        let recipe = Self {
            diff_id: Digest::from_bytes(header[32..64].try_into().expect("32 bytes")),
            tar_bytes: long(16),
            literal_bytes: long(24),
            frames,
            steps,
            pieces,
            literals,
            blob,
        };
        recipe.check()
    }

    /// Everything adds up.
    fn check(self) -> Result<Self, RecipeError> {
        let mut sum = u128::from(self.literal_bytes);
        for piece in &self.pieces {
            let (_, place) = self.frame(piece.frame)?;
            let end = u64::from(piece.skip) + u64::from(piece.len);
            if piece.len == 0 || end > u64::from(place.frame.plain_len) {
                return Err(RecipeError::Bounds("piece of frame", piece.frame.into()));
            }
            sum += u128::from(piece.len);
        }
        let literal: u128 = self.steps.iter().map(|step| u128::from(step.literal_len)).sum();
        let named: u128 = self.steps.iter().map(|step| u128::from(step.pieces)).sum();
        if sum != u128::from(self.tar_bytes) || literal != u128::from(self.literal_bytes) {
            return Err(RecipeError::Bounds("length", self.tar_bytes));
        }
        if named != self.pieces.len() as u128 {
            return Err(RecipeError::Bounds("step", self.steps.len() as u64));
        }
        Ok(self)
    }

    /// The recipe's own bytes.
    pub fn blob(&self) -> &Bytes {
        &self.blob
    }

    /// What the rebuilt tar must hash to.
    pub fn diff_id(&self) -> Digest {
        self.diff_id
    }

    /// How long the rebuilt tar is, in bytes.
    pub fn tar_bytes(&self) -> u64 {
        self.tar_bytes
    }

    /// Each distinct frame once, in the order of first use, and where it lies.
    pub fn frames(&self) -> &[(FrameId, Place)] {
        &self.frames
    }

    /// The tar from byte `from` on, piece by piece. Cost until the first piece: decompressing the literal bytes
    /// before it, and no frames.
    pub fn pieces(&self, from: u64) -> Pieces<'_> {
        Pieces::new(self, from)
    }

    fn frame(&self, number: u32) -> Result<(FrameId, Place), RecipeError> {
        let found = self.frames.get(number as usize).copied();
        found.ok_or(RecipeError::Bounds("frame", number.into()))
    }
}

fn decompress(frame: &[u8], expected: u64) -> Result<Vec<u8>, RecipeError> {
    if expected > TABLE_BYTES_MAX {
        return Err(RecipeError::Header);
    }
    let damaged = |_| RecipeError::Compressed("tables");
    let decoder = zstd::Decoder::with_buffer(frame).map_err(damaged)?;
    let mut tables = Vec::new();
    decoder.take(expected + 1).read_to_end(&mut tables).map_err(damaged)?;
    if tables.len() as u64 != expected { Err(RecipeError::Compressed("tables")) } else { Ok(tables) }
}

/// The rest of the decompressed tables, whose length was checked against all counts.
struct Table<'a>(&'a [u8]);

impl Table<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (bytes, rest) =
            self.0.split_first_chunk::<N>().expect("the length was checked against the counts");
        self.0 = rest;
        *bytes
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn place(&mut self, packs: &[PackId]) -> Result<Place, RecipeError> {
        let pack = self.word();
        let frame = Frame { offset: self.word(), sealed_len: self.word(), plain_len: self.word() };
        let pack = packs.get(pack as usize).filter(|_| frame.is_possible());
        Ok(Place { pack: *pack.ok_or(RecipeError::Bounds("place", frame.offset.into()))?, frame })
    }
}

/// Numbers for packs, in the order in which they are first asked for.
#[derive(Debug, Default)]
pub(crate) struct PackNumbers {
    numbers: HashMap<PackId, u32>,
    pub(crate) packs: Vec<PackId>,
}

impl PackNumbers {
    pub(crate) fn number(&mut self, pack: PackId) -> u32 {
        *self.numbers.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            u32::try_from(self.packs.len() - 1)
                .expect("fewer packs than frames, and those are counted in 32 bits")
        })
    }
}
