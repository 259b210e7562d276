//! Where a node gets bytes: memory, disk, and a source over the network.
//!
//! Its unit is the frame: one chunk, or several neighbours sealed together. A [`Cache`] holds opened frames in memory
//! and sealed ones in one bounded directory that every mount of the process shares, and asks a [`Source`] for what it lacks: once for each frame however many readers wait, with
//! neighbours merged into one range, demand before everything else, and a deadline on each request.
//!
//! It knows frames, packs and ranges, and not which chunks a frame holds. It never sees a name, an inode or a manifest, and it hands out plaintext only
//! as a `Chunk`, which cannot exist without having been verified.

mod body;
mod cache;
mod config;
mod disk;
mod error;
mod fetch;
mod flight;
mod memory;
mod metrics;
mod plan;
mod source;
mod whole;
mod writer;

pub use cache::Cache;
pub use config::{CacheConfig, Class, InFlight};
pub use disk::{Unfit, check_directory};
pub use error::CacheError;
pub use fetch::Want;
pub use metrics::Snapshot;
pub use source::{Pieces, Source, SourceError};
pub use whole::{Made, Part, WholeId};
