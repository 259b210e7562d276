//! Paths of a profile: which are sound, what they name in a tree, and what a tree's inodes are called.

use super::PROFILE_ITEMS_MAX;
use crate::{FileKind, Ino, Tree, TreeError};

/// No longer path, as in Linux.
const PATH_BYTES_MAX: usize = 4096;
/// No longer part of one.
const NAME_BYTES_MAX: usize = 255;
/// Bytes of JSON that the names and directories, or the files, of a profile made here may have: 42,000 files with paths of 80
/// bytes have 3.5 MB.
const PATHS_JSON_BYTES_MAX: usize = 6 << 20;

/// What is left for a list of paths, so that the profile's JSON can be read again.
pub(crate) struct PathBudget {
    json_bytes: usize,
    items: usize,
}

impl PathBudget {
    pub(crate) fn full() -> Self {
        Self { json_bytes: PATHS_JSON_BYTES_MAX, items: PROFILE_ITEMS_MAX }
    }

    /// Whether there is room for one more path; if so, it is taken.
    pub(crate) fn take(&mut self, path: &str) -> bool {
        let escaped = path.bytes().filter(|byte| matches!(byte, 0..0x20 | b'"' | b'\\')).count();
        // quotes and a comma; an escape has at most six bytes
        let json_bytes = path.len() + 3 + 5 * escaped;
        let fits = self.items > 0 && json_bytes <= self.json_bytes;
        if fits {
            self.items -= 1;
            self.json_bytes -= json_bytes;
        }
        fits
    }
}

/// Whether a path stays within the image it is resolved in.
pub(crate) fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= PATH_BYTES_MAX
        && !path.contains('\0')
        && path.split('/').all(|part| !matches!(part, "" | "." | "..") && part.len() <= NAME_BYTES_MAX)
}

/// The inode at a path, links not followed.
pub(crate) fn find(tree: &Tree, path: &str) -> Result<Option<Ino>, TreeError> {
    let mut at = Ino::ROOT;
    for part in path.split('/') {
        if tree.inode(at)?.kind() != FileKind::Directory {
            return Ok(None);
        }
        match tree.lookup(at, part.as_bytes())? {
            Some(next) => at = next,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

/// The size of a regular file.
pub(crate) fn file_size(tree: &Tree, ino: Ino) -> Option<u64> {
    tree.inode(ino).ok().filter(|inode| inode.kind() == FileKind::Regular).map(|inode| inode.size)
}

/// Where each inode has its first name, in the order of the directories' numbers.
pub(super) struct Paths<'a>(Vec<Option<(Ino, &'a [u8])>>);

impl<'a> Paths<'a> {
    /// Reads all directories. Cost: one step a name, and half as much memory as the tree has.
    pub(super) fn of(tree: &'a Tree) -> Result<Self, TreeError> {
        let mut names = vec![None; tree.inodes() as usize];
        for dir in (0..tree.inodes()).map(Ino::from_index) {
            if tree.inode(dir)?.kind() != FileKind::Directory {
                continue;
            }
            for entry in tree.entries(dir)?.iter() {
                let entry = entry?;
                let index = entry.ino.index().and_then(|index| names.get_mut(index as usize));
                index.ok_or(TreeError::Bounds("inode", entry.ino.0))?.get_or_insert((dir, entry.name));
            }
        }
        Ok(Self(names))
    }

    /// An inode's path; the root's is empty. `None` for one that is not there, or whose path is too long or
    /// not UTF-8.
    pub(super) fn path(&self, ino: Ino) -> Option<String> {
        let (mut parts, mut bytes, mut at) = (Vec::new(), 0, ino);
        while at != Ino::ROOT {
            let (dir, name) = (*self.0.get(at.index()? as usize)?)?;
            bytes += name.len() + 1;
            // this also ends the walk where a damaged tree has a circle
            if bytes > PATH_BYTES_MAX + 1 {
                return None;
            }
            parts.push(std::str::from_utf8(name).ok()?);
            at = dir;
        }
        parts.reverse();
        Some(parts.join("/"))
    }
}
