//! Blobs: bytes under the digest of them, stored as such or rebuilt from a recipe.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use lamina_image::{Digest, Recipe};

use crate::objects::Objects;
use crate::record::LayerRecord;
use crate::{Content, Store, StoreError, keys};

/// Recipes over 512 MiB are refused: enough for a layer of 300 GiB.
const RECIPE_BYTES_MAX: u64 = 512 << 20;

/// How the bytes of a blob can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blob {
    /// They are stored.
    Stored {
        /// The blob's length in bytes.
        size: u64,
    },
    /// They are a layer's plain tar, which its recipe rebuilds.
    Rebuilt {
        /// The blob's length in bytes.
        size: u64,
        /// The recipe's blob.
        recipe: Digest,
    },
}

/// Some bytes of a blob.
pub struct BlobPart {
    /// The whole blob's length in bytes.
    pub size: u64,
    /// Which they are; at least one.
    pub range: Range<u64>,
    /// They.
    pub bytes: Content,
}

impl std::fmt::Debug for BlobPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlobPart({:?} of {})", self.range, self.size)
    }
}

impl Blob {
    /// The blob's length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Stored { size } | Self::Rebuilt { size, .. } => *size,
        }
    }
}

impl Store {
    /// How to read a blob; `None` where it is not known.
    pub async fn blob(&self, digest: Digest) -> Result<Option<Blob>, StoreError> {
        if let Some(meta) = self.objects.head(&keys::blob(digest)).await? {
            return Ok(Some(Blob::Stored { size: meta.size }));
        }
        let layer: Option<LayerRecord> = self.objects.json(&keys::layer(digest)).await?;
        let layer = layer.filter(|layer| layer.diff_id == digest);
        Ok(layer.map(|layer| Blob::Rebuilt { size: layer.tar_bytes, recipe: layer.recipe }))
    }

    /// The same for whoever tells others that the blob is there, or builds on it: no collection removes it from now on,
    /// for as long as a push may take.
    pub async fn take_blob(&self, digest: Digest) -> Result<Option<Blob>, StoreError> {
        if let Some(meta) = self.objects.take(&keys::blob(digest)).await? {
            return Ok(Some(Blob::Stored { size: meta.size }));
        }
        // the record holds its recipe, and that its packs
        let layer = self.layer(digest).await?.filter(|layer| layer.diff_id == digest);
        Ok(layer.map(|layer| Blob::Rebuilt { size: layer.tar_bytes, recipe: layer.recipe }))
    }

    /// A part of a blob. The range must lie inside.
    pub async fn read_blob(
        &self,
        digest: Digest,
        blob: Blob,
        range: Range<u64>,
    ) -> Result<Content, StoreError> {
        assert!(range.start <= range.end && range.end <= blob.size(), "{range:?} of {blob:?}");
        let recipe = match blob {
            Blob::Stored { size } => {
                if let Some(body) = self.objects.content(&keys::blob(digest), range.clone()).await? {
                    return Ok(body);
                }
                // an original that was dropped since somebody looked
                match self.blob(digest).await? {
                    Some(Blob::Rebuilt { size: rebuilt, recipe }) if rebuilt == size => recipe,
                    _ => return Err(StoreError::Missing(digest)),
                }
            }
            Blob::Rebuilt { recipe, .. } => recipe,
        };
        self.rebuild(Arc::new(self.recipe(recipe).await?), range).await.map(Content::Stream)
    }

    /// A whole stored blob, of at most `limit` bytes.
    pub async fn small_blob(&self, digest: Digest, limit: u64) -> Result<Bytes, StoreError> {
        let bytes = self.objects.read(&keys::blob(digest), limit).await?;
        bytes.ok_or(StoreError::Missing(digest))
    }

    /// Reads and parses a recipe.
    pub async fn recipe(&self, digest: Digest) -> Result<Recipe, StoreError> {
        read_recipe(&self.objects, digest).await
    }

    /// Stores bytes that this process has made, under their sha256.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<Digest, StoreError> {
        let hashed = bytes.clone();
        let digest = tokio::task::spawn_blocking(move || Digest::of(&hashed)).await;
        let digest = digest.expect("hashing does not panic");
        if self.objects.take(&keys::blob(digest)).await?.is_none() {
            self.objects.put(&keys::blob(digest), bytes.into()).await?;
        }
        Ok(digest)
    }
}

/// Reads and parses a recipe.
pub(crate) async fn read_recipe(objects: &Objects, digest: Digest) -> Result<Recipe, StoreError> {
    let bytes = objects.read(&keys::blob(digest), RECIPE_BYTES_MAX).await?;
    let bytes = bytes.ok_or(StoreError::Missing(digest))?;
    let parsed = tokio::task::spawn_blocking(move || Recipe::parse(bytes)).await;
    Ok(parsed.expect("parsing does not panic")?)
}
