//! A FUSE file system over a tree and a cache.
//!
//! A [`Mount`] shows one image, read-only. Names, attributes and links are answered from the tree and never wait; file
//! contents come from the cache. No thread that reads requests from the kernel ever waits for the network: a read that
//! finds its frames in memory or on disk is answered at once, every other one from a task of its own. A read is
//! answered in full, with verified bytes, or with `EIO`: never with zeros, short, or old data.
//!
//! The image is immutable, so the kernel may keep everything it was told for as long as it likes, and nothing here
//! depends on what was asked before: inode numbers are the tree's, file handles are all alike. But for a passthrough mount: what is
//! open of its big files, and how, it remembers beyond its process (`opens.rs`).

mod ahead;
mod bits;
mod boot;
mod bound;
mod config;
mod contents;
mod elf;
mod error;
mod fs;
mod fuse;
mod loading;
mod metrics;
mod mount;
mod mountpoint;
mod opens;
mod order;
mod pages;
mod passthrough;
mod resume;
mod small;
mod streams;
mod trace;
mod walks;
mod whole;
mod window;

pub use boot::{BootFailure, BootRoom, BootRooms, BootStream, BootUse};
pub use config::{MountConfig, Record};
pub use contents::{Bringing, Contents};
pub use error::MountError;
pub use metrics::MountSnapshot;
pub use mount::{Attached, Kept, Mount};
pub use resume::Terms;
pub use streams::Ramp;
