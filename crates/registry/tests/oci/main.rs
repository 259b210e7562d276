//! The registry as its clients see it: raw requests, skopeo, podman, and images that come with their tree.

mod bound;
mod clients;
mod conversion;
mod protocol;
mod support;
