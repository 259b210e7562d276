//! One inode of a tree.

use super::TreeError;
use super::layout::{INODE_BYTES, u32_at, u64_at};

/// The number of an inode: from 1, the root, without gaps. The same image always has the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

impl Ino {
    /// The image's root directory.
    pub const ROOT: Self = Self(1);

    /// The number of the record at a position in the table.
    pub fn from_index(index: u32) -> Self {
        Self(u64::from(index) + 1)
    }

    /// The position in the table; `None` where no table could have it.
    pub fn index(self) -> Option<u32> {
        self.0.checked_sub(1).and_then(|index| u32::try_from(index).ok())
    }
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum FileKind {
    Regular,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

impl FileKind {
    /// The kind in the upper bits of a mode, after inode(7).
    pub fn of_mode(mode: u32) -> Option<Self> {
        Self::from_code(u8::try_from((mode & 0o170_000) >> 12).ok()?)
    }

    /// The kind with this code: the upper four bits of a mode, the `DT_*` values of readdir(3).
    pub fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Fifo,
            2 => Self::CharDevice,
            4 => Self::Directory,
            6 => Self::BlockDevice,
            8 => Self::Regular,
            10 => Self::Symlink,
            12 => Self::Socket,
            _ => return None,
        })
    }

    /// The code of [`from_code`](Self::from_code).
    pub fn code(self) -> u8 {
        match self {
            Self::Fifo => 1,
            Self::CharDevice => 2,
            Self::Directory => 4,
            Self::BlockDevice => 6,
            Self::Regular => 8,
            Self::Symlink => 10,
            Self::Socket => 12,
        }
    }

    /// The same as the upper bits of a mode.
    pub fn mode_bits(self) -> u32 {
        u32::from(self.code()) << 12
    }
}

/// The attributes of one inode, and where its contents stand in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Kind and permissions, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that point here; for directories 2 and one for each directory inside.
    pub nlink: u32,
    /// Bytes of a regular file, or of a symbolic link's target; 0 for the rest.
    pub size: u64,
    /// Last change, in seconds since 1970; may be negative.
    pub mtime_s: i64,
    /// And nanoseconds, below 1,000,000,000.
    pub mtime_ns: u32,
    /// The device, as Linux encodes it in 32 bits (`new_encode_dev` in include/linux/kdev_t.h).
    pub rdev: u32,
    pub(super) data_start: u32,
    pub(super) data_count: u32,
    pub(super) xattrs: u32,
    pub(super) parent: u32,
}

impl Inode {
    /// What it is.
    pub fn kind(&self) -> FileKind {
        FileKind::of_mode(self.mode).expect("checked when the inode was read")
    }

    /// Whether it has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.xattrs != super::NO_XATTRS
    }

    pub(super) fn read(record: &[u8]) -> Result<Self, TreeError> {
        let mode = u32_at(record, 0);
        FileKind::of_mode(mode).ok_or(TreeError::Bounds("mode", mode.into()))?;
        Ok(Self {
            mode,
            uid: u32_at(record, 4),
            gid: u32_at(record, 8),
            nlink: u32_at(record, 12),
            size: u64_at(record, 16),
            mtime_s: u64_at(record, 24).cast_signed(),
            mtime_ns: u32_at(record, 32),
            rdev: u32_at(record, 36),
            data_start: u32_at(record, 40),
            data_count: u32_at(record, 44),
            xattrs: u32_at(record, 48),
            parent: u32_at(record, 52),
        })
    }

    pub(super) fn write(&self) -> [u8; INODE_BYTES] {
        let mut record = [0; INODE_BYTES];
        let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.mode.to_le_bytes());
        put(4, &self.uid.to_le_bytes());
        put(8, &self.gid.to_le_bytes());
        put(12, &self.nlink.to_le_bytes());
        put(16, &self.size.to_le_bytes());
        put(24, &self.mtime_s.to_le_bytes());
        put(32, &self.mtime_ns.to_le_bytes());
        put(36, &self.rdev.to_le_bytes());
        put(40, &self.data_start.to_le_bytes());
        put(44, &self.data_count.to_le_bytes());
        put(48, &self.xattrs.to_le_bytes());
        put(52, &self.parent.to_le_bytes());
        record
    }
}
