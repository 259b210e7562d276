//! The real binary, killed: what programs that read a mount notice of it, which is nothing.
//!
//! Needs root and `/dev/fuse`. Without them every test here fails; none is skipped.

#[path = "survival/bad_input.rs"]
mod bad_input;
#[path = "survival/filling.rs"]
mod filling;
#[path = "survival/kill.rs"]
mod kill;
#[path = "survival/leaks.rs"]
mod leaks;
#[path = "survival/node.rs"]
mod node;
#[path = "survival/owner.rs"]
mod owner;
#[path = "survival/passthrough.rs"]
mod passthrough;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "e2e/proxy.rs"]
mod proxy;
#[path = "survival/restart.rs"]
mod restart;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "cli/rig.rs"]
mod rig;
#[path = "survival/upgrade.rs"]
mod upgrade;
