//! The documents of a pushed image.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use lamina_image::{
    Descriptor, Digest, Manifest, Platform, RECIPE_ANNOTATION, Recipe, TREE_ANNOTATIONS, media_type,
};

use crate::source::SourceImage;

/// What goes to the registry last.
pub(super) struct Documents {
    pub(super) config: Bytes,
    pub(super) media_type: String,
    pub(super) manifest: Bytes,
}

/// What becomes of the manifest.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// The source's own stays as it is.
    pub(super) keep_manifest: bool,
    /// The registry rebuilds layers from recipes. Otherwise they are there as the source has them.
    pub(super) rebuilt: bool,
}

/// Writes the manifest that names the tree, and each layer with its recipe: as a plain tar where the registry rebuilds it. The
/// config stays in any case, and with it the image's id.
pub(super) fn write_documents(
    image: &SourceImage,
    recipes: &[Recipe],
    tree: &Descriptor,
    platform: &Platform,
    shape: Shape,
) -> Result<Documents> {
    let config = match &image.config {
        Some(config) => Bytes::from(config.clone()),
        None => Bytes::from(new_config(recipes, platform)),
    };
    if shape.keep_manifest {
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
    let layers = recipes.iter().zip(&image.layers).map(|(recipe, source)| {
        let plain = || Descriptor::named(media_type::OCI_LAYER, recipe.diff_id(), recipe.tar_bytes());
        let kept = source.descriptor.clone().filter(|_| !shape.rebuilt);
        let mut layer = kept.map_or_else(plain, |layer| Descriptor { media_type: oci(&layer), ..layer });
        layer.annotations.insert(RECIPE_ANNOTATION.into(), Digest::of(recipe.blob()).to_string());
        layer
    });
    let original = image.manifest.as_ref().map(|(_, _, manifest)| manifest);
    let mut annotations = original.map_or_else(BTreeMap::new, |manifest| manifest.annotations.clone());
    annotations.retain(|note, _| !TREE_ANNOTATIONS.contains(&note.as_str()));
    annotations.extend(tree.tree_notes());
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

/// The media type that an OCI manifest has for a layer of a Docker one.
fn oci(layer: &Descriptor) -> String {
    match layer.media_type.as_str() {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => format!("{}+gzip", media_type::OCI_LAYER),
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => format!("{}+zstd", media_type::OCI_LAYER),
        "application/vnd.docker.image.rootfs.diff.tar" => media_type::OCI_LAYER.to_owned(),
        other => other.to_owned(),
    }
}
