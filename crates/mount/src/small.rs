//! Small files, by the frame that holds them: neighbours were cut one after the other and are sealed together.

use lamina_image::{FileKind, Ino, Tree};

/// A file of so many bytes is recorded, and handed out, whole.
pub(crate) const SMALL_FILE_BYTES: u64 = 64 << 10;

/// The small files that lie in one frame each. 8 bytes a file.
pub(crate) struct SmallFiles(Vec<(u32, u32)>);

impl SmallFiles {
    /// Finds them. Cost: about 100 ns an inode.
    pub(crate) fn of(tree: &Tree) -> Self {
        let mut by_frame: Vec<(u32, u32)> = (0..tree.inodes())
            .filter_map(|index| Some((frame_of(tree, Ino::from_index(index))?, index)))
            .collect();
        by_frame.sort_unstable();
        by_frame.shrink_to_fit();
        Self(by_frame)
    }

    /// Those in a frame, in the order of their inodes.
    pub(crate) fn in_frame(&self, frame: u32) -> impl Iterator<Item = Ino> {
        let first = self.0.partition_point(|(of, _)| *of < frame);
        self.0[first..]
            .iter()
            .take_while(move |(of, _)| *of == frame)
            .map(|(_, index)| Ino::from_index(*index))
    }
}

/// The frame that holds all of a small file. A damaged tree is found, and told, by reading.
fn frame_of(tree: &Tree, ino: Ino) -> Option<u32> {
    let inode = tree.inode(ino).ok()?;
    if inode.kind() != FileKind::Regular || !(1..=SMALL_FILE_BYTES).contains(&inode.size) {
        return None;
    }
    let first = tree.extents(ino, 0, inode.size).ok()?.next()?.ok()?;
    first.frame.filter(|_| first.len == inode.size)
}
