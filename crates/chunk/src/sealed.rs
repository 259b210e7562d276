//! Sealing and opening: the bytes of a chunk as stored and sent.

use std::cell::RefCell;

use bytes::Bytes;
use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, Strategy};

use crate::{CHUNK_BYTES_MAX, ChunkId};

/// The plaintext of a chunk or of a frame, 1 byte to 256 KiB, already matched against its id. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Chunk {
    id: ChunkId,
    plain: Bytes,
}

impl Chunk {
    /// Names bytes that were just cut from a file, or chunks put together for one frame. Panics where they are not 1 byte to 256 KiB long: the cutter
    /// promised that.
    pub fn cut(plain: Bytes) -> Self {
        assert!(!plain.is_empty() && plain.len() <= CHUNK_BYTES_MAX, "a cut of {} bytes", plain.len());
        Self { id: ChunkId::of(&plain), plain }
    }

    /// Bytes of which `id` was seen to be the hash.
    pub(crate) fn proven(id: ChunkId, plain: Bytes) -> Self {
        Self { id, plain }
    }

    /// The BLAKE3 hash of the plaintext.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// The plaintext.
    pub fn bytes(&self) -> &Bytes {
        &self.plain
    }
}

impl std::fmt::Debug for Chunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Chunk({}, {} bytes)", self.id, self.plain.len())
    }
}

/// Why a frame is not the chunk it was said to be. None of these goes away by opening the same bytes again; fetch
/// them from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The lengths cannot belong to any frame: the plaintext is empty or over 256 KiB, or the frame is longer.
    #[error("chunk {id} cannot be {plain_len} bytes in a frame of {sealed_len}")]
    Length {
        /// The chunk asked for.
        id: ChunkId,
        /// The claimed length of its plaintext, in bytes.
        plain_len: usize,
        /// The length of the frame, in bytes.
        sealed_len: usize,
    },
    /// The frame does not decompress to exactly the claimed length.
    #[error("the frame of chunk {0} does not decompress")]
    Damaged(ChunkId),
    /// The frame decompresses, to another chunk's bytes.
    #[error("the frame of chunk {0} holds other bytes")]
    WrongBytes(ChunkId),
}

/// A zstd compression level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(pub i32);

impl Default for Level {
    /// What everything published is sealed with; `FORMAT.md` has the measurements behind it.
    fn default() -> Self {
        Self(3)
    }
}

/// How much of the middle of a chunk tells what it is like, in bytes. Shorter ones than twice this are not asked.
const PROBE_BYTES: usize = 8 << 10;
/// A chunk compresses poorly where its probe keeps more than this much of its length, in hundredths.
const POOR_PERCENT: usize = 65;

/// Seals chunks one after another, reusing compressors and a buffer of about 2 MiB together.
///
/// At the default level, what compresses poorly (weights and kernels of GPUs, half of an image) is sealed by zstd's fast strategy with
/// matches of four bytes and a large table: nearly as short, in half the time. `FORMAT.md` has the figures.
pub struct Sealer {
    level: Compressor<'static>,
    /// For what compresses poorly, and what finds out whether it does.
    poor: Option<[Compressor<'static>; 2]>,
    frame: Vec<u8>,
}

impl Sealer {
    /// A sealer that compresses at `level`.
    pub fn new(level: Level) -> Self {
        let compressor = |level| Compressor::new(level).expect("zstd takes every level, clamped");
        let poor = (level == Level::default()).then(|| {
            let mut fast = compressor(level.0);
            for parameter in
                [CParameter::Strategy(Strategy::ZSTD_fast), CParameter::HashLog(16), CParameter::MinMatch(4)]
            {
                fast.set_parameter(parameter).expect("within zstd's bounds");
            }
            [fast, compressor(1)]
        });
        Self { level: compressor(level.0), poor, frame: vec![0; CHUNK_BYTES_MAX] }
    }

    /// The frame of `chunk`: one zstd frame, or the plaintext itself where zstd would not make it shorter.
    pub fn seal(&mut self, chunk: &Chunk) -> Sealed {
        let plain = chunk.bytes();
        let Self { level, poor, frame } = self;
        let compressor = match poor {
            Some([fast, probe]) => {
                if is_poor(plain, probe, frame) {
                    fast
                } else {
                    level
                }
            }
            None => level,
        };
        // a buffer one byte too small makes zstd refuse what would not get smaller
        let bytes = match compressor.compress_to_buffer(plain, &mut frame[..plain.len() - 1]) {
            Ok(len) => Bytes::copy_from_slice(&frame[..len]),
            Err(_) => plain.clone(),
        };
        Sealed { bytes, plain_len: plain.len() }
    }
}

/// Whether `plain` is long, and its middle does not get much shorter.
fn is_poor(plain: &[u8], probe: &mut Compressor<'_>, frame: &mut [u8]) -> bool {
    if plain.len() < 2 * PROBE_BYTES {
        return false;
    }
    let middle = (plain.len() - PROBE_BYTES) / 2;
    let kept = probe.compress_to_buffer(&plain[middle..middle + PROBE_BYTES], frame);
    kept.map_or(true, |len| len * 100 > PROBE_BYTES * POOR_PERCENT)
}

/// A chunk as stored and sent, with nothing checked yet: a zstd frame, or the plaintext itself where both lengths
/// are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    bytes: Bytes,
    plain_len: usize,
}

thread_local! {
    /// Its tables take longer to set up than a small chunk to open.
    static OPENER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

impl Sealed {
    /// `bytes` from a disk or a network, said to hold `plain_len` bytes of plaintext.
    pub fn new(bytes: Bytes, plain_len: usize) -> Self {
        Self { bytes, plain_len }
    }

    /// The frame.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// How long the plaintext is said to be, in bytes.
    pub fn plain_len(&self) -> usize {
        self.plain_len
    }

    /// Whether the lengths of a frame can be right, before anything is allocated.
    pub(crate) fn check_lengths(id: ChunkId, plain_len: usize, sealed_len: usize) -> Result<(), ChunkError> {
        let is_possible = (1..=CHUNK_BYTES_MAX).contains(&plain_len) && (1..=plain_len).contains(&sealed_len);
        is_possible.then_some(()).ok_or(ChunkError::Length { id, plain_len, sealed_len })
    }

    /// Decompresses and verifies: what comes back is the chunk `id`, or an error. A frame that was stored raw is
    /// not copied. Never allocates more than the claimed length, and never more than 256 KiB.
    ///
    /// Cost: about 60 µs for 64 KiB.
    pub fn open(&self, id: ChunkId) -> Result<Chunk, ChunkError> {
        let (plain_len, sealed_len) = (self.plain_len, self.bytes.len());
        Self::check_lengths(id, plain_len, sealed_len)?;
        let plain = if sealed_len == plain_len {
            self.bytes.clone()
        } else {
            let opened = OPENER.with_borrow_mut(|opener| match opener {
                Some(opener) => opener.decompress(&self.bytes, plain_len),
                none => none.insert(zstd::bulk::Decompressor::new()?).decompress(&self.bytes, plain_len),
            });
            let plain = opened.map_err(|_| ChunkError::Damaged(id))?;
            if plain.len() != plain_len {
                return Err(ChunkError::Damaged(id));
            }
            Bytes::from(plain)
        };
        if ChunkId::of(&plain) != id {
            return Err(ChunkError::WrongBytes(id));
        }
        Ok(Chunk { id, plain })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_does_not_compress_is_kept_as_it_is() {
        let chunk = Chunk::cut(Bytes::from_static(b"\x01\xfe\x33"));
        let sealed = Sealer::new(Level::default()).seal(&chunk);
        assert_eq!(sealed.bytes(), chunk.bytes());
        assert_eq!(sealed.open(chunk.id()), Ok(chunk));
    }

    #[test]
    fn what_compresses_is_stored_shorter() {
        let chunk = Chunk::cut(Bytes::from(vec![7; 100_000]));
        let sealed = Sealer::new(Level::default()).seal(&chunk);
        assert!(sealed.bytes().len() < 100);
        assert_eq!(sealed.open(chunk.id()), Ok(chunk));
    }

    #[test]
    fn what_compresses_poorly_is_stored_a_little_shorter_and_the_same_each_time() {
        // a quarter of each byte is known
        let mut state = 1u32;
        let plain: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 26) as u8
        })
        .take(200_000)
        .collect();
        let chunk = Chunk::cut(plain.into());
        let mut sealer = Sealer::new(Level::default());
        let sealed = sealer.seal(&chunk);
        assert!((140_000..170_000).contains(&sealed.bytes().len()), "{}", sealed.bytes().len());
        assert_eq!(sealer.seal(&chunk), sealed);
        assert_eq!(sealed.open(chunk.id()), Ok(chunk));
    }

    #[test]
    fn lengths_that_lie_are_refused_before_anything_is_allocated() {
        let id = ChunkId::of(b"x");
        for (frame, plain_len) in [(0, 0), (0, 1), (1, usize::MAX), (2, 1), (1, CHUNK_BYTES_MAX + 1)] {
            let sealed = Sealed::new(Bytes::from(vec![0; frame]), plain_len);
            assert!(matches!(sealed.open(id), Err(ChunkError::Length { .. })), "{frame} of {plain_len}");
        }
    }

    proptest! {
        #[test]
        fn sealing_and_opening_gives_the_same_bytes(plain in prop::collection::vec(0u8..4, 1..20_000)) {
            let chunk = Chunk::cut(Bytes::from(plain));
            let sealed = Sealer::new(Level::default()).seal(&chunk);
            prop_assert!(sealed.bytes().len() <= chunk.bytes().len());
            prop_assert_eq!(sealed.open(chunk.id()), Ok(chunk));
        }

        #[test]
        fn a_frame_with_any_bit_changed_never_opens_as_other_bytes(
            plain in prop::collection::vec(0u8..4, 1..5_000), at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let chunk = Chunk::cut(Bytes::from(plain));
            let sealed = Sealer::new(Level::default()).seal(&chunk);
            let mut frame = sealed.bytes().to_vec();
            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
            // some bits of a zstd header mean nothing: then the bytes are still the right ones
            if let Ok(opened) = Sealed::new(Bytes::from(frame), sealed.plain_len()).open(chunk.id()) {
                prop_assert_eq!(opened, chunk);
            }
        }

        #[test]
        fn any_bytes_at_all_open_to_an_error(frame in prop::collection::vec(any::<u8>(), 0..2_000), plain_len in 0usize..300_000) {
            let id = ChunkId::of(b"something else");
            prop_assert!(Sealed::new(Bytes::from(frame), plain_len).open(id).is_err());
        }
    }
}
