//! Sparse files: where the stored bytes lie in the file.

use super::fields::{BLOCK, number};
use super::pax::{Extensions, parse};
use super::{TarError, TarSource, framing_exactly};

/// More segments in one file are refused: 16 MiB of map.
const SEGMENTS_MAX: usize = 1 << 20;

/// A run of stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

/// A sparse map as it was read.
#[derive(Debug)]
pub(super) struct Map {
    real_size: u64,
    segments: Vec<Segment>,
}

impl Map {
    /// The file's size and its segments, if they come in order, do not overlap, lie inside the file, and add up to
    /// the bytes that are stored.
    pub(super) fn checked(self, stored: u64, at: u64) -> Result<(u64, Vec<Segment>), TarError> {
        let wrong = TarError::Header { at, field: "sparse map" };
        let (mut end, mut sum) = (0u64, 0u64);
        for segment in &self.segments {
            let next = segment.offset.checked_add(segment.len);
            match next {
                Some(next) if segment.offset >= end && next <= self.real_size => end = next,
                _ => return Err(wrong),
            }
            sum += segment.len;
        }
        if sum != stored || self.real_size > i64::MAX as u64 {
            return Err(wrong);
        }
        Ok((self.real_size, self.segments))
    }
}

/// The map of GNU tar's own old format: four segments in the header, then 21 in each block that follows.
pub(super) fn old_gnu<S: TarSource>(source: &mut S, header: &tar::Header, at: u64) -> Result<Map, TarError> {
    let wrong = || TarError::Header { at, field: "sparse map" };
    let gnu = header.as_gnu().ok_or_else(wrong)?;
    let real_size = number(gnu.real_size(), "sparse size", at)?;
    let mut segments = Vec::new();
    let mut take = |entries: &[tar::GnuSparseHeader]| -> Result<(), TarError> {
        for entry in entries.iter().filter(|entry| !entry.is_empty()) {
            let offset = number(entry.offset(), "sparse map", at)?;
            segments.push(Segment { offset, len: number(entry.length(), "sparse map", at)? });
        }
        if segments.len() > SEGMENTS_MAX { Err(wrong()) } else { Ok(()) }
    };
    take(&gnu.sparse)?;
    let mut more = gnu.is_extended();
    while more {
        let mut extension = tar::GnuExtSparseHeader::new();
        extension.as_mut_bytes().copy_from_slice(&framing_exactly(source, BLOCK)?);
        take(extension.sparse())?;
        more = extension.is_extended();
    }
    Ok(Map { real_size, segments })
}

/// The map in PAX records (versions 0.0 and 0.1), or at the front of the contents (1.0). Also how many bytes of the
/// contents it took.
pub(super) fn of_pax<S: TarSource>(
    source: &mut S,
    extensions: &Extensions,
    at: u64,
) -> Result<(Option<Map>, u64), TarError> {
    let sparse = &extensions.sparse;
    let wrong = || TarError::Header { at, field: "sparse map" };
    match (sparse.version, sparse.real_size) {
        (Some((1, 0)), Some(real_size)) => {
            let (numbers, taken) = map_in_front(source, at)?;
            Ok((Some(Map { real_size, segments: pairs(&numbers).ok_or_else(wrong)? }), taken))
        }
        (None | Some((0, 0 | 1)), Some(real_size)) => {
            Ok((Some(Map { real_size, segments: pairs(&sparse.map).ok_or_else(wrong)? }), 0))
        }
        (None, None) => Ok((None, 0)),
        _ => Err(wrong()),
    }
}

fn pairs(numbers: &[u64]) -> Option<Vec<Segment>> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    let segments = pairs.iter().map(|[offset, len]| Segment { offset: *offset, len: *len });
    (rest.is_empty() && pairs.len() <= SEGMENTS_MAX).then(|| segments.collect())
}

/// Decimal numbers, one a line, the first saying how many pairs follow; padded to whole blocks.
fn map_in_front<S: TarSource>(source: &mut S, at: u64) -> Result<(Vec<u64>, u64), TarError> {
    let wrong = || TarError::Header { at, field: "sparse map" };
    let mut numbers: Vec<u64> = Vec::new();
    let (mut taken, mut line) = (0, Vec::new());
    loop {
        let block = framing_exactly(source, BLOCK)?;
        taken += BLOCK as u64;
        for byte in block {
            if byte != b'\n' {
                line.push(byte);
                if line.len() > 20 {
                    return Err(wrong());
                }
                continue;
            }
            numbers.push(parse(&line).ok_or_else(wrong)?);
            line.clear();
            let pairs = usize::try_from(numbers[0]).ok().filter(|pairs| *pairs <= SEGMENTS_MAX);
            if numbers.len() == 1 + 2 * pairs.ok_or_else(wrong)? {
                numbers.remove(0);
                return Ok((numbers, taken));
            }
        }
    }
}
