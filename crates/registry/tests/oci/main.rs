//! The registry as its clients see it: raw requests, skopeo, podman, images that come with their tree, and crashes.

mod bound;
mod clients;
mod conversion;
mod crash;
mod protocol;
mod support;
