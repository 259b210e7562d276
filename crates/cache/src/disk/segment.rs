//! A segment file: a header, then records of one sealed frame each. `FORMAT.md` has the bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use lamina_chunk::{CHUNK_BYTES_MAX, FrameId, Sealed};

/// What a segment begins with, in bytes.
pub(crate) const SEGMENT_HEADER_BYTES: u64 = 16;
/// What a record begins with, in bytes.
pub(crate) const RECORD_HEADER_BYTES: usize = 64;

const SEGMENT_MAGIC: [u8; 8] = *b"LAMSEG01";
const RECORD_MAGIC: [u8; 8] = *b"LAMFRM01";

/// An open segment.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) file: File,
    /// Bytes in use; only the writer changes it.
    pub(crate) len: AtomicU64,
    pub(crate) kind: Kind,
}

/// What lies in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What was fetched, in the order of fetching.
    New,
    /// What was in a segment that was evicted, and deserved to stay.
    Kept,
}

impl Kind {
    fn header(self) -> [u8; SEGMENT_HEADER_BYTES as usize] {
        let mut header = [0; SEGMENT_HEADER_BYTES as usize];
        header[..8].copy_from_slice(&SEGMENT_MAGIC);
        header[8] = match self {
            Self::New => 0,
            Self::Kept => 1,
        };
        header
    }
}

/// What a record's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) id: FrameId,
    pub(crate) sealed_len: u32,
    pub(crate) plain_len: u32,
}

impl RecordHeader {
    /// Appends the whole record of `sealed` to `records`. Panics where a frame is longer than any frame can be; such were
    /// never opened.
    pub(crate) fn write(id: FrameId, sealed: &Sealed, records: &mut Vec<u8>) {
        let small = |len: usize| u32::try_from(len).expect("frames are at most 256 KiB");
        let start = records.len();
        records.reserve(RECORD_HEADER_BYTES + sealed.bytes().len());
        records.extend_from_slice(&RECORD_MAGIC);
        records.extend_from_slice(id.as_bytes());
        records.extend_from_slice(&small(sealed.bytes().len()).to_le_bytes());
        records.extend_from_slice(&small(sealed.plain_len()).to_le_bytes());
        let check = check(&records[start..]);
        records.extend_from_slice(&check);
        records.extend_from_slice(sealed.bytes());
    }

    /// Reads a header; `None` where these 64 bytes are not one.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; RECORD_HEADER_BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (sealed_len, plain_len) = (word(40), word(44));
        let possible = sealed_len > 0 && sealed_len <= plain_len && plain_len as usize <= CHUNK_BYTES_MAX;
        if bytes[..8] != RECORD_MAGIC || bytes[48..] != check(&bytes[..48]) || !possible {
            return None;
        }
        let id: [u8; 32] = bytes[8..40].try_into().expect("32 bytes");
        Some(Self { id: FrameId::from_bytes(id), sealed_len, plain_len })
    }

    /// Header and frame, in bytes.
    pub(crate) fn record_len(&self) -> u64 {
        RECORD_HEADER_BYTES as u64 + u64::from(self.sealed_len)
    }
}

/// The check over a record header's first 48 bytes.
fn check(header: &[u8]) -> [u8; 16] {
    FrameId::of(header).as_bytes()[..16].try_into().expect("16 bytes")
}

/// Writes the header of a new segment.
pub(crate) fn begin(file: &File, kind: Kind) -> io::Result<()> {
    file.write_all_at(&kind.header(), 0)
}

/// What kind of segment `file` is; `None` where it does not begin as one of this version does.
pub(crate) fn begins(file: &File) -> Option<Kind> {
    let mut header = [0; SEGMENT_HEADER_BYTES as usize];
    file.read_exact_at(&mut header, 0).ok()?;
    [Kind::New, Kind::Kept].into_iter().find(|kind| kind.header() == header)
}

/// The frame whose record begins at `offset`, if it is the one of `expected`. The frame itself is not verified.
pub(crate) fn read(file: &File, offset: u64, expected: RecordHeader) -> io::Result<Option<Sealed>> {
    let len = usize::try_from(expected.record_len()).expect("a record is below 1 MiB");
    let mut record = vec![0; len];
    file.read_exact_at(&mut record, offset)?;
    if RecordHeader::read(&record[..RECORD_HEADER_BYTES]) != Some(expected) {
        return Ok(None);
    }
    let frame = Bytes::from(record).slice(RECORD_HEADER_BYTES..);
    Ok(Some(Sealed::new(frame, expected.plain_len as usize)))
}

/// The headers of all whole records between `from` and `len`, with their offsets, and where the last one ends. What
/// follows that is torn.
///
/// Cost: one read of 64 bytes a record.
pub(crate) fn scan(file: &File, from: u64, len: u64) -> (Vec<(u64, RecordHeader)>, u64) {
    let (mut records, mut at) = (Vec::new(), from);
    let mut header = [0; RECORD_HEADER_BYTES];
    while at < len {
        let Some(record) =
            file.read_exact_at(&mut header, at).ok().and_then(|()| RecordHeader::read(&header))
        else {
            break;
        };
        if at + record.record_len() > len {
            break;
        }
        records.push((at, record));
        at += record.record_len();
    }
    (records, at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_record_header_is_these_bytes() {
        let sealed = Sealed::new(Bytes::from_static(b"abc"), 5);
        let mut record = Vec::new();
        RecordHeader::write(FrameId::from_bytes([7; 32]), &sealed, &mut record);
        assert_eq!(record.len(), 67);
        assert_eq!(record[..8], *b"LAMFRM01");
        assert_eq!(record[8..40], [7; 32]);
        assert_eq!(record[40..48], [3, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(record[64..], *b"abc");
        let header = RecordHeader::read(&record[..64]).expect("a header");
        assert_eq!(header, RecordHeader { id: FrameId::from_bytes([7; 32]), sealed_len: 3, plain_len: 5 });
    }

    proptest! {
        #[test]
        fn a_header_with_any_bit_changed_is_none(at in 0usize..64, bit in 0u8..8) {
            let sealed = Sealed::new(Bytes::from_static(b"abc"), 5);
            let mut record = Vec::new();
            RecordHeader::write(FrameId::of(b"x"), &sealed, &mut record);
            record[at] ^= 1 << bit;
            prop_assert_eq!(RecordHeader::read(&record[..64]), None);
        }

        #[test]
        fn any_bytes_at_all_scan_to_no_record(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let file = tempfile::tempfile().expect("a file");
            file.write_all_at(&bytes, 0).expect("written");
            prop_assert_eq!(scan(&file, 0, bytes.len() as u64), (vec![], 0));
        }
    }
}
