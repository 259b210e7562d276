//! The HTTP face of a store: an OCI Distribution 1.1 registry that also makes trees.
//!
//! Any client's push is taken as it is and answered at once; the tree is made in the background and hangs on the
//! image as a referrer. A manifest that names a tree itself is checked before anything of it can be seen: the tree is
//! derived again from the recipes, and each new layer is rebuilt once. What nodes tell of starts becomes a profile and a
//! boot pack, which hang on the image as well. The registry keeps no state of its own: jobs are in the store, and a
//! restart goes on with them. Only uploads that were open are lost by it, and what waited to be learnt.
//!
//! Where there is an upstream, what is asked for and not here comes from it, and stays as if it had been pushed.

mod access;
mod admit;
mod api;
mod artifact;
mod blobs;
mod body;
mod config;
mod convert;
mod error;
mod ingest;
mod learn;
mod lists;
mod manifests;
mod messages;
mod metrics;
mod observe;
mod prelude;
mod profiles;
mod put;
mod query;
mod queue;
mod range;
mod reach;
mod route;
mod sendfile;
mod server;
mod stall;
mod tls;
mod uploads;
mod upstream;

pub use access::{Access, AccessConfig, Action, DedupScope, Rule, RuleError, Users, UsersError, Who};
pub use config::{RegistryConfig, UpstreamConfig};
pub use error::{Absent, ApiError};
pub use server::serve;
pub use tls::{Tls, TlsError};
