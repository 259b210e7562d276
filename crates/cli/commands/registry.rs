//! `lamina registry`.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use lamina_registry::RegistryConfig;
use lamina_store::{Store, StoreConfig};
use tokio::net::TcpListener;

use super::interrupted;
use crate::args::{Common, RegistryArguments};

/// Serves until Ctrl-C or SIGTERM.
pub(crate) async fn run(arguments: RegistryArguments, common: Common) -> Result<()> {
    let address = arguments.listen;
    ensure!(
        address.ip().is_loopback() || common.plain_http,
        "{address} is not on loopback, and this registry speaks plain HTTP: put TLS in front of it, or say --plain-http"
    );
    let storage = arguments.storage.parse(&common)?;
    let config = arguments.limits.storing(StoreConfig::new(arguments.storage.index(&storage)));
    let store = Store::open_storage(&storage, config).await.with_context(|| storage.to_string())?;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}; is another registry running? See --listen"))?;
    println!("listening on http://{}", listener.local_addr()?);
    std::io::stdout().flush()?;
    let gc = arguments.gc.config();
    let gc = (!arguments.gc_every.is_zero()).then_some((arguments.gc_every, gc));
    let config = RegistryConfig { gc, ..arguments.limits.serving() };
    lamina_registry::serve(listener, store.clone(), config, interrupted()).await?;
    store.close().await.context("the registry ended, but could not say so to others on the same storage")?;
    Ok(())
}
