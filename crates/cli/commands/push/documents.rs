//! The documents of a pushed image.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use lamina_image::{
    Descriptor, Digest, Manifest, Platform, RECIPE_ANNOTATION, Recipe, TREE_ANNOTATION,
    TREE_BYTES_ANNOTATION, media_type,
};

use crate::source::SourceImage;

/// What goes to the registry last.
pub(super) struct Documents {
    pub(super) config: Bytes,
    pub(super) media_type: String,
    pub(super) manifest: Bytes,
}

/// Writes the manifest that names each layer as a plain tar with its recipe, and the tree. With `keep`, the source's
/// own manifest stays as it is. The config stays in any case, and with it the image's id.
pub(super) fn write_documents(
    image: &SourceImage,
    recipes: &[Recipe],
    (tree, tree_len): (Digest, usize),
    platform: &Platform,
    keep: bool,
) -> Result<Documents> {
    let config = match &image.config {
        Some(config) => Bytes::from(config.clone()),
        None => Bytes::from(new_config(recipes, platform)),
    };
    if keep {
        let Some((media_type, manifest, _)) = &image.manifest else {
            bail!(
                "--keep-layers needs a source with a manifest and compressed layers: oci, oci-archive or docker://"
            );
        };
        return Ok(Documents {
            config,
            media_type: media_type.clone(),
            manifest: Bytes::from(manifest.clone()),
        });
    }
    let layers = recipes.iter().map(|recipe| {
        let mut layer = Descriptor::named(media_type::OCI_LAYER, recipe.diff_id(), recipe.tar_bytes());
        layer.annotations.insert(RECIPE_ANNOTATION.into(), Digest::of(recipe.blob()).to_string());
        layer
    });
    let original = image.manifest.as_ref().map(|(_, _, manifest)| manifest);
    let mut annotations = original.map_or_else(BTreeMap::new, |manifest| manifest.annotations.clone());
    annotations.insert(TREE_ANNOTATION.into(), tree.to_string());
    annotations.insert(TREE_BYTES_ANNOTATION.into(), tree_len.to_string());
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.into()),
        artifact_type: None,
        config: Descriptor::of(media_type::OCI_CONFIG, &config),
        layers: layers.collect(),
        subject: original.and_then(|manifest| manifest.subject.clone()),
        annotations,
    };
    let manifest = serde_json::to_vec(&manifest).context("the manifest cannot be written")?;
    Ok(Documents { config, media_type: media_type::OCI_MANIFEST.into(), manifest: Bytes::from(manifest) })
}

/// The config of an image made from a directory. No time in it: the same directory gives the same image.
fn new_config(recipes: &[Recipe], platform: &Platform) -> Vec<u8> {
    let diff_ids: Vec<Digest> = recipes.iter().map(Recipe::diff_id).collect();
    let config = serde_json::json!({
        "architecture": platform.architecture,
        "os": platform.os,
        "config": { "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    serde_json::to_vec(&config).expect("strings and lists are JSON")
}
