//! The daemon of a machine: one cache directory, one process that owns it, any number of mounts.
//!
//! `lamina mount` asks the daemon of its cache directory over a Unix socket, and starts one where there is none. So
//! mounts share memory, disk, connections and single flight, and a cache directory never has two writers.

mod boot_files;
mod client;
mod daemon;
mod error;
mod fill;
mod held;
mod holder;
mod image;
mod known;
mod line;
mod metrics;
mod owner;
mod pins;
mod process;
mod records;
mod remembered;
mod resolve;
mod restore;
mod server;
mod sources;
mod spans;
mod start;
mod stats;
mod traces;
mod tree;
mod trees;
mod turn;
mod untold;
mod upgrade;

pub use client::{ControlError, Controller};
pub use daemon::{Node, NodeConfig};
pub use error::NodeError;
pub use held::Held;
pub use holder::{HolderConfig, hold};
pub use image::{Found, find_image, image_process};
pub use metrics::serve_metrics;
pub use restore::Restored;
pub use server::serve;
pub use sources::Mirrors;
pub use traces::{KeptTrace, KeptTraces};

pub use lamina_cache::check_directory as check_cache_directory;
