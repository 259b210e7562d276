//! The small JSON documents beside the blobs.

use lamina_image::{Descriptor, Digest};
use serde::{Deserialize, Serialize};

/// That a manifest belongs to a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestLink {
    /// As the manifest was pushed.
    pub media_type: String,
    /// Its length in bytes.
    pub size: u64,
}

/// How to rebuild a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The recipe's blob.
    pub recipe: Digest,
    /// The sha256 of the plain tar.
    pub diff_id: Digest,
    /// The length of the plain tar.
    pub tar_bytes: u64,
}

/// Where an image is on its way to a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageState {
    /// Waits for its turn, or has it.
    Converting,
    /// Has a tree.
    Done,
    /// Has none, and trying again with the same bytes will not help.
    Failed,
}

/// What conversion counted. All zero for an image that came with its tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerCounts {
    /// Layers that were cut.
    pub layers_cut: u64,
    /// Layers of which the recipe was known.
    pub layers_known: u64,
    /// Bytes read of layers as they are compressed.
    pub bytes_read: u64,
    /// Bytes of their plain tars.
    pub tar_bytes: u64,
    /// Chunks cut, each time one occurs.
    pub chunks: u64,
    /// Distinct chunks that were new.
    pub chunks_new: u64,
    /// Distinct chunks that were known.
    pub chunks_known: u64,
    /// Bytes of packs written.
    pub pack_bytes: u64,
}

/// What became of an image's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Where it is.
    pub state: ImageState,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The tree's blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<Descriptor>,
    /// The manifest that hangs the tree on the image; `None` where the image's own manifest names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Descriptor>,
    /// What conversion counted, so far or in the end.
    pub counts: LayerCounts,
    /// When the image came, in seconds since 1970.
    pub queued_at: u64,
    /// When it was done or failed, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<u64>,
}

impl ImageRecord {
    /// An image that waits for its tree since `now`, in seconds since 1970.
    pub fn queued(now: u64) -> Self {
        let (state, counts) = (ImageState::Converting, LayerCounts::default());
        Self { state, reason: None, tree: None, artifact: None, counts, queued_at: now, finished_at: None }
    }
}

/// What a tag points at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefValue {
    /// The manifest; `None` after the tag was deleted.
    pub manifest: Option<Digest>,
}
