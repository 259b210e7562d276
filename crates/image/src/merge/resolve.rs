//! Finding and making directories in the merged file system.

use std::collections::{BTreeMap, VecDeque};

use super::{Contents, Link, MANY, Merge, MergeError, NodeId, ROOT};
use crate::tar::path_parts;

/// As many symbolic links as Linux follows in one path (`MAXSYMLINKS`).
const SYMLINKS_MAX: usize = 40;

/// Where a walk ended.
enum Walk {
    Directory(NodeId),
    /// Here, at this name, with these parts still to go.
    Missing,
    Stuck(&'static str),
}

impl Merge {
    pub(super) fn is_directory(&self, node: NodeId) -> bool {
        matches!(self.nodes[node].contents, Contents::Directory(_))
    }

    pub(super) fn children(&self, node: NodeId) -> impl Iterator<Item = (&Box<[u8]>, &Link)> {
        let children = match &self.nodes[node].contents {
            Contents::Directory(children) => Some(children),
            _ => None,
        };
        children.into_iter().flatten()
    }

    pub(super) fn has_children(&self, node: NodeId) -> bool {
        self.children(node).next().is_some()
    }

    pub(super) fn children_mut(&mut self, node: NodeId) -> &mut BTreeMap<Box<[u8]>, Link> {
        match &mut self.nodes[node].contents {
            Contents::Directory(children) => children,
            other => panic!("{other:?} has no children"),
        }
    }

    pub(super) fn child(&self, node: NodeId, name: &[u8]) -> Option<Link> {
        match &self.nodes[node].contents {
            Contents::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    pub(super) fn link(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let layer = self.layer;
        self.children_mut(parent).insert(name.into(), Link { node, layer });
    }

    /// The directory at a path, made where it is missing.
    pub(super) fn make_parents(&mut self, path: &[u8], parts: &[&[u8]]) -> Result<NodeId, MergeError> {
        match self.walk(parts, true) {
            Walk::Directory(node) => Ok(node),
            Walk::Missing => unreachable!("what is missing was made"),
            Walk::Stuck(reason) => Err(self.wrong(path, reason)),
        }
    }

    /// The directory at a path, if there is one.
    pub(super) fn find_directory(&mut self, parts: &[&[u8]]) -> Option<NodeId> {
        match self.walk(parts, false) {
            Walk::Directory(node) => Some(node),
            Walk::Missing | Walk::Stuck(_) => None,
        }
    }

    /// What a hard link points at: any file, but no directory. The last part is not followed.
    pub(super) fn link_target(&mut self, path: &[u8], target: &[u8]) -> Result<NodeId, MergeError> {
        let parts = path_parts(target).map_err(|error| MergeError::Tar { layer: self.layer, error })?;
        let missing = "is a hard link to something that is not there";
        let Some((name, parents)) = parts.split_last() else { return Err(self.wrong(path, missing)) };
        let parent = self.find_directory(parents).ok_or_else(|| self.wrong(path, missing))?;
        let found = self.child(parent, name).ok_or_else(|| self.wrong(path, missing))?;
        if self.is_directory(found.node) {
            return Err(self.wrong(path, "is a hard link to a directory"));
        }
        Ok(found.node)
    }

    /// Follows a path from the root, through symbolic links that stay inside it, as openat2(2) does with
    /// `RESOLVE_IN_ROOT`.
    fn walk(&mut self, parts: &[&[u8]], make: bool) -> Walk {
        let mut todo: VecDeque<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        let mut here = vec![ROOT];
        let mut symlinks = 0;
        while let Some(part) = todo.pop_front() {
            let current = *here.last().expect("the root never leaves");
            if part == b".." {
                here.truncate((here.len() - 1).max(1));
                continue;
            }
            let Some(link) = self.child(current, &part) else {
                if !make {
                    return Walk::Missing;
                }
                let Some(node) = self.new_node(Contents::Directory(BTreeMap::new())) else {
                    return Walk::Stuck(MANY);
                };
                self.link(current, &part, node);
                here.push(node);
                continue;
            };
            match &self.nodes[link.node].contents {
                Contents::Directory(_) => here.push(link.node),
                Contents::Symlink(target) => {
                    symlinks += 1;
                    if symlinks > SYMLINKS_MAX {
                        return Walk::Stuck("lies behind too many symbolic links");
                    }
                    if target.starts_with(b"/") {
                        here.truncate(1);
                    }
                    let parts = target.split(|byte| *byte == b'/');
                    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
                    for part in parts.rev().map(<[u8]>::to_vec) {
                        todo.push_front(part);
                    }
                }
                _ => return Walk::Stuck("lies below something that is not a directory"),
            }
        }
        Walk::Directory(*here.last().expect("the root never leaves"))
    }
}
