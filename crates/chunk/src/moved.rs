//! Where the frames of a pack have gone that is there no more. `FORMAT.md` has the bytes.

use std::ops::Range;

use crate::{CHUNK_BYTES_MAX, Frame, PACK_BYTES_MAX, PackId, PackRecord};

const MAGIC: [u8; 8] = *b"LAMMOVE1";
/// Magic, number of frames, zero, and the name of the new pack.
const HEADER_BYTES: usize = 48;
/// One frame: offset in the old pack, and sealed length.
const FRAME_BYTES: usize = 8;
/// The BLAKE3 hash of all before it.
const HASH_BYTES: usize = 32;
/// A pack needs 85 bytes for a frame of one byte: one record of a frame, one of a chunk, and itself.
const FRAMES_MAX: usize = PACK_BYTES_MAX / 85;
/// How often a frame may be moved: whoever follows records follows so many. Each move is of a pack that was mostly dead.
pub const MOVES_MAX: usize = 8;
/// No moved record is longer, in bytes: 6 MiB. One of a usual pack has less than 10 KiB.
pub const MOVED_BYTES_MAX: usize = HEADER_BYTES + FRAMES_MAX * FRAME_BYTES + HASH_BYTES;

/// Why bytes are not a moved record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MovedError {
    /// The magic is missing or of another version, or the length is not what it says.
    #[error("not a moved record: bad header")]
    Header,
    /// The bytes do not match their hash.
    #[error("the moved record is damaged")]
    Hash,
    /// A frame is out of order, overlaps another, or has a length that no frame has.
    #[error("the moved record is impossible at frame {0}")]
    Frame(u32),
}

/// Which frames of a pack were taken over into another one, in the order in which they lie in both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    pack: PackId,
    frames: Vec<MovedFrame>,
}

/// A frame that was moved. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovedFrame {
    /// Where it was in the old pack.
    pub offset: u32,
    /// Its length as stored.
    pub sealed_len: u32,
    /// Where it is in the new pack.
    pub new_offset: u32,
}

impl MovedFrame {
    fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.sealed_len)
    }

    /// Where in the new pack the byte is that was at `at` in the old one, which is inside or the end.
    fn new_at(&self, at: u64) -> u64 {
        u64::from(self.new_offset) + at - u64::from(self.offset)
    }
}

/// How a part of an old pack is made of the new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedSpan {
    /// The bytes of the new pack that are needed: frames that stayed are neighbours there.
    pub range: Range<u64>,
    /// The old bytes in order, by their lengths: those of the new pack, and those that are gone.
    pub parts: Vec<MovedPart>,
}

/// Some bytes of an old pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MovedPart {
    /// The next so many bytes of the new pack.
    Kept(u64),
    /// So many bytes that are nowhere any more.
    Gone(u64),
}

impl Moved {
    /// The record of a pack of which these frames, in the order of their offsets, became the pack `pack`. Panics where they
    /// overlap or none is there: they were read from a pack's index.
    pub fn new(pack: PackId, frames: impl IntoIterator<Item = Frame>) -> Self {
        let mut moved = Self { pack, frames: Vec::new() };
        for frame in frames {
            assert!(moved.push(frame.offset, frame.sealed_len), "frames of a pack follow each other");
        }
        assert!(!moved.frames.is_empty(), "some frame was moved");
        moved
    }

    /// Adds a frame. False where there can be none.
    fn push(&mut self, offset: u32, sealed_len: u32) -> bool {
        let (end, new_offset) = match self.frames.last() {
            Some(last) => (last.end(), last.new_offset + last.sealed_len),
            None => (0, 0),
        };
        let frame = MovedFrame { offset, sealed_len, new_offset };
        let is_possible = u64::from(offset) >= end
            && (1..=CHUNK_BYTES_MAX).contains(&(sealed_len as usize))
            && frame.end() <= PACK_BYTES_MAX as u64;
        if is_possible {
            self.frames.push(frame);
        }
        is_possible
    }

    /// Reads a record.
    pub fn parse(bytes: &[u8]) -> Result<Self, MovedError> {
        let body_len = bytes.len().checked_sub(HASH_BYTES).ok_or(MovedError::Header)?;
        let (body, hash) = bytes.split_at(body_len);
        let (header, frames) = body.split_at_checked(HEADER_BYTES).ok_or(MovedError::Header)?;
        let count = word(header, 8) as usize;
        let adds_up = (1..=FRAMES_MAX).contains(&count) && frames.len() == count * FRAME_BYTES;
        if header[..8] != MAGIC || header[12..16] != [0; 4] || !adds_up {
            return Err(MovedError::Header);
        }
        if blake3::hash(body).as_bytes() != hash {
            return Err(MovedError::Hash);
        }
        let pack = PackId::from_bytes(header[16..48].try_into().expect("32 bytes"));
        let mut moved = Self { pack, frames: Vec::with_capacity(count) };
        for (number, frame) in (0u32..).zip(frames.chunks_exact(FRAME_BYTES)) {
            if !moved.push(word(frame, 0), word(frame, 4)) {
                return Err(MovedError::Frame(number));
            }
        }
        Ok(moved)
    }

    /// The record as it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        let count = u32::try_from(self.frames.len()).expect("packs are at most 64 MiB");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.frames.len() * FRAME_BYTES + HASH_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(self.pack.as_bytes());
        for frame in &self.frames {
            bytes.extend_from_slice(&frame.offset.to_le_bytes());
            bytes.extend_from_slice(&frame.sealed_len.to_le_bytes());
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    /// The new pack.
    pub fn pack(&self) -> PackId {
        self.pack
    }

    /// The frames that were moved, in order.
    pub fn frames(&self) -> &[MovedFrame] {
        &self.frames
    }

    /// The frame that was at this offset of the old pack.
    pub fn at(&self, offset: u32) -> Option<MovedFrame> {
        let found = self.frames.binary_search_by_key(&offset, |frame| frame.offset).ok()?;
        Some(self.frames[found])
    }

    /// The frames of which some bytes lie in a range of the old pack.
    fn in_range(&self, range: &Range<u64>) -> &[MovedFrame] {
        let start = self.frames.partition_point(|frame| frame.end() <= range.start);
        let end = self.frames.partition_point(|frame| u64::from(frame.offset) < range.end);
        self.frames.get(start..end).unwrap_or_default()
    }

    /// How a range of the old pack is made of the new one; `None` where no byte of it was moved.
    pub fn span(&self, range: Range<u64>) -> Option<MovedSpan> {
        let frames = if range.is_empty() { &[] } else { self.in_range(&range) };
        let (first, last) = (frames.first()?, frames.last()?);
        let start = first.new_at(range.start.max(first.offset.into()));
        let end = last.new_at(range.end.min(last.end()));
        let (mut parts, mut at) = (Vec::new(), range.start);
        for frame in frames {
            let (from, to) = (range.start.max(frame.offset.into()), range.end.min(frame.end()));
            if from > at {
                parts.push(MovedPart::Gone(from - at));
            }
            parts.push(MovedPart::Kept(to - from));
            at = to;
        }
        if range.end > at {
            parts.push(MovedPart::Gone(range.end - at));
        }
        Some(MovedSpan { range: start..end, parts })
    }

    /// The records that the old pack's index had of the frames that were moved, from those of the new one. What the new pack
    /// has not where it should is left out.
    pub fn old_records(&self, new: &[PackRecord]) -> Vec<PackRecord> {
        let old = self.frames.iter().filter_map(|moved| {
            let found = new.binary_search_by_key(&moved.new_offset, |record| record.frame.offset).ok()?;
            let record = new.get(found).filter(|record| record.frame.sealed_len == moved.sealed_len)?;
            let frame = Frame { offset: moved.offset, ..record.frame };
            Some(PackRecord { frame, ..record.clone() })
        });
        old.collect()
    }
}

/// The little-endian word at a position that the caller knows to be inside.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACK: PackId = PackId::from_bytes([7; 32]);

    fn frame(offset: u32, sealed_len: u32) -> Frame {
        Frame { offset, sealed_len, plain_len: sealed_len }
    }

    fn sample() -> Moved {
        Moved::new(PACK, [frame(10, 5), frame(15, 5), frame(40, 2)])
    }

    #[test]
    fn frames_that_were_moved_are_found_and_others_are_not() {
        let moved = sample();
        assert_eq!(moved.at(15), Some(MovedFrame { offset: 15, sealed_len: 5, new_offset: 5 }));
        assert_eq!(moved.at(40).map(|frame| frame.new_offset), Some(10));
        assert_eq!(moved.at(12), None);
    }

    #[test]
    fn a_range_of_the_old_pack_is_one_range_of_the_new_one_and_gaps() {
        use MovedPart::{Gone, Kept};
        let moved = sample();
        for (range, new, parts) in [
            (10..15, 0..5, vec![Kept(5)]),
            (0..50, 0..12, vec![Gone(10), Kept(5), Kept(5), Gone(20), Kept(2), Gone(8)]),
            (17..41, 7..11, vec![Kept(3), Gone(20), Kept(1)]),
            (11..13, 1..3, vec![Kept(2)]),
        ] {
            assert_eq!(moved.span(range.clone()), Some(MovedSpan { range: new, parts }), "{range:?}");
        }
        for range in [0..10, 20..40, 42..90, 12..12] {
            assert_eq!(moved.span(range.clone()), None, "{range:?}");
        }
    }

    #[test]
    fn the_bytes_of_a_moved_record_are_the_golden_ones() {
        let golden = include_str!("../golden/moved.hex");
        assert_eq!(hex::encode(sample().to_bytes()), golden.split_whitespace().collect::<String>());
    }

    #[test]
    fn a_change_of_any_byte_is_found() {
        let bytes = sample().to_bytes();
        assert_eq!(Moved::parse(&bytes), Ok(sample()));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(Moved::parse(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn frames_that_no_pack_can_have_are_refused_though_the_hash_is_right() {
        let whole = u32::try_from(PACK_BYTES_MAX).unwrap();
        for frames in
            [&[(10, 5), (14, 5)][..], &[(10, 5), (5, 2)], &[(0, 0)], &[(0, 262_145)], &[(whole - 4, 5)], &[]]
        {
            let frames: Vec<MovedFrame> = frames
                .iter()
                .map(|(offset, sealed_len)| MovedFrame {
                    offset: *offset,
                    sealed_len: *sealed_len,
                    new_offset: 0,
                })
                .collect();
            let bytes = Moved { pack: PACK, frames }.to_bytes();
            assert!(Moved::parse(&bytes).is_err());
        }
    }

    /// Frames by the gap before each and its length.
    fn frames() -> impl Strategy<Value = Vec<(u32, u32)>> {
        prop::collection::vec((0u32..9, 1u32..9), 1..40)
    }

    fn of(gaps: &[(u32, u32)]) -> Moved {
        let mut at = 0;
        Moved::new(
            PACK,
            gaps.iter().map(|(gap, len)| {
                let found = frame(at + gap, *len);
                at += gap + len;
                found
            }),
        )
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_and_any_truncation_is_an_error(gaps in frames(), keep: prop::sample::Index) {
            let moved = of(&gaps);
            let bytes = moved.to_bytes();
            prop_assert_eq!(Moved::parse(&bytes), Ok(moved));
            prop_assert!(Moved::parse(&bytes[..keep.index(bytes.len())]).is_err());
        }

        #[test]
        fn any_bytes_are_an_error(mut junk in prop::collection::vec(any::<u8>(), 0..300), magic: bool) {
            if magic && junk.len() >= 8 {
                junk[..8].copy_from_slice(&MAGIC);
            }
            prop_assert!(Moved::parse(&junk).is_err());
        }

        #[test]
        fn spans_put_every_byte_where_it_was(gaps in frames(), start in 0u64..400, len in 1u64..400) {
            let moved = of(&gaps);
            // the old pack has its own offset in each byte of a frame, and nobody knows the rest
            let old: Vec<Option<u64>> = (0..start + len)
                .map(|at| moved.frames().iter().any(|frame| (u64::from(frame.offset)..frame.end()).contains(&at)).then_some(at))
                .collect();
            let new: Vec<u64> =
                moved.frames().iter().flat_map(|frame| u64::from(frame.offset)..frame.end()).collect();
            let wanted = &old[start as usize..];
            let Some(span) = moved.span(start..start + len) else {
                prop_assert!(wanted.iter().all(Option::is_none));
                return Ok(());
            };
            let mut kept = new[span.range.start as usize..span.range.end as usize].iter();
            let mut made = Vec::new();
            for part in span.parts {
                match part {
                    MovedPart::Kept(len) => made.extend(kept.by_ref().take(len as usize).copied().map(Some)),
                    MovedPart::Gone(len) => made.extend((0..len).map(|_| None)),
                }
            }
            prop_assert_eq!(made, wanted);
            prop_assert_eq!(kept.next(), None);
        }
    }
}
