//! Where a sealed chunk lies.

use std::fmt;

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

/// Where the frame of one chunk lies. A place is a claim until the frame read from it has been opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pack.
    pub pack: PackId,
    /// The frame's bytes in it.
    pub frame: Frame,
}

/// The frame of one chunk inside a pack. All in bytes.
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
}
