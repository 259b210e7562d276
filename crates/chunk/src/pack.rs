//! Packs: up to 64 MiB of frames, with an index behind them. `FORMAT.md` has the bytes.

use bytes::Bytes;

use crate::{CHUNK_BYTES_MAX, ChunkId, Frame, Sealed};

/// No pack is longer: 64 MiB, index and footer included.
pub const PACK_BYTES_MAX: usize = 64 << 20;
/// What a pack ends with, in bytes.
pub const FOOTER_BYTES: usize = 64;
/// One chunk in the index, in bytes.
pub const RECORD_BYTES: usize = 44;

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
    #[error("the pack's index is impossible at record {0}")]
    Record(u32),
}

/// One chunk of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRecord {
    /// The chunk.
    pub id: ChunkId,
    /// Its frame.
    pub frame: Frame,
}

/// Collects frames into one pack.
#[derive(Debug, Default)]
pub struct PackBuilder {
    bytes: Vec<u8>,
    records: Vec<PackRecord>,
}

impl PackBuilder {
    /// An empty pack that has room for `capacity` bytes of frames before it reallocates.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { bytes: Vec::with_capacity(capacity), records: Vec::new() }
    }

    /// How long the pack would be if it were finished now, in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.records.len() * RECORD_BYTES + FOOTER_BYTES
    }

    /// Whether nothing was pushed yet.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Appends a frame and says where it lies. Panics where the pack would grow over [`PACK_BYTES_MAX`]: ask
    /// [`len`](Self::len) first.
    pub fn push(&mut self, id: ChunkId, sealed: &Sealed) -> Frame {
        let frame = Frame {
            offset: small(self.bytes.len()),
            sealed_len: small(sealed.bytes().len()),
            plain_len: small(sealed.plain_len()),
        };
        self.bytes.extend_from_slice(sealed.bytes());
        self.records.push(PackRecord { id, frame });
        assert!(self.len() <= PACK_BYTES_MAX, "a pack of {} bytes", self.len());
        frame
    }

    /// Writes index and footer behind the frames.
    pub fn finish(mut self) -> (Bytes, Vec<PackRecord>) {
        let index_at = self.bytes.len();
        self.bytes.reserve_exact(self.records.len() * RECORD_BYTES + FOOTER_BYTES);
        for record in &self.records {
            self.bytes.extend_from_slice(record.id.as_bytes());
            for field in [record.frame.offset, record.frame.sealed_len, record.frame.plain_len] {
                self.bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        let index_hash = blake3::hash(&self.bytes[index_at..]);
        self.bytes.extend_from_slice(&MAGIC);
        self.bytes.extend_from_slice(&small(self.records.len()).to_le_bytes());
        self.bytes.extend_from_slice(&small(index_at).to_le_bytes());
        self.bytes.extend_from_slice(index_hash.as_bytes());
        self.bytes.extend_from_slice(&[0; 16]);
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
    records: u32,
    index_at: u32,
    index_hash: [u8; 32],
}

impl PackFooter {
    /// Reads the last [`FOOTER_BYTES`] of a pack that is `pack_len` bytes long.
    pub fn read(footer: &[u8], pack_len: u64) -> Result<Self, PackError> {
        let footer: &[u8; FOOTER_BYTES] = footer.try_into().map_err(|_| PackError::Footer)?;
        let word =
            |at: usize| u32::from_le_bytes([footer[at], footer[at + 1], footer[at + 2], footer[at + 3]]);
        let (records, index_at) = (word(8), word(12));
        let index_len = u64::from(records) * RECORD_BYTES as u64;
        let whole = u64::from(index_at) + index_len + FOOTER_BYTES as u64;
        if footer[..8] != MAGIC
            || footer[48..] != [0; 16]
            || whole != pack_len
            || pack_len > PACK_BYTES_MAX as u64
        {
            return Err(PackError::Footer);
        }
        let index_hash = footer[16..48].try_into().expect("32 bytes");
        Ok(Self { records, index_at, index_hash })
    }

    /// Where the index lies in the pack, in bytes from its beginning. Ends where the footer begins.
    pub fn index_range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.index_at);
        start..start + u64::from(self.records) * RECORD_BYTES as u64
    }

    /// Reads the index, the bytes of [`index_range`](Self::index_range). Records come in the order of their
    /// frames, which follow each other without gaps from the beginning of the pack.
    pub fn records(&self, index: &[u8]) -> Result<Vec<PackRecord>, PackError> {
        if *blake3::hash(index).as_bytes() != self.index_hash {
            return Err(PackError::IndexHash);
        }
        let mut end = 0u64;
        let mut records = Vec::with_capacity(index.len() / RECORD_BYTES);
        for (number, record) in (0u32..).zip(index.chunks_exact(RECORD_BYTES)) {
            let word =
                |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
            let frame = Frame { offset: word(32), sealed_len: word(36), plain_len: word(40) };
            let possible = frame.sealed_len > 0
                && frame.sealed_len <= frame.plain_len
                && frame.plain_len as usize <= CHUNK_BYTES_MAX
                && u64::from(frame.offset) == end
                && frame.end() <= u64::from(self.index_at);
            if !possible {
                return Err(PackError::Record(number));
            }
            end = frame.end();
            let id = ChunkId::from_bytes(record[..32].try_into().expect("32 bytes"));
            records.push(PackRecord { id, frame });
        }
        if end != u64::from(self.index_at) {
            return Err(PackError::Footer);
        }
        Ok(records)
    }
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

    fn sample() -> (Bytes, Vec<PackRecord>) {
        let mut sealer = Sealer::new(Level::default());
        let mut builder = PackBuilder::with_capacity(1 << 10);
        for text in ["one", "two two two two two two two two two two two two", "three"] {
            let chunk = Chunk::cut(Bytes::from_static(text.as_bytes()));
            builder.push(chunk.id(), &sealer.seal(&chunk));
        }
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
        for PackRecord { id, frame } in records {
            let bytes = pack.slice(frame.offset as usize..frame.end() as usize);
            assert!(Sealed::new(bytes, frame.plain_len as usize).open(id).is_ok());
        }
    }

    #[test]
    fn the_bytes_of_a_pack_are_the_golden_ones() {
        let mut builder = PackBuilder::default();
        let chunk = Chunk::cut(Bytes::from_static(b"hi"));
        builder.push(chunk.id(), &Sealer::new(Level::default()).seal(&chunk));
        let (pack, _) = builder.finish();
        let golden = include_str!("../golden/pack.hex");
        assert_eq!(hex::encode(&pack), golden.split_whitespace().collect::<String>());
    }

    #[test]
    fn a_change_of_any_byte_of_index_or_footer_is_found() {
        let (pack, records) = sample();
        let index_at = records.last().unwrap().frame.end() as usize;
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
