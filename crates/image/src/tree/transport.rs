//! A tree as a blob, in two parts: the names, which a mount begins with, and the contents, which say where the files' bytes are.
//!
//! Records of one kind differ in few of their bytes, so each block of them is stored column by column: the first bytes of all its
//! records, then the second ones. Of 40,000 files that makes the names 0.6 times as long, and the whole blob 0.8 times.
//!
//! Before there were parts a blob was the flat bytes as one frame. Such blobs are read, and not written any more.

use std::array;
use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::sync_channel;
use std::thread;

use super::TreeError;
use super::layout::{
    ENTRY_BYTES, EXTENT_BYTES, HEADER_BYTES, ID_BYTES, INODE_BYTES, Layout, PACK_BYTES, PLACE_BYTES, Section,
};
use crate::{Digest, TREE_NAMES_ANNOTATION, TREE_NAMES_BYTES_ANNOTATION};

/// No flat tree is longer: 2 GiB, some ten million files.
pub const TREE_BYTES_MAX: u64 = 2 << 30;

/// Of the names of 40,000 files this makes 95 bytes of 100 that level 3 does, in 30 ms instead of 10, and they take no longer to
/// decompress; level 19 would make 88 in half a second. Of the contents, most of which are hashes, none makes less.
const LEVEL: i32 = 9;
/// That of before.
const LEVEL_BEFORE: i32 = 3;
/// A reader has to hold so much, as a power of two: 256 KiB. Its memory is fresh from the kernel, and costs more than decompressing;
/// eight times as much would make the names 1 % shorter.
const WINDOW_LOG: u32 = 18;
/// In the length before a blob's frames: it is in parts.
const IN_PARTS: u64 = 1 << 63;
/// What stands before the frame of the names: the flat tree's length, and the length of all up to the end of that frame.
const LENGTHS_BYTES: usize = 16;
/// So many columns of so many records fit into words.
const SQUARE: usize = size_of::<u64>();
/// So many records are stored column by column, together: more gain nothing, and a reader has to hold them.
const BLOCK: usize = 8192;
/// No more of them are there at once: one that is read, one that waits, one that is written.
const BLOCKS_HELD: usize = 3;

/// The part of a tree's blob that a mount begins with, which the blob begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeNames {
    /// Of these bytes.
    pub digest: Digest,
    /// How many they are.
    pub bytes: u64,
}

impl TreeNames {
    /// Those of a blob; `None` where it is in one part, or says something else than what it is.
    pub fn of(blob: &[u8]) -> Option<Self> {
        let (lengths, _) = blob.split_first_chunk::<LENGTHS_BYTES>()?;
        let bytes = Lengths::read(lengths)?.names;
        let part = blob.get(..usize::try_from(bytes).ok()?)?;
        Some(Self { digest: Digest::of(part), bytes })
    }

    /// Those that the annotations of an image, or of an artifact that hangs a tree on one, tell of; `None` where they tell of none that
    /// could be.
    pub fn noted_in(annotations: &BTreeMap<String, String>) -> Option<Self> {
        let digest = annotations.get(TREE_NAMES_ANNOTATION)?.parse().ok()?;
        let bytes = annotations.get(TREE_NAMES_BYTES_ANNOTATION)?.parse().ok()?;
        let could_be = LENGTHS_BYTES as u64..=TREE_BYTES_MAX;
        Some(Self { digest, bytes }).filter(|names| could_be.contains(&names.bytes))
    }

    /// What [`noted_in`](Self::noted_in) reads.
    pub fn notes(&self) -> [(String, String); 2] {
        [
            (TREE_NAMES_ANNOTATION.to_owned(), self.digest.to_string()),
            (TREE_NAMES_BYTES_ANNOTATION.to_owned(), self.bytes.to_string()),
        ]
    }
}

/// Takes the bytes of a flat tree, in any order, each once.
pub trait FlatSink {
    /// Takes those from position `at`. Positions that are never written are zeros.
    ///
    /// # Errors
    /// Where they cannot be kept.
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Into memory. It must be as long as the tree.
impl FlatSink for [u8] {
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let at = usize::try_from(at).expect("within memory");
        self[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// Compresses a flat tree for the registry. Whether two trees are the same is told by the flat bytes: zstd may compress better one
/// day.
///
/// # Panics
/// Where `flat` is no tree.
pub fn pack_tree(flat: &[u8]) -> Vec<u8> {
    pack_in_parts(flat, |blob| {
        let mut encoder = encoder(blob, LEVEL);
        encoder.window_log(WINDOW_LOG).expect("a window zstd knows");
        encoder
    })
}

/// The same as it was done before, each way: only these make the blobs of then again, with the digests they had.
///
/// # Panics
/// As [`pack_tree`].
pub fn pack_tree_as_before(flat: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let ways = [true, false].into_iter();
    ways.map(move |in_parts| match in_parts {
        true => pack_in_parts(flat, |blob| encoder(blob, LEVEL_BEFORE)),
        false => pack_whole(flat),
    })
}

fn pack_in_parts(flat: &[u8], encoder: impl Fn(&mut Vec<u8>) -> Encoder<'_>) -> Vec<u8> {
    let layout = Layout::read(flat).expect("a tree");
    let mut blob = vec![0; LENGTHS_BYTES];
    let mut names = encoder(&mut blob);
    write(&mut names, &flat[..HEADER_BYTES]);
    names_of(&layout).iter().for_each(|kind| kind.pack(flat, &mut names));
    names.finish().expect("a Vec takes every byte");
    let lengths = Lengths { flat: flat.len() as u64, names: blob.len() as u64 };
    blob[..LENGTHS_BYTES].copy_from_slice(&lengths.to_bytes());
    let mut contents = encoder(&mut blob);
    contents_of(&layout).iter().for_each(|kind| kind.pack(flat, &mut contents));
    contents.finish().expect("a Vec takes every byte");
    blob
}

/// In one part.
fn pack_whole(flat: &[u8]) -> Vec<u8> {
    let mut blob = (flat.len() as u64).to_le_bytes().to_vec();
    let mut encoder = encoder(&mut blob, LEVEL_BEFORE);
    write(&mut encoder, flat);
    encoder.finish().expect("a Vec takes every byte");
    blob
}

/// The flat tree in a blob. The claimed length is only believed up to [`TREE_BYTES_MAX`], and the kernel gives memory only for what
/// really comes.
pub fn unpack_tree(blob: &[u8]) -> Result<Vec<u8>, TreeError> {
    let unpacked = || {
        let mut blob = blob;
        let begun = TreeUnpacking::begin(&mut blob)?;
        // of zeros: pages that nobody writes to are not there
        let mut flat = vec![0; usize::try_from(begun.flat_len()).expect("2 GiB at most")];
        begun.unpack(&mut blob, &mut flat[..])?;
        Ok(flat)
    };
    let wrong = |error: io::Error| error.into_inner()?.downcast::<TreeError>().ok();
    unpacked().map_err(|error| wrong(error).map_or(TreeError::Compressed, |it| *it))
}

/// A blob that is being unpacked, of which nothing but its beginning was read.
#[derive(Debug)]
pub struct TreeUnpacking {
    flat: u64,
    /// How many bytes the frame of the names takes; `None` where there are no parts.
    names: Option<u64>,
}

impl TreeUnpacking {
    /// Reads the lengths that `blob` begins with.
    ///
    /// # Errors
    /// What `blob` says; and `InvalidData` around a [`TreeError`] for what is no tree's blob. So it is with the others.
    pub fn begin(mut blob: impl Read) -> io::Result<Self> {
        let mut lengths = [0; LENGTHS_BYTES];
        let (first, second) = lengths.split_at_mut(LENGTHS_BYTES / 2);
        blob.read_exact(first)?;
        let flat = u64::from_le_bytes(first.try_into().expect("8 bytes"));
        if flat & IN_PARTS == 0 {
            return Self { flat, names: None }.checked();
        }
        blob.read_exact(second)?;
        let lengths = Lengths::read(&lengths).ok_or_else(|| wrong(TreeError::Header))?;
        Self { flat: lengths.flat, names: Some(lengths.names - LENGTHS_BYTES as u64) }.checked()
    }

    fn checked(self) -> io::Result<Self> {
        let is_large = self.flat.max(self.names.unwrap_or(0)) > TREE_BYTES_MAX;
        if is_large { Err(wrong(TreeError::TooLarge("its length"))) } else { Ok(self) }
    }

    /// How many bytes of the blob are the names, counted from its first; `None` where it is in one part.
    pub fn names_len(&self) -> Option<u64> {
        Some(self.names? + LENGTHS_BYTES as u64)
    }

    /// How long the flat tree is, in bytes.
    pub fn flat_len(&self) -> u64 {
        self.flat
    }

    /// Unpacks all of it: `blob` goes on where it was left, up to its end. Memory does not grow with it.
    pub fn unpack(self, mut blob: impl Read, flat: &mut (impl FlatSink + Send + ?Sized)) -> io::Result<()> {
        let Some(names) = self.names else { return self.unpack_whole(blob, flat) };
        self.unpack_names((&mut blob).take(names), flat)?.unpack(blob, flat)
    }

    /// Unpacks the names: `part` is what a [`TreeNames`] is of, up to its end, but for what [`begin`](Self::begin) has read of it.
    /// Memory does not grow with it. A mount waits for this, so `flat` is written by a thread of its own.
    pub fn unpack_names(
        self,
        part: impl Read,
        flat: &mut (impl FlatSink + Send + ?Sized),
    ) -> io::Result<TreeContents> {
        let mut frame = zstd::Decoder::new(part)?.single_frame();
        let mut header = [0; HEADER_BYTES];
        frame.read_exact(&mut header)?;
        let layout = Layout::read_header(&header).map_err(wrong)?;
        if layout.len as u64 != self.flat {
            return Err(wrong(TreeError::Header));
        }
        flat.write_at(0, &header)?;
        unpack_side_by_side(&names_of(&layout), &mut frame, flat)?;
        must_end(frame)?;
        Ok(TreeContents(layout))
    }

    /// A blob in one part.
    fn unpack_whole(self, blob: impl Read, flat: &mut (impl FlatSink + ?Sized)) -> io::Result<()> {
        let mut frame = zstd::Decoder::new(blob)?.single_frame();
        Kind::bytes(Section { start: 0, count: u32::try_from(self.flat).expect("2 GiB at most") })
            .unpack(&mut frame, flat)?;
        must_end(frame)
    }
}

/// What is left of a blob of which the names have been unpacked.
#[derive(Debug)]
pub struct TreeContents(Layout);

impl TreeContents {
    /// Unpacks them: `blob` is what comes behind the names, up to its end. Memory does not grow with it.
    ///
    /// # Errors
    /// As of [`TreeUnpacking::begin`].
    pub fn unpack(self, blob: impl Read, flat: &mut (impl FlatSink + ?Sized)) -> io::Result<()> {
        let mut frame = zstd::Decoder::new(blob)?.single_frame();
        contents_of(&self.0).iter().try_for_each(|kind| kind.unpack(&mut frame, flat))?;
        must_end(frame)
    }
}

/// What a blob in parts begins with, each in bytes.
struct Lengths {
    /// Of the flat tree.
    flat: u64,
    /// Of everything up to the end of the frame of the names.
    names: u64,
}

impl Lengths {
    fn to_bytes(&self) -> [u8; LENGTHS_BYTES] {
        let mut bytes = [0; LENGTHS_BYTES];
        let (flat, names) = bytes.split_at_mut(LENGTHS_BYTES / 2);
        flat.copy_from_slice(&(self.flat | IN_PARTS).to_le_bytes());
        names.copy_from_slice(&self.names.to_le_bytes());
        bytes
    }

    /// `None` where it is in one part, or cannot be.
    fn read(bytes: &[u8; LENGTHS_BYTES]) -> Option<Self> {
        let (flat, names) = bytes.split_at(LENGTHS_BYTES / 2);
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        let (flat, names) = (word(flat), word(names));
        let is_sound = flat & IN_PARTS != 0 && names >= LENGTHS_BYTES as u64;
        is_sound.then_some(Self { flat: flat & !IN_PARTS, names })
    }
}

/// Records of one kind, as a blob has them.
struct Kind {
    section: Section,
    /// Bytes of a record.
    width: usize,
}

/// What is in the names, in the order of the blob.
fn names_of(layout: &Layout) -> [Kind; 4] {
    let Layout { inodes, entries, xattrs, names, .. } = *layout;
    [
        Kind { section: inodes, width: INODE_BYTES },
        Kind { section: entries, width: ENTRY_BYTES },
        Kind::bytes(xattrs),
        Kind::bytes(names),
    ]
}

/// What is in the contents, in the order of the blob. Hashes have no columns.
fn contents_of(layout: &Layout) -> [Kind; 4] {
    let Layout { extents, ids, places, packs, .. } = *layout;
    let hashes = |section: Section, width: usize| {
        let count = u32::try_from(section.count as usize * width).expect("within 2 GiB");
        Kind::bytes(Section { count, ..section })
    };
    [
        Kind { section: extents, width: EXTENT_BYTES },
        hashes(ids, ID_BYTES),
        Kind { section: places, width: PLACE_BYTES },
        hashes(packs, PACK_BYTES),
    ]
}

impl Kind {
    /// Bytes that are stored as they are.
    fn bytes(section: Section) -> Self {
        Self { section, width: 1 }
    }

    /// How long each block is, in bytes; the last may be shorter.
    fn block(&self) -> usize {
        BLOCK * if self.width == 1 { INODE_BYTES } else { self.width }
    }

    fn pack(&self, flat: &[u8], blob: &mut impl Write) {
        let bytes = &flat[self.section.start..][..self.section.count as usize * self.width];
        let mut columns = Vec::with_capacity(self.block().min(bytes.len()));
        for block in bytes.chunks(self.block()) {
            if self.width == 1 {
                write(blob, block);
                continue;
            }
            columns.clear();
            for column in 0..self.width {
                columns.extend(block[column..].iter().step_by(self.width));
            }
            write(blob, &columns);
        }
    }

    /// Where in the flat tree each block is, and how many bytes it has.
    fn blocks(&self) -> impl Iterator<Item = (u64, usize)> {
        let (len, block) = (self.section.count as usize * self.width, self.block());
        let start = self.section.start;
        (0..len).step_by(block).map(move |at| ((start + at) as u64, block.min(len - at)))
    }

    fn unpack(&self, blob: &mut impl Read, flat: &mut (impl FlatSink + ?Sized)) -> io::Result<()> {
        let (mut block, mut rows) = (Vec::new(), Vec::new());
        for (at, len) in self.blocks() {
            block.resize(len, 0);
            blob.read_exact(&mut block)?;
            self.put(at, &block, &mut rows, flat)?;
        }
        Ok(())
    }

    /// Writes one block. What `rows` has does not matter: it is to be used again.
    fn put(
        &self,
        at: u64,
        block: &[u8],
        rows: &mut Vec<u8>,
        flat: &mut (impl FlatSink + ?Sized),
    ) -> io::Result<()> {
        if self.width == 1 {
            return flat.write_at(at, block);
        }
        rows.resize(block.len(), 0);
        self.rows(block, rows);
        flat.write_at(at, rows)
    }

    /// Makes records of the columns of one block. Eight columns and eight records at a time, each line of the cache is read and written
    /// once; byte by byte that takes four times as long.
    fn rows(&self, columns: &[u8], block: &mut [u8]) {
        let (width, count) = (self.width, columns.len() / self.width);
        let wide = width / SQUARE * SQUARE;
        for first in (0..wide).step_by(SQUARE) {
            let square: [&[[u8; SQUARE]]; SQUARE] =
                array::from_fn(|column| columns[(first + column) * count..][..count].as_chunks::<SQUARE>().0);
            for (number, records) in block.chunks_exact_mut(SQUARE * width).enumerate() {
                let bytes = transposed(array::from_fn(|column| square[column][number]));
                for (record, bytes) in records.chunks_exact_mut(width).zip(bytes) {
                    record[first..first + SQUARE].copy_from_slice(&bytes);
                }
            }
        }
        // what is not in a square
        let even = count / SQUARE * SQUARE;
        for (column, bytes) in columns.chunks_exact(count).enumerate() {
            let from = if column < wide { even } else { 0 };
            for (record, byte) in block[from * width..].chunks_exact_mut(width).zip(&bytes[from..]) {
                record[column] = *byte;
            }
        }
    }
}

/// Unpacks records of these kinds: they are read and decompressed here, while another thread makes rows of the block before, and
/// writes them.
fn unpack_side_by_side(
    kinds: &[Kind],
    frame: &mut impl Read,
    flat: &mut (impl FlatSink + Send + ?Sized),
) -> io::Result<()> {
    let (read, coming) = sync_channel::<(&Kind, u64, Vec<u8>)>(1);
    let (used, again) = sync_channel(BLOCKS_HELD);
    let put_all = move || {
        let mut rows = Vec::new();
        coming.iter().try_for_each(|(kind, at, block)| {
            kind.put(at, &block, &mut rows, flat)?;
            let _ = used.try_send(block);
            Ok(())
        })
    };
    thread::scope(|scope| {
        let putting = thread::Builder::new().name("lamina-tree".to_owned()).spawn_scoped(scope, put_all)?;
        let all = kinds.iter().flat_map(|kind| kind.blocks().map(move |block| (kind, block)));
        let all_read = all.into_iter().try_for_each(|(kind, (at, len))| {
            let mut block = again.try_recv().unwrap_or_default();
            block.resize(len, 0);
            frame.read_exact(&mut block)?;
            // whoever hung up says why
            read.send((kind, at, block)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
        });
        drop(read);
        putting.join().expect("writing does not panic").and(all_read)
    })
}

/// Columns become rows. A word is eight bytes, so it takes three rounds, each of which changes places within pairs of words: halves,
/// then quarters, then single bytes.
fn transposed(square: [[u8; SQUARE]; SQUARE]) -> [[u8; SQUARE]; SQUARE] {
    let mut words = square.map(u64::from_le_bytes);
    let rounds =
        [(4, 32, 0x0000_0000_ffff_ffff), (2, 16, 0x0000_ffff_0000_ffff), (1, 8, 0x00ff_00ff_00ff_00ff)];
    for (apart, bits, low) in rounds {
        for upper in (0..SQUARE).filter(|word| word & apart == 0) {
            let (above, below) = (words[upper], words[upper + apart]);
            words[upper] = (above & low) | ((below & low) << bits);
            words[upper + apart] = ((above >> bits) & low) | (below & !low);
        }
    }
    words.map(u64::to_le_bytes)
}

/// Compresses what is behind what a blob has.
type Encoder<'a> = zstd::Encoder<'static, &'a mut Vec<u8>>;

fn encoder(blob: &mut Vec<u8>, level: i32) -> Encoder<'_> {
    zstd::Encoder::new(blob, level).expect("a level zstd knows")
}

fn write(to: &mut impl Write, bytes: &[u8]) {
    to.write_all(bytes).expect("a Vec takes every byte");
}

fn wrong(error: TreeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Checks that a frame ends here, and what it comes from with it.
fn must_end(mut frame: zstd::Decoder<'_, impl BufRead>) -> io::Result<()> {
    let is_more = frame.read(&mut [0])? != 0 || !frame.finish().fill_buf()?.is_empty();
    if is_more { Err(wrong(TreeError::Compressed)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_made_of_columns_whatever_their_number_and_width() {
        for width in [INODE_BYTES, ENTRY_BYTES, EXTENT_BYTES, PLACE_BYTES, 7, 9] {
            for count in (1..=17).chain([BLOCK - 1, BLOCK]) {
                let columns: Vec<u8> = (0..width * count).map(|at| (at * 31 + at / 251) as u8).collect();
                let kind = Kind { section: Section { start: 0, count: count as u32 }, width };
                let mut block = vec![0; columns.len()];
                kind.rows(&columns, &mut block);
                let row = |record: usize| (0..width).map(move |column| (record, column));
                let expected =
                    (0..count).flat_map(row).map(|(record, column)| columns[column * count + record]);
                assert!(block.iter().copied().eq(expected), "{count} records of {width} bytes");
            }
        }
    }
}
