//! What a chunk is: how file contents are cut, named, sealed and opened.
//!
//! A **chunk** is 16 to 256 KiB of one file's plaintext (less only at the end of a file), cut by content and named
//! by its BLAKE3 hash; it is the unit of deduplication. A **frame** is one chunk, or several neighbours of together
//! at most 256 KiB, sealed: it is the unit of storage, transfer and verification, named by the BLAKE3 hash of its
//! plaintext. Plaintext exists only as [`Chunk`], and bytes that came from anywhere else become one only through
//! [`Sealed::open`], or [`Opening`] while they come, which check the hash. Frames are kept in **packs** of up to 64 MiB,
//! whose index says which chunks are in which frame.
//!
//! This crate does no I/O, reads no clock and spawns nothing. `FORMAT.md` beside it fixes the bytes.

mod cut;
mod id;
mod moved;
mod opening;
mod pack;
mod place;
mod sealed;

pub use cut::{CHUNK_BYTES_AVG, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, next_cut};
pub use id::{ChunkId, FrameId, ParseIdError};
pub use moved::{MOVED_BYTES_MAX, MOVES_MAX, Moved, MovedError, MovedFrame, MovedPart, MovedSpan};
pub use opening::Opening;
pub use pack::{
    FOOTER_BYTES, PACK_BYTES_MAX, PackBuilder, PackError, PackFooter, PackRecord, PackedChunk, pack_records,
};
pub use place::{ChunkPlace, Frame, PackId, Place};
pub use sealed::{Chunk, ChunkError, Level, Sealed, Sealer};
