//! `lamina node`: the daemon of a cache directory.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use lamina_cache::CacheConfig;
use lamina_node::{Controller, Mirrors, Node, NodeConfig};
use tokio::runtime::Handle;

use super::{client_config, interrupted};
use crate::args::{CacheArguments, Common, NodeArguments, NodeSettings};
use crate::source::host_platform;

/// Serves mounts until Ctrl-C or SIGTERM, then unmounts everything.
pub(crate) async fn run(arguments: NodeArguments, common: Common) -> Result<()> {
    let ready = || {
        println!("ready");
        // whoever started this process may not read any more
        let _ = std::io::stdout().flush();
    };
    let socket = Controller::socket(&arguments.cache.directory);
    let node = open(&arguments.cache, &arguments.settings, &common).await?;
    lamina_node::serve(node, &socket, arguments.exit_when_idle, ready, interrupted()).await?;
    Ok(())
}

/// Opens the cache.
pub(crate) async fn open(
    cache: &CacheArguments,
    settings: &NodeSettings,
    common: &Common,
) -> Result<Arc<Node>> {
    let mut cache = CacheConfig::new(cache.directory.clone(), settings.cache_mib << 20);
    cache.deadline = Duration::from_secs(settings.deadline);
    let read_ahead_kb = settings.read_ahead_kb;
    let mut mirrors = Mirrors::new();
    for (registry, mirror) in &settings.mirrors {
        mirrors.entry(registry.clone()).or_default().push(mirror.clone());
    }
    let client = client_config(common);
    let config = NodeConfig { cache, client, mirrors, platform: host_platform(), read_ahead_kb };
    let handle = Handle::current();
    let node = tokio::task::spawn_blocking(move || Node::open(config, handle)).await??;
    Ok(Arc::new(node))
}
