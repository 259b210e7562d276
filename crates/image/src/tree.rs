//! The tree: one image's whole file system, used straight from an mmap.
//!
//! Opening reads 96 bytes, however many files there are. Everything else is found by arithmetic and binary search,
//! with every access checked against the length of its section, so that damaged bytes give [`TreeError`], never a
//! panic and never bytes of something else. Whoever loads a tree from a disk or a network checks its hash first.
//!
//! `FORMAT.md` has the layout.

mod encode;
mod inode;
mod layout;
mod transport;

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lamina_chunk::{Frame, FrameId, PackId, Place};

pub(crate) use encode::{NewInode, TreeBuilder};
pub use inode::{FileKind, Ino, Inode};
use layout::{
    ENTRY_BYTES, EXTENT_BYTES, ID_BYTES, INODE_BYTES, Layout, PACK_BYTES, PLACE_BYTES, Section, u32_at,
    u64_at,
};
pub use layout::{HOLE, NO_XATTRS};
pub use transport::{
    FlatSink, TREE_BYTES_MAX, TreeContents, TreeNames, TreeUnpacking, pack_tree, pack_tree_as_before,
    unpack_tree,
};

/// Why bytes are not a tree, or not this part of one. Another try with the same bytes will not help, but for the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The magic is missing or of another version, a needed feature is unknown, or the lengths contradict.
    #[error("not a tree: bad header")]
    Header,
    /// Something points outside its section.
    #[error("the tree is damaged: {0} {1} is out of bounds")]
    Bounds(&'static str, u64),
    /// The inode exists and is of another kind.
    #[error("inode {0} is not a {1}")]
    Kind(u64, &'static str),
    /// The tree, or something in it, is too large for the format.
    #[error("too large for a tree: {0}")]
    TooLarge(&'static str),
    /// The compressed form does not decompress to what it says.
    #[error("the tree's compressed form is damaged")]
    Compressed,
    /// Where the bytes of files are has not come yet: the tree was opened with [`Tree::open_names`]. The one error after which another
    /// try may help.
    #[error("where the bytes of files are has not come yet")]
    Coming,
}

/// An image's file system. Cheap to clone: the bytes are shared.
#[derive(Clone, Debug)]
pub struct Tree {
    /// All of it, or at least the names.
    bytes: Bytes,
    layout: Layout,
    /// All of it, where that has come.
    contents: Arc<OnceLock<Bytes>>,
}

/// One name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name: 1 to 255 bytes, any but `/` and NUL.
    pub name: &'a [u8],
    /// What it names.
    pub ino: Ino,
    /// Its kind, as in the inode.
    pub kind: FileKind,
}

/// An extended attribute's name and value.
pub type Xattr<'a> = (&'a [u8], &'a [u8]);

/// A piece of a file. Never empty; pieces come in order and without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// Which frame of the tree holds them; `None` is a hole, which reads as zeros.
    pub frame: Option<u32>,
    /// Where in the frame's plaintext they begin.
    pub skip: u32,
}

impl Tree {
    /// Takes the bytes of a flat tree, from an mmap or memory. Cost: the same for every tree.
    pub fn open(bytes: Bytes) -> Result<Self, TreeError> {
        let tree = Self::open_names(bytes.clone())?;
        let _ = tree.contents.set(bytes);
        Ok(tree)
    }

    /// The same where only what a [`TreeNames`] is of is there yet: names and inodes. Whatever asks for extents and frames gets
    /// [`TreeError::Coming`] until [`set_contents`](Self::set_contents) was called.
    pub fn open_names(bytes: Bytes) -> Result<Self, TreeError> {
        let layout = Layout::read(&bytes)?;
        Ok(Self { bytes, layout, contents: Arc::default() })
    }

    /// Takes all of a tree of which the names were there. *Errors*: it is another tree. Cost: names and inodes are compared, unless
    /// these are the bytes that the names are in, where the contents were written meanwhile.
    pub fn set_contents(&self, bytes: Bytes) -> Result<(), TreeError> {
        let Layout { extents, xattrs, .. } = self.layout;
        let names = |bytes: &Bytes| [bytes.slice(..extents.start), bytes.slice(xattrs.start..)];
        let is_same = bytes.as_ptr_range() == self.bytes.as_ptr_range();
        if Layout::read(&bytes)? != self.layout || !(is_same || names(&bytes) == names(&self.bytes)) {
            return Err(TreeError::Header);
        }
        let _ = self.contents.set(bytes);
        Ok(())
    }

    /// The flat bytes. Before the contents have come only the names are right.
    pub fn as_bytes(&self) -> &Bytes {
        self.contents.get().unwrap_or(&self.bytes)
    }

    /// Whether extents and frames are there.
    pub fn has_contents(&self) -> bool {
        self.contents.get().is_some()
    }

    /// How many inodes there are. They are numbered from 1, the root.
    pub fn inodes(&self) -> u32 {
        self.layout.inodes.count
    }

    /// How many distinct frames hold the files' contents.
    pub fn frames(&self) -> u32 {
        self.layout.ids.count
    }

    /// The sum of the sizes of all regular files, each inode once, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.layout.file_bytes
    }

    /// Whether any inode has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.layout.xattrs.count > 0
    }

    /// The packs that the frames lie in; none before the contents have come.
    pub fn packs(&self) -> impl Iterator<Item = PackId> + '_ {
        (0..self.layout.packs.count).filter_map(|number| {
            let record = record(self.contents.get()?, self.layout.packs, number, PACK_BYTES, "pack").ok()?;
            Some(PackId::from_bytes(record.try_into().ok()?))
        })
    }

    /// The attributes of an inode.
    pub fn inode(&self, ino: Ino) -> Result<Inode, TreeError> {
        let number = ino.index().ok_or(TreeError::Bounds("inode", ino.0))?;
        Inode::read(record(&self.bytes, self.layout.inodes, number, INODE_BYTES, "inode")?)
    }

    /// Finds a name in a directory. Cost: a binary search, no allocation.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Option<Ino>, TreeError> {
        let entries = self.entries(dir)?;
        let (mut low, mut high) = (0, entries.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = entries.at(middle)?;
            match entry.name.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(entry.ino)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The names in a directory, sorted by their bytes, without `.` and `..`.
    pub fn entries(&self, dir: Ino) -> Result<Entries<'_>, TreeError> {
        let inode = self.inode(dir)?;
        if inode.kind() != FileKind::Directory {
            return Err(TreeError::Kind(dir.0, "directory"));
        }
        Ok(Entries { tree: self, start: inode.data_start, count: inode.data_count })
    }

    /// The directory that holds this one; the root's is the root.
    pub fn parent(&self, dir: Ino) -> Result<Ino, TreeError> {
        let inode = self.inode(dir)?;
        match inode.kind() {
            FileKind::Directory => Ok(Ino::from_index(inode.parent)),
            _ => Err(TreeError::Kind(dir.0, "directory")),
        }
    }

    /// Where a symbolic link points, as it was written.
    pub fn symlink(&self, ino: Ino) -> Result<&[u8], TreeError> {
        let inode = self.inode(ino)?;
        if inode.kind() != FileKind::Symlink {
            return Err(TreeError::Kind(ino.0, "symbolic link"));
        }
        self.span(self.layout.names, inode.data_start, inode.data_count, "symlink target")
    }

    /// The value of one extended attribute.
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Option<&[u8]>, TreeError> {
        Ok(self.xattrs(ino)?.into_iter().find(|(found, _)| *found == name).map(|(_, value)| value))
    }

    /// All extended attributes of an inode, sorted by name.
    pub fn xattrs(&self, ino: Ino) -> Result<Vec<Xattr<'_>>, TreeError> {
        let inode = self.inode(ino)?;
        if inode.xattrs == NO_XATTRS {
            return Ok(Vec::new());
        }
        let mut at = inode.xattrs;
        let mut word = |width: u32| {
            let bytes = self.span(self.layout.xattrs, at, width, "xattr")?;
            at = at.checked_add(width).ok_or(TreeError::Bounds("xattr", u64::from(at)))?;
            Ok::<_, TreeError>(bytes)
        };
        let number = |bytes: &[u8]| u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        let count = number(word(2)?);
        let mut all = Vec::with_capacity(count.min(64) as usize);
        for _ in 0..count {
            let (name_len, value_len) = (number(word(2)?), u32_at(word(4)?, 0));
            all.push((word(name_len)?, word(value_len)?));
        }
        Ok(all)
    }

    /// The pieces of a regular file that hold the bytes from `from` to before `to`, cut to that range and to the
    /// file's size. Cost: a binary search, then one step a piece.
    pub fn extents(&self, ino: Ino, from: u64, to: u64) -> Result<Extents<'_>, TreeError> {
        let inode = self.inode(ino)?;
        if inode.kind() != FileKind::Regular {
            return Err(TreeError::Kind(ino.0, "regular file"));
        }
        let to = to.min(inode.size);
        let mut extents = Extents { tree: self, inode, next: 0, from, to };
        let (mut low, mut high) = (0, inode.data_count);
        // the last piece that begins at or before `from`
        while low < high {
            let middle = low + (high - low) / 2;
            match extents.raw(middle)?.0 <= from {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        extents.next = low.saturating_sub(1);
        Ok(extents)
    }

    /// The name of a frame and its place.
    pub fn frame(&self, number: u32) -> Result<(FrameId, Place), TreeError> {
        let bytes = self.contents.get().ok_or(TreeError::Coming)?;
        let id = record(bytes, self.layout.ids, number, ID_BYTES, "frame")?;
        let place = record(bytes, self.layout.places, number, PLACE_BYTES, "place")?;
        let pack = record(bytes, self.layout.packs, u32_at(place, 0), PACK_BYTES, "pack")?;
        let frame =
            Frame { offset: u32_at(place, 4), sealed_len: u32_at(place, 8), plain_len: u32_at(place, 12) };
        let pack = PackId::from_bytes(pack.try_into().expect("32 bytes"));
        Ok((FrameId::from_bytes(id.try_into().expect("32 bytes")), Place { pack, frame }))
    }

    fn span(&self, section: Section, start: u32, len: u32, what: &'static str) -> Result<&[u8], TreeError> {
        let out = TreeError::Bounds(what, u64::from(start));
        if u64::from(start) + u64::from(len) > u64::from(section.count) {
            return Err(out);
        }
        let start = section.start + start as usize;
        self.bytes.get(start..start + len as usize).ok_or(out)
    }
}

/// Record `number` of a section of records.
fn record<'a>(
    bytes: &'a [u8],
    section: Section,
    number: u32,
    width: usize,
    what: &'static str,
) -> Result<&'a [u8], TreeError> {
    let out = TreeError::Bounds(what, u64::from(number));
    if number >= section.count {
        return Err(out);
    }
    let start = section.start + number as usize * width;
    bytes.get(start..start + width).ok_or(out)
}

/// The names in one directory.
#[derive(Clone, Copy, Debug)]
pub struct Entries<'a> {
    tree: &'a Tree,
    start: u32,
    count: u32,
}

impl<'a> Entries<'a> {
    /// How many names there are.
    pub fn len(&self) -> u32 {
        self.count
    }

    /// Whether the directory is empty.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The name at a position. Panics where the position is not below [`len`](Self::len).
    pub fn at(&self, position: u32) -> Result<Entry<'a>, TreeError> {
        assert!(position < self.count, "entry {position} of {}", self.count);
        let number = self.start.checked_add(position).ok_or(TreeError::Bounds("entry", position.into()))?;
        let record = record(&self.tree.bytes, self.tree.layout.entries, number, ENTRY_BYTES, "entry")?;
        let (name_at, ino) = (u32_at(record, 0), Ino::from_index(u32_at(record, 4)));
        let name_len = u32::from(u16::from_le_bytes([record[8], record[9]]));
        let name = self.tree.span(self.tree.layout.names, name_at, name_len, "name")?;
        let kind = FileKind::from_code(record[10]).ok_or(TreeError::Bounds("kind", number.into()))?;
        Ok(Entry { name, ino, kind })
    }

    /// All names in order.
    pub fn iter(self) -> impl Iterator<Item = Result<Entry<'a>, TreeError>> {
        (0..self.count).map(move |position| self.at(position))
    }
}

/// Pieces of a file, in order.
#[derive(Clone, Debug)]
pub struct Extents<'a> {
    tree: &'a Tree,
    inode: Inode,
    next: u32,
    from: u64,
    to: u64,
}

impl Extents<'_> {
    /// Where piece `position` of the file begins, its frame, and where it begins in that.
    fn raw(&self, position: u32) -> Result<(u64, u32, u32), TreeError> {
        let out = TreeError::Bounds("extent", position.into());
        let number = self.inode.data_start.checked_add(position).ok_or(out)?;
        let bytes = self.tree.contents.get().ok_or(TreeError::Coming)?;
        let record = record(bytes, self.tree.layout.extents, number, EXTENT_BYTES, "extent")?;
        Ok((u64_at(record, 0), u32_at(record, 8), u32_at(record, 12)))
    }

    fn step(&mut self) -> Result<Option<Extent>, TreeError> {
        let position = self.next;
        if self.from >= self.to || position >= self.inode.data_count {
            // a file whose pieces end before its size would read short: damage
            return if self.from < self.to { Err(TreeError::Bounds("file end", self.to)) } else { Ok(None) };
        }
        let (start, frame, skip) = self.raw(position)?;
        let end = match position + 1 < self.inode.data_count {
            true => self.raw(position + 1)?.0,
            false => self.inode.size,
        };
        let out = TreeError::Bounds("extent", position.into());
        if start > self.from || end <= self.from {
            return Err(out);
        }
        let inside = self.from - start;
        let len = end.min(self.to) - self.from;
        let extent = match frame {
            HOLE => Extent { offset: self.from, len, frame: None, skip: 0 },
            frame => {
                let plain_len = u64::from(self.tree.frame(frame)?.1.frame.plain_len);
                let skip = u64::from(skip) + inside;
                if skip + len > plain_len {
                    return Err(out);
                }
                let skip = u32::try_from(skip).map_err(|_| out)?;
                Extent { offset: self.from, len, frame: Some(frame), skip }
            }
        };
        self.next = position + 1;
        self.from += len;
        Ok(Some(extent))
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent, TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            // say it once, then end
            self.from = self.to;
        }
        step.transpose()
    }
}
