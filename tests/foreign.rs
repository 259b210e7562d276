//! Registries that are not Lamina's as homes of images: Debian's `docker-registry`, which knows no referrers API.
//!
//! Needs root and `/dev/fuse`. Without them every test here fails; none is skipped.

#[path = "foreign/access.rs"]
mod access;
#[path = "foreign/docker_registry.rs"]
mod docker_registry;
#[path = "foreign/home.rs"]
mod home;
#[path = "foreign/learning.rs"]
mod learning;
#[expect(dead_code, reason = "the tests of the command line use the rest")]
#[path = "cli/rig.rs"]
mod rig;
#[path = "foreign/upstream.rs"]
mod upstream;
