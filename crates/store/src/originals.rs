//! Originals: layers that are stored as they came, though a recipe makes them again.
//!
//! Where they are dropped, collections do it, and what holds for all they delete holds here too: grace, quarantine, leases.
//! A layer is dropped only if it was made again just before, from the record, recipe and packs as they are stored, and hashed
//! to its digest. These stay for as long as anything names the layer, and dropping writes nothing: a crash leaves the layer
//! stored or dropped, and readable either way.
//!
//! That is so for plain tars alone. A compressed layer has decisions of its compressor in it, and these are not in the
//! recipe. They could be made again only by the same version of the same compressor, and a version does not last: zlib-rs
//! 0.6 and zstd 1.5.7 at any level make not one of the layers that gzip, pigz, Python, skopeo and Debian's zstd 1.5.4 make of
//! one tar. What was dropped by the word of such a version would be lost with the next one.

use std::sync::Arc;

use lamina_image::Digest;

use crate::StoreError;
use crate::blobs::read_recipe;
use crate::objects::Objects;
use crate::rebuild::rebuilt_digest;
use crate::record::LayerRecord;

/// What becomes of originals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Originals {
    /// They stay.
    #[default]
    Keep,
    /// Plain tars are dropped once their images are converted, and rebuilt for whoever asks. Compressed layers stay.
    Drop,
}

/// Makes a layer's plain tar again, to see that its bytes can be had without the original.
///
/// Cost: every frame read and opened, and the tar hashed: a second for each GiB on two cores. Memory: up to 80 MiB.
///
/// # Errors
/// [`StoreError::Digest`] where other bytes come out, and whatever else keeps it from being rebuilt now.
pub(crate) async fn prove(objects: &Objects, layer: &LayerRecord) -> Result<(), StoreError> {
    let LayerRecord { recipe, diff_id: expected, .. } = *layer;
    let recipe = read_recipe(objects, recipe).await?;
    if recipe.tar_bytes() != layer.tar_bytes {
        return Err(StoreError::Digest { expected, found: recipe.diff_id() });
    }
    let found: Digest = rebuilt_digest(objects, Arc::new(recipe)).await?;
    if found == expected { Ok(()) } else { Err(StoreError::Digest { expected, found }) }
}
