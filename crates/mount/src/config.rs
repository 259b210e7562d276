//! What a mount can be told.

use std::path::PathBuf;

use crate::Ramp;

/// Whether a mount records what a start touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Nothing.
    Off,
    /// As exactly as a start that is also fast allows.
    Start,
    /// Every page, whatever it costs.
    Exact,
}

/// The kernel's readahead where it is to ask for what is read and no more: one page.
pub(crate) const EXACT_KB: u32 = 4;

/// How to mount. [`MountConfig::new`] fills in what was measured to be good.
#[derive(Clone, Debug)]
pub struct MountConfig {
    /// An empty directory.
    pub mountpoint: PathBuf,
    /// What `/proc/mounts` shows as the source; commas and control characters are replaced.
    pub name: String,
    /// Threads that read requests from the kernel.
    pub threads: usize,
    /// The kernel's readahead while reading is sparse, in KiB. What it asks for must be answered in full, so a large
    /// one turns each wanted page into many unwanted ones.
    pub read_ahead_kb: u32,
    /// The kernel's readahead for files opened while reading is dense, in KiB.
    pub read_ahead_dense_kb: u32,
    /// The same as `read_ahead_kb` while a start is recorded: what is read unasked blurs the trace. With two pages instead of one the
    /// boot pack of a start of torch was 7 % longer, and the start that was recorded no faster. It is one page, too, while a boot pack
    /// comes.
    pub read_ahead_start_kb: u32,
    /// Whether the kernel may read big files that are on disk as a whole by itself, without asking and with no check of ours. Such a
    /// mount records no start, since much of it is not seen here, and is asked at each open and close of a file.
    pub passthrough: bool,
    /// Whether the start is recorded.
    pub record: Record,
    /// A stream that has read this many bytes is dense. The order of the paths is looked for from the first one on.
    pub dense_run_bytes: u64,
    /// Of a stream so many bytes are recorded, and not what follows: a start reads no library in so long a stream, and readahead
    /// has long been filling the link.
    pub recorded_run_bytes: u64,
    /// A miss asks for frames that follow in the pack until the request is this long, in bytes of frames. The wanted ones
    /// come first and do not wait for them; 168 KiB is what a 1 Gbit/s link carries in one and
    /// a half round trips of 1 ms.
    pub neighbour_bytes: u64,
    /// Readahead within a file, in bytes of the file.
    pub file_ramp: Ramp,
    /// Readahead across files that lie one behind the other in packs, in bytes of frames. Opening small files takes longer than
    /// fetching them, so its bound is what a 1 Gbit/s link carries in a second.
    pub pack_ramp: Ramp,
    /// Readahead across files in the order of their paths, in bytes of frames, besides that along packs. Its `run_min` is more than
    /// programs read so when they start: whoever does read it, of whatever order, is not helped by a boot pack any more.
    pub path_ramp: Ramp,
}

impl MountConfig {
    /// The kernel's readahead while reading is sparse, in KiB, for a mount that records so.
    pub(crate) fn sparse_kb(&self, record: Record) -> u32 {
        match record {
            Record::Off => self.read_ahead_kb,
            Record::Start => self.read_ahead_start_kb,
            Record::Exact => EXACT_KB,
        }
    }

    /// A mount at `mountpoint`.
    pub fn new(mountpoint: PathBuf) -> Self {
        Self {
            mountpoint,
            name: "lamina".to_owned(),
            threads: 2,
            read_ahead_kb: 16,
            read_ahead_dense_kb: 1024,
            read_ahead_start_kb: EXACT_KB,
            passthrough: false,
            record: Record::Off,
            dense_run_bytes: 8 << 20,
            recorded_run_bytes: 64 << 20,
            neighbour_bytes: 168 << 10,
            file_ramp: Ramp {
                run_min: 256 << 10,
                ahead_max: 16 << 20,
                piece_max: 4 << 20,
                slack: 128 << 10,
                reach_max: 4 << 20,
            },
            pack_ramp: Ramp {
                run_min: 512 << 10,
                ahead_max: 128 << 20,
                piece_max: 16 << 20,
                slack: 256 << 10,
                reach_max: 16 << 20,
            },
            path_ramp: Ramp {
                run_min: 32 << 20,
                ahead_max: 64 << 20,
                piece_max: 16 << 20,
                slack: 256 << 10,
                reach_max: 16 << 20,
            },
        }
    }
}
