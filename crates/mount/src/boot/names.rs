//! The names of a boot pack, looked up through the mount, so that the kernel knows them and their inodes.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::INodeNo;
use lamina_image::{Ino, Tree};
use parking_lot::MutexGuard;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat, fstat, openat, openat2, readlinkat,
    stat, statat,
};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tracing::{debug, trace};

use super::brought::make_known;
use super::known::{Finishing, Known};
use super::run::Booting;
use super::{BROUGHT_NAME, Boot, Listing};
use crate::metrics::{Counters, one};

/// The kernel learns at the first opening whether it is to ask at each (not of a passthrough mount, where it is), and at the first
/// closing the same. A file that is opened first, so that no program waits for this, is too small to be opened past the node.
const OPENED_FIRST_MAX: i64 = 64 << 10;
/// Of a directory's entries, at once: some 500.
const LISTED_BYTES: usize = 64 << 10;
/// A listing of no more entries for each name that is wanted there is done in the place of looking these up. An entry takes 4 µs; a name
/// that is looked up 25 where nothing else runs, most of them for waking who answers and who asked, and more where a program does.
const ENTRIES_FOR_A_NAME: u32 = 8;
/// For fewer names nothing is gained.
const NAMES_MIN: u32 = 4;

impl Booting<'_> {
    /// Has the kernel know all files of the boot pack, then looks names up through the mount, found or not, and reads links: the kernel then
    /// knows these as well. That is when what is returned ends. Then lists the directories, which the kernel keeps as well; but those of which much is wanted before their names.
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
            let _asking = Asking::begin(&boot);
            let finishing = Finishing(&known);
            let mut first = listed_first(&tree, &names);
            dirs.retain(|dir| !first.contains(dir));
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let Ok(root) = openat(CWD, &path, flags, Mode::empty()) else { return };
            // no page waits for names then
            let brought = make_known(&root, &known, &counters);
            if let Err(error) = &brought {
                debug!(%error, "files become known by their names");
            }
            let mut opened = false;
            for name in &names {
                let dir = directory_of(name);
                if first.remove(dir) {
                    counted(list(&root, dir), dir, &counters);
                }
                // a name that is not there is known not to be there afterwards
                if let Ok(found) = statat(&root, name, AtFlags::SYMLINK_NOFOLLOW) {
                    known.add(Ino(found.st_ino));
                    match FileType::from_raw_mode(found.st_mode) {
                        FileType::Symlink => drop(readlinkat(&root, name, Vec::new())),
                        FileType::RegularFile if !opened && found.st_size < OPENED_FIRST_MAX => {
                            opened = open_inside(&root, name, OFlags::empty()).is_ok();
                        }
                        _ => {}
                    }
                }
                one(&counters.boot_names);
            }
            // every file is known by a name of its own now
            if brought.is_ok_and(|brought| brought) {
                let _ = notifier.inval_entry(INodeNo::ROOT, OsStr::new(BROUGHT_NAME));
            }
            // neither pages nor the boot's end wait for a listing
            drop(finishing);
            boot.begin_listing(root);
            drop(naming);
            boot.list(&path, &dirs, &counters);
        });
        named
    }
}

/// The directories whose listing gives the kernel what else would have to be looked up name by name.
fn listed_first(tree: &Tree, names: &[String]) -> HashSet<String> {
    let mut wanted: HashMap<&str, u32> = HashMap::new();
    for name in names {
        *wanted.entry(directory_of(name)).or_default() += 1;
    }
    let is_cheap = |dir: &str, names: u32| {
        entries(tree, dir).is_some_and(|entries| entries <= names * ENTRIES_FOR_A_NAME)
    };
    let cheap = wanted.into_iter().filter(|(dir, names)| *names >= NAMES_MIN && is_cheap(dir, *names));
    cheap.map(|(dir, _)| dir.to_owned()).collect()
}

/// How many entries a directory has; `None` where it is none, or is reached by a link.
fn entries(tree: &Tree, path: &str) -> Option<u32> {
    let mut names = path.split('/').filter(|name| *name != ".");
    let dir = names.try_fold(Ino::ROOT, |dir, name| tree.lookup(dir, name.as_bytes()).ok()?)?;
    Some(tree.entries(dir).ok()?.len())
}

/// The path before the last name.
fn directory_of(name: &str) -> &str {
    name.rsplit_once('/').map_or(".", |(dir, _)| dir)
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
            counted(list(root, dir), dir, counters);
            // who waits for the end waits for one listing
            MutexGuard::unlock_fair(listing);
        }
        self.end_listing();
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

/// Has the kernel read a directory below `root`.
fn list(root: &OwnedFd, dir: &str) -> rustix::io::Result<()> {
    listed(open_inside(root, dir, OFlags::DIRECTORY)?, |_| ())
}

/// The same with one that is open, and says which inodes it has.
pub(super) fn listed(opened: OwnedFd, mut each: impl FnMut(Ino)) -> rustix::io::Result<()> {
    // as much as the kernel asks for at once: a request fills the buffer that the entries are for (fs/fuse/readdir.c)
    let mut buffer = Vec::with_capacity(LISTED_BYTES);
    let mut entries = RawDir::new(opened, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        each(Ino(entry?.ino()));
    }
    Ok(())
}

/// Says that this thread asks for the boot, as long as it lives.
struct Asking<'a>(&'a Boot);

impl<'a> Asking<'a> {
    fn begin(boot: &'a Boot) -> Self {
        let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        boot.asker.store(thread, Ordering::Relaxed);
        Self(boot)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.asker.store(0, Ordering::Relaxed);
    }
}
