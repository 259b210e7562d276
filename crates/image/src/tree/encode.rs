//! Writing a flat tree.

use std::collections::HashMap;

use lamina_chunk::{FrameId, Place};

use super::inode::{FileKind, Inode};
use super::layout::{Counts, HEADER_BYTES, Layout, NO_XATTRS};
use super::{TREE_BYTES_MAX, TreeError};
use crate::recipe::PackNumbers;

/// The attributes of an inode that is being written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewInode<'a> {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_s: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) size: u64,
    pub(crate) rdev: u32,
    pub(crate) parent: u32,
    /// Where its entries, extents or target stand: what the builder answered when it took them.
    pub(crate) data: (u32, u32),
    pub(crate) xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// Collects the sections of a tree. Inodes come in the order of their numbers, and the entries of each directory
/// sorted by name.
#[derive(Debug)]
pub(crate) struct TreeBuilder {
    inodes: Vec<Inode>,
    entries: Vec<(u32, u32, u16, FileKind)>,
    extents: Vec<(u64, u32, u32)>,
    /// The frames on offer, and under which number each is used so far.
    offered: Vec<(FrameId, Place)>,
    used: Vec<Option<u32>>,
    frames: Vec<(FrameId, Place)>,
    xattrs: Vec<u8>,
    xattr_sets: HashMap<Vec<u8>, u32>,
    names: Vec<u8>,
    name_spans: HashMap<Box<[u8]>, u32>,
    file_bytes: u64,
}

impl TreeBuilder {
    /// A builder for files made of these frames. Only those that are really used come into the tree.
    pub(crate) fn new(offered: Vec<(FrameId, Place)>) -> Self {
        Self {
            inodes: Vec::new(),
            entries: Vec::new(),
            extents: Vec::new(),
            used: vec![None; offered.len()],
            offered,
            frames: Vec::new(),
            xattrs: Vec::new(),
            xattr_sets: HashMap::new(),
            names: Vec::new(),
            name_spans: HashMap::new(),
            file_bytes: 0,
        }
    }

    pub(crate) fn begin_directory(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn entry(&mut self, name: &[u8], ino: u32, kind: FileKind) -> Result<(), TreeError> {
        let (start, len) = self.name(name)?;
        let len = u16::try_from(len).map_err(|_| TreeError::TooLarge("a name"))?;
        self.entries.push((start, ino, len, kind));
        Ok(())
    }

    pub(crate) fn end_directory(&self, first: usize) -> Result<(u32, u32), TreeError> {
        Ok((small(first, "its entries")?, small(self.entries.len() - first, "its entries")?))
    }

    /// Takes a name or a symbolic link's target. Equal ones are stored once.
    pub(crate) fn name(&mut self, name: &[u8]) -> Result<(u32, u32), TreeError> {
        let len = small(name.len(), "a name")?;
        if let Some(start) = self.name_spans.get(name) {
            return Ok((*start, len));
        }
        let start = small(self.names.len(), "its names")?;
        self.names.extend_from_slice(name);
        self.name_spans.insert(name.into(), start);
        Ok((start, len))
    }

    /// Takes the pieces of a file: offset in the file, number of the frame on offer, bytes to skip in it.
    pub(crate) fn extents(&mut self, pieces: &[(u64, u32, u32)]) -> Result<(u32, u32), TreeError> {
        let start = small(self.extents.len(), "its extents")?;
        for (offset, offered, skip) in pieces {
            let number = match *offered {
                super::HOLE => super::HOLE,
                offered => *self.used[offered as usize].get_or_insert_with(|| {
                    self.frames.push(self.offered[offered as usize]);
                    u32::try_from(self.frames.len() - 1).expect("as many as are on offer")
                }),
            };
            self.extents.push((*offset, number, *skip));
        }
        Ok((start, small(pieces.len(), "its extents")?))
    }

    pub(crate) fn inode(&mut self, new: NewInode<'_>) -> Result<(), TreeError> {
        let xattrs = self.xattr_set(new.xattrs)?;
        if FileKind::of_mode(new.mode) == Some(FileKind::Regular) {
            self.file_bytes = self.file_bytes.saturating_add(new.size);
        }
        self.inodes.push(Inode {
            mode: new.mode,
            uid: new.uid,
            gid: new.gid,
            nlink: 0,
            size: new.size,
            mtime_s: new.mtime_s,
            mtime_ns: new.mtime_ns,
            rdev: new.rdev,
            data_start: new.data.0,
            data_count: new.data.1,
            xattrs,
            parent: new.parent,
        });
        Ok(())
    }

    fn xattr_set(&mut self, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<u32, TreeError> {
        if xattrs.is_empty() {
            return Ok(NO_XATTRS);
        }
        let large = TreeError::TooLarge("its extended attributes");
        let short = |len: usize| u16::try_from(len).map_err(|_| large);
        let mut set = short(xattrs.len())?.to_le_bytes().to_vec();
        for (name, value) in xattrs {
            set.extend_from_slice(&short(name.len())?.to_le_bytes());
            set.extend_from_slice(&small(value.len(), "an extended attribute")?.to_le_bytes());
            set.extend_from_slice(name);
            set.extend_from_slice(value);
        }
        if let Some(start) = self.xattr_sets.get(&set) {
            return Ok(*start);
        }
        let start = small(self.xattrs.len(), "its extended attributes")?;
        self.xattrs.extend_from_slice(&set);
        self.xattr_sets.insert(set, start);
        Ok(start)
    }

    /// Counts the links and writes all sections.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>, TreeError> {
        self.count_links();
        let mut packs = PackNumbers::default();
        let places: Vec<[u32; 4]> = self
            .frames
            .iter()
            .map(|(_, place)| {
                let frame = place.frame;
                [packs.number(place.pack), frame.offset, frame.sealed_len, frame.plain_len]
            })
            .collect();
        let counts = Counts {
            inodes: small(self.inodes.len(), "its inodes")?,
            entries: small(self.entries.len(), "its entries")?,
            extents: small(self.extents.len(), "its extents")?,
            frames: small(self.frames.len(), "its frames")?,
            packs: small(packs.packs.len(), "its packs")?,
            xattr_bytes: small(self.xattrs.len(), "its extended attributes")?,
            name_bytes: small(self.names.len(), "its names")?,
        };
        let layout = Layout::of(counts, self.file_bytes);
        if layout.len as u64 > TREE_BYTES_MAX {
            return Err(TreeError::TooLarge("its length"));
        }
        let mut flat = Vec::with_capacity(layout.len);
        flat.extend_from_slice(&layout.header());
        debug_assert_eq!(flat.len(), HEADER_BYTES);
        self.inodes.iter().for_each(|inode| flat.extend_from_slice(&inode.write()));
        pad(&mut flat);
        for (name, ino, len, kind) in &self.entries {
            flat.extend_from_slice(&name.to_le_bytes());
            flat.extend_from_slice(&ino.to_le_bytes());
            flat.extend_from_slice(&len.to_le_bytes());
            flat.extend_from_slice(&[kind.code(), 0]);
        }
        pad(&mut flat);
        for (offset, frame, skip) in &self.extents {
            flat.extend_from_slice(&offset.to_le_bytes());
            flat.extend_from_slice(&frame.to_le_bytes());
            flat.extend_from_slice(&skip.to_le_bytes());
        }
        self.frames.iter().for_each(|(id, _)| flat.extend_from_slice(id.as_bytes()));
        places.iter().flatten().for_each(|word| flat.extend_from_slice(&word.to_le_bytes()));
        packs.packs.iter().for_each(|pack| flat.extend_from_slice(pack.as_bytes()));
        flat.extend_from_slice(&self.xattrs);
        pad(&mut flat);
        flat.extend_from_slice(&self.names);
        pad(&mut flat);
        assert_eq!(flat.len(), layout.len, "sections are written as they are laid out");
        Ok(flat)
    }

    /// Names of files; for directories 2 and one for each directory inside.
    fn count_links(&mut self) {
        self.inodes[0].nlink = 2;
        for index in 0..self.inodes.len() {
            let inode = self.inodes[index];
            if inode.kind() != FileKind::Directory {
                continue;
            }
            let entries = inode.data_start as usize..(inode.data_start + inode.data_count) as usize;
            for (_, child, _, kind) in &self.entries[entries] {
                let child = &mut self.inodes[*child as usize];
                if *kind == FileKind::Directory {
                    child.nlink = 2;
                } else {
                    child.nlink = child.nlink.saturating_add(1);
                }
            }
        }
        for index in 0..self.inodes.len() {
            let inode = self.inodes[index];
            if inode.kind() == FileKind::Directory && index != 0 {
                let parent = &mut self.inodes[inode.parent as usize];
                parent.nlink = parent.nlink.saturating_add(1);
            }
        }
    }
}

fn pad(flat: &mut Vec<u8>) {
    flat.resize(flat.len().next_multiple_of(8), 0);
}

fn small(len: usize, what: &'static str) -> Result<u32, TreeError> {
    // the highest number stands for a hole and for no attributes
    u32::try_from(len).ok().filter(|len| *len < u32::MAX).ok_or(TreeError::TooLarge(what))
}
