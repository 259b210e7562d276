//! One image from layers to tree.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use lamina_chunk::{Frame, PackId};
use lamina_image::{
    Algorithm, Descriptor, Digest, Document, ImageConfig, LAYERS_MAX, LayerInput, Manifest, Progress, Recipe,
    TREE_BYTES_MAX, Tree, derive_tree, ingest, media_type, pack_tree, parse_config, unpack_tree,
};
use lamina_store::{Blob, BlobReader, ImageRecord, LayerCounts, LayerRecord, Repo, StoreError, StoreSink};
use tokio::runtime::Handle;

use crate::DedupScope;
use crate::artifact::{Artifact, hang};
use crate::convert::{ConvertError, Converter};
use crate::reach::{NearSink, is_near};

const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// What a conversion gives. All of it is durable.
#[derive(Debug)]
pub(crate) struct Converted {
    pub(crate) tree: Descriptor,
    /// The manifest that hangs the tree on the image, as it is named in a referrers answer.
    pub(crate) artifact: Descriptor,
    pub(crate) counts: LayerCounts,
}

/// A layer of the image, with how to rebuild it.
struct Layer {
    recipe_digest: Digest,
    recipe: Arc<Recipe>,
}

/// Whether a manifest is an image of file systems: not an artifact, and every layer a tar.
pub(crate) fn converts(manifest: &Manifest) -> bool {
    manifest.is_image() && !manifest.layers.is_empty() && manifest.layers.iter().all(Descriptor::is_tar)
}

/// What is counted so far.
pub(crate) fn counts_of(progress: &Progress) -> LayerCounts {
    let read = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    LayerCounts {
        bytes_read: read(&progress.read),
        tar_bytes: read(&progress.tar),
        chunks: read(&progress.chunks),
        chunks_new: read(&progress.new),
        chunks_known: read(&progress.known),
        pack_bytes: read(&progress.sent),
        ..LayerCounts::default()
    }
}

impl Converter {
    /// Cuts the layers that are not known yet, derives the tree, and writes the manifest that hangs it on the image.
    pub(crate) async fn convert_once(
        &self,
        repo: &Repo,
        (digest, manifest, bytes): (Digest, &Manifest, &[u8]),
        progress: &Arc<Progress>,
    ) -> Result<Converted, ConvertError> {
        let wrong = |error: &dyn std::fmt::Display| ConvertError::Image(error.to_string());
        let config = self.store.small_blob(manifest.config.digest, CONFIG_BYTES_MAX).await?;
        let config = parse_config(manifest, &config).map_err(|error| wrong(&error))?;
        if config.rootfs.diff_ids.iter().any(|diff_id| diff_id.algorithm() != Algorithm::Sha256) {
            let text =
                "its config names plain layers by another digest than sha256, and recipes prove sha256";
            return Err(ConvertError::Image(text.to_owned()));
        }
        let mut known = self.known_layers(repo, manifest, &config).await?;
        let layers_known = known.len() as u64;
        let cut = self.cut_layers(repo, (manifest, &config), &known, progress).await?;
        let layers_cut = cut.len() as u64;
        known.extend(cut);
        let layers: Vec<&Layer> = manifest.layers.iter().map(|layer| &known[&layer.digest]).collect();
        let recipes: Vec<Recipe> = layers.iter().map(|layer| Recipe::clone(&layer.recipe)).collect();
        let tree = tokio::task::spawn_blocking(move || derive_tree(&recipes).map(|flat| pack_tree(&flat)));
        let tree =
            Bytes::from(tree.await.expect("deriving a tree does not panic").map_err(|error| wrong(&error))?);
        self.store.put_blob(tree.clone()).await?;
        let tree = Descriptor::of_tree(&tree);
        let media_type = manifest.media_type.as_deref().unwrap_or(media_type::OCI_MANIFEST);
        let subject = Descriptor::named(media_type, digest, bytes.len() as u64);
        let artifact = self.put_artifact(subject, &tree, &layers).await?;
        let counts = LayerCounts { layers_known, layers_cut, ..counts_of(progress) };
        Ok(Converted { tree, artifact, counts })
    }

    /// The layers of which a recipe is known under their own digest.
    async fn known_layers(
        &self,
        repo: &Repo,
        manifest: &Manifest,
        config: &ImageConfig,
    ) -> Result<BTreeMap<Digest, Layer>, ConvertError> {
        let mut known = BTreeMap::new();
        for (layer, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
            let Some(record) = self.store.layer(layer.digest).await? else { continue };
            if record.diff_id != *diff_id {
                let (digest, found) = (layer.digest, record.diff_id);
                let text = format!(
                    "layer {digest}: its plain tar is {found}, but the image's config says {diff_id}"
                );
                return Err(ConvertError::Image(text));
            }
            let recipe = Arc::new(self.store.recipe(record.recipe).await?);
            if !self.is_near(repo, &recipe).await? {
                continue;
            }
            known.insert(layer.digest, Layer { recipe_digest: record.recipe, recipe });
        }
        Ok(known)
    }

    /// How far deduplication reaches: everywhere where nobody is kept out.
    fn scope(&self) -> DedupScope {
        self.config.access.as_ref().map_or(DedupScope::All, |access| access.dedup)
    }

    /// Whether a repository may use the tree, and with it the packs, that an image has got.
    pub(crate) async fn is_image_near(&self, repo: &Repo, image: &ImageRecord) -> Result<bool, StoreError> {
        match &image.tree {
            Some(tree) if self.scope() != DedupScope::All => {
                is_near(&self.store, self.scope(), repo, tree.digest).await
            }
            _ => Ok(true),
        }
    }

    /// Whether all packs that a recipe leans on may be used in a repository: whoever reads a pack reads all of it.
    async fn is_near(&self, repo: &Repo, recipe: &Recipe) -> Result<bool, StoreError> {
        if self.scope() == DedupScope::All {
            return Ok(true);
        }
        let packs: BTreeSet<Digest> = recipe.frames().iter().map(|(_, place)| place.pack.into()).collect();
        for pack in packs {
            if !is_near(&self.store, self.scope(), repo, pack).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes in the other layers, each once however often the image has it, and remembers them.
    async fn cut_layers(
        &self,
        repo: &Repo,
        (manifest, config): (&Manifest, &ImageConfig),
        known: &BTreeMap<Digest, Layer>,
        progress: &Arc<Progress>,
    ) -> Result<BTreeMap<Digest, Layer>, ConvertError> {
        let mut seen = BTreeSet::new();
        let pairs = manifest.layers.iter().zip(&config.rootfs.diff_ids);
        let unknown =
            pairs.filter(|(layer, _)| !known.contains_key(&layer.digest) && seen.insert(layer.digest));
        let unknown: Vec<(Digest, Digest)> =
            unknown.map(|(layer, diff_id)| (layer.digest, *diff_id)).collect();
        if unknown.is_empty() {
            return Ok(BTreeMap::new());
        }
        let (store, options, progress) = (self.store.clone(), self.config.ingest, Arc::clone(progress));
        let (runtime, layers) = (Handle::current(), unknown.clone());
        let (scope, repo) = (self.scope(), repo.clone());
        let recipes = tokio::task::spawn_blocking(move || {
            let inputs = layers.into_iter().map(|(digest, diff_id)| LayerInput {
                name: format!("layer {digest}"),
                bytes: Box::new(BlobReader::new(store.clone(), digest, runtime.clone())),
                diff_id: Some(diff_id),
            });
            let inner = StoreSink::new(store.clone(), runtime.clone());
            let sink = NearSink { inner, store: store.clone(), scope, repo, runtime: runtime.clone() };
            ingest(inputs.collect(), &sink, options, &progress)
        });
        let recipes =
            recipes.await.map_err(|_| ConvertError::Image("cutting its layers panicked".to_owned()))??;
        let mut cut = BTreeMap::new();
        for ((digest, diff_id), recipe) in unknown.into_iter().zip(recipes) {
            let recipe_digest = self.store.put_blob(recipe.blob().clone()).await?;
            let record = LayerRecord { recipe: recipe_digest, diff_id, tar_bytes: recipe.tar_bytes() };
            self.store.know_layer(&record, Some(digest)).await?;
            cut.insert(digest, Layer { recipe_digest, recipe: Arc::new(recipe) });
        }
        Ok(cut)
    }

    /// Writes the blob of the manifest that hangs a tree on an image. The repositories get it by
    /// [`attach`](Self::attach).
    async fn put_artifact(
        &self,
        subject: Descriptor,
        tree: &Descriptor,
        layers: &[&Layer],
    ) -> Result<Descriptor, StoreError> {
        let mut blobs = vec![tree.clone()];
        let (mut recipes, mut packs) = (BTreeSet::new(), BTreeMap::<PackId, Vec<Frame>>::new());
        for layer in layers {
            if recipes.insert(layer.recipe_digest) {
                let size = layer.recipe.blob().len() as u64;
                blobs.push(Descriptor::named(media_type::RECIPE, layer.recipe_digest, size));
            }
            for (_, place) in layer.recipe.frames() {
                packs.entry(place.pack).or_default().push(place.frame);
            }
        }
        // those where the frames are, and for who has the image from elsewhere, the records that lead there
        let (mut here, mut moved) = (BTreeSet::new(), BTreeMap::new());
        for (pack, frames) in packs {
            let moves = self.store.moves(pack, &frames).await?;
            here.insert(Digest::from(moves.last().map_or(pack, |(_, moved)| moved.pack())));
            moved.extend(moves);
        }
        for (pack, moved) in moved {
            let record = Bytes::from(moved.to_bytes());
            blobs.push(Descriptor::of_moved(pack, &record));
            self.store.put_blob(record).await?;
        }
        for pack in here {
            let size = self.store.blob(pack).await?.map_or(0, |blob: Blob| blob.size());
            blobs.push(Descriptor::named(media_type::PACK, pack, size));
        }
        // an image of more packs than a manifest may list names the first of them: the tree names them all
        blobs.truncate(LAYERS_MAX);
        let annotations = tree.tree_notes();
        Artifact { kind: media_type::TREE, subject, blobs, annotations }.write(&self.store).await
    }

    /// Hangs the tree of an image on it in one repository, which has its packs and plain layers from now on.
    pub(crate) async fn attach(
        &self,
        repo: &Repo,
        image: Digest,
        record: &ImageRecord,
    ) -> Result<(), StoreError> {
        let (Some(artifact), Some(tree)) = (&record.artifact, &record.tree) else { return Ok(()) };
        // it may have been deleted while it was converted
        let Some((media_type, bytes)) = self.store.manifest(repo, image).await? else { return Ok(()) };
        let diff_ids = self.diff_ids(&media_type, &bytes).await?;
        let blob = self.store.small_blob(tree.digest, TREE_BYTES_MAX).await?;
        let packs = tokio::task::spawn_blocking(move || {
            let tree = unpack_tree(&blob).ok().and_then(|flat| Tree::open(flat.into()).ok());
            tree.map(|tree| tree.packs().map(Digest::from).collect::<Vec<_>>())
        });
        let packs = packs.await.expect("opening does not panic").unwrap_or_default();
        self.store.link_packs(repo, packs).await?;
        self.store.link_blobs(repo, diff_ids).await?;
        let artifact = self.artifact_now(image, tree.digest, artifact).await?;
        hang(&self.store, repo, image, &artifact).await
    }

    /// What hangs this tree on an image by now: a collection may have renewed it before all that it names was held. Each round but
    /// the last is one of those.
    async fn artifact_now(
        &self,
        image: Digest,
        tree: Digest,
        artifact: &Descriptor,
    ) -> Result<Descriptor, StoreError> {
        let mut now = artifact.clone();
        loop {
            self.store.take_blob(now.digest).await?;
            let record = self.store.image(image).await?;
            let record = record.filter(|record| record.tree.as_ref().is_some_and(|it| it.digest == tree));
            match record.and_then(|record| record.artifact) {
                Some(other) if other.digest != now.digest => now = other,
                _ => return Ok(now),
            }
        }
    }

    /// The plain layers of an image, which can be read once it is converted.
    async fn diff_ids(&self, media_type: &str, manifest: &[u8]) -> Result<Vec<Digest>, StoreError> {
        let Ok(Document::Manifest(manifest)) = Document::parse(media_type, manifest) else {
            return Ok(Vec::new());
        };
        let config = self.store.small_blob(manifest.config.digest, CONFIG_BYTES_MAX).await?;
        Ok(parse_config(&manifest, &config).map(|config| config.rootfs.diff_ids).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use lamina_store::{Store, StoreConfig};

    use super::*;
    use crate::RegistryConfig;
    use crate::learn::Learner;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn who_has_read_an_old_record_hangs_what_is_on_record_of_the_same_tree_by_now() {
        let directory = tempfile::tempdir().unwrap();
        let store = StoreConfig::new(directory.path().join("index"));
        let store = Store::open_directory(directory.path(), store).await.unwrap();
        let config = RegistryConfig::default();
        let learner = Arc::new(Learner::new(store.clone(), config.trace_every, config.clock));
        let converter = Converter::new(store.clone(), config, learner, Metrics::default());
        let [image, tree, other] = ["image", "tree", "other"].map(|text| Digest::of(text.as_bytes()));
        let [old, new] = ["old", "new"].map(|text| Descriptor::of(media_type::OCI_MANIFEST, text.as_bytes()));
        assert_eq!(converter.artifact_now(image, tree, &old).await.unwrap(), old);
        let (tree_blob, artifact) = (Descriptor::named(media_type::TREE, tree, 4), Some(new.clone()));
        let record = ImageRecord { tree: Some(tree_blob), artifact, ..ImageRecord::queued(0) };
        store.put_image(image, &record).await.unwrap();
        for (tree, now) in [(tree, &new), (other, &old)] {
            assert_eq!(converter.artifact_now(image, tree, &old).await.unwrap(), *now);
        }
    }
}
