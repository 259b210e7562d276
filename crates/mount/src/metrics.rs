//! What a mount counts, since it was mounted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The live counters.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        /// The counters at one moment, each read on its own.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct MountSnapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Their values now.
            pub(crate) fn snapshot(&self) -> MountSnapshot {
                MountSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl MountSnapshot {
            /// Every counter by name, in a fixed order.
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Names looked up.
    lookups,
    /// Of those, names that do not exist.
    lookups_absent,
    /// Attributes asked for.
    getattrs,
    /// Pieces of directories listed.
    readdirs,
    /// Links read.
    readlinks,
    /// Extended attributes asked for, or listed.
    xattrs,
    /// Reads. What the kernel's page cache answers never comes here.
    reads,
    /// Bytes of file contents answered.
    read_bytes,
    /// Reads that had to wait for the network.
    reads_waited,
    /// How long they waited, summed, in microseconds.
    read_wait_us_total,
    /// The longest, in microseconds.
    read_wait_us_max,
    /// Reads answered with an error.
    reads_failed,
    /// Opens of big files that the kernel reads by itself.
    passthrough_opens,
    /// Opens of big files, while the mount is to do passthrough, that it does not.
    passthrough_misses,
    /// 1 where passthrough was asked for and cannot be had; the log says why.
    passthrough_failed,
    /// Times that readahead asked for more.
    aheads,
    /// Frames that readahead asked for, near ones included.
    ahead_frames,
    /// Runs of pages handed to the kernel unasked.
    stores,
    /// Their bytes.
    store_bytes,
    /// Bytes of the boot pack that came.
    boot_bytes,
    /// Files that it made known to the kernel before their names.
    boot_files,
    /// Names that it made known, found or not.
    boot_names,
    /// Directories that it listed, for their own sake or for their names.
    boot_dirs,
    /// Runs of pages that it stored in the kernel's page cache.
    boot_stored_runs,
    /// Their bytes.
    boot_stored_bytes,
    /// Runs that the kernel refused.
    boot_refused,
    /// Reads answered from it before the kernel had the pages.
    boot_reads,
    /// Of these, reads that waited for it.
    boot_waits,
    /// How long, summed, in microseconds.
    boot_wait_us_total,
    /// Reads of pages that it has and that were asked for elsewhere, because they would have come too late.
    boot_far,
    /// Reads of pages that it had stored and that the kernel had dropped since.
    boot_again,
    /// 1 where it was given up; the log says why.
    boot_failed,
    /// How long it took from the first request to the last page stored, in microseconds.
    boot_us,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// Adds one to a counter.
pub(crate) fn one(counter: &AtomicU64) {
    add(counter, 1);
}

/// What has passed, in microseconds.
pub(crate) fn us_since(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}
