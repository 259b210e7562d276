//! A segment file: a header, then records of one sealed frame each. `FORMAT.md` has the bytes.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use lamina_chunk::{CHUNK_BYTES_MAX, FrameId, Sealed};

/// What a segment begins with, in bytes.
pub(crate) const SEGMENT_HEADER_BYTES: u64 = 16;
/// What a record begins with, in bytes.
pub(crate) const RECORD_HEADER_BYTES: usize = 64;

/// Parts that one write takes: `UIO_MAXIOV` of the kernel's include/uapi/linux/uio.h.
const IOV_MAX: usize = 1024;

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
    /// Panics where a frame is longer than any frame can be; such were never opened.
    pub(crate) fn of(id: FrameId, sealed: &Sealed) -> Self {
        let small = |len: usize| u32::try_from(len).expect("frames are at most 256 KiB");
        Self { id, sealed_len: small(sealed.bytes().len()), plain_len: small(sealed.plain_len()) }
    }

    fn bytes(&self) -> [u8; RECORD_HEADER_BYTES] {
        let mut header = [0; RECORD_HEADER_BYTES];
        header[..8].copy_from_slice(&RECORD_MAGIC);
        header[8..40].copy_from_slice(self.id.as_bytes());
        header[40..44].copy_from_slice(&self.sealed_len.to_le_bytes());
        header[44..48].copy_from_slice(&self.plain_len.to_le_bytes());
        let check = check(&header[..48]);
        header[48..].copy_from_slice(&check);
        header
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

/// Writes a record for each frame, one behind the other from `offset` on, with as few calls as the kernel takes; frames are not
/// copied on the way. After an error anything may lie behind `offset`.
pub(crate) fn write(file: &File, offset: u64, frames: &[(FrameId, &Sealed)]) -> io::Result<()> {
    let headers: Vec<_> = frames.iter().map(|(id, sealed)| RecordHeader::of(*id, sealed).bytes()).collect();
    let mut parts = Vec::with_capacity(2 * frames.len());
    for (header, (_, sealed)) in headers.iter().zip(frames) {
        parts.extend([IoSlice::new(header), IoSlice::new(sealed.bytes())]);
    }
    let (mut parts, mut at) = (&mut parts[..], offset);
    while !parts.is_empty() {
        match rustix::io::pwritev(file, &parts[..parts.len().min(IOV_MAX)], at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                at += written as u64;
                IoSlice::advance_slices(&mut parts, written);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
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
        let header = RecordHeader::of(FrameId::from_bytes([7; 32]), &sealed);
        assert_eq!((header.sealed_len, header.plain_len, header.record_len()), (3, 5, 67));
        let bytes = header.bytes();
        assert_eq!(bytes[..8], *b"LAMFRM01");
        assert_eq!(bytes[8..40], [7; 32]);
        assert_eq!(bytes[40..48], [3, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(RecordHeader::read(&bytes), Some(header));
    }

    #[test]
    fn records_are_written_one_behind_the_other_however_many() {
        let file = tempfile::tempfile().expect("a file");
        let sealed: Vec<Sealed> =
            (0..IOV_MAX).map(|n| Sealed::new(Bytes::from(vec![n as u8; 1 + n % 7]), 9)).collect();
        let frames: Vec<(FrameId, &Sealed)> =
            sealed.iter().zip(0u32..).map(|(sealed, n)| (FrameId::of(&n.to_le_bytes()), sealed)).collect();
        write(&file, 100, &frames).expect("written");
        let (records, end) = scan(&file, 100, file.metadata().expect("a length").len());
        assert_eq!((records.len(), end), (frames.len(), file.metadata().expect("a length").len()));
        for ((at, header), (id, frame)) in records.iter().zip(&frames) {
            assert_eq!(*header, RecordHeader::of(*id, frame));
            let read = read(&file, *at, *header).expect("read").expect("a record");
            assert_eq!(read.bytes(), frame.bytes());
        }
    }

    proptest! {
        #[test]
        fn a_header_with_any_bit_changed_is_none(at in 0usize..64, bit in 0u8..8) {
            let sealed = Sealed::new(Bytes::from_static(b"abc"), 5);
            let mut header = RecordHeader::of(FrameId::of(b"x"), &sealed).bytes();
            header[at] ^= 1 << bit;
            prop_assert_eq!(RecordHeader::read(&header), None);
        }

        #[test]
        fn any_bytes_at_all_scan_to_no_record(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let file = tempfile::tempfile().expect("a file");
            file.write_all_at(&bytes, 0).expect("written");
            prop_assert_eq!(scan(&file, 0, bytes.len() as u64), (vec![], 0));
        }
    }
}
