//! A registry as the source of a cache.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lamina_cache::{Class, Source, SourceError};
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
            fetched.map_err(|error| match error {
                WireError::NotFound { .. } => SourceError::Missing(pack),
                error if error.is_passing() => SourceError::Unreachable { pack, cause: Arc::new(error) },
                error => SourceError::Refused { pack, cause: Arc::new(error) },
            })
        }
        .boxed()
    }
}
