//! The real binary where the network, the registry or the source does not do its part, and at the moments in between.
//!
//! Needs root and `/dev/fuse`. Without them every test here fails; none is skipped.

#[path = "e2e/commit.rs"]
mod commit;
#[path = "e2e/disk.rs"]
mod disk;
#[path = "foreign/docker_registry.rs"]
mod docker_registry;
#[path = "e2e/faulty.rs"]
mod faulty;
#[path = "e2e/filling.rs"]
mod filling;
#[path = "e2e/layouts.rs"]
mod layouts;
#[path = "e2e/outages.rs"]
mod outages;
#[path = "e2e/preludes.rs"]
mod preludes;
#[path = "e2e/proxy.rs"]
mod proxy;
#[path = "e2e/repacked.rs"]
mod repacked;
#[expect(dead_code, reason = "the tests of the command line use the rest")]
#[path = "cli/rig.rs"]
mod rig;
