//! What can be set.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lamina_image::IngestOptions;
use lamina_store::GcConfig;
use lamina_wire::Client;

use crate::{Access, Tls};

/// How a registry behaves.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// Connections that are served at the same time; more wait in the kernel's queue.
    pub connections_max: usize,
    /// How long a request's head may take, and how long a connection may be idle between requests.
    pub head_max: Duration,
    /// How long a body may stand still, in either direction.
    pub stall_max: Duration,
    /// How long requests may still run after the shutdown was asked for.
    pub drain_max: Duration,
    /// Whether `/metrics` is served beside the registry itself.
    pub metrics: bool,
    /// How much time lies at least between two traces of one image that are taken; others are dropped.
    pub trace_every: Duration,
    /// How pushed layers are cut.
    pub ingest: IngestOptions,
    /// How often garbage is collected, and how; `None` for never.
    pub gc: Option<(Duration, GcConfig)>,
    /// Who may do what; everybody everything where there is none.
    pub access: Option<Arc<Access>>,
    /// TLS; plain HTTP where there is none.
    pub tls: Option<Arc<Tls>>,
    /// Whose images are served beside those that are here; then nothing is pushed here.
    pub upstream: Option<UpstreamConfig>,
    /// What time it is.
    pub clock: fn() -> SystemTime,
}

/// Another registry, whose images are passed on.
#[derive(Clone, Debug)]
pub struct UpstreamConfig {
    /// How it is asked.
    pub client: Client,
    /// How long it counts what the upstream has said of a tag.
    pub revalidate: Duration,
    /// A directory for what is on its way: as much as the blobs that come at the same time, in files that vanish by
    /// themselves.
    pub spool: PathBuf,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            head_max: Duration::from_secs(75),
            stall_max: Duration::from_secs(60),
            drain_max: Duration::from_secs(10),
            metrics: true,
            trace_every: Duration::from_secs(3),
            ingest: IngestOptions::default(),
            gc: None,
            access: None,
            tls: None,
            upstream: None,
            clock: SystemTime::now,
        }
    }
}

impl RegistryConfig {
    /// Seconds since 1970.
    pub(crate) fn now(&self) -> u64 {
        (self.clock)().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}
