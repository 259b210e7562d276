//! `lamina registry`.

mod guard;
mod upstream;

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lamina_registry::{RegistryConfig, Tls};
use lamina_store::{Store, StoreConfig};
use tokio::net::TcpListener;

use super::interrupted;
use crate::args::{Common, RegistryArguments};
use crate::config::access_table;

/// Serves until Ctrl-C or SIGTERM.
pub(crate) async fn run(arguments: RegistryArguments, common: Common) -> Result<()> {
    let address = arguments.listen;
    let tls = match arguments.tls_cert.zip(arguments.tls_key) {
        Some((certificate, key)) => Some(Arc::new(Tls::open(certificate, key)?)),
        None => None,
    };
    ensure!(
        address.ip().is_loopback() || common.plain_http || tls.is_some(),
        "{address} is not on loopback: name a certificate by --tls-cert and --tls-key, or put TLS in front of it and say --plain-http"
    );
    let access = match access_table(common.config.as_deref())? {
        Some((file, table)) => Some(guard::read(&file, table, tls.is_some())?),
        None => None,
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let storage = arguments.storage.parse(&common)?;
    let index = arguments.storage.index(&storage);
    let upstream = upstream::read(arguments.upstream, &common, index.with_file_name("spool"))?;
    let config = arguments.limits.storing(StoreConfig::new(index));
    let store = Store::open_storage(&storage, config).await.with_context(|| storage.to_string())?;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}; is another registry running? See --listen"))?;
    println!("listening on {scheme}://{}", listener.local_addr()?);
    std::io::stdout().flush()?;
    let gc = arguments.gc.config();
    let gc = (!arguments.gc_every.is_zero()).then_some((arguments.gc_every, gc));
    let config = RegistryConfig { gc, access, tls, upstream, ..arguments.limits.serving() };
    lamina_registry::serve(listener, store.clone(), config, interrupted()).await?;
    store.close().await.context("the registry ended, but could not say so to others on the same storage")?;
    Ok(())
}
