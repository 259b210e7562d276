//! Artifacts that hang on an image, made on the client for registries that do not make them.

use std::collections::BTreeMap;

use anyhow::Result;
use bytes::Bytes;
use lamina_image::{Descriptor, Digest, Manifest, media_type};
use lamina_wire::Client;

/// The config of every artifact.
const CONFIG: &[u8] = b"{}";

/// A manifest that hangs blobs on an image.
pub(crate) struct Artifact {
    /// Its artifact type.
    pub(crate) kind: &'static str,
    /// The image's manifest.
    pub(crate) subject: Descriptor,
    /// What it holds. All of it has been pushed.
    pub(crate) blobs: Vec<Descriptor>,
    /// What a list of referrers says of it.
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Artifact {
    /// Puts it on the image. Its config, [`config`], must have been pushed. Gives what a list of referrers says of
    /// it.
    pub(crate) async fn push(self, client: &Client, repository: &str) -> Result<Descriptor> {
        let subject = self.subject.digest;
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type::OCI_MANIFEST.to_owned()),
            artifact_type: Some(self.kind.to_owned()),
            config: Descriptor::of(media_type::OCI_EMPTY, CONFIG),
            layers: self.blobs,
            subject: Some(self.subject),
            annotations: self.annotations.clone(),
        };
        let bytes = Bytes::from(serde_json::to_vec(&manifest)?);
        let mut listed = Descriptor::of(media_type::OCI_MANIFEST, &bytes);
        listed.artifact_type = Some(self.kind.to_owned());
        listed.annotations = self.annotations;
        client.push_referrer(repository, subject, listed.clone(), bytes).await?;
        Ok(listed)
    }
}

/// The config that every artifact names, with its digest.
pub(crate) fn config() -> (Digest, Bytes) {
    (Digest::of(CONFIG), Bytes::from_static(CONFIG))
}
