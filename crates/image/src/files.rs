//! Bytes of an image's files, by way of the frames that they are in.

use std::num::NonZeroUsize;
use std::ops::Range;

use lamina_chunk::{Chunk, FrameId, Place};
use lru::LruCache;

use crate::{Ino, Tree, TreeError};

/// Frames held, each at most 256 KiB: 64 MiB. Who reads comes back to a frame soon, or not.
const HELD_FRAMES: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Why bytes of a file cannot be had.
#[derive(Debug)]
pub(crate) enum ReadError<E> {
    Tree(TreeError),
    Frame(E),
}

impl<E> From<TreeError> for ReadError<E> {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

/// Reads files of a tree.
#[derive(Debug)]
pub(crate) struct Files {
    tree: Tree,
    held: LruCache<u32, Chunk>,
}

impl Files {
    pub(crate) fn of(tree: &Tree) -> Self {
        Self { tree: tree.clone(), held: LruCache::new(HELD_FRAMES) }
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Gives up the frames that are held.
    pub(crate) fn let_go(&mut self) {
        self.held.clear();
    }

    /// Appends what a file has of these bytes. `open` gives the image's frames.
    pub(crate) fn read<E>(
        &mut self,
        ino: Ino,
        bytes: Range<u64>,
        open: &mut impl FnMut(FrameId, Place) -> Result<Chunk, E>,
        plain: &mut Vec<u8>,
    ) -> Result<(), ReadError<E>> {
        for extent in self.tree.extents(ino, bytes.start, bytes.end)? {
            let extent = extent?;
            let damaged = || TreeError::Bounds("extent", extent.offset);
            let len = usize::try_from(extent.len).map_err(|_| damaged())?;
            let Some(number) = extent.frame else {
                plain.resize(plain.len() + len, 0);
                continue;
            };
            if !self.held.contains(&number) {
                let (id, place) = self.tree.frame(number)?;
                self.held.put(number, open(id, place).map_err(ReadError::Frame)?);
            }
            let frame = self.held.get(&number).expect("just put").bytes();
            let skip = extent.skip as usize;
            plain.extend_from_slice(frame.get(skip..skip + len).ok_or_else(damaged)?);
        }
        Ok(())
    }
}
