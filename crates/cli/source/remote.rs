//! Images in another registry.

use std::io::Read;

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use lamina_image::{Descriptor, Document, MANIFEST_BYTES_MAX, Platform};
use lamina_wire::{Client, ClientConfig, Reference, Version};
use tokio::runtime::Handle;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::{Source, SourceImage, image_of, resolve};

/// One image of a registry.
pub(crate) struct Remote {
    client: Client,
    repository: String,
    image: SourceImage,
    runtime: Handle,
}

impl Remote {
    /// Reads manifest and config. Blocks: call it where that is allowed, inside a runtime.
    pub(crate) fn open(reference: &Reference, platform: &Platform, config: ClientConfig) -> Result<Self> {
        let runtime = Handle::current();
        let client = Client::new(&reference.host, config)?;
        let repository = reference.repository.clone();
        let fetched = runtime.block_on(client.manifest(&repository, &reference.version))?;
        let mut fetch = |descriptor: &Descriptor| {
            let version = Version::Digest(descriptor.digest);
            let fetched = runtime.block_on(client.manifest(&repository, &version))?;
            Ok((fetched.media_type, fetched.bytes.to_vec()))
        };
        let name = reference.to_string();
        let manifest = resolve(&name, &fetched.media_type, fetched.bytes.to_vec(), platform, &mut fetch)?;
        let max = MANIFEST_BYTES_MAX as u64;
        let config = runtime.block_on(client.blob(&repository, manifest.2.config.digest, max))?;
        let image = image_of(&name, manifest, config.to_vec())?;
        Ok(Self { client, repository, image, runtime })
    }

    /// The image's manifest and its bytes, for whoever only wants to look.
    pub(crate) async fn manifest(
        client: &Client,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<(lamina_wire::Fetched, Document)> {
        let mut fetched = client.manifest(&reference.repository, &reference.version).await?;
        let mut document = Document::parse(&fetched.media_type, &fetched.bytes)
            .with_context(|| format!("{reference}: its manifest"))?;
        if let Document::Index(index) = &document
            && let Some(one) = index.for_platform(platform)
        {
            fetched = client.manifest(&reference.repository, &Version::Digest(one.digest)).await?;
            document = Document::parse(&fetched.media_type, &fetched.bytes)?;
        }
        Ok((fetched, document))
    }
}

impl Source for Remote {
    fn image(&self) -> &SourceImage {
        &self.image
    }

    fn layer(&self, number: usize) -> Result<Box<dyn Read + Send>> {
        let descriptor = self.image.layers[number].descriptor.as_ref().expect("registries have descriptors");
        let blob = self.runtime.block_on(self.client.blob_stream(&self.repository, descriptor.digest))?;
        let reader = StreamReader::new(blob.bytes.map_err(std::io::Error::other));
        Ok(Box::new(SyncIoBridge::new_with_handle(reader, self.runtime.clone())))
    }
}
