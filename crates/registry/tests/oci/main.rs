//! The registry as its clients see it: raw requests, skopeo, podman, images that come with their tree, what is learnt of
//! starts, what is dropped, and crashes.

mod between;
mod bound;
mod clients;
mod conversion;
mod crash;
mod documents;
mod endpoints;
mod everyday;
mod fsck;
mod fuzz;
mod gc;
mod hostile;
mod learning;
mod membership;
mod originals;
mod protocol;
mod renewed;
mod repack;
mod support;
mod upstream;
