//! What a cache counts. All since it was opened; `_bytes` are bytes, `_us` microseconds.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The live counters.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        /// The counters at one moment, each read on its own.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Their values now.
            pub(crate) fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl Snapshot {
            /// Every counter by name, in a fixed order.
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Frames handed out of memory.
    memory_frames,
    /// Their plaintext.
    memory_bytes,
    /// Frames read from disk, or from the queue to it.
    disk_frames,
    /// Their plaintext.
    disk_bytes,
    /// Requests made to sources.
    source_requests,
    /// Frames fetched from sources.
    source_frames,
    /// Bytes received from sources, gaps between wanted frames included.
    source_bytes,
    /// Bytes of those that were gaps, thrown away.
    source_gap_bytes,
    /// Requests that failed or ran into the deadline.
    source_failures,
    /// Frames fetched though nobody waited for them yet.
    ahead_frames,
    /// Their sealed bytes.
    ahead_bytes,
    /// Those of them that were then handed out of memory. The rest was not needed, or not yet.
    ahead_used_frames,
    /// Their sealed bytes.
    ahead_used_bytes,
    /// Frames that did not open as what they were said to be, from disk or source.
    verify_failures,
    /// Readers that joined a fetch which another had started.
    joined,
    /// Readers that wait right now.
    waiting,
    /// Frames that readers had to wait for.
    waits,
    /// How long they waited, summed.
    wait_us_total,
    /// The longest wait.
    wait_us_max,
    /// Frames written to disk.
    written_frames,
    /// Frames not kept on disk because the disk was slower than the network, or everything there is pinned.
    write_dropped,
    /// Frames that were in an evicted segment and were written again, because they had been read or are pinned.
    kept_frames,
    /// Failures of the disk: full, broken, or its index in error. The cache works on without it.
    disk_failures,
    /// Whole segments evicted to stay below the cap.
    evicted_segments,
    /// Their bytes.
    evicted_bytes,
    /// Whole files written.
    whole_files,
    /// Whole files that found no room.
    whole_refused,
    /// Whole files removed to stay below the cap.
    evicted_whole_files,
    /// Bytes that whole files take now.
    whole_used_bytes,
    /// Bytes that segment files and whole files take now.
    disk_used_bytes,
    /// Bytes that they may take.
    disk_max_bytes,
    /// Bytes of frames on disk that are pinned.
    pinned_bytes,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}
