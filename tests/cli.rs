//! The real binary, from a source to a program that reads a mount: push, mount, compare, and what goes wrong on the way.
//!
//! Needs root and `/dev/fuse`. Without them every test here fails; none is skipped.

#[path = "cli/bad_input.rs"]
mod bad_input;
#[path = "cli/mounting.rs"]
mod mounting;
#[path = "cli/profile.rs"]
mod profile;
#[path = "cli/pushing.rs"]
mod pushing;
#[path = "cli/rig.rs"]
mod rig;
#[path = "cli/running.rs"]
mod running;
#[path = "cli/seeing.rs"]
mod seeing;
