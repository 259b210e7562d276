//! A registry as the source of a cache.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use lamina_cache::{Class, Pieces, Source, SourceError};
use lamina_chunk::PackId;
use lamina_wire::{Client, WireError};

/// Serves packs from one repository. Retries are the client's.
#[derive(Clone, Debug)]
pub struct RegistrySource {
    client: Client,
    repository: String,
}

impl RegistrySource {
    /// Packs as blobs of `repository`.
    pub fn new(client: Client, repository: String) -> Self {
        Self { client, repository }
    }
}

impl Source for RegistrySource {
    fn fetch(
        &self,
        pack: PackId,
        range: Range<u64>,
        _class: Class,
    ) -> BoxFuture<'_, Result<Bytes, SourceError>> {
        async move {
            let fetched = self.client.blob_range(&self.repository, pack.into(), range).await;
            fetched.map_err(|error| translated(pack, error))
        }
        .boxed()
    }

    fn stream(
        &self,
        pack: PackId,
        range: Range<u64>,
        _class: Class,
    ) -> BoxFuture<'_, Result<Pieces, SourceError>> {
        async move {
            let pieces = self.client.blob_range_stream(&self.repository, pack.into(), range).await;
            let pieces = pieces.map_err(|error| translated(pack, error))?;
            Ok(pieces.map_err(move |error| translated(pack, error)).boxed())
        }
        .boxed()
    }
}

/// A registry's answer as a cache understands it.
fn translated(pack: PackId, error: WireError) -> SourceError {
    match error {
        WireError::NotFound { .. } => SourceError::Missing(pack),
        error if error.is_passing() => SourceError::Unreachable { pack, cause: Arc::new(error) },
        error => SourceError::Refused { pack, cause: Arc::new(error) },
    }
}
