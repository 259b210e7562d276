//! What two processes say to each other, both ends: references, the OCI client with its ranges, uploads and
//! retries, and the protobuf messages of `proto/`.
//!
//! This crate never parses an image: it carries documents and blobs, and checks that they are the ones asked for.
//! It reads no environment and keeps nothing on disk; of files it reads those with credentials and certificates that it was
//! told of.

mod access;
mod auth;
mod challenge;
mod client;
mod credentials;
mod error;
mod http_call;
mod post;
mod prelude;
mod profile;
mod proxy;
mod push;
mod reference;
mod referrers;
mod tls;
mod window;

pub use access::{Access, ClientCertificate, HostAccess, ProxySettings};
pub use client::{Blob, Client, ClientConfig, Fetched, Pong, Scheme};
pub use credentials::CredentialFiles;
pub use error::WireError;
pub use post::Post;
pub use prelude::{COMMAND_HEADER, PartStream, Prelude};
pub use profile::{read_trace, write_trace};
pub use push::{KnownLayer, write_places};
pub use reference::{ParseReferenceError, Reference, Version, is_repository_name, is_tag};
pub use referrers::{CREATED_ANNOTATION, created_after, made_at, newest_first};

/// The messages of `proto/lamina/v1`, as prost makes them.
pub mod proto {
    mod generated {
        #![expect(
            missing_docs,
            unused_qualifications,
            clippy::allow_attributes_without_reason,
            clippy::too_many_lines,
            reason = "it is generated; proto/ has the comments"
        )]
        include!(concat!(env!("OUT_DIR"), "/lamina.v1.rs"));
    }
    pub use generated::*;

    /// The content type of every request and answer of a registry under `/lamina/v1`.
    pub const CONTENT_TYPE: &str = "application/x-protobuf";
    /// Chunk ids in one request: 4096 × 32 B = 128 KiB, about 1 ms on a 1 Gbit/s link, so that a slow round trip is
    /// still the larger cost.
    pub const IDS_PER_REQUEST: usize = 4096;
    /// Layers in one request.
    pub const LAYERS_PER_REQUEST: usize = 1000;
}
