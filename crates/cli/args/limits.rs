//! What a registry takes from its clients at most.

use std::time::Duration;

use clap::Args;
use lamina_registry::RegistryConfig;
use lamina_store::StoreConfig;

#[derive(Args, Clone, Debug)]
pub(crate) struct RegistryLimits {
    /// Connections that are served at the same time; more wait
    #[arg(long, env = "LAMINA_CONNECTIONS", default_value_t = 1024, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) connections: u32,
    /// Uploads that may be open at the same time; each holds up to 16 MiB of memory
    #[arg(long, env = "LAMINA_UPLOADS", default_value_t = 256, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) uploads: u32,
    /// After how long an upload to which nobody writes is dropped, in seconds
    #[arg(long, env = "LAMINA_UPLOAD_IDLE", default_value_t = 3600, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) upload_idle: u64,
    /// The longest blob that is taken, in GiB
    #[arg(long, env = "LAMINA_BLOB_GIB", default_value_t = 1024, value_name = "GIB",
        value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) blob_gib: u64,
    /// How long a body may stand still, in either direction, in seconds; slower than 1 KiB/s on average is no better
    #[arg(long, env = "LAMINA_STALL", default_value_t = 60, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) stall: u64,
    /// How often it is asked whether somebody collects
    #[arg(long, hide = true, value_name = "TIME", value_parser = super::gc::duration)]
    pub(crate) poll_every: Option<Duration>,
    /// Do not serve /metrics
    #[arg(long, env = "LAMINA_NO_METRICS", value_parser = clap::builder::BoolishValueParser::new(),
        action = clap::ArgAction::SetTrue)]
    pub(crate) no_metrics: bool,
}

impl RegistryLimits {
    /// Of the HTTP side.
    pub(crate) fn serving(&self) -> RegistryConfig {
        RegistryConfig {
            connections_max: usize::try_from(self.connections).expect("32 bits"),
            stall_max: Duration::from_secs(self.stall),
            metrics: !self.no_metrics,
            ..RegistryConfig::default()
        }
    }

    /// Of what is taken in.
    pub(crate) fn storing(&self, config: StoreConfig) -> StoreConfig {
        StoreConfig {
            uploads_max: usize::try_from(self.uploads).expect("32 bits"),
            upload_idle_max: Duration::from_secs(self.upload_idle),
            blob_bytes_max: self.blob_gib << 30,
            poll_every: self.poll_every.unwrap_or(config.poll_every),
            ..config
        }
    }
}
