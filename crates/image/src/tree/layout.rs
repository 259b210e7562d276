//! Where each section of a flat tree lies.

use super::TreeError;

pub(super) const MAGIC: [u8; 8] = *b"LAMTREE1";
pub(super) const HEADER_BYTES: usize = 96;
pub(super) const INODE_BYTES: usize = 64;
pub(super) const ENTRY_BYTES: usize = 12;
pub(super) const EXTENT_BYTES: usize = 16;
pub(super) const PLACE_BYTES: usize = 16;
pub(super) const PACK_BYTES: usize = 32;
pub(super) const ID_BYTES: usize = 32;

/// In the place of a frame number: these bytes of the file are zeros that nobody stored.
pub const HOLE: u32 = u32::MAX;
/// In an inode: no extended attributes.
pub const NO_XATTRS: u32 = u32::MAX;

/// How many records of each kind a tree has, in the order of the sections. The last two count bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) inodes: u32,
    pub(super) entries: u32,
    pub(super) extents: u32,
    pub(super) frames: u32,
    pub(super) packs: u32,
    pub(super) xattr_bytes: u32,
    pub(super) name_bytes: u32,
}

/// A run of equally wide records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) start: usize,
    pub(super) count: u32,
}

/// The sections of one tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) inodes: Section,
    pub(super) entries: Section,
    pub(super) extents: Section,
    pub(super) ids: Section,
    pub(super) places: Section,
    pub(super) packs: Section,
    pub(super) xattrs: Section,
    pub(super) names: Section,
    pub(super) len: usize,
    pub(super) file_bytes: u64,
}

impl Layout {
    /// Lays the sections out one behind the other, each beginning at a multiple of 8.
    pub(super) fn of(counts: Counts, file_bytes: u64) -> Self {
        let mut end = HEADER_BYTES;
        let mut section = |count: u32, width: usize| {
            let start = end;
            end = (start + count as usize * width).next_multiple_of(8);
            Section { start, count }
        };
        Self {
            inodes: section(counts.inodes, INODE_BYTES),
            entries: section(counts.entries, ENTRY_BYTES),
            extents: section(counts.extents, EXTENT_BYTES),
            ids: section(counts.frames, ID_BYTES),
            places: section(counts.frames, PLACE_BYTES),
            packs: section(counts.packs, PACK_BYTES),
            xattrs: section(counts.xattr_bytes, 1),
            names: section(counts.name_bytes, 1),
            len: end,
            file_bytes,
        }
    }

    pub(super) fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        let counts = [
            self.inodes.count,
            self.entries.count,
            self.extents.count,
            self.ids.count,
            self.packs.count,
            self.xattrs.count,
            self.names.count,
        ];
        for (place, count) in header[20..].chunks_exact_mut(4).zip(counts) {
            place.copy_from_slice(&count.to_le_bytes());
        }
        header[48..56].copy_from_slice(&self.file_bytes.to_le_bytes());
        header
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Self, TreeError> {
        let layout = Self::read_header(bytes.first_chunk().ok_or(TreeError::Header)?)?;
        if layout.len != bytes.len() {
            return Err(TreeError::Header);
        }
        Ok(layout)
    }

    /// What a header says, whatever is behind it.
    pub(super) fn read_header(header: &[u8; HEADER_BYTES]) -> Result<Self, TreeError> {
        let refused_features = u32_at(header, 12);
        if header[..8] != MAGIC
            || refused_features != 0
            || header[16..20] != [0; 4]
            || header[56..] != [0; 40]
        {
            return Err(TreeError::Header);
        }
        let counts = Counts {
            inodes: u32_at(header, 20),
            entries: u32_at(header, 24),
            extents: u32_at(header, 28),
            frames: u32_at(header, 32),
            packs: u32_at(header, 36),
            xattr_bytes: u32_at(header, 40),
            name_bytes: u32_at(header, 44),
        };
        if counts.inodes == 0 {
            return Err(TreeError::Header);
        }
        Ok(Self::of(counts, u64_at(header, 48)))
    }
}

/// The little-endian word at a position that the caller knows to be inside.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The same, 64 bits wide.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
