//! Layers merged into one file system.
//!
//! Semantics are those of an unpacker that applies one layer after the other to a directory, as OCI image-spec
//! 1.1 (layer.md, "Applying Changesets") wants it: an entry replaces what was there, except that a directory over
//! a directory only changes its attributes; whiteouts hide what lower layers brought, never what their own layer
//! brings. Parents are resolved through symbolic links, which always stay inside the image's root.

mod resolve;

use std::collections::{BTreeMap, HashMap, HashSet};

use lamina_chunk::{FrameId, Place};

use crate::recipe::{Recipe, RecipeSource};
use crate::tar::{EntryKind, Piece, Segment, TarEntry, TarError, lossy, path_parts, read_tar};
use crate::tree::{FileKind, HOLE, TreeBuilder, TreeError};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that AUFS used for itself.
const RESERVED: &[u8] = b".wh..wh.";
/// Files and directories that layers bring, replaced ones included. Each takes some 300 bytes while layers are merged, and a tar
/// of a few MiB can name any number of directories: so one image costs at most 2.5 GiB of memory.
const NODES_MAX: usize = 8 << 20;

/// Why layers do not make a file system. Another try with the same layers will not help.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A layer's tar does not parse.
    #[error("layer {layer}: {error}")]
    Tar {
        /// Which, counted from 0, the lowest.
        layer: usize,
        /// What is wrong.
        #[source]
        error: TarError,
    },
    /// A layer's entry cannot be applied to what is below.
    #[error("layer {layer} has an entry {path:?} that {reason}")]
    Entry {
        /// Which, counted from 0, the lowest.
        layer: usize,
        /// The entry.
        path: String,
        /// Why not.
        reason: &'static str,
    },
    /// The result does not fit a tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Why a file is refused that is one too many.
const MANY: &str = "is one file more than an image may have";

/// Derives the flat tree of an image from the recipes of its layers, lowest first. The same recipes always give
/// the same bytes: that is how a registry checks a tree which somebody else made.
pub fn derive_tree(recipes: &[Recipe]) -> Result<Vec<u8>, MergeError> {
    merge(recipes, NODES_MAX)
}

fn merge(recipes: &[Recipe], nodes_max: usize) -> Result<Vec<u8>, MergeError> {
    let mut merge = Merge::new(nodes_max);
    for (layer, recipe) in recipes.iter().enumerate() {
        merge.layer = layer;
        merge.cleared.clear();
        let wrong = |error| MergeError::Tar { layer, error };
        let mut source = RecipeSource::new(recipe).map_err(wrong)?;
        let mut refused = None;
        let read = read_tar(&mut source, |entry| {
            merge.apply(entry, recipe).map_err(|error| {
                refused = Some(error);
                // stops the reader; the real reason is beside it
                TarError::Recipe(0)
            })
        });
        match (refused, read) {
            (Some(refused), _) => return Err(refused),
            (None, Err(error)) => return Err(wrong(error)),
            (None, Ok(())) => {}
        }
    }
    Ok(merge.encode()?)
}

type NodeId = usize;
const ROOT: NodeId = 0;

/// A name in a directory: what it names, and which layer put it there.
#[derive(Clone, Copy, Debug)]
struct Link {
    node: NodeId,
    layer: usize,
}

#[derive(Debug)]
enum Contents {
    Directory(BTreeMap<Box<[u8]>, Link>),
    File { size: u64, extents: Vec<(u64, u32, u32)> },
    Symlink(Vec<u8>),
    Special(FileKind, u32),
}

#[derive(Debug)]
struct Node {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime_s: i64,
    mtime_ns: u32,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    contents: Contents,
}

impl Node {
    /// A directory that no entry describes: root's, mode 755, from 1970.
    fn implied() -> Self {
        let contents = Contents::Directory(BTreeMap::new());
        Self { mode: 0o755, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0, xattrs: Vec::new(), contents }
    }
}

struct Merge {
    nodes: Vec<Node>,
    nodes_max: usize,
    layer: usize,
    frames: Vec<(FrameId, Place)>,
    numbers: HashMap<FrameId, u32>,
    /// Directories in which, at any depth, this layer has hidden what is below. What comes into them later is its own, so
    /// that hiding again would change nothing: a layer full of whiteouts costs one walk through the tree, not one each.
    cleared: HashSet<NodeId>,
}

impl Merge {
    fn new(nodes_max: usize) -> Self {
        Self {
            nodes: vec![Node::implied()],
            nodes_max,
            layer: 0,
            frames: Vec::new(),
            numbers: HashMap::new(),
            cleared: HashSet::new(),
        }
    }

    fn wrong(&self, path: &[u8], reason: &'static str) -> MergeError {
        MergeError::Entry { layer: self.layer, path: lossy(path), reason }
    }

    fn apply(&mut self, entry: TarEntry, recipe: &Recipe) -> Result<(), MergeError> {
        let path = entry.path.clone();
        let bad_name = |error| MergeError::Tar { layer: self.layer, error };
        let parts = path_parts(&path).map_err(bad_name)?;
        let Some((name, parents)) = parts.split_last() else {
            return self.apply_root(entry);
        };
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(&path, parents, name, hidden);
        }
        let parent = self.make_parents(&path, parents)?;
        let existing = self.child(parent, name);
        if let (EntryKind::Directory, Some(link)) = (&entry.kind, existing)
            && self.is_directory(link.node)
        {
            self.describe(link.node, entry);
            self.link(parent, name, link.node);
            return Ok(());
        }
        let node = match entry.kind {
            EntryKind::HardLink(ref target) => self.link_target(&path, target)?,
            _ => self.add(entry, recipe, &path)?,
        };
        self.link(parent, name, node);
        Ok(())
    }

    fn apply_root(&mut self, entry: TarEntry) -> Result<(), MergeError> {
        if entry.kind != EntryKind::Directory {
            return Err(self.wrong(&entry.path, "replaces the root by something else than a directory"));
        }
        self.describe(ROOT, entry);
        Ok(())
    }

    fn describe(&mut self, node: NodeId, entry: TarEntry) {
        let node = &mut self.nodes[node];
        (node.mode, node.uid, node.gid) = (entry.mode, entry.uid, entry.gid);
        (node.mtime_s, node.mtime_ns, node.xattrs) = (entry.mtime_s, entry.mtime_ns, entry.xattrs);
    }

    fn add(&mut self, entry: TarEntry, recipe: &Recipe, path: &[u8]) -> Result<NodeId, MergeError> {
        let contents = match &entry.kind {
            EntryKind::File { size, segments, pieces } => {
                let extents = self.extents(*size, segments, pieces, recipe);
                Contents::File { size: *size, extents }
            }
            EntryKind::Symlink(target) if target.is_empty() || target.len() > 4095 || target.contains(&0) => {
                return Err(self.wrong(path, "is a symbolic link to nothing that a path can name"));
            }
            EntryKind::Symlink(target) => Contents::Symlink(target.clone()),
            EntryKind::Directory => Contents::Directory(BTreeMap::new()),
            EntryKind::Special(kind, device) => Contents::Special(*kind, *device),
            EntryKind::HardLink(_) => unreachable!("links are not added but found"),
        };
        let id = self.new_node(contents).ok_or_else(|| self.wrong(path, MANY))?;
        self.describe(id, entry);
        Ok(id)
    }

    /// One more file or directory, without attributes; `None` where an image has enough.
    fn new_node(&mut self, contents: Contents) -> Option<NodeId> {
        if self.nodes.len() >= self.nodes_max {
            return None;
        }
        self.nodes.push(Node { contents, ..Node::implied() });
        Some(self.nodes.len() - 1)
    }

    /// Lays the stored pieces over the segments of a file; what no segment covers is a hole.
    fn extents(
        &mut self,
        size: u64,
        segments: &[Segment],
        pieces: &[Piece],
        recipe: &Recipe,
    ) -> Vec<(u64, u32, u32)> {
        let mut extents = Vec::with_capacity(pieces.len());
        let mut pieces = pieces.iter();
        let (mut number, mut used, mut left) = (0, 0, 0u32);
        let mut end = 0;
        for segment in segments {
            if segment.offset > end {
                extents.push((end, HOLE, 0));
            }
            let (mut at, mut missing) = (segment.offset, segment.len);
            while missing > 0 {
                if left == 0 {
                    let piece =
                        pieces.next().expect("the reader checked that segments add up to what is stored");
                    (number, used, left) = (self.number(recipe, piece.frame), piece.skip, piece.len);
                }
                extents.push((at, number, used));
                let part = u64::from(left).min(missing);
                let part32 = u32::try_from(part).expect("at most what is left of a piece");
                (used, left) = (used + part32, left - part32);
                (at, missing) = (at + part, missing - part);
            }
            end = at;
        }
        if end < size {
            extents.push((end, HOLE, 0));
        }
        extents
    }

    /// The image's number of a recipe's frame. Where two recipes know a frame, the place of the lower layer counts.
    fn number(&mut self, recipe: &Recipe, frame: u32) -> u32 {
        let (id, place) = recipe.frames()[frame as usize];
        *self.numbers.entry(id).or_insert_with(|| {
            self.frames.push((id, place));
            u32::try_from(self.frames.len() - 1).expect("tables are far below 2^32 frames")
        })
    }

    fn whiteout(
        &mut self,
        path: &[u8],
        parents: &[&[u8]],
        name: &[u8],
        hidden: &[u8],
    ) -> Result<(), MergeError> {
        let Some(parent) = self.find_directory(parents) else { return Ok(()) };
        if name == OPAQUE {
            self.hide_lower(parent);
            return Ok(());
        }
        if name.starts_with(RESERVED) {
            return Ok(());
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(self.wrong(path, "is a whiteout of nothing"));
        }
        let Some(link) = self.child(parent, hidden) else { return Ok(()) };
        if self.is_directory(link.node) {
            self.hide_lower(link.node);
        }
        let keeps = link.layer == self.layer || self.has_children(link.node);
        if !keeps {
            self.children_mut(parent).remove(hidden);
        }
        Ok(())
    }

    /// Removes what lower layers put into a directory, at any depth.
    fn hide_lower(&mut self, directory: NodeId) {
        if !self.cleared.insert(directory) {
            return;
        }
        // an explicit stack: a hostile layer may nest directories deeper than this thread's stack
        let mut order = vec![directory];
        let mut next = 0;
        while next < order.len() {
            let here = order[next];
            next += 1;
            let children: Vec<NodeId> = self.children(here).map(|(_, link)| link.node).collect();
            let below = children.into_iter().filter(|node| self.is_directory(*node));
            let below: Vec<NodeId> = below.filter(|node| !self.cleared.contains(node)).collect();
            self.cleared.extend(&below);
            order.extend(below);
        }
        for here in order.into_iter().rev() {
            let layer = self.layer;
            let kept: Vec<Box<[u8]>> = self
                .children(here)
                .filter(|(_, link)| link.layer != layer && !self.has_children(link.node))
                .map(|(name, _)| name.clone())
                .collect();
            for name in kept {
                self.children_mut(here).remove(&name);
            }
        }
    }

    fn encode(self) -> Result<Vec<u8>, TreeError> {
        let mut tree = TreeBuilder::new(self.frames);
        let mut numbers: Vec<Option<u32>> = vec![None; self.nodes.len()];
        let mut order = vec![(ROOT, ROOT)];
        numbers[ROOT] = Some(0);
        let mut next = 0;
        while next < order.len() {
            let (node, parent) = order[next];
            next += 1;
            let node = &self.nodes[node];
            let parent = numbers[parent].expect("parents come first");
            let data = match &node.contents {
                Contents::Directory(children) => {
                    let first = tree.begin_directory();
                    for (name, link) in children {
                        let child = &self.nodes[link.node];
                        let number = *numbers[link.node].get_or_insert_with(|| {
                            order.push((link.node, order[next - 1].0));
                            u32::try_from(order.len() - 1).unwrap_or(u32::MAX)
                        });
                        tree.entry(name, number, child.kind())?;
                    }
                    tree.end_directory(first)?
                }
                Contents::File { extents, .. } => tree.extents(extents)?,
                Contents::Symlink(target) => tree.name(target)?,
                Contents::Special(..) => (0, 0),
            };
            let (size, rdev) = match &node.contents {
                Contents::File { size, .. } => (*size, 0),
                Contents::Symlink(target) => (target.len() as u64, 0),
                Contents::Special(_, rdev) => (0, *rdev),
                Contents::Directory(_) => (0, 0),
            };
            tree.inode(crate::tree::NewInode {
                mode: node.kind().mode_bits() | node.mode,
                uid: node.uid,
                gid: node.gid,
                mtime_s: node.mtime_s,
                mtime_ns: node.mtime_ns,
                size,
                rdev,
                parent,
                data,
                xattrs: &node.xattrs,
            })?;
        }
        tree.finish()
    }
}

impl Node {
    fn kind(&self) -> FileKind {
        match &self.contents {
            Contents::Directory(_) => FileKind::Directory,
            Contents::File { .. } => FileKind::Regular,
            Contents::Symlink(_) => FileKind::Symlink,
            Contents::Special(kind, _) => *kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_of_too_many_files_is_refused_before_it_fills_the_memory() {
        let mut merge = Merge::new(4);
        let (path, parts) = (b"a/b/c/d", [&b"a"[..], b"b", b"c", b"d"]);
        merge.make_parents(path, &parts[..3]).expect("the root and three more");
        merge.make_parents(path, &parts[..3]).expect("they are there already");
        let error = merge.make_parents(path, &parts).expect_err("a fifth");
        assert_eq!(
            error.to_string(),
            "layer 0 has an entry \"a/b/c/d\" that is one file more than an image may have"
        );
        assert_eq!(merge.nodes.len(), 4);
    }
}
