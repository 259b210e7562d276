//! What is known of layers: which recipe rebuilds them.

use lamina_image::Digest;

use crate::record::LayerRecord;
use crate::{Store, StoreError, keys};

impl Store {
    /// How to rebuild the layer of this digest, compressed or plain. No collection removes what is needed for that from
    /// now on.
    pub async fn layer(&self, digest: Digest) -> Result<Option<LayerRecord>, StoreError> {
        self.objects.take_json(&keys::layer(digest)).await
    }

    /// Remembers how to rebuild a layer, under its plain tar's digest and under that of its compressed form, where
    /// there is one. The recipe and all its packs must be durable, and the recipe checked. What is known already
    /// stays.
    pub async fn know_layer(
        &self,
        layer: &LayerRecord,
        compressed: Option<Digest>,
    ) -> Result<(), StoreError> {
        self.objects.create_json(&keys::layer(layer.diff_id), layer).await?;
        if let Some(compressed) = compressed.filter(|digest| *digest != layer.diff_id) {
            self.objects.create_json(&keys::layer(compressed), layer).await?;
        }
        Ok(())
    }
}
