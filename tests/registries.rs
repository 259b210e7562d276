//! Registry processes as they fare in the field: two over one bucket, killed at work, over storage that is slow
//! and refuses, dropping originals.
//!
//! Needs root and `/dev/fuse`, as the tests of the command line do.

#[path = "registries/killed.rs"]
mod killed;
#[path = "registries/originals.rs"]
mod originals;
#[expect(dead_code, reason = "the tests of the command line use the rest")]
#[path = "cli/rig.rs"]
mod rig;
#[path = "registries/server.rs"]
mod server;
#[path = "registries/shared.rs"]
mod shared;
#[path = "registries/storage.rs"]
mod storage;
