//! A registry that is not Lamina's as an image's home: packs, recipes and tree are plain blobs there, held by an artifact
//! that hangs on the image, beside the layers for whoever pulls in the ordinary way.
//!
//! Such a registry cannot say which chunks it has. So the images that the repository has already are looked at, and what
//! their artifacts name is taken at its word: whoever may write there might as well replace the image.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{ChunkId, ChunkPlace, FOOTER_BYTES, PACK_BYTES_MAX, PackFooter, PackId};
use lamina_image::{Descriptor, Digest, Document, LAYERS_MAX, Manifest, Recipe, media_type};
use lamina_wire::{Client, KnownLayer, Reference, Version};
use parking_lot::Mutex;

use super::RECIPE_BYTES_MAX;
use crate::commands::artifact::{Artifact, config};

/// Images that are looked at for what they share with this one: the one of the tag, and others of the repository.
const EARLIER_MAX: usize = 8;
/// Indexes of packs that are read at the same time.
const READS: usize = 8;

/// What the repository has already.
#[derive(Default)]
pub(super) struct Earlier {
    /// Packs, with their lengths in bytes. Those of this push come to it.
    packs: Mutex<BTreeMap<Digest, u64>>,
    layers: Vec<KnownLayer>,
    chunks: HashMap<ChunkId, ChunkPlace>,
}

impl Earlier {
    /// Reads what the artifacts of earlier images name. What is gone or damaged counts as not there.
    pub(super) async fn find(client: &Client, reference: &Reference) -> Result<Self> {
        let repository = &reference.repository;
        let mut earlier = Self::default();
        let (mut packs, mut recipes) = (BTreeMap::new(), BTreeSet::new());
        for artifact in artifacts(client, reference).await? {
            for blob in artifact.layers {
                match blob.media_type.as_str() {
                    media_type::PACK => drop(packs.insert(blob.digest, blob.size)),
                    media_type::RECIPE => drop(recipes.insert(blob.digest)),
                    _ => {}
                }
            }
        }
        for digest in recipes {
            let Ok(blob) = client.blob(repository, digest, RECIPE_BYTES_MAX).await else { continue };
            let Ok(recipe) = Recipe::parse(blob) else { continue };
            // a recipe may lean on packs that its own image's artifact did not have room for
            if recipe.frames().iter().all(|(_, place)| packs.contains_key(&place.pack.into())) {
                let (diff_id, tar_bytes) = (recipe.diff_id(), recipe.tar_bytes());
                earlier.layers.push(KnownLayer { digest: diff_id, recipe: digest, diff_id, tar_bytes });
            }
        }
        earlier.packs = Mutex::new(packs);
        Ok(earlier)
    }

    /// The layers whose recipes are there.
    pub(super) fn layers(&self) -> &[KnownLayer] {
        &self.layers
    }

    /// Reads which chunks the packs have: only a push that cuts something needs to know.
    pub(super) async fn read_packs(&mut self, client: &Client, repository: &str) -> Result<()> {
        let packs: Vec<(Digest, u64)> = self.packs.lock().iter().map(|(pack, len)| (*pack, *len)).collect();
        let indexes = packs.into_iter().map(|(pack, len)| pack_index(client, repository, pack, len));
        let indexes: Vec<_> = stream::iter(indexes).buffer_unordered(READS).collect().await;
        for (pack, index) in indexes {
            match index {
                Ok(places) => self.chunks.extend(places),
                Err(error) => {
                    tracing::debug!(%pack, %error, "a pack is not used again");
                    self.packs.lock().remove(&pack);
                }
            }
        }
        Ok(())
    }

    pub(super) fn known(&self, ids: &[ChunkId]) -> Vec<Option<ChunkPlace>> {
        ids.iter().map(|id| self.chunks.get(id).copied()).collect()
    }

    /// Remembers a pack of this push.
    pub(super) fn add_pack(&self, pack: PackId, len: u64) {
        self.packs.lock().insert(pack.into(), len);
    }

    /// The artifacts that hold an image's tree, recipes and packs: one, unless there are more packs than a manifest lists.
    /// The first names the tree.
    pub(super) fn artifacts(
        &self,
        subject: &Descriptor,
        tree: &Descriptor,
        recipes: &[Recipe],
    ) -> Result<Vec<Artifact>> {
        let mut blobs = vec![tree.clone()];
        let (mut seen, mut named) = (BTreeSet::new(), BTreeSet::new());
        for recipe in recipes {
            let digest = Digest::of(recipe.blob());
            if seen.insert(digest) {
                blobs.push(Descriptor::named(media_type::RECIPE, digest, recipe.blob().len() as u64));
                named.extend(recipe.frames().iter().map(|(_, place)| Digest::from(place.pack)));
            }
        }
        let packs = self.packs.lock();
        for pack in named {
            let len = packs.get(&pack).with_context(|| format!("nobody knows the length of pack {pack}"))?;
            blobs.push(Descriptor::named(media_type::PACK, pack, *len));
        }
        let artifact = |blobs: &[Descriptor]| Artifact {
            kind: media_type::TREE,
            subject: subject.clone(),
            blobs: blobs.to_vec(),
            annotations: tree.tree_notes(),
        };
        Ok(blobs.chunks(LAYERS_MAX).map(artifact).collect())
    }
}

/// The artifacts with trees of the repository's images, the one under the tag itself first.
async fn artifacts(client: &Client, reference: &Reference) -> Result<Vec<Manifest>> {
    let repository = &reference.repository;
    let mut versions = vec![reference.version.clone()];
    let mut tags = client.tags(repository).await?;
    // what stands for the referrers API is no image
    tags.retain(|tag| !tag.starts_with("sha256-") && !tag.starts_with("sha512-"));
    tags.reverse();
    versions.extend(tags.into_iter().map(Version::Tag).filter(|version| *version != reference.version));
    let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
    for version in versions.into_iter().take(EARLIER_MAX) {
        let image = match client.manifest(repository, &version).await {
            Err(error) if error.is_not_found() => continue,
            image => image?,
        };
        for listed in client.referrers(repository, image.digest, media_type::TREE).await? {
            if !seen.insert(listed.digest) {
                continue;
            }
            let Ok(artifact) = client.manifest(repository, &Version::Digest(listed.digest)).await else {
                continue;
            };
            if let Ok(Document::Manifest(manifest)) = Document::parse(&artifact.media_type, &artifact.bytes) {
                found.push(manifest);
            }
        }
    }
    Ok(found)
}

/// What a pack's own index says of its chunks. Two small requests.
async fn pack_index(
    client: &Client,
    repository: &str,
    pack: Digest,
    len: u64,
) -> (Digest, Result<Vec<(ChunkId, ChunkPlace)>>) {
    let read = async {
        let footer_at = len.checked_sub(FOOTER_BYTES as u64).filter(|_| len <= PACK_BYTES_MAX as u64);
        let Some(footer_at) = footer_at else { bail!("{len} bytes are no pack") };
        let footer = client.blob_range(repository, pack, footer_at..len).await?;
        let footer = PackFooter::read(&footer, len)?;
        let range = footer.index_range();
        let index = match range.is_empty() {
            true => Bytes::new(),
            false => client.blob_range(repository, pack, range).await?,
        };
        let records = footer.records(&index)?;
        let name = PackId::try_from(pack)?;
        Ok(records.iter().flat_map(|record| record.places(name)).collect())
    };
    (pack, read.await)
}

/// Pushes artifacts and what every one of them needs. Gives the bytes sent.
pub(super) async fn push_artifacts(
    client: &Client,
    repository: &str,
    artifacts: Vec<Artifact>,
) -> Result<u64> {
    let (digest, bytes) = config();
    client.push_blob(repository, digest, bytes).await?;
    let pushed = stream::iter(artifacts).then(|artifact| artifact.push(client, repository));
    pushed.try_fold(0, |sent, listed| async move { Ok(sent + listed.size) }).await
}
