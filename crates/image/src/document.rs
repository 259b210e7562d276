//! The JSON documents of an image: manifest, index, config, and what Docker calls by other names.
//!
//! Documents are read, never rewritten: the bytes that were pushed are what is stored and served. What is parsed
//! here is only what Lamina needs. Sources: OCI image-spec 1.1 (manifest.md, image-index.md, config.md,
//! descriptor.md) and Docker's image manifest version 2, schema 2.

use std::collections::BTreeMap;

use lamina_chunk::PackId;
use serde::{Deserialize, Serialize};

use crate::{Algorithm, Digest, TreeNames};

/// Manifests and indexes up to 4 MiB are taken: distribution-spec 1.1 asks for at least that.
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// Deeper documents are refused: the specified ones have 5 levels, and readers give up between 100 and 10,000.
const DEPTH_MAX: usize = 100;
/// More layers are refused. Kernels mount at most 500 lower directories; Docker stops at 127.
pub const LAYERS_MAX: usize = 1_000;

/// Media types, as they stand in documents and in HTTP headers.
pub mod media_type {
    /// An OCI image or artifact manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// An OCI image index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// An OCI image config.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// A layer as a plain tar.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// The two-byte config `{}` of artifacts.
    pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
    /// Docker's manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker's list of manifests.
    pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker's image config.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// A tree, zstd-compressed. Also the artifact type of the manifest that hangs a tree on an image.
    pub const TREE: &str = "application/vnd.lamina.tree.v1+zstd";
    /// A recipe.
    pub const RECIPE: &str = "application/vnd.lamina.recipe.v1";
    /// A profile. Also the artifact type of the manifest that hangs a profile on an image.
    pub const PROFILE: &str = "application/vnd.lamina.profile.v1+json";
    /// A boot pack. Also the artifact type of the manifest that hangs a boot pack on an image.
    pub const BOOT: &str = "application/vnd.lamina.boot.v1";
    /// A pack.
    pub const PACK: &str = "application/vnd.lamina.pack.v1";
    /// A prelude: what a registry answers in one go to whoever starts an image.
    pub const PRELUDE: &str = "application/vnd.lamina.prelude.v1";
    /// A moved record: where the frames of a pack are now.
    pub const MOVED: &str = "application/vnd.lamina.moved.v1";
}

/// Annotation on a manifest, or on its descriptor in a referrers answer: the digest of the image's tree.
pub const TREE_ANNOTATION: &str = "dev.lamina.tree";
/// Annotation beside [`TREE_ANNOTATION`]: how long the tree's blob is, in bytes.
pub const TREE_BYTES_ANNOTATION: &str = "dev.lamina.tree.bytes";
/// Annotation beside [`TREE_ANNOTATION`]: the digest of the names, which the tree's blob begins with.
pub const TREE_NAMES_ANNOTATION: &str = "dev.lamina.tree.names";
/// Annotation beside [`TREE_NAMES_ANNOTATION`]: how long they are, in bytes.
pub const TREE_NAMES_BYTES_ANNOTATION: &str = "dev.lamina.tree.names.bytes";
/// All that is noted of a tree.
pub const TREE_ANNOTATIONS: [&str; 4] =
    [TREE_ANNOTATION, TREE_BYTES_ANNOTATION, TREE_NAMES_ANNOTATION, TREE_NAMES_BYTES_ANNOTATION];
/// Annotation on the descriptor of a profile in a referrers answer: the digest of its blob.
pub const PROFILE_ANNOTATION: &str = "dev.lamina.profile";
/// Annotation on the descriptor of a boot pack in a referrers answer: the digest of its blob.
pub const BOOT_ANNOTATION: &str = "dev.lamina.boot";
/// Annotation beside [`BOOT_ANNOTATION`]: how long the blob is, in bytes.
pub const BOOT_BYTES_ANNOTATION: &str = "dev.lamina.boot.bytes";
/// Annotation beside [`PROFILE_ANNOTATION`] or [`BOOT_ANNOTATION`]: the key of the command that it was made for. What has none
/// is the image's general one.
pub const COMMAND_ANNOTATION: &str = "dev.lamina.command";
/// Annotation on a layer's descriptor: the digest of its recipe.
pub const RECIPE_ANNOTATION: &str = "dev.lamina.recipe";
/// Annotation on the descriptor of a moved record: the pack of which it says where the frames are now.
pub const MOVED_ANNOTATION: &str = "dev.lamina.moved";

/// How a document refers to a blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: String,
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Which machine an image is for; in indexes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// The kind of artifact; in referrers answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Free-form notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// A descriptor of `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::named(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// A descriptor of the blob `digest` of `size` bytes.
    pub fn named(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            platform: None,
            artifact_type: None,
            annotations: BTreeMap::new(),
        }
    }

    /// A descriptor of a tree's blob.
    pub fn of_tree(blob: &[u8]) -> Self {
        let annotations = TreeNames::of(blob).iter().flat_map(TreeNames::notes).collect();
        Self { annotations, ..Self::of(media_type::TREE, blob) }
    }

    /// What an image, or an artifact that hangs this tree on one, is annotated with.
    pub fn tree_notes(&self) -> BTreeMap<String, String> {
        let mut notes = self.annotations.clone();
        notes.insert(TREE_ANNOTATION.to_owned(), self.digest.to_string());
        notes.insert(TREE_BYTES_ANNOTATION.to_owned(), self.size.to_string());
        notes
    }

    /// A descriptor of the bytes of a moved record, which says where the frames of `pack` are now.
    pub fn of_moved(pack: PackId, record: &[u8]) -> Self {
        let annotations = BTreeMap::from([(MOVED_ANNOTATION.to_owned(), pack.to_string())]);
        Self { annotations, ..Self::of(media_type::MOVED, record) }
    }

    /// The tree that it hangs on what it is a referrer of, where it is such an artifact.
    pub fn hung_tree(&self) -> Option<Digest> {
        let is_tree = self.artifact_type.as_deref() == Some(media_type::TREE);
        self.annotations.get(TREE_ANNOTATION).filter(|_| is_tree)?.parse().ok()
    }

    /// The pack of which it says where the frames are now, where it names a moved record.
    pub fn moved_pack(&self) -> Option<PackId> {
        let pack = self.annotations.get(MOVED_ANNOTATION).filter(|_| self.media_type == media_type::MOVED)?;
        PackId::try_from(pack.parse::<Digest>().ok()?).ok()
    }

    /// Whether it is said to be a layer of a file system, compressed or not.
    pub fn is_tar(&self) -> bool {
        let name = self.media_type.split('+').next().unwrap_or_default();
        name.ends_with(".tar") || name.ends_with(".tar.gzip")
    }
}

/// Which machine an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// As Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// As Go names it: `linux`.
    pub os: String,
    /// `v8`, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// An image manifest, or an artifact in the form of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Absent in some older OCI manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The kind of artifact, where this is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image's config.
    pub config: Descriptor,
    /// Its layers, lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub layers: Vec<Descriptor>,
    /// The manifest that this one hangs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free-form notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Whether this is a container image rather than some other artifact.
    pub fn is_image(&self) -> bool {
        [media_type::OCI_CONFIG, media_type::DOCKER_CONFIG].contains(&self.config.media_type.as_str())
    }

    /// The tree that the manifest binds, where it names one.
    pub fn bound_tree(&self) -> Result<Option<Digest>, DocumentError> {
        let annotation = self.annotations.get(TREE_ANNOTATION);
        let parsed: Result<Option<Digest>, _> = annotation.map(|text| text.parse()).transpose();
        match parsed {
            Ok(Some(digest)) if digest.algorithm() != Algorithm::Sha256 => {
                Err(DocumentError::Annotation(TREE_ANNOTATION))
            }
            parsed => parsed.map_err(|_| DocumentError::Annotation(TREE_ANNOTATION)),
        }
    }
}

/// A list of manifests, one for each platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Absent in some older OCI indexes, and in the `index.json` of layouts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The kind of artifact, where this is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The images.
    #[serde(default, deserialize_with = "null_as_default")]
    pub manifests: Vec<Descriptor>,
    /// The manifest that this one hangs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free-form notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

impl Index {
    /// The image for `wanted`: the first whose platform has its architecture and system, or the only one that
    /// says nothing of platforms.
    pub fn for_platform(&self, wanted: &Platform) -> Option<&Descriptor> {
        let fits = |found: &Platform| {
            found.os == wanted.os
                && found.architecture == wanted.architecture
                && (wanted.variant.is_none() || found.variant == wanted.variant)
        };
        let fitting = self.manifests.iter().find(|one| one.platform.as_ref().is_some_and(fits));
        fitting.or_else(|| match self.manifests.as_slice() {
            [only] if only.platform.is_none() => Some(only),
            _ => None,
        })
    }
}

/// What Lamina reads of an image's config.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ImageConfig {
    /// The layers as plain tars.
    pub rootfs: RootFs,
    /// What to run, and how.
    #[serde(default)]
    pub config: Option<Process>,
}

/// The layers of an image, as the config names them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RootFs {
    /// The sha256 of each layer's plain tar, lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub diff_ids: Vec<Digest>,
}

/// What an image runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Process {
    /// `NAME=value` each.
    #[serde(deserialize_with = "null_as_default")]
    pub env: Vec<String>,
    /// The program and its first arguments.
    #[serde(deserialize_with = "null_as_default")]
    pub entrypoint: Vec<String>,
    /// What follows them unless the caller says otherwise.
    #[serde(deserialize_with = "null_as_default")]
    pub cmd: Vec<String>,
    /// Where it starts.
    #[serde(deserialize_with = "null_as_default")]
    pub working_dir: String,
    /// `user[:group]`, by name or number.
    #[serde(deserialize_with = "null_as_default")]
    pub user: String,
}

/// `null` means the same as nothing: Go's encoder writes it for empty lists.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Why a document cannot be used. Another try with the same bytes will not help.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Over [`MANIFEST_BYTES_MAX`].
    #[error("the document is {0} bytes long, more than {MANIFEST_BYTES_MAX}")]
    TooLong(usize),
    /// Not JSON, or not this document.
    #[error("the document does not parse: {0}")]
    Json(#[from] serde_json::Error),
    /// Lists in lists in lists.
    #[error("the document is nested deeper than {DEPTH_MAX} levels")]
    Depth,
    /// Of schema 1, or of a future one.
    #[error("schema version {0} is not supported; push the image again with a client that writes version 2")]
    SchemaVersion(u32),
    /// The header and the document disagree, or neither is known.
    #[error("media type {0:?} is not a manifest or an index")]
    MediaType(String),
    /// The document lists more layers than [`LAYERS_MAX`].
    #[error("{0} layers are more than {LAYERS_MAX}")]
    Layers(usize),
    /// The config lists another number of layers than the manifest.
    #[error("the manifest has {manifest} layers and the config {config}")]
    LayerCount {
        /// In the manifest.
        manifest: usize,
        /// In the config.
        config: usize,
    },
    /// One of Lamina's annotations does not hold what it should.
    #[error("annotation {0} does not hold a sha256 digest")]
    Annotation(&'static str),
    /// A prelude without a manifest, or of more than there can be.
    #[error("the prelude has no manifest, or parts that cannot be")]
    Prelude,
}

/// What can stand under a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// One image or artifact.
    Manifest(Manifest),
    /// Several.
    Index(Index),
}

impl Document {
    /// Reads a manifest or an index of the media type that came with it.
    pub fn parse(media_type: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(DocumentError::TooLong(bytes.len()));
        }
        // what is not read here is skipped, however deep; others read it all
        if depth(bytes) > DEPTH_MAX {
            return Err(DocumentError::Depth);
        }
        let document = match media_type {
            media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => {
                Self::Manifest(serde_json::from_slice(bytes)?)
            }
            media_type::OCI_INDEX | media_type::DOCKER_INDEX => Self::Index(serde_json::from_slice(bytes)?),
            other => return Err(DocumentError::MediaType(other.to_owned())),
        };
        let (version, said, layers) = match &document {
            Self::Manifest(it) => (it.schema_version, &it.media_type, it.layers.len()),
            Self::Index(it) => (it.schema_version, &it.media_type, 0),
        };
        if version != 2 {
            return Err(DocumentError::SchemaVersion(version));
        }
        if layers > LAYERS_MAX {
            return Err(DocumentError::Layers(layers));
        }
        match said {
            Some(said) if said != media_type => Err(DocumentError::MediaType(said.clone())),
            _ => Ok(document),
        }
    }

    /// The manifest that this one hangs on, where there is one.
    pub fn subject(&self) -> Option<&Descriptor> {
        match self {
            Self::Manifest(it) => it.subject.as_ref(),
            Self::Index(it) => it.subject.as_ref(),
        }
    }
}

/// How deep the lists and objects of a JSON text are nested.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_text, mut escaped) = (0usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Reads an image's config and checks it against its manifest.
pub fn parse_config(manifest: &Manifest, bytes: &[u8]) -> Result<ImageConfig, DocumentError> {
    if bytes.len() > MANIFEST_BYTES_MAX {
        return Err(DocumentError::TooLong(bytes.len()));
    }
    let config: ImageConfig = serde_json::from_slice(bytes)?;
    let counts = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if counts.0 != counts.1 {
        return Err(DocumentError::LayerCount { manifest: counts.0, config: counts.1 });
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_that_of_brackets_outside_of_texts() {
        for (json, expected) in [
            ("", 0),
            ("{}", 1),
            (r#"{"a":[{"b":1},[]]}"#, 3),
            (r#"{"[[[":"{{{\"[[["}"#, 1),
            ("]]]]", 0),
            ("[[[[", 4),
        ] {
            assert_eq!(depth(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn a_moved_record_is_told_from_other_layers_and_says_of_which_pack_it_is() {
        let pack = PackId::from_bytes([7; 32]);
        let layer = Descriptor::of_moved(pack, b"a record");
        let read: Descriptor = serde_json::from_slice(&serde_json::to_vec(&layer).unwrap()).unwrap();
        assert_eq!((read.moved_pack(), read.digest), (Some(pack), Digest::of(b"a record")));
        let mut wrong = vec![Descriptor { media_type: media_type::PACK.to_owned(), ..layer.clone() }];
        for text in ["", "sha256:07", "../../etc", &Digest::by(Algorithm::Sha512, b"").to_string()] {
            let annotations = BTreeMap::from([(MOVED_ANNOTATION.to_owned(), text.to_owned())]);
            wrong.push(Descriptor { annotations, ..layer.clone() });
        }
        wrong.push(Descriptor::of(media_type::MOVED, b"a record"));
        assert!(wrong.iter().all(|layer| layer.moved_pack().is_none()), "{wrong:?}");
    }
}
