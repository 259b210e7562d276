//! What the real binary tells an OpenTelemetry collector, and that nothing depends on there being one.
//!
//! Needs root and `/dev/fuse`. Without them every test here fails; none is skipped.

#[path = "spans/collector.rs"]
mod collector;
#[path = "spans/missing.rs"]
mod missing;
#[expect(dead_code, reason = "the tests of the command line use the rest")]
#[path = "cli/rig.rs"]
mod rig;
#[path = "spans/told.rs"]
mod told;
