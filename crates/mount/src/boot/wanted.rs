//! A part of a directory: the entries that a start looks up. Only the boot itself can list it.
//!
//! An entry of a listing with attributes makes its name known to the kernel as a lookup does (fs/fuse/readdir.c,
//! `fuse_direntplus_link`), so what a start wants of a directory takes a request for some 400 names, and before Linux 6.16 for some 25,
//! in the place of one for each. The listing
//! begins at a position that no directory has: the kernel keeps for others only what it was given from the beginning on (the same file,
//! `fuse_add_dirent_to_cache`). Names that are not there have no entry, and are looked up.

use std::os::fd::OwnedFd;

use lamina_image::{Ino, Tree};
use parking_lot::Mutex;
use rustix::fs::{OFlags, SeekFrom, seek};

use super::Boot;
use super::names::{inside, listed, open_inside, split};

/// Where it begins: behind what any directory has.
const BEGINNING: u64 = 1 << 62;

/// What is wanted now.
#[derive(Default)]
pub(super) struct Wanted(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    dir: Option<Ino>,
    entries: Vec<(String, Ino)>,
}

impl Boot {
    /// Calls `take` with the entries that are wanted of `dir`, and the position after each, until it says that it has enough. False where
    /// `from` is no position of such a listing, or another directory is listed.
    pub(crate) fn list_wanted(
        &self,
        dir: Ino,
        from: u64,
        mut take: impl FnMut(&str, Ino, u64) -> bool,
    ) -> bool {
        let Some(skip) = from.checked_sub(BEGINNING) else { return false };
        let wanted = self.wanted.0.lock();
        if wanted.dir != Some(dir) {
            return false;
        }
        let skip = usize::try_from(skip).unwrap_or(usize::MAX);
        for ((name, ino), next) in wanted.entries.iter().skip(skip).zip(from + 1..) {
            if take(name, *ino, next) {
                break;
            }
        }
        true
    }

    /// Has the kernel know those of `paths` that are there, all of them in the directory `dir`. Calls `known` with each that it knows
    /// then. *Errors*: fewer are known than there are.
    pub(super) fn make_wanted_known<'a>(
        &self,
        (root, tree): (&OwnedFd, &Tree),
        dir: &str,
        paths: &[&'a str],
        mut known: impl FnMut(&'a str, Ino),
    ) -> rustix::io::Result<()> {
        let Some(ino) = inside(tree, dir) else { return Ok(()) };
        let is_there = |path: &&'a str| Some((*path, tree.lookup(ino, split(path).1.as_bytes()).ok()??));
        let there: Vec<(&str, Ino)> = paths.iter().filter_map(is_there).collect();
        // one is as well looked up
        if there.len() < 2 {
            return Ok(());
        }
        let opened = open_inside(root, dir, OFlags::DIRECTORY)?;
        seek(&opened, SeekFrom::Start(BEGINNING))?;
        let entries = there.iter().map(|(path, ino)| (split(path).1.to_owned(), *ino)).collect();
        *self.wanted.0.lock() = Entries { dir: Some(ino), entries };
        let mut all = there.into_iter();
        let done = listed(opened, |entry| {
            // they come in this order, and none is left out
            if let Some((path, ino)) = all.next().filter(|(_, ino)| ino.0 == entry.ino()) {
                known(path, ino);
            }
            // the kernel need not ask whether there are more
            all.len() > 0
        });
        *self.wanted.0.lock() = Entries::default();
        done
    }
}
