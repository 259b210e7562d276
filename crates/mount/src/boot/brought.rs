//! A directory of all files that a boot pack has pages of. Only the boot itself finds it.
//!
//! The kernel takes pages only for inodes that it knows, and it learns of these by name: one request for each, and one for each
//! directory on the way, while the program that starts sends its own. But an entry of a listing with attributes makes an inode known as
//! well, whatever its directory is (fs/fuse/readdir.c, `fuse_direntplus_link`): so some 400 files take one request. A file may have any
//! number of names, so its own, when it is looked up, leads to the same inode. Directories may have one, and are not here.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;

use fuser::{INodeNo, Notifier};
use lamina_image::{Ino, Tree};
use rustix::fs::{OFlags, fstat};

use super::Boot;
use super::known::Known;
use super::names::{listed, open_inside};
use crate::metrics::{Counters, one};

/// The inode of that directory, which is none of a tree's: these are 32 bits long.
pub(crate) const BROUGHT: Ino = Ino(1 << 62);
/// What the boot calls it, in the root directory.
pub(super) const BROUGHT_NAME: &str = ".lamina-boot";

/// Whether this is the name of that directory, which an image that has such a name is without.
pub(crate) fn is_brought(tree: &Tree, parent: Ino, name: &OsStr) -> bool {
    let is_it = parent == Ino::ROOT && name == BROUGHT_NAME;
    is_it && matches!(tree.lookup(parent, BROUGHT_NAME.as_bytes()), Ok(None))
}

impl Boot {
    /// The files that the boot pack has pages of, each once, in the order in which they are needed; from position `from` on.
    pub(crate) fn brought(&self, from: u64) -> &[Ino] {
        let all = self.coming.get().map_or(&[][..], |coming| &coming.order);
        usize::try_from(from).ok().and_then(|from| all.get(from..)).unwrap_or_default()
    }

    /// What a name in it leads to: a position, from 1 on.
    pub(crate) fn brought_as(&self, name: &OsStr) -> Option<Ino> {
        let position: usize = name.to_str()?.parse().ok()?;
        let ino = self.coming.get()?.order.get(position.checked_sub(1)?).copied();
        ino.filter(|_| name == OsStr::new(&position.to_string()))
    }

    /// Has the kernel forget the directory, and the names in it: once every file is known by a name of its own. Those that are not would be
    /// forgotten with what was stored of them.
    pub(crate) fn hide_brought(notifier: &Notifier) {
        let _ = notifier.inval_entry(INodeNo::ROOT, OsStr::new(BROUGHT_NAME));
    }
}

/// Has the kernel know the inodes of all files of a boot pack, if it has that directory. `root` is the mount's. *Errors*: fewer are known
/// than there are.
pub(super) fn make_known(root: &OwnedFd, known: &Known, counters: &Counters) -> rustix::io::Result<bool> {
    let opened = open_inside(root, BROUGHT_NAME, OFlags::DIRECTORY)?;
    if fstat(&opened)?.st_ino != BROUGHT.0 {
        return Ok(false);
    }
    listed(opened, |entry| {
        known.add(Ino(entry.ino()));
        one(&counters.boot_files);
        true
    })?;
    Ok(true)
}
