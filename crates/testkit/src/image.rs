//! Container images described in code.
//!
//! ```
//! use lamina_testkit::image::Image;
//!
//! let dir = tempfile::tempdir().unwrap();
//! let source = Image::new()
//!     .layer(|l| l.dir("etc").file("etc/motd", "hi").mode(0o600).owner(1, 2))
//!     .layer(|l| l.whiteout("etc/motd").zstd())
//!     .write(dir.path(), "small")
//!     .unwrap();
//! assert!(source.starts_with("oci:") && source.ends_with(":small"));
//! ```
//!
//! Names are written as they are given: `..`, absolute ones and names that are not UTF-8 too, since a reader
//! has to face them. The same description always gives the same bytes.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub use self::layer::Layer;
use self::layer::Packing;

mod entry;
mod layer;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An image: layers, the lowest first, and what its configuration says.
#[derive(Clone, Debug, Default)]
pub struct Image {
    layers: Vec<Layer>,
    command: Vec<String>,
    entrypoint: Vec<String>,
    env: Vec<String>,
    user: String,
    working_dir: String,
}

impl Image {
    /// An image without layers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts one layer on top. It is a gzip layer unless it says otherwise.
    pub fn layer(mut self, describe: impl FnOnce(Layer) -> Layer) -> Self {
        self.layers.push(describe(Layer::new()));
        self
    }

    /// What a container of this image runs.
    pub fn command<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.command = words.into_iter().map(str::to_owned).collect();
        self
    }

    /// What stands before the command of its containers.
    pub fn entrypoint<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.entrypoint = words.into_iter().map(str::to_owned).collect();
        self
    }

    /// Who runs its containers: `user[:group]`.
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }

    /// Where its containers start.
    pub fn working_dir(mut self, dir: &str) -> Self {
        dir.clone_into(&mut self.working_dir);
        self
    }

    /// Adds one `NAME=value` to the environment of its containers.
    pub fn env(mut self, assignment: &str) -> Self {
        self.env.push(assignment.to_owned());
        self
    }

    /// The layers, the lowest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Writes the image into the OCI layout `dir`, which is made if need be, and gives `oci:DIR:TAG`.
    /// Other tags of the layout stay.
    ///
    /// # Errors
    /// When a file cannot be written, or `dir` holds something else.
    pub fn write(&self, dir: &Path, tag: &str) -> Result<String> {
        let layout = Layout::open(dir)?;
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &self.layers {
            let tar = layer.tar();
            diff_ids.push(digest(&tar));
            layers.push(layout.put(layer.packing().media_type(), &layer.packing().pack(&tar)?)?);
        }
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": {
                "Env": self.env, "Cmd": self.command, "Entrypoint": self.entrypoint, "User": self.user,
                "WorkingDir": self.working_dir,
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = layout.put(CONFIG, &serde_json::to_vec(&config)?)?;
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        let manifest = layout.put(MANIFEST, &serde_json::to_vec(&manifest)?)?;
        layout.tag(manifest, tag)?;
        Ok(format!("oci:{}:{tag}", dir.display()))
    }
}

/// A directory that holds blobs and an index.
struct Layout(PathBuf);

impl Layout {
    fn open(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir.join("blobs/sha256")).with_context(|| dir.display().to_string())?;
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Self(dir.to_owned()))
    }

    /// Stores a blob and gives its descriptor.
    fn put(&self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = digest(bytes);
        let hex = digest.strip_prefix("sha256:").expect("made so");
        std::fs::write(self.0.join("blobs/sha256").join(hex), bytes)?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
    }

    /// Makes `tag` name the manifest, and no other.
    fn tag(&self, mut manifest: Value, tag: &str) -> Result<()> {
        let path = self.0.join("index.json");
        let mut tagged = match std::fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice::<Value>(&bytes)?["manifests"].take() {
                Value::Array(manifests) => manifests,
                _ => Vec::new(),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        tagged.retain(|other| other["annotations"][REF_NAME] != tag);
        manifest["annotations"] = json!({ REF_NAME: tag });
        tagged.push(manifest);
        let index = json!({ "schemaVersion": 2, "manifests": tagged });
        Ok(std::fs::write(path, serde_json::to_vec(&index)?)?)
    }
}

impl Packing {
    fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    fn pack(self, tar: &[u8]) -> Result<Vec<u8>> {
        Ok(match self {
            Self::Plain => tar.to_vec(),
            Self::Zstd => zstd::bulk::compress(tar, 3)?,
            Self::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(tar)?;
                gzip.finish()?
            }
        })
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

#[cfg(test)]
mod tests;
