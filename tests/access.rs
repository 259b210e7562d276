//! A registry that lets in whom its configuration says, and what others get to see.
//!
//! Needs root and `/dev/fuse`. Without them every test here fails; none is skipped.

#[path = "access/guarded.rs"]
mod guarded;
#[expect(dead_code, reason = "the tests of the command line use the rest")]
#[path = "cli/rig.rs"]
mod rig;
#[path = "access/tls.rs"]
mod tls;
#[path = "access/visibility.rs"]
mod visibility;
