//! The HTTP face of a store: an OCI Distribution 1.1 registry that also makes trees.
//!
//! Any client's push is taken as it is and answered at once; the tree is made in the background and hangs on the
//! image as a referrer. A manifest that names a tree itself is checked before anything of it can be seen: the tree is
//! derived again from the recipes, and each new layer is rebuilt once. The registry keeps no state of its own: jobs
//! are in the store, and a restart goes on with them. Only uploads that were open are lost by it.

mod admit;
mod api;
mod blobs;
mod body;
mod config;
mod convert;
mod error;
mod ingest;
mod lists;
mod manifests;
mod messages;
mod query;
mod range;
mod route;
mod server;
mod stall;
mod uploads;

pub use config::RegistryConfig;
pub use error::ApiError;
pub use server::serve;
