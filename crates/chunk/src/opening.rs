//! Opening a frame while it comes.
//!
//! A frame of 200 KiB of plaintext takes 300 µs to open, and its bytes 700 µs to come over 1 Gbit/s. So what has come is
//! decompressed and hashed while the rest is on its way: zstd gives out blocks of 128 KiB (RFC 8878, 3.1.1.2.4), and only the last
//! one is left to be done when the last byte is here.

use bytes::Bytes;
use parking_lot::Mutex;
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use crate::sealed::{Chunk, ChunkError, Sealed};
use crate::{CHUNK_BYTES_MAX, ChunkId};

/// Decoders that are kept for the next frame, some 700 KiB each.
const SPARE_MAX: usize = 4;
/// The longest window that a frame needs, as a power of two: what it holds is no longer.
const WINDOW_LOG_MAX: u32 = CHUNK_BYTES_MAX.ilog2();

/// They are the process's: a decoder knows nothing of the frame before.
static SPARE: Mutex<Vec<Decoder<'static>>> = Mutex::new(Vec::new());

/// A frame of which the first bytes are here.
pub struct Opening {
    id: ChunkId,
    sealed_len: usize,
    /// How many bytes of the frame were taken in.
    taken: usize,
    /// As long as the plaintext is said to be, and how much of it there is.
    plain: Vec<u8>,
    done: usize,
    hash: blake3::Hasher,
    /// None for a frame that is the plaintext itself.
    decoder: Option<Decoder<'static>>,
    /// Whether zstd has seen the end of it.
    is_over: bool,
    is_damaged: bool,
}

impl std::fmt::Debug for Opening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opening({}, {} of {} bytes)", self.id, self.taken, self.sealed_len)
    }
}

impl Opening {
    /// Of the frame `id`, said to be `sealed_len` bytes long and to hold `plain_len` bytes of plaintext. `None` where
    /// [`Sealed::open`] would refuse these lengths, or where there is no memory.
    pub fn new(id: ChunkId, plain_len: usize, sealed_len: usize) -> Option<Self> {
        Sealed::check_lengths(id, plain_len, sealed_len).ok()?;
        let decoder = match sealed_len == plain_len {
            true => None,
            false => Some(SPARE.lock().pop().map_or_else(decoder, Ok).ok()?),
        };
        let is_over = decoder.is_none();
        let (plain, hash) = (vec![0; plain_len], blake3::Hasher::new());
        Some(Self { id, sealed_len, taken: 0, plain, done: 0, hash, decoder, is_over, is_damaged: false })
    }

    /// How many bytes of the frame were taken in.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// How many bytes it is said to be long.
    pub fn sealed_len(&self) -> usize {
        self.sealed_len
    }

    /// Takes the next bytes of the frame in.
    pub fn take(&mut self, bytes: &[u8]) {
        self.taken = self.taken.saturating_add(bytes.len());
        if self.is_damaged || self.taken > self.sealed_len {
            self.is_damaged = true;
            return;
        }
        let before = self.done;
        match &mut self.decoder {
            None => {
                self.plain[before..before + bytes.len()].copy_from_slice(bytes);
                self.done += bytes.len();
            }
            Some(decoder) => {
                let mut input = InBuffer::around(bytes);
                let mut output = OutBuffer::around_pos(&mut self.plain[..], before);
                while !self.is_over && !self.is_damaged {
                    let (read, written) = (input.pos(), output.pos());
                    match decoder.run(&mut input, &mut output) {
                        Ok(hint) => self.is_over = hint == 0,
                        Err(_) => self.is_damaged = true,
                    }
                    // it reads all that it is given, unless it has more plaintext than was said
                    if input.pos() == read && output.pos() == written {
                        break;
                    }
                }
                self.is_damaged |= input.pos() < bytes.len();
                self.done = output.pos();
            }
        }
        self.hash.update(&self.plain[before..self.done]);
    }

    /// What [`Sealed::open`] gives of all the bytes that were taken in.
    ///
    /// # Errors
    /// As there; also for a frame that says that it needs a window longer than the longest frame, which no sealer writes.
    pub fn finish(mut self) -> Result<Chunk, ChunkError> {
        if self.is_damaged || !self.is_over || self.taken != self.sealed_len || self.done != self.plain.len()
        {
            return Err(ChunkError::Damaged(self.id));
        }
        if self.hash.finalize() != *self.id.as_bytes() {
            return Err(ChunkError::WrongBytes(self.id));
        }
        Ok(Chunk::proven(self.id, Bytes::from(std::mem::take(&mut self.plain))))
    }
}

/// A decoder that never takes more memory than our frames need.
fn decoder() -> std::io::Result<Decoder<'static>> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
    Ok(decoder)
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(mut decoder) = self.decoder.take()
            && decoder.reinit().is_ok()
        {
            let mut spare = SPARE.lock();
            if spare.len() < SPARE_MAX {
                spare.push(decoder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Level, Sealer};

    fn sealed(plain: Vec<u8>) -> (Chunk, Sealed) {
        let chunk = Chunk::cut(plain.into());
        let sealed = Sealer::new(Level::default()).seal(&chunk);
        (chunk, sealed)
    }

    fn open(id: ChunkId, sealed: &Sealed, pieces: usize) -> Result<Chunk, ChunkError> {
        let mut opening = Opening::new(id, sealed.plain_len(), sealed.bytes().len()).unwrap();
        sealed.bytes().chunks(pieces).for_each(|piece| opening.take(piece));
        opening.finish()
    }

    /// Bytes that become shorter by about a half.
    fn plain(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 28) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn most_of_a_frame_is_open_before_its_last_byte_has_come() {
        let (chunk, sealed) = sealed(plain(CHUNK_BYTES_MAX));
        let mut opening = Opening::new(chunk.id(), CHUNK_BYTES_MAX, sealed.bytes().len()).unwrap();
        opening.take(&sealed.bytes()[..sealed.bytes().len() - 1]);
        assert!(opening.done >= CHUNK_BYTES_MAX / 2, "{}", opening.done);
        opening.take(&sealed.bytes()[sealed.bytes().len() - 1..]);
        assert_eq!(opening.finish(), Ok(chunk));
    }

    #[test]
    fn a_frame_that_ends_early_or_late_is_damaged() {
        let (chunk, sealed) = sealed(plain(50_000));
        let len = sealed.bytes().len();
        for taken in [&sealed.bytes()[..0], &sealed.bytes()[..len - 1], &[&sealed.bytes()[..], b"x"].concat()]
        {
            let mut opening = Opening::new(chunk.id(), 50_000, len).unwrap();
            opening.take(taken);
            assert_eq!(opening.finish(), Err(ChunkError::Damaged(chunk.id())), "{} of {len}", taken.len());
        }
        // said to be longer, or shorter, than it is
        for plain_len in [49_999, 50_001] {
            let other = Sealed::new(sealed.bytes().clone(), plain_len);
            assert_eq!(open(chunk.id(), &other, 1000), Err(ChunkError::Damaged(chunk.id())));
        }
    }

    proptest! {
        #[test]
        fn whatever_the_pieces_it_opens_as_all_at_once(
            plain in prop::collection::vec(0u8..4, 1..20_000), pieces in 1usize..5_000,
        ) {
            let (chunk, sealed) = sealed(plain);
            prop_assert_eq!(open(chunk.id(), &sealed, pieces), Ok(chunk));
        }

        #[test]
        fn a_frame_with_any_bit_changed_never_opens_as_other_bytes(
            plain in prop::collection::vec(0u8..4, 1..5_000), at in any::<prop::sample::Index>(), bit in 0u8..8, pieces in 1usize..5_000,
        ) {
            let (chunk, sealed) = sealed(plain);
            let mut frame = sealed.bytes().to_vec();
            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
            let damaged = Sealed::new(Bytes::from(frame), sealed.plain_len());
            if let Ok(opened) = open(chunk.id(), &damaged, pieces) {
                prop_assert_eq!(opened, chunk);
            }
            // and leaves nothing behind in the decoder
            let (chunk, sealed) = self::sealed(self::plain(1000));
            prop_assert_eq!(open(chunk.id(), &sealed, 100), Ok(chunk));
        }
    }
}
