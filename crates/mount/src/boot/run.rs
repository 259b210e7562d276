//! Booting: from the stream to the page cache.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{INodeNo, Notifier};
use lamina_image::{BOOT_FRAME_BYTES, BootRun, Tree};
use tokio::sync::{mpsc, oneshot};
use tracing::trace;

use super::crew::Role;
use super::known::Known;
use super::opened::Opened;
use super::stream::OpenedFrame;
use super::{Boot, BootFailure, BootStream, Coming, KEPT};
use crate::bits::Bits;
use crate::metrics::{Counters, add, one};

/// The first frames are short.
const KEPT_BYTES: usize = KEPT * BOOT_FRAME_BYTES;

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
        let _ended = Ended { opened: Arc::clone(stream.opened()), counters: Arc::clone(self.counters) };
        let table = stream.records().await?.table(self.tree)?;
        let coming = Arc::new(Coming::new(&stream, &table));
        if self.boot.coming.set(Arc::clone(&coming)).is_err() {
            return Ok(());
        }
        let known = Arc::new(Known::new(self.tree.inodes()));
        let named = self.look_up(table.names, table.dirs, &known);
        let storing = self.store(&coming, table.runs, known, stream.frames());
        storing.map_err(|_| BootFailure::Refused)?.await.map_err(|_| BootFailure::Refused)??;
        // what is wrong with the pack ends the storing, which has done what it could
        stream.end().await?;
        // nothing is ever sent: it ends with the names, however
        let _ = named.await;
        Ok(())
    }

    /// Stores frames until no more come, each run once its file is known.
    fn store(
        &self,
        coming: &Arc<Coming>,
        runs: Vec<BootRun>,
        known: Arc<Known>,
        mut queue: mpsc::Receiver<OpenedFrame>,
    ) -> io::Result<oneshot::Receiver<Result<(), BootFailure>>> {
        let (coming, crew, notifier) = (Arc::clone(coming), Arc::clone(&coming.crew), self.notifier.clone());
        let (counters, touched) = (Arc::clone(self.counters), Arc::clone(self.touched));
        crew.spawn(Role::Stores, move || {
            let (mut oldest, mut kept_bytes) = (0, 0);
            while let Some((number, plain)) = queue.blocking_recv() {
                trace!(frame = number, "storing");
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
                coming.has_stored(number as usize + 1);
                trace!(frame = number, "stored");
                counters.boot_bytes.store(coming.opened.taken_bytes(), Ordering::Relaxed);
                kept_bytes += plain.len();
                while let len = coming.frames[oldest as usize].plain_len as usize
                    && kept_bytes - len >= KEPT_BYTES
                {
                    coming.opened.give_up(oldest);
                    kept_bytes -= len;
                    oldest += 1;
                }
            }
            Ok(())
        })
    }
}

/// Tells waiting reads when a boot pack has ended, however, and counts what came of it.
struct Ended {
    opened: Arc<Opened>,
    counters: Arc<Counters>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.opened.end();
        self.counters.boot_bytes.store(self.opened.taken_bytes(), Ordering::Relaxed);
    }
}
