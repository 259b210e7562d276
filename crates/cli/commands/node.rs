//! `lamina node`: the daemon of a cache directory.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lamina_cache::CacheConfig;
use lamina_node::{Controller, Held, HolderConfig, Mirrors, Node, NodeConfig, hold};
use tokio::runtime::Handle;

mod upgrade;

use self::upgrade::upgrade;
use super::{Ended, client_config, interrupted};
use crate::access;
use crate::args::{CacheArguments, Common, NodeArguments, NodeCommand, NodeSettings};
use crate::source::host_platform;

/// Serves mounts until Ctrl-C or SIGTERM, then unmounts everything. What serves is a child of this process, which starts it again
/// when it dies, and keeps its mounts alive meanwhile.
pub(crate) async fn run(arguments: NodeArguments, common: Common) -> Result<()> {
    match arguments.command {
        Some(NodeCommand::Upgrade(arguments)) => return upgrade(arguments).await,
        None => {}
    }
    let words = std::env::args_os().skip(1);
    let words = words.filter(|word| word != "--held" && !word.as_bytes().starts_with(b"--adopt"));
    let words: Vec<OsString> = words.collect();
    if !arguments.held {
        let code = hold(HolderConfig { arguments: words, adopt: arguments.adopt }).await?;
        return if code == 0 { Ok(()) } else { bail!(Ended(code)) };
    }
    let held = tokio::task::spawn_blocking(|| Held::by_holder(words)).await??;
    // whoever started a daemon before this one may not read any more
    let again = held.is_again();
    let ready = || {
        if !again {
            println!("ready");
            let _ = std::io::stdout().flush();
        }
    };
    let socket = Controller::socket(&arguments.cache.directory);
    let permanent = !arguments.exit_when_idle;
    let node = open(&arguments.cache, &arguments.settings, &common, held, permanent).await?;
    if let Some(url) = metrics(&node, &arguments.settings)?
        && !again
    {
        println!("metrics on {url}");
    }
    lamina_node::serve(node, &socket, arguments.exit_when_idle, ready, interrupted()).await?;
    Ok(())
}

/// Opens the cache.
pub(crate) async fn open(
    cache: &CacheArguments,
    settings: &NodeSettings,
    common: &Common,
    held: Held,
    permanent: bool,
) -> Result<Arc<Node>> {
    let mut cache = CacheConfig::new(cache.directory.clone(), settings.cache_mib << 20);
    cache.deadline = Duration::from_secs(settings.deadline);
    let read_ahead_kb = settings.read_ahead_kb;
    let mut mirrors: Mirrors = access::mirrors(common)?.into_iter().collect();
    for (registry, mirror) in &settings.mirrors {
        mirrors.entry(registry.clone()).or_default().push(mirror.clone());
    }
    let client = client_config(common)?;
    let config = NodeConfig { cache, client, mirrors, platform: host_platform(), read_ahead_kb, permanent };
    let handle = Handle::current();
    let node = tokio::task::spawn_blocking(move || Node::open(config, held, handle)).await??;
    Ok(Arc::new(node))
}

/// Serves counters where that is wanted, and gives the URL.
pub(crate) fn metrics(node: &Arc<Node>, settings: &NodeSettings) -> Result<Option<String>> {
    let Some(address) = settings.metrics else { return Ok(None) };
    let served = lamina_node::serve_metrics(node, address);
    let address = served.with_context(|| format!("metrics cannot be served on {address}"))?;
    Ok(Some(format!("http://{address}/metrics")))
}
