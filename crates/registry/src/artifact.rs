//! Artifacts that this registry makes and hangs on images: trees, profiles, boot packs.
//!
//! An artifact is a manifest of its own whose subject is the image. Its blobs are durable before it is, and it before
//! any repository lists it.

use std::collections::BTreeMap;

use bytes::Bytes;
use lamina_image::{Descriptor, Digest, Document, Manifest, media_type};
use lamina_store::{ManifestPut, Referrer, Repo, Store, StoreError};

use crate::manifests::referrer_of;

/// A manifest that hangs blobs on an image.
#[derive(Debug)]
pub(crate) struct Artifact {
    /// Its artifact type.
    pub(crate) kind: &'static str,
    /// The image's manifest.
    pub(crate) subject: Descriptor,
    /// What it carries. All of it is durable.
    pub(crate) blobs: Vec<Descriptor>,
    /// What a referrers answer says of it.
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Artifact {
    /// Writes the manifest's blob. Gives what a referrers answer says of it; the repositories get it by [`hang`].
    pub(crate) async fn write(self, store: &Store) -> Result<Descriptor, StoreError> {
        let config = Bytes::from_static(b"{}");
        store.put_blob(config.clone()).await?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type::OCI_MANIFEST.to_owned()),
            artifact_type: Some(self.kind.to_owned()),
            config: Descriptor::of(media_type::OCI_EMPTY, &config),
            layers: self.blobs,
            subject: Some(self.subject),
            annotations: self.annotations,
        };
        let bytes = Bytes::from(serde_json::to_vec(&manifest).expect("a manifest has string keys"));
        let digest = store.put_blob(bytes.clone()).await?;
        let document = Document::Manifest(manifest);
        Ok(referrer_of(&document, media_type::OCI_MANIFEST, digest, bytes.len() as u64))
    }
}

/// Hangs an artifact that was written on its image in one repository, which has all that it carries from now on.
pub(crate) async fn hang(
    store: &Store,
    repo: &Repo,
    image: Digest,
    artifact: &Descriptor,
) -> Result<(), StoreError> {
    let digest = artifact.digest;
    let bytes = store.small_blob(digest, artifact.size).await?;
    let media_type = media_type::OCI_MANIFEST.to_owned();
    if let Ok(Document::Manifest(manifest)) = Document::parse(&media_type, &bytes) {
        let carried = manifest.layers.iter().chain([&manifest.config]);
        store.link_blobs(repo, carried.map(|blob| blob.digest)).await?;
    }
    let referrer = Some(Referrer { subject: image, descriptor: artifact.clone() });
    store.put_manifest(repo, ManifestPut { digest, media_type, bytes, referrer }).await
}
