//! Whether the kernel reads big files of a mount by itself: what that takes, and when it begins.
//!
//! It is a mount as any other where the kernel will not. Most of that is found out before the first request is answered: then nothing of
//! it is negotiated, and the mount may be stacked as deep as any other. Only that a process has `CAP_SYS_ADMIN` of a user namespace
//! alone is found out behind it.
//!
//! Order is the safety argument: nothing is opened past us before the table of what is open (`opens.rs`) is kept by whoever goes
//! on after this process. Who goes on without one answers every open with `ENOSYS`: what has a backing file is read right then
//! by pages of ours, but cannot be mapped until it was closed (`ENODEV`; `fuse_file_mmap` in `fs/fuse/file.c`).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use fuser::InitFlags;
use lamina_cache::Cache;
use lamina_image::Tree;
use parking_lot::Mutex;
use rustix::io::Errno;
use tracing::warn;

use crate::MountConfig;
use crate::metrics::Counters;
use crate::opens::{Opens, Table};
use crate::resume::Terms;
use crate::whole::{BIG_BYTES, Wholes};

/// The big files of a mount whose kernel may read them by itself.
pub(crate) struct Passthrough {
    pub(crate) wholes: Arc<Wholes>,
    /// What is open, until there is a connection.
    table: Mutex<io::Result<Table>>,
    opens: OnceLock<Opens>,
    /// A file as the kernel is to read them, until it was tried.
    trial: Mutex<io::Result<File>>,
}

impl Passthrough {
    /// Of a mount that begins. *Errors*: the kernel would not do it here.
    pub(crate) fn new(tree: &Arc<Tree>, cache: &Arc<Cache>) -> io::Result<Self> {
        let (trial, table) = (trial(cache)?, Table::new(tree.inodes(), BIG_BYTES)?);
        let wholes = Wholes::start(tree.clone(), cache.clone(), BIG_BYTES)?;
        Ok(Self {
            wholes,
            table: Mutex::new(Ok(table)),
            opens: OnceLock::new(),
            trial: Mutex::new(Ok(trial)),
        })
    }

    /// Of a mount that goes on with what another process has left. *Errors*: that did no passthrough.
    pub(crate) fn resumed(
        tree: &Arc<Tree>,
        cache: &Arc<Cache>,
        left: Option<OwnedFd>,
        terms: &Terms,
    ) -> io::Result<Self> {
        agreed(InitFlags::from_bits_retain(terms.capabilities))?;
        let none = || io::Error::new(io::ErrorKind::NotFound, "nobody knows what the node before has opened");
        let table = left.ok_or_else(none).and_then(|left| Table::of(left, tree.inodes()));
        let big_bytes = table.as_ref().map_or(BIG_BYTES, Table::big_bytes);
        let wholes = Wholes::start(tree.clone(), cache.clone(), big_bytes)?;
        let trial = Mutex::new(trial(cache));
        Ok(Self { wholes, table: Mutex::new(table), opens: OnceLock::new(), trial })
    }

    /// Takes up what is open, once there is a connection. *Errors*: nobody knows that, or the kernel has no passthrough.
    pub(crate) fn connect(&self, connection: io::Result<OwnedFd>, capabilities: InitFlags) -> io::Result<()> {
        agreed(capabilities)?;
        let opens = Opens::new(connection?, take(&self.table)?)?;
        // nobody else connects it
        let _ = self.opens.set(opens);
        Ok(())
    }

    /// What is open; none where passthrough cannot be had after all.
    pub(crate) fn opens(&self) -> Option<&Opens> {
        self.opens.get()
    }

    /// From now on files are opened past us. *Errors*: the kernel takes no backing files; what is open past us stays so.
    pub(crate) fn begin(&self) -> io::Result<()> {
        let Some(opens) = self.opens().filter(|opens| !opens.is_past()) else { return Ok(()) };
        opens.go_past(&take(&self.trial)?)?;
        self.wholes.check();
        Ok(())
    }

    /// Whether files are opened past us.
    pub(crate) fn has_begun(&self) -> bool {
        self.opens().is_some_and(Opens::is_past)
    }
}

/// What is there, once.
fn take<T>(once: &Mutex<io::Result<T>>) -> io::Result<T> {
    std::mem::replace(&mut *once.lock(), Err(io::ErrorKind::AlreadyExists.into()))
}

fn agreed(capabilities: InitFlags) -> io::Result<()> {
    if capabilities.contains(InitFlags::FUSE_PASSTHROUGH) {
        return Ok(());
    }
    let reason =
        "the kernel has no FUSE passthrough (that needs Linux 6.9), or did none when the mount began";
    Err(io::Error::new(io::ErrorKind::Unsupported, reason))
}

/// A file as whole files are. *Errors*: who has it open cannot be known, or it is on an overlayfs, as the mount may have one
/// above it, and three are more than the kernel stacks.
fn trial(cache: &Cache) -> io::Result<File> {
    let file = cache.trial_whole()?;
    let is_stacked = rustix::fs::fstatfs(&file)?.f_type == libc::OVERLAYFS_SUPER_MAGIC;
    if is_stacked { Err(Errno::LOOP.into()) } else { Ok(file) }
}

/// What was found, if it was; else says why there is no passthrough, and counts it.
pub(crate) fn note<T>(config: &MountConfig, counters: &Counters, found: io::Result<T>) -> Option<T> {
    let error = match found {
        Ok(found) => return Some(found),
        Err(error) => error,
    };
    let reason = match Errno::from_io_error(&error) {
        Some(Errno::PERM) => "this process lacks CAP_SYS_ADMIN".to_owned(),
        Some(Errno::LOOP) => "the cache directory is on a stacked file system (overlayfs)".to_owned(),
        _ => error.to_string(),
    };
    counters.passthrough_failed.store(1, Ordering::Relaxed);
    let mountpoint = config.mountpoint.display();
    warn!(%mountpoint, reason, "the kernel is given no further file of a mount to read by itself");
    None
}
