//! What the bench needs to know of an image in an OCI layout.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// One image of a layout.
#[derive(Debug)]
pub(crate) struct Layout {
    /// `oci:DIR:TAG`, with an absolute directory.
    pub(crate) source: String,
    /// The tag alone.
    pub(crate) tag: String,
    /// `sha256:…` of the manifest.
    pub(crate) digest: String,
    /// The layers as they are stored, the lowest first.
    pub(crate) layers: Vec<PathBuf>,
    /// Bytes of those together.
    pub(crate) layer_bytes: u64,
    /// The environment of its containers.
    pub(crate) env: Vec<(String, String)>,
}

impl Layout {
    /// Reads index, manifest and config.
    ///
    /// # Errors
    /// When `source` is no `oci:DIR:TAG`, or something is missing in it.
    pub(crate) fn open(source: &str) -> Result<Self> {
        let (dir, tag) = source
            .strip_prefix("oci:")
            .and_then(|rest| rest.rsplit_once(':'))
            .with_context(|| format!("{source}: not of the form oci:DIR:TAG"))?;
        let dir = std::fs::canonicalize(dir).with_context(|| dir.to_owned())?;
        let blob = |digest: &str| dir.join("blobs").join(digest.replacen(':', "/", 1));
        let json = |path: PathBuf| -> Result<Value> {
            let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
            serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
        };
        let index = json(dir.join("index.json"))?;
        let tagged = index["manifests"].as_array().into_iter().flatten();
        let digest = tagged
            .filter(|manifest| manifest["annotations"]["org.opencontainers.image.ref.name"] == tag)
            .find_map(|manifest| manifest["digest"].as_str())
            .with_context(|| format!("{source}: no such tag"))?;
        let manifest = json(blob(digest))?;
        let layers: Vec<_> = manifest["layers"].as_array().into_iter().flatten().collect();
        ensure!(!layers.is_empty(), "{source}: a manifest without layers");
        let config = json(blob(manifest["config"]["digest"].as_str().context("a manifest without config")?))?;
        let env = config["config"]["Env"].as_array().into_iter().flatten();
        Ok(Self {
            source: format!("oci:{}:{tag}", dir.display()),
            tag: tag.to_owned(),
            digest: digest.to_owned(),
            layer_bytes: layers.iter().filter_map(|layer| layer["size"].as_u64()).sum(),
            layers: layers.iter().filter_map(|layer| layer["digest"].as_str()).map(blob).collect(),
            env: env
                .filter_map(|assignment| assignment.as_str()?.split_once('='))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        })
    }
}
