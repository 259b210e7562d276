//! Boot packs: the pages that a start needs, in the order in which it needs them.
//!
//! `FORMAT.md` has the bytes. The head names the tree, so that inode numbers mean something, and carries a
//! table with the hash of every frame and the place of every run; so a reader checks each frame before it
//! believes a page of it, and each run against the tree before any page goes anywhere. Lengths of runs are
//! not stored: they follow from the file's size in the tree.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;

use lamina_chunk::PackId;
use zstd::bulk::Decompressor;

use crate::profile::{PAGE_BYTES, PROFILE_ITEMS_MAX, PROFILE_PAGES_MAX, file_size};
use crate::{
    Algorithm, BOOT_ANNOTATION, BOOT_BYTES_ANNOTATION, CommandKey, Descriptor, Digest, Ino, TREE_ANNOTATION,
    Tree,
};

mod build;
mod plan;

pub use build::{BuildError, build_boot};

const MAGIC: &[u8; 8] = b"LAMBOOT1";
/// Bytes of the head.
pub const BOOT_HEAD_BYTES: usize = 128;
/// Plaintext of a frame at most: 1 MiB is some 3 ms of decompression, after which its pages are there; a
/// smaller one would compress worse.
pub const BOOT_FRAME_BYTES: usize = 1 << 20;
const FRAME_BYTES: u64 = BOOT_FRAME_BYTES as u64;
/// Plaintext of the first frame, and each after it has twice as much, up to [`BOOT_FRAME_BYTES`]. A program waits for what it reads
/// first, which a long frame would have only when all of it has come and is opened; what it reads later is there before it.
const FIRST_FRAME_BYTES: u64 = 64 << 10;
/// A run lies in one frame.
const RUN_PAGES_MAX: u64 = FRAME_BYTES / PAGE_BYTES;
/// Names of a table, twice those that are listed.
const NAMES_MAX: usize = 2 * PROFILE_ITEMS_MAX;
/// The table is not longer, compressed or plain, in bytes.
const TABLE_BYTES_MAX: u32 = 64 << 20;
/// No boot pack is longer, in bytes of the blob.
pub const BOOT_BYTES_MAX: u64 = 4 << 30;
/// Bytes of the head before its hash.
const HASHED_HEAD_BYTES: usize = 60;
const FRAME_RECORD_BYTES: usize = 44;
const RUN_RECORD_BYTES: usize = 12;

/// Why a boot pack is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// Not a boot pack, or of another version, or its lengths contradict.
    #[error("not a boot pack: bad head")]
    Head,
    /// Made for another tree.
    #[error("a boot pack of another image")]
    OtherImage,
    /// The table or a frame is not what the head says.
    #[error("the boot pack is damaged: {0} {1}")]
    Damaged(&'static str, usize),
    /// A run of something that is no file, lies beyond its end, or overlaps another.
    #[error("the boot pack lies about run {0}")]
    Run(usize),
}

/// A boot pack and the image it is for, as a referrers answer names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootPack {
    /// Its blob.
    pub blob: Digest,
    /// The blob's length, in bytes.
    pub bytes: u64,
    /// The blob of the tree that it must be made for.
    pub tree: Digest,
}

impl BootPack {
    /// The one that these annotations name. `None` where they name none, or not all of it.
    pub fn named_by(annotations: &BTreeMap<String, String>) -> Option<Self> {
        let sha256 = |digest: &Digest| digest.algorithm() == Algorithm::Sha256;
        let blob = annotations.get(BOOT_ANNOTATION)?.parse().ok().filter(sha256)?;
        let bytes = annotations.get(BOOT_BYTES_ANNOTATION)?.parse().ok()?;
        let tree = annotations.get(TREE_ANNOTATION)?.parse().ok().filter(sha256)?;
        Some(Self { blob, bytes, tree })
    }

    /// The one for a command among what hangs on an image with this tree, and whether it was made for that command: else it is the general
    /// one.
    pub fn choose(found: &[Descriptor], tree: Digest, command: Option<&CommandKey>) -> Option<(Self, bool)> {
        let of = |command: Option<&CommandKey>| {
            let named = found.iter().filter(|one| CommandKey::is_named(command, &one.annotations));
            named.filter_map(|one| Self::named_by(&one.annotations)).find(|pack| pack.tree == tree)
        };
        let own = command.and_then(|command| of(Some(command))).map(|pack| (pack, true));
        own.or_else(|| Some((of(None)?, false)))
    }

    /// Its blob as what caches fetch from. It is named by a sha256, as packs are.
    pub fn pack(&self) -> PackId {
        PackId::try_from(self.blob).expect("a boot pack is read and made under a sha256 only")
    }

    /// The annotations that name it.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            (BOOT_ANNOTATION.to_owned(), self.blob.to_string()),
            (BOOT_BYTES_ANNOTATION.to_owned(), self.bytes.to_string()),
            (TREE_ANNOTATION.to_owned(), self.tree.to_string()),
        ])
    }
}

/// The head of a boot pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootHead {
    table_sealed: u32,
    table_plain: u32,
    frames: u32,
    runs: u32,
    names: u32,
    tree: Digest,
    hash: [u8; 32],
}

/// Some pages of a file, and where in a frame's plaintext they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootRun {
    /// The file.
    pub ino: Ino,
    /// Where in the file, in bytes; whole pages.
    pub offset: u64,
    /// Bytes: whole pages, or up to the end of the file.
    pub len: u32,
    /// Bytes of the frame's plaintext before them.
    pub skip: u32,
}

/// A frame of a boot pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFrame {
    /// Where in the blob.
    pub offset: u64,
    /// Bytes of the blob.
    pub sealed_len: u32,
    /// Bytes that it opens to.
    pub plain_len: u32,
    hash: [u8; 32],
    /// Which runs are in it.
    pub runs: std::ops::Range<usize>,
}

/// The table of a boot pack, unpacked. Its frames can be opened, while its runs mean nothing without the tree.
#[derive(Clone, Debug)]
pub struct BootRecords {
    frames: Vec<BootFrame>,
    runs: usize,
    names: usize,
    plain: Vec<u8>,
    runs_at: usize,
    names_at: usize,
    blob_bytes: u64,
}

/// What is in a boot pack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootTable {
    /// In the order in which they come.
    pub frames: Vec<BootFrame>,
    /// All runs, frame by frame.
    pub runs: Vec<BootRun>,
    /// Paths to look up before any page is stored, without a leading slash.
    pub names: Vec<String>,
    /// Those of them that are to be listed, as directories.
    pub dirs: Vec<String>,
}

impl BootHead {
    /// Reads the first [`BOOT_HEAD_BYTES`] bytes of a boot pack made for the tree with this digest.
    pub fn parse(bytes: &[u8], tree: Digest) -> Result<Self, BootError> {
        let bytes: &[u8; BOOT_HEAD_BYTES] = bytes.try_into().map_err(|_| BootError::Head)?;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if &bytes[..8] != MAGIC || bytes[92..] != [0; BOOT_HEAD_BYTES - 92] {
            return Err(BootError::Head);
        }
        let head = Self {
            table_sealed: word(8),
            table_plain: word(12),
            frames: word(16),
            runs: word(20),
            names: word(24),
            tree: Digest::from_bytes(bytes[28..60].try_into().expect("32 bytes")),
            hash: bytes[HASHED_HEAD_BYTES..92].try_into().expect("32 bytes"),
        };
        let items_max = u32::try_from(PROFILE_ITEMS_MAX).expect("half a million");
        let pages_max = u32::try_from(PROFILE_PAGES_MAX).expect("a million");
        let bounded = head.table_sealed <= TABLE_BYTES_MAX
            && head.table_plain <= TABLE_BYTES_MAX
            && head.frames <= items_max
            && head.runs <= pages_max
            && head.names as usize <= NAMES_MAX;
        match bounded {
            false => Err(BootError::Head),
            true if head.tree != tree => Err(BootError::OtherImage),
            true => Ok(head),
        }
    }

    fn to_bytes(self) -> [u8; BOOT_HEAD_BYTES] {
        let mut bytes = [0; BOOT_HEAD_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        let words = [self.table_sealed, self.table_plain, self.frames, self.runs, self.names];
        for (place, word) in bytes[8..].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes[28..HASHED_HEAD_BYTES].copy_from_slice(self.tree.as_bytes());
        bytes[HASHED_HEAD_BYTES..92].copy_from_slice(&self.hash);
        bytes
    }

    /// The hash that belongs to a head with these lengths and this table: of both, so that no byte of either
    /// changes unseen.
    fn hash_with(self, sealed_table: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.to_bytes()[..HASHED_HEAD_BYTES]);
        hasher.update(sealed_table);
        *hasher.finalize().as_bytes()
    }

    /// How many frames there are.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// How many bytes of table follow the head.
    pub fn table_len(&self) -> usize {
        self.table_sealed as usize
    }

    /// Reads the table that follows the head.
    pub fn records(&self, sealed: &[u8]) -> Result<BootRecords, BootError> {
        let damaged = || BootError::Damaged("table", 0);
        if sealed.len() != self.table_len() || self.hash_with(sealed) != self.hash {
            return Err(damaged());
        }
        let plain_len = self.table_plain as usize;
        let plain = zstd::bulk::decompress(sealed, plain_len).map_err(|_| damaged())?;
        let (frames, runs) = (self.frames as usize, self.runs as usize);
        let runs_at = frames * FRAME_RECORD_BYTES;
        let names_at = runs_at + runs * RUN_RECORD_BYTES;
        if plain.len() != plain_len || plain.len() < names_at {
            return Err(damaged());
        }
        let (frames, blob_bytes) = self.frames_of(&plain[..runs_at])?;
        Ok(BootRecords { frames, runs, names: self.names as usize, plain, runs_at, names_at, blob_bytes })
    }

    /// The frames, and where the last one ends.
    fn frames_of(&self, records: &[u8]) -> Result<(Vec<BootFrame>, u64), BootError> {
        let (mut frames, mut first) = (Vec::with_capacity(self.frames as usize), 0);
        let mut offset = (BOOT_HEAD_BYTES + self.table_len()) as u64;
        for (number, record) in records.chunks_exact(FRAME_RECORD_BYTES).enumerate() {
            let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("four bytes"));
            let (sealed_len, plain_len, count) = (word(0), word(4), word(8) as usize);
            let (last, end) = (first + count, offset + u64::from(sealed_len));
            let lengths = u64::from(plain_len) <= FRAME_BYTES && (1..=plain_len).contains(&sealed_len);
            if !lengths || count == 0 || last > self.runs as usize || end > BOOT_BYTES_MAX {
                return Err(BootError::Damaged("frame", number));
            }
            let hash = record[12..44].try_into().expect("32 bytes");
            frames.push(BootFrame { offset, sealed_len, plain_len, hash, runs: first..last });
            offset = end;
            first = last;
        }
        let all = first == self.runs as usize;
        if all { Ok((frames, offset)) } else { Err(BootError::Damaged("frame", frames.len())) }
    }
}

impl BootRecords {
    /// The frames, in the order in which they come: enough to open them.
    pub fn frames(&self) -> &[BootFrame] {
        &self.frames
    }

    /// Bytes of the blob, by what the frames say.
    pub fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    /// All of it, each run checked against the tree that the boot pack was made for.
    pub fn table(self, tree: &Tree) -> Result<BootTable, BootError> {
        let (names, dirs) = names(&self.plain[self.names_at..], self.names)?;
        let mut runs = columns(&self.plain[self.runs_at..self.names_at], self.runs, tree)?;
        for (number, frame) in self.frames.iter().enumerate() {
            let damaged = || BootError::Damaged("frame", number);
            let mut skip = 0u64;
            for run in &mut runs[frame.runs.clone()] {
                run.skip = u32::try_from(skip).map_err(|_| damaged())?;
                skip += u64::from(run.len);
            }
            if skip != u64::from(frame.plain_len) {
                return Err(damaged());
            }
        }
        check_overlaps(&runs)?;
        Ok(BootTable { frames: self.frames, runs, names, dirs })
    }
}

thread_local! {
    /// Making one costs as much as a tenth of a frame.
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

impl BootFrame {
    /// Opens and verifies a frame: its plaintext, in which its runs lie, in the place of what `plain` had.
    pub fn open_into(&self, sealed: &[u8], plain: &mut Vec<u8>) -> Result<(), BootError> {
        let damaged =
            || BootError::Damaged("frame at byte", usize::try_from(self.offset).unwrap_or(usize::MAX));
        if sealed.len() != self.sealed_len as usize || *blake3::hash(sealed).as_bytes() != self.hash {
            return Err(damaged());
        }
        plain.clear();
        if self.sealed_len == self.plain_len {
            plain.extend_from_slice(sealed);
            return Ok(());
        }
        plain.reserve_exact(self.plain_len as usize);
        let written = DECOMPRESSOR.with_borrow_mut(|kept| match kept {
            Some(kept) => kept.decompress_to_buffer(sealed, plain),
            none => none.insert(Decompressor::new()?).decompress_to_buffer(sealed, plain),
        });
        if written.ok() == Some(self.plain_len as usize) { Ok(()) } else { Err(damaged()) }
    }

    /// The same into memory of its own.
    pub fn open(&self, sealed: &[u8]) -> Result<Bytes, BootError> {
        let mut plain = Vec::new();
        self.open_into(sealed, &mut plain).map(|()| Bytes::from(plain))
    }
}

/// The runs: all inodes, then all first pages, then all counts, since each column compresses by itself.
fn columns(bytes: &[u8], count: usize, tree: &Tree) -> Result<Vec<BootRun>, BootError> {
    let word = |column: usize, number: usize| {
        let at = (column * count + number) * 4;
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    };
    let run = |number| {
        let (ino, first, pages) = (Ino::from_index(word(0, number)), word(1, number), word(2, number));
        let size = file_size(tree, ino).ok_or(BootError::Run(number))?;
        let offset = u64::from(first) * PAGE_BYTES;
        let end = offset + u64::from(pages) * PAGE_BYTES;
        // the last page may be cut off by the end of the file, and nothing lies behind it
        if pages == 0 || u64::from(pages) > RUN_PAGES_MAX || end - PAGE_BYTES >= size {
            return Err(BootError::Run(number));
        }
        let len = u32::try_from(end.min(size) - offset).map_err(|_| BootError::Run(number))?;
        Ok(BootRun { ino, offset, len, skip: 0 })
    };
    (0..count).map(run).collect()
}

/// Refuses runs of which two have a page in common.
fn check_overlaps(runs: &[BootRun]) -> Result<(), BootError> {
    let mut sorted: Vec<usize> = (0..runs.len()).collect();
    sorted.sort_unstable_by_key(|number| (runs[*number].ino, runs[*number].offset));
    let overlap = sorted.windows(2).find(|pair| {
        let (a, b) = (runs[pair[0]], runs[pair[1]]);
        a.ino == b.ino && a.offset + u64::from(a.len) > b.offset
    });
    overlap.map_or(Ok(()), |pair| Err(BootError::Run(pair[1])))
}

/// Paths, each after its length in 16 bits, and of these the ones that come again. None comes a third time: each costs a listing.
fn names(mut bytes: &[u8], count: usize) -> Result<(Vec<String>, Vec<String>), BootError> {
    let (mut names, mut again) = (Vec::new(), Vec::new());
    let (mut seen, mut listed) = (HashSet::new(), HashSet::new());
    for number in 0..count {
        let damaged = || BootError::Damaged("name", number);
        let (len, rest) = bytes.split_first_chunk::<2>().ok_or_else(damaged)?;
        let (name, rest) = rest.split_at_checked(u16::from_le_bytes(*len).into()).ok_or_else(damaged)?;
        let name = std::str::from_utf8(name)
            .ok()
            .filter(|name| crate::profile::is_inside(name))
            .ok_or_else(damaged)?;
        if seen.insert(name) {
            names.push(name.to_owned());
        } else if listed.insert(name) {
            again.push(name.to_owned());
        } else {
            return Err(damaged());
        }
        bytes = rest;
    }
    if bytes.is_empty() { Ok((names, again)) } else { Err(BootError::Damaged("name", count)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_gets_its_own_boot_pack_and_else_the_general_one() {
        let (tree, other) = (Digest::of(b"tree"), Digest::of(b"other"));
        let key = |text: &str| text.parse::<CommandKey>().expect("a key");
        let boot = |command: Option<&CommandKey>, tree: Digest, bytes: u64| {
            let mut artifact = Descriptor::of(crate::media_type::OCI_MANIFEST, b"");
            artifact.annotations = BootPack { blob: Digest::of(b"boot"), bytes, tree }.annotations();
            artifact.annotations.extend(CommandKey::annotation(command));
            artifact
        };
        let (a, b, c) = (key("a"), key("b"), key("c"));
        let found = [
            boot(Some(&a), tree, 1),
            boot(Some(&b), tree, 2),
            boot(Some(&c), other, 3),
            boot(None, other, 4),
            boot(None, tree, 5),
        ];
        let chosen = |command: Option<&CommandKey>, found: &[Descriptor]| {
            BootPack::choose(found, tree, command).map(|(pack, own)| (pack.bytes, own))
        };
        assert_eq!(chosen(Some(&a), &found), Some((1, true)));
        assert_eq!(chosen(Some(&b), &found), Some((2, true)));
        for none in [Some(&c), Some(&key("d")), None] {
            assert_eq!(chosen(none, &found), Some((5, false)), "{none:?}");
        }
        assert_eq!(chosen(None, &found[..4]), None, "no other command's, and no other image's");
        assert_eq!(chosen(Some(&b), &found[..1]), None);
    }
}
