//! The registry whose images are passed on.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lamina_registry::UpstreamConfig;
use lamina_wire::{Client, ClientConfig, Scheme};

use crate::args::{Common, UpstreamArguments};
use crate::commands::client_config;

/// What the arguments say; `None` where they name no upstream. Makes the spool, `spool` unless another one is named.
pub(super) fn read(
    arguments: UpstreamArguments,
    common: &Common,
    spool: PathBuf,
) -> Result<Option<UpstreamConfig>> {
    let Some(url) = arguments.upstream else { return Ok(None) };
    let usual = client_config(common)?;
    let scheme = match url.is_tls {
        None => usual.scheme,
        Some(true) => Scheme::Tls,
        // what no TLS is spoken to without being told is loopback
        Some(false) if common.plain_http => Scheme::PlainHttp,
        Some(false) => Scheme::Automatic,
    };
    let client = Client::new(&url.host, ClientConfig { scheme, ..usual })?;
    ensure!(
        url.is_tls != Some(false) || client.base().starts_with("http:"),
        "the upstream {} is not on loopback; if plain HTTP is what you want there, say --plain-http",
        url.host
    );
    let spool = arguments.upstream_spool.unwrap_or(spool);
    std::fs::create_dir_all(&spool).with_context(|| format!("the spool {}", spool.display()))?;
    let revalidate = arguments.upstream_revalidate;
    Ok(Some(UpstreamConfig { client, revalidate, spool }))
}
