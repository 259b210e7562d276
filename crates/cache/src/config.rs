//! What a cache can be told, and the three classes of fetching.

use std::path::PathBuf;
use std::time::Duration;

/// Why something is fetched. Demand never queues behind the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Nobody has asked for it: it is wanted on disk.
    Fill,
    /// Nobody waits yet: readahead.
    Background,
    /// A start will need it soon.
    Boot,
    /// A reader waits for it.
    Demand,
}

impl Class {
    /// Its name, in counters and spans.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fill => "fill",
            Self::Background => "background",
            Self::Boot => "boot",
            Self::Demand => "demand",
        }
    }
}

/// How many requests of each class are on their way to a source at once. What waits for its turn in one class does
/// not hold up another.
#[derive(Clone, Copy, Debug)]
pub struct InFlight {
    /// Requests that only fill the disk: as many as fill a link.
    pub fill: usize,
    /// A reader waits for each of these; more than this many readers at once share the link badly anyway.
    pub demand: usize,
    /// Requests of a start.
    pub boot: usize,
    /// Readahead: enough of [`CacheConfig::range_bytes_max`] to fill a link for a round trip, and not more, since
    /// they share the link with demand: three fill 1 Gbit/s up to a round trip of 25 ms, and delay a demand read by
    /// that at worst.
    pub background: usize,
}

/// What a cache is made of. [`CacheConfig::new`] fills in what was measured to be good.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Where frames are kept. One process owns it at a time.
    pub directory: PathBuf,
    /// The segment files and whole files never take more bytes than this. The index beside them takes about 2 % more.
    pub bytes_max: u64,
    /// Frames held in memory, in bytes of plaintext (of sealed bytes, where not opened yet).
    pub memory_bytes: usize,
    /// Frames that wait to be written to disk, in bytes. When they do not fit, frames of demand reads are not kept on
    /// disk (counted), and readahead waits.
    pub write_behind_bytes: usize,
    /// How long a reader waits for a frame before it gets an error.
    pub deadline: Duration,
    /// Requests under way at once.
    pub in_flight: InFlight,
    /// Two wanted frames in one pack are asked for together if no more than this many bytes lie between them: about
    /// half of what a 1 Gbit/s link carries in a round trip of 1 ms.
    pub gap_bytes_max: u64,
    /// No request asks for more, in bytes: answers arrive whole, so this bounds how long the first frame waits for
    /// the last.
    pub range_bytes_max: u64,
}

impl CacheConfig {
    /// A cache in `directory` of at most `bytes_max` bytes on disk.
    pub fn new(directory: PathBuf, bytes_max: u64) -> Self {
        Self {
            directory,
            bytes_max,
            memory_bytes: 40 << 20,
            write_behind_bytes: 16 << 20,
            deadline: Duration::from_secs(30),
            in_flight: InFlight { fill: 4, demand: 32, boot: 8, background: 3 },
            gap_bytes_max: 48 << 10,
            range_bytes_max: 1 << 20,
        }
    }
}
