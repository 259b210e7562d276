//! Packs: up to 64 MiB of frames, with an index behind them. `FORMAT.md` has the bytes.

use bytes::Bytes;

use crate::{ChunkId, ChunkPlace, Frame, FrameId, PackId, Place, Sealed};

/// No pack is longer: 64 MiB, index and footer included.
pub const PACK_BYTES_MAX: usize = 64 << 20;
/// What a pack ends with, in bytes.
pub const FOOTER_BYTES: usize = 64;

/// One frame in the index: id, offset, sealed length, plain length, number of chunks.
const FRAME_RECORD_BYTES: usize = 48;
/// One chunk in the index: id and length.
const CHUNK_RECORD_BYTES: usize = 36;
const MAGIC: [u8; 8] = *b"LAMPACK1";

/// Why bytes are not a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// The footer is missing, of another version, or contradicts the length of the pack.
    #[error("not a pack: bad footer")]
    Footer,
    /// The index does not match the hash in the footer.
    #[error("the pack's index is damaged")]
    IndexHash,
    /// A record lies outside the pack, overlaps another, or has a length that no frame has.
    #[error("the pack's index is impossible at frame {0}")]
    Record(u32),
}

/// One frame of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackRecord {
    /// The frame's name.
    pub id: FrameId,
    /// Where it lies.
    pub frame: Frame,
    /// The chunks in it, in order; their lengths add up to the frame's plaintext.
    pub chunks: Vec<PackedChunk>,
}

/// One chunk of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedChunk {
    /// The chunk.
    pub id: ChunkId,
    /// Its length in bytes.
    pub len: u32,
}

impl PackRecord {
    /// Where each chunk of the frame is, given the pack's name.
    pub fn places(&self, pack: PackId) -> impl Iterator<Item = (ChunkId, ChunkPlace)> + '_ {
        let place = Place { pack, frame: self.frame };
        self.chunks.iter().scan(0, move |skip, chunk| {
            let here = ChunkPlace { frame_id: self.id, place, skip: *skip, len: chunk.len };
            *skip += chunk.len;
            Some((chunk.id, here))
        })
    }

    /// Opens the frame in `pack`, the whole pack's bytes, and checks that its chunks are those that the index
    /// names: what a store does before it offers any of them to others.
    pub fn verify(&self, pack: &Bytes) -> Result<(), crate::ChunkError> {
        let start = self.frame.offset as usize;
        let sealed = pack.slice(start..start + self.frame.sealed_len as usize);
        let opened = Sealed::new(sealed, self.frame.plain_len as usize).open(self.id)?;
        let mut start = 0;
        for chunk in &self.chunks {
            let end = start + chunk.len as usize;
            // a frame of one chunk was just checked under the same name
            if chunk.id != self.id && ChunkId::of(&opened.bytes()[start..end]) != chunk.id {
                return Err(crate::ChunkError::WrongBytes(chunk.id));
            }
            start = end;
        }
        Ok(())
    }
}

/// Collects frames into one pack.
#[derive(Debug, Default)]
pub struct PackBuilder {
    bytes: Vec<u8>,
    records: Vec<PackRecord>,
    chunks: usize,
}

impl PackBuilder {
    /// An empty pack that has room for `capacity` bytes of frames before it reallocates.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { bytes: Vec::with_capacity(capacity), ..Self::default() }
    }

    /// How long the pack would be if it were finished now, in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.index_len() + FOOTER_BYTES
    }

    fn index_len(&self) -> usize {
        self.records.len() * FRAME_RECORD_BYTES + self.chunks * CHUNK_RECORD_BYTES
    }

    /// Whether nothing was pushed yet.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Appends a frame that holds these chunks in this order. Panics where their lengths do not add up to the
    /// frame's, or where the pack would grow over [`PACK_BYTES_MAX`]: ask [`len`](Self::len) first.
    pub fn push(&mut self, id: FrameId, sealed: &Sealed, chunks: Vec<PackedChunk>) {
        let frame = Frame {
            offset: small(self.bytes.len()),
            sealed_len: small(sealed.bytes().len()),
            plain_len: small(sealed.plain_len()),
        };
        let sum: usize = chunks.iter().map(|chunk| chunk.len as usize).sum();
        assert_eq!(sum, sealed.plain_len(), "the chunks of a frame are all of it");
        self.bytes.extend_from_slice(sealed.bytes());
        self.chunks += chunks.len();
        self.records.push(PackRecord { id, frame, chunks });
        assert!(self.len() <= PACK_BYTES_MAX, "a pack of {} bytes", self.len());
    }

    /// Writes index and footer behind the frames.
    pub fn finish(mut self) -> (Bytes, Vec<PackRecord>) {
        let index_at = self.bytes.len();
        self.bytes.reserve_exact(self.index_len() + FOOTER_BYTES);
        for record in &self.records {
            self.bytes.extend_from_slice(record.id.as_bytes());
            let frame = record.frame;
            for field in [frame.offset, frame.sealed_len, frame.plain_len, small(record.chunks.len())] {
                self.bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        for chunk in self.records.iter().flat_map(|record| &record.chunks) {
            self.bytes.extend_from_slice(chunk.id.as_bytes());
            self.bytes.extend_from_slice(&chunk.len.to_le_bytes());
        }
        let index_hash = blake3::hash(&self.bytes[index_at..]);
        self.bytes.extend_from_slice(&MAGIC);
        for count in [self.records.len(), self.chunks, index_at, 0] {
            self.bytes.extend_from_slice(&small(count).to_le_bytes());
        }
        self.bytes.extend_from_slice(index_hash.as_bytes());
        self.bytes.extend_from_slice(&[0; 8]);
        (Bytes::from(self.bytes), self.records)
    }
}

/// A length below [`PACK_BYTES_MAX`] as the format writes it.
fn small(len: usize) -> u32 {
    u32::try_from(len).expect("packs are at most 64 MiB")
}

/// A pack's last 64 bytes, checked against its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackFooter {
    frames: u32,
    chunks: u32,
    index_at: u32,
    index_hash: [u8; 32],
}

impl PackFooter {
    /// Reads the last [`FOOTER_BYTES`] of a pack that is `pack_len` bytes long.
    pub fn read(footer: &[u8], pack_len: u64) -> Result<Self, PackError> {
        let footer: &[u8; FOOTER_BYTES] = footer.try_into().map_err(|_| PackError::Footer)?;
        let (frames, chunks, index_at) = (word(footer, 8), word(footer, 12), word(footer, 16));
        let index_hash = footer[24..56].try_into().expect("32 bytes");
        let found = Self { frames, chunks, index_at, index_hash };
        let whole = found.index_range().end + FOOTER_BYTES as u64;
        let blank = footer[20..24] == [0; 4] && footer[56..] == [0; 8];
        if footer[..8] != MAGIC || !blank || whole != pack_len || pack_len > PACK_BYTES_MAX as u64 {
            return Err(PackError::Footer);
        }
        Ok(found)
    }

    /// Where the index lies in the pack, in bytes from its beginning. Ends where the footer begins.
    pub fn index_range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.index_at);
        let frames = u64::from(self.frames) * FRAME_RECORD_BYTES as u64;
        start..start + frames + u64::from(self.chunks) * CHUNK_RECORD_BYTES as u64
    }

    /// Reads the index, the bytes of [`index_range`](Self::index_range). Records come in the order of their
    /// frames, which follow each other without gaps from the beginning of the pack.
    pub fn records(&self, index: &[u8]) -> Result<Vec<PackRecord>, PackError> {
        if *blake3::hash(index).as_bytes() != self.index_hash {
            return Err(PackError::IndexHash);
        }
        let frames_len = self.frames as usize * FRAME_RECORD_BYTES;
        let (frames, chunks) = index.split_at_checked(frames_len).ok_or(PackError::Footer)?;
        let mut chunks = chunks.chunks_exact(CHUNK_RECORD_BYTES).map(|record| PackedChunk {
            id: ChunkId::from_bytes(record[..32].try_into().expect("32 bytes")),
            len: word(record, 32),
        });
        let mut end = 0u64;
        let mut records = Vec::with_capacity(self.frames as usize);
        for (number, record) in (0u32..).zip(frames.chunks_exact(FRAME_RECORD_BYTES)) {
            let id = FrameId::from_bytes(record[..32].try_into().expect("32 bytes"));
            let frame =
                Frame { offset: word(record, 32), sealed_len: word(record, 36), plain_len: word(record, 40) };
            let chunks: Vec<PackedChunk> = chunks.by_ref().take(word(record, 44) as usize).collect();
            let sum: u64 = chunks.iter().map(|chunk| u64::from(chunk.len)).sum();
            let adds_up = sum == u64::from(frame.plain_len) && chunks.iter().all(|chunk| chunk.len > 0);
            let in_place = u64::from(frame.offset) == end && frame.end() <= u64::from(self.index_at);
            if !frame.is_possible() || !adds_up || !in_place {
                return Err(PackError::Record(number));
            }
            end = frame.end();
            records.push(PackRecord { id, frame, chunks });
        }
        if end != u64::from(self.index_at) || chunks.next().is_some() {
            return Err(PackError::Footer);
        }
        Ok(records)
    }
}

/// The little-endian word at a position that the caller knows to be inside.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The index of a pack that is wholly in memory. The frames themselves are not opened.
pub fn pack_records(pack: &[u8]) -> Result<Vec<PackRecord>, PackError> {
    let footer_at = pack.len().checked_sub(FOOTER_BYTES).ok_or(PackError::Footer)?;
    let footer = PackFooter::read(&pack[footer_at..], pack.len() as u64)?;
    let range = footer.index_range();
    let start = usize::try_from(range.start).map_err(|_| PackError::Footer)?;
    footer.records(&pack[start..footer_at])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Chunk, Level, Sealer};

    fn push(builder: &mut PackBuilder, texts: &[&'static str]) {
        let chunks = texts.iter().map(|text| {
            let len = u32::try_from(text.len()).unwrap();
            PackedChunk { id: ChunkId::of(text.as_bytes()), len }
        });
        let whole = Chunk::cut(Bytes::from(texts.concat()));
        builder.push(whole.id(), &Sealer::new(Level::default()).seal(&whole), chunks.collect());
    }

    fn sample() -> (Bytes, Vec<PackRecord>) {
        let mut builder = PackBuilder::with_capacity(1 << 10);
        push(&mut builder, &["one"]);
        push(&mut builder, &["two two two two two two two two two two two two", "three", "four"]);
        assert!(!builder.is_empty());
        let len = builder.len();
        let (pack, records) = builder.finish();
        assert_eq!(pack.len(), len);
        (pack, records)
    }

    #[test]
    fn a_pack_gives_back_its_records_and_its_frames_open() {
        let (pack, records) = sample();
        assert_eq!(pack_records(&pack), Ok(records.clone()));
        for record in &records {
            assert_eq!(record.verify(&pack), Ok(()));
        }
        let places: Vec<_> = records[1].places(PackId::from_bytes([7; 32])).map(|(_, place)| place).collect();
        assert_eq!(
            places.iter().map(|place| (place.skip, place.len)).collect::<Vec<_>>(),
            [(0, 47), (47, 5), (52, 4)]
        );
        assert!(places.iter().all(ChunkPlace::is_possible));
    }

    #[test]
    fn an_index_that_names_other_chunks_than_the_frame_holds_is_found() {
        let mut builder = PackBuilder::default();
        let whole = Chunk::cut(Bytes::from_static(b"onetwo"));
        let chunk = |text: &[u8]| PackedChunk { id: ChunkId::of(text), len: 3 };
        builder.push(
            whole.id(),
            &Sealer::new(Level::default()).seal(&whole),
            vec![chunk(b"one"), chunk(b"owt")],
        );
        let (pack, records) = builder.finish();
        assert_eq!(records[0].verify(&pack), Err(crate::ChunkError::WrongBytes(ChunkId::of(b"owt"))));
    }

    #[test]
    fn the_bytes_of_a_pack_are_the_golden_ones() {
        let mut builder = PackBuilder::default();
        push(&mut builder, &["hi"]);
        let (pack, _) = builder.finish();
        let golden = include_str!("../golden/pack.hex");
        assert_eq!(hex::encode(&pack), golden.split_whitespace().collect::<String>());
    }

    #[test]
    fn a_change_of_any_byte_of_index_or_footer_is_found() {
        let (pack, records) = sample();
        let index_at = usize::try_from(records.last().unwrap().frame.end()).unwrap();
        for at in index_at..pack.len() {
            let mut damaged = pack.to_vec();
            damaged[at] ^= 1;
            assert!(pack_records(&damaged).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_and_any_truncation_are_an_error(junk in prop::collection::vec(any::<u8>(), 0..300), keep in 0usize..200) {
            prop_assert!(pack_records(&junk).is_err());
            let (pack, _) = sample();
            let keep = keep.min(pack.len() - 1);
            prop_assert!(pack_records(&pack[..keep]).is_err());
        }
    }
}
