//! Where frames and chunks lie.

use std::fmt;

use crate::{CHUNK_BYTES_MAX, FrameId, PACK_BYTES_MAX};

/// A pack's name: the sha256 of its bytes, so that any OCI registry can serve it as the blob `sha256:…`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId([u8; 32]);

impl PackId {
    /// The id with exactly these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the sha256.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for PackId {
    /// As an OCI digest, `sha256:` and 64 digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackId({self})")
    }
}

/// Where a frame lies. A place is a claim until the frame read from it has been opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pack.
    pub pack: PackId,
    /// The frame's bytes in it.
    pub frame: Frame,
}

/// A frame inside a pack. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// From the beginning of the pack to the first byte.
    pub offset: u32,
    /// Length as stored.
    pub sealed_len: u32,
    /// Length of the plaintext.
    pub plain_len: u32,
}

impl Frame {
    /// The first byte after the frame.
    pub fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.sealed_len)
    }

    /// Whether the lengths can belong to any frame: neither empty nor over the limits of frame and pack, and not
    /// longer sealed than plain.
    pub fn is_possible(&self) -> bool {
        self.sealed_len > 0
            && self.sealed_len <= self.plain_len
            && self.plain_len as usize <= CHUNK_BYTES_MAX
            && self.end() <= PACK_BYTES_MAX as u64
    }
}

/// Where a chunk's plaintext is: in a frame, which may hold neighbours too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The BLAKE3 hash of the frame's whole plaintext. A chunk alone in its frame has the same name.
    pub frame_id: FrameId,
    /// Where the frame lies.
    pub place: Place,
    /// Bytes of the frame's plaintext before the chunk.
    pub skip: u32,
    /// The chunk's length in bytes.
    pub len: u32,
}

impl ChunkPlace {
    /// Whether the lengths can belong to any frame and chunk: what comes from outside is asked this first.
    pub fn is_possible(&self) -> bool {
        self.place.frame.is_possible()
            && self.len > 0
            && u64::from(self.skip) + u64::from(self.len) <= u64::from(self.place.frame.plain_len)
    }
}
