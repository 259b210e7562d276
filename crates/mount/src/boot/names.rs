//! The names of a boot pack, made known to the kernel through the mount, and their inodes with them.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lamina_image::{FileKind, Ino, Tree};
use parking_lot::MutexGuard;
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RawDir, RawDirEntry, ResolveFlags, Stat, fstat, openat, openat2, readlinkat,
    stat, statat,
};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tracing::{debug, trace};

use super::brought::make_known;
use super::crew::{spawn, step_back};
use super::known::{Finishing, Known};
use super::run::Booting;
use super::{Boot, Listing};
use crate::metrics::{Counters, one};

/// The kernel learns at the first opening whether it is to ask at each (not of a passthrough mount, where it is), and at the first
/// closing the same. A file that is opened first, so that no program waits for this, is too small to be opened past the node.
const OPENED_FIRST_MAX: u64 = 64 << 10;
/// Of a directory's entries, at once: some 500.
const LISTED_BYTES: usize = 64 << 10;
/// A directory that is to be listed is listed before its names where it has no more entries for each name that is wanted there: a program
/// that lists it as well asks for nothing then. An entry takes 4 µs, and a request 70, so pages wait little longer for their names.
const ENTRIES_FOR_A_NAME: u32 = 8;
/// For fewer names nothing is gained.
const NAMES_MIN: u32 = 4;

impl Booting<'_> {
    /// Has the kernel know all files of the boot pack, then the names, found or not, and links: that is when what is returned ends. Then
    /// lists the directories, which the kernel keeps as well; but those of which much is wanted before their names.
    pub(super) fn look_up(
        &self,
        names: Vec<String>,
        mut dirs: Vec<String>,
        known: &Arc<Known>,
    ) -> oneshot::Receiver<Infallible> {
        let (naming, named) = oneshot::channel();
        let (tree, path, counters) =
            (self.tree.clone(), self.mountpoint.to_owned(), Arc::clone(self.counters));
        let (boot, known, notifier) = (Arc::clone(self.boot), Arc::clone(known), self.notifier.clone());
        // not behind programs: these look up the same names, and wait for whoever was first
        spawn_blocking(move || {
            let asking = Asking::begin(&boot.asker);
            let finishing = Finishing(&known);
            let first = listed_first(&tree, &names, &dirs);
            dirs.retain(|dir| !first.contains(dir));
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let Ok(root) = openat(CWD, &path, flags, Mode::empty()) else { return };
            // no page waits for names then
            let brought = make_known(&root, &known, &counters);
            if let Err(error) = &brought {
                debug!(%error, "files become known by their names");
            }
            let asker = Asker { root: &root, tree: &tree, boot: &boot, known: &known, counters: &counters };
            asker.name_all(&names, first);
            if brought.is_ok_and(|brought| brought) {
                Boot::hide_brought(&notifier);
            }
            // neither pages nor the boot's end wait for a listing
            drop(finishing);
            boot.begin_listing(root);
            drop((asking, naming));
            list_behind(boot, path, dirs, counters);
        });
        named
    }
}

/// Makes names known, through the mount.
struct Asker<'a> {
    root: &'a OwnedFd,
    tree: &'a Tree,
    boot: &'a Boot,
    known: &'a Known,
    counters: &'a Counters,
}

impl Asker<'_> {
    /// Has the kernel know all of these, found or not, in this order, but those of one directory together; and what `first` has listed.
    fn name_all(&self, paths: &[String], mut first: HashSet<String>) {
        let (mut of_dirs, mut named, mut opened) = (by_directory(paths), HashMap::new(), false);
        for path in paths {
            let (dir, _) = split(path);
            let together = of_dirs.remove(dir).unwrap_or_default();
            if first.remove(dir) {
                counted(list(self.root, dir), dir, self.counters);
            } else {
                let done =
                    self.boot.make_wanted_known((self.root, self.tree), dir, &together, |path, ino| {
                        self.known.add(ino);
                        named.insert(path, ino);
                    });
                if let Err(error) = done {
                    debug!(%error, dir, "names become known one by one");
                }
            }
            let found = named.get(path.as_str()).copied().or_else(|| self.look_up(path));
            match found.and_then(|ino| self.tree.inode(ino).ok()) {
                Some(link) if link.kind() == FileKind::Symlink => {
                    drop(readlinkat(self.root, path, Vec::new()));
                }
                Some(file) if file.kind() == FileKind::Regular && !opened && file.size < OPENED_FIRST_MAX => {
                    opened = open_inside(self.root, path, OFlags::empty()).is_ok();
                }
                _ => {}
            }
            one(&self.counters.boot_names);
        }
    }

    /// One by itself. That one is not there is known afterwards as well.
    fn look_up(&self, path: &str) -> Option<Ino> {
        let ino = Ino(statat(self.root, path, AtFlags::SYMLINK_NOFOLLOW).ok()?.st_ino);
        self.known.add(ino);
        Some(ino)
    }
}

/// Lists directories behind programs, which may have listed them before.
fn list_behind(boot: Arc<Boot>, mountpoint: PathBuf, dirs: Vec<String>, counters: Arc<Counters>) {
    if dirs.is_empty() {
        return drop(boot.end_listing());
    }
    let listing = Arc::clone(&boot);
    let listed = spawn(move || {
        step_back();
        let _asking = Asking::begin(&listing.asker);
        listing.list(&mountpoint, &dirs, &counters);
    });
    if listed.is_err() {
        drop(boot.end_listing());
    }
}

/// Those of the directories that are to be listed of which so much is wanted that they are listed first.
fn listed_first(tree: &Tree, names: &[String], dirs: &[String]) -> HashSet<String> {
    let mut counts: HashMap<&str, u32> = dirs.iter().map(|dir| (dir.as_str(), 0)).collect();
    for name in names {
        counts.entry(split(name).0).and_modify(|count| *count += 1);
    }
    let is_cheap = |dir: &str, count: u32| {
        entries(tree, dir).is_some_and(|entries| entries <= count * ENTRIES_FOR_A_NAME)
    };
    let cheap = counts.into_iter().filter(|(dir, count)| *count >= NAMES_MIN && is_cheap(dir, *count));
    cheap.map(|(dir, _)| dir.to_owned()).collect()
}

/// All names of each directory.
fn by_directory(names: &[String]) -> HashMap<&str, Vec<&str>> {
    let mut all = HashMap::<&str, Vec<&str>>::new();
    for name in names {
        all.entry(split(name).0).or_default().push(name);
    }
    all
}

/// How many entries a directory has; `None` where it is none, or is reached by a link.
fn entries(tree: &Tree, path: &str) -> Option<u32> {
    Some(tree.entries(inside(tree, path)?).ok()?.len())
}

/// What a path leads to, by no link.
pub(super) fn inside(tree: &Tree, path: &str) -> Option<Ino> {
    let mut names = path.split('/').filter(|name| *name != ".");
    names.try_fold(Ino::ROOT, |dir, name| tree.lookup(dir, name.as_bytes()).ok()?)
}

/// The path before the last name, and that.
pub(super) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or((".", path))
}

impl Boot {
    /// Directories will be listed below the mount's root, unless that was ended before it has begun.
    fn begin_listing(&self, root: OwnedFd) {
        let mut listing = self.listing.lock();
        if matches!(*listing, Listing::NotYet) {
            *listing = Listing::Below(root);
        }
    }

    /// Lists them, until [`Boot::end_listing`], or until the root is not what is mounted any more.
    fn list(&self, mountpoint: &Path, dirs: &[String], counters: &Counters) {
        let device = |found: rustix::io::Result<Stat>| found.ok().map(|stat| stat.st_dev);
        for dir in dirs {
            let listing = self.listing.lock();
            let Listing::Below(root) = &*listing else { return };
            if device(stat(mountpoint)) != device(fstat(root)) {
                break;
            }
            let done = open_inside(root, dir, OFlags::DIRECTORY);
            counted(done.and_then(|opened| listed(opened, |_| !self.is_ending())), dir, counters);
            // who waits for the end waits for one request
            MutexGuard::unlock_fair(listing);
        }
        drop(self.end_listing());
    }
}

/// Counts a listing that has succeeded.
fn counted(listed: rustix::io::Result<()>, dir: &str, counters: &Counters) {
    if listed.is_ok() {
        trace!(dir, "listed");
        one(&counters.boot_dirs);
    }
}

/// Opens something below `root` for reading. A boot pack's word leads out of the mount by no link and no other mount.
pub(super) fn open_inside(root: &OwnedFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(root, path, OFlags::RDONLY | OFlags::CLOEXEC | flags, Mode::empty(), inside)
}

/// Has the kernel read a directory below `root`, all of it.
fn list(root: &OwnedFd, dir: &str) -> rustix::io::Result<()> {
    listed(open_inside(root, dir, OFlags::DIRECTORY)?, |_| true)
}

/// The same with one that is open, as long as `each` wants more of its entries.
pub(super) fn listed(
    opened: OwnedFd,
    mut each: impl FnMut(RawDirEntry<'_>) -> bool,
) -> rustix::io::Result<()> {
    // as much as the kernel asks for at once: from Linux 6.16 on a request fills the buffer that the entries are for, before a page
    // (fs/fuse/readdir.c)
    let mut buffer = Vec::with_capacity(LISTED_BYTES);
    let mut entries = RawDir::new(opened, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        if !each(entry?) {
            break;
        }
    }
    Ok(())
}

/// Says that this thread asks for the boot, as long as it lives.
pub(super) struct Asking<'a>(&'a AtomicU32, u32);

impl<'a> Asking<'a> {
    pub(super) fn begin(asker: &'a AtomicU32) -> Self {
        let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        asker.store(thread, Ordering::Relaxed);
        Self(asker, thread)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        // another may have begun meanwhile
        let _ = self.0.compare_exchange(self.1, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}
