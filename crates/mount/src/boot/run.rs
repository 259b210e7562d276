//! Booting: from the stream to the page cache.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use fuser::{INodeNo, Notifier};
use futures_util::stream::{FuturesOrdered, StreamExt};
use lamina_image::{BOOT_BYTES_MAX, BOOT_HEAD_BYTES, BootError, BootHead, BootRun, BootTable, Ino, Tree};
use parking_lot::MutexGuard;
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, ResolveFlags, Stat, fstat, stat};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::trace;

use super::buffers::Buffers;
use super::known::{Finishing, Known};
use super::{Boot, BootFailure, BootStream, Coming, KEPT, Listing, OPENED};
use crate::bits::Bits;
use crate::metrics::{Counters, add, one};

/// Frames that are opened side by side: each takes a millisecond, and comes in three over 1 Gbit/s.
const OPENING: usize = 4;

/// What boot needs of a mount.
pub(crate) struct Booting<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) counters: &'a Arc<Counters>,
    pub(crate) notifier: Notifier,
    pub(crate) mountpoint: &'a Path,
    pub(crate) boot: &'a Arc<Boot>,
    /// Where the files are noted that it has a part of.
    pub(crate) touched: &'a Arc<Bits>,
}

impl Booting<'_> {
    /// Takes and stores a boot pack. Returns when everything is in the page cache, or with what went wrong. Directories may still
    /// be listed then, until [`Boot::end_listing`] at the latest.
    pub(crate) async fn run(self, mut stream: BootStream) -> Result<(), BootFailure> {
        let table = self.table(&mut stream).await;
        self.count(&stream, 0);
        let table = table?;
        let coming = Arc::new(Coming::new(stream.pack().pack(), &table));
        if self.boot.coming.set(Arc::clone(&coming)).is_err() {
            return Ok(());
        }
        let _ended = Ended(Arc::clone(&coming));
        let known = Arc::new(Known::new(self.tree.inodes()));
        let named = self.look_up(table.names, table.dirs, Arc::clone(&known));
        let (frames, queue) = mpsc::channel(OPENED);
        let storing = self.store(&coming, table.runs, known, queue);
        let opened = self.open(&mut stream, &coming, frames).await;
        let stored = storing.await.map_err(|_| BootFailure::Refused)?;
        // nothing is ever sent: it ends with the names, however
        let _ = named.await;
        opened.and(stored)
    }

    /// Counts what came since `before`.
    fn count(&self, stream: &BootStream, before: u64) {
        add(&self.counters.boot_bytes, stream.taken() - before);
    }

    /// What is in the pack.
    async fn table(&self, stream: &mut BootStream) -> Result<BootTable, BootFailure> {
        let pack = stream.pack();
        let head_bytes = BOOT_HEAD_BYTES as u64;
        if !(head_bytes..=BOOT_BYTES_MAX).contains(&pack.bytes) {
            return Err(BootFailure::Length(pack.bytes));
        }
        let head = BootHead::parse(&stream.take(BOOT_HEAD_BYTES).await?, pack.tree)?;
        let end = head_bytes + head.table_len() as u64;
        if end > pack.bytes {
            return Err(BootFailure::Length(pack.bytes));
        }
        let table = head.table(&stream.take(head.table_len()).await?, self.tree)?;
        let frames_end = table.frames.last().map_or(end, |last| last.offset + u64::from(last.sealed_len));
        if frames_end == pack.bytes { Ok(table) } else { Err(BootFailure::Length(pack.bytes)) }
    }

    /// Looks names up through the mount, found or not: the kernel then knows them and the inodes. That is when what is returned
    /// ends. Then lists directories, which the kernel keeps as well; no more than there are names.
    fn look_up(
        &self,
        names: Vec<String>,
        dirs: Vec<String>,
        known: Arc<Known>,
    ) -> oneshot::Receiver<Infallible> {
        let (naming, named) = oneshot::channel();
        let (path, counters) = (self.mountpoint.to_owned(), self.counters.clone());
        let boot = Arc::clone(self.boot);
        spawn_blocking(move || {
            let _asking = Asking::begin(&boot);
            let finishing = Finishing(&known);
            let Ok(root) = rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            else {
                return;
            };
            let look = |root: &OwnedFd, name: &str| rustix::fs::statat(root, name, AtFlags::SYMLINK_NOFOLLOW);
            for name in &names {
                // a name that is not there is known not to be there afterwards
                if let Ok(found) = look(&root, name) {
                    known.add(Ino(found.st_ino));
                }
                one(&counters.boot_names);
            }
            // neither pages nor the boot's end wait for a listing
            drop(finishing);
            boot.begin_listing(root);
            drop(naming);
            boot.list(&path, &dirs, &counters);
        });
        named
    }

    /// Opens frames as they come, and hands them on in order.
    async fn open(
        &self,
        stream: &mut BootStream,
        coming: &Arc<Coming>,
        queue: mpsc::Sender<(u32, Bytes)>,
    ) -> Result<(), BootFailure> {
        let buffers = Arc::new(Buffers::default());
        let mut frames = coming.frames.iter();
        let mut opening = FuturesOrdered::<JoinHandle<Result<Bytes, BootError>>>::new();
        let mut number = 0;
        loop {
            let len = frames.as_slice().first().map(|frame| frame.sealed_len as usize);
            let before = stream.taken();
            tokio::select! {
                biased;
                Some(plain) = opening.next() => {
                    let plain = plain.map_err(|_| BootFailure::Refused)??;
                    // for the reads that wait, before anything that may block
                    coming.opened(number, plain.clone());
                    if queue.send((number, plain)).await.is_err() {
                        return Err(BootFailure::Refused);
                    }
                    number += 1;
                }
                sealed = stream.take(len.unwrap_or(0)), if len.is_some() && opening.len() < OPENING => {
                    let (sealed, frame) = (sealed?, frames.next().expect("just seen").clone());
                    self.count(stream, before);
                    let buffers = Arc::clone(&buffers);
                    opening.push_back(spawn_blocking(move || {
                        let mut plain = buffers.take();
                        frame.open_into(&sealed, &mut plain).map(|()| buffers.share(plain))
                    }));
                }
                else => return Ok(()),
            }
        }
    }

    /// Stores frames until no more come, each run once its file is known.
    fn store(
        &self,
        coming: &Arc<Coming>,
        runs: Vec<BootRun>,
        known: Arc<Known>,
        mut queue: mpsc::Receiver<(u32, Bytes)>,
    ) -> JoinHandle<Result<(), BootFailure>> {
        let (coming, notifier) = (Arc::clone(coming), self.notifier.clone());
        let (counters, touched) = (Arc::clone(self.counters), Arc::clone(self.touched));
        spawn_blocking(move || {
            while let Some((number, plain)) = queue.blocking_recv() {
                for run in &runs[coming.frames[number as usize].runs.clone()] {
                    known.wait(run.ino);
                    touched.set(u32::try_from(run.ino.0).unwrap_or(u32::MAX));
                    let (skip, len) = (run.skip as usize, run.len as usize);
                    let stored = notifier.store(INodeNo(run.ino.0), run.offset, &plain[skip..skip + len]);
                    if let Err(error) = stored {
                        one(&counters.boot_refused);
                        // the connection is gone; everything else is about one run
                        if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) {
                            return Err(BootFailure::Refused);
                        }
                        continue;
                    }
                    one(&counters.boot_stored_runs);
                    add(&counters.boot_stored_bytes, len as u64);
                }
                coming.stored.store(number as usize + 1, Ordering::Relaxed);
                if let Some(old) = number.checked_sub(u32::try_from(KEPT).expect("few")) {
                    coming.opened.lock().remove(&old);
                }
            }
            Ok(())
        })
    }
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
            if list(root, dir).is_ok() {
                trace!(dir, "listed");
                one(&counters.boot_dirs);
            }
            // who waits for the end waits for one listing
            MutexGuard::unlock_fair(listing);
        }
        self.end_listing();
    }
}

/// Has the kernel read a directory below `root`. A boot pack's word leads out of the mount by no link and no other mount.
fn list(root: &OwnedFd, dir: &str) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let opened = rustix::fs::openat2(root, dir, flags, Mode::empty(), inside)?;
    Dir::new(opened)?.try_for_each(|entry| entry.map(drop))
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

/// Tells waiting reads when a boot pack has ended, however.
struct Ended(Arc<Coming>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.progress.send_replace(usize::MAX);
        self.0.opened.lock().clear();
    }
}
