//! Images that come with their tree: everything they claim is derived again before any of it can be seen, where it is pushed.
//!
//! Otherwise a scanner, which reads layers, would see one file system, and a program, which reads the tree, another.
//!
//! An image that is passed on can be seen before: it is checked once all of it has come. Until then its tree is the
//! upstream's word, and one that is found false is taken out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lamina_image::{
    Descriptor, Digest, Manifest, RECIPE_ANNOTATION, Recipe, TREE_BYTES_MAX, TREE_NAMES_ANNOTATION,
    TREE_NAMES_BYTES_ANNOTATION, derive_tree, parse_config, unpack_tree,
};
use lamina_store::{Blob, ImageRecord, ImageState, LayerRecord, Proof, Repo, StoreError};

use crate::api::Api;
use crate::{Absent, ApiError};

/// Configs are small; one over 4 MiB is refused by its parser too.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// A layer whose recipe is good.
struct Admitted {
    recipe: Arc<Recipe>,
    record: LayerRecord,
}

impl Api {
    /// Checks a manifest that binds a tree, remembers its layers, and makes all that it is made of belong to the
    /// repository but its config, which has to come by itself. `None` where it binds none.
    ///
    /// Cost: each layer that was never rebuilt from this recipe is, once.
    pub(crate) async fn admit(
        &self,
        repo: &Repo,
        digest: Digest,
        manifest: &Manifest,
    ) -> Result<Option<ImageRecord>, ApiError> {
        let Some(tree) = manifest.bound_tree()? else { return Ok(None) };
        if let Some(known) = self.store.image(digest).await?
            && known.state == ImageState::Done
        {
            let mut recipes = Vec::with_capacity(manifest.layers.len());
            for layer in &manifest.layers {
                recipes.push(self.recipe_of(layer).await?);
            }
            self.link(repo, tree, recipes.iter().map(|(digest, recipe)| (*digest, recipe))).await?;
            return Ok(Some(known));
        }
        let _permit = self.admissions.acquire().await.expect("never closed");
        let now = self.config().now();
        let config = self.store.small_blob(manifest.config.digest, CONFIG_BYTES_MAX).await.map_err(
            |error| match error {
                StoreError::Missing(digest) => absent("the config", digest),
                other => other.into(),
            },
        )?;
        let config = parse_config(manifest, &config)?;
        let proof = Arc::new(Proof::default());
        let mut layers = Vec::with_capacity(manifest.layers.len());
        for (layer, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
            layers.push(self.admit_layer(layer, *diff_id, &proof).await?);
        }
        let recipes = layers.iter().map(|layer| Arc::clone(&layer.recipe)).collect();
        let tree = self.check_tree(tree, names_noted(manifest), recipes).await?;
        let invalid = |text| ApiError::ManifestInvalid(text);
        self.store.conclude(&proof).await.map_err(|error| refusal(error, invalid))?;
        for layer in &layers {
            self.store.know_layer(&layer.record, None).await?;
        }
        self.link(repo, tree.digest, layers.iter().map(|layer| (layer.record.recipe, &layer.recipe))).await?;
        let (state, finished_at) = (ImageState::Done, Some(now));
        Ok(Some(ImageRecord { state, tree: Some(tree), finished_at, ..ImageRecord::queued(now) }))
    }

    /// What an image with its tree is made of belongs to the repository from now on.
    async fn link(
        &self,
        repo: &Repo,
        tree: Digest,
        recipes: impl Iterator<Item = (Digest, &Arc<Recipe>)>,
    ) -> Result<(), ApiError> {
        let (mut parts, mut packs) = (BTreeSet::from([tree]), BTreeSet::new());
        for (digest, recipe) in recipes {
            parts.extend([digest, recipe.diff_id()]);
            packs.extend(recipe.frames().iter().map(|(_, place)| Digest::from(place.pack)));
        }
        self.store.link_packs(repo, packs).await?;
        Ok(self.store.link_blobs(repo, parts).await?)
    }

    async fn admit_layer(
        &self,
        layer: &Descriptor,
        diff_id: Digest,
        proof: &Arc<Proof>,
    ) -> Result<Admitted, ApiError> {
        let invalid = |text: String| ApiError::ManifestInvalid(format!("layer {}: {text}", layer.digest));
        let (digest, recipe) = self.recipe_of(layer).await?;
        if layer.digest != diff_id {
            return Err(invalid(format!("the config says that its plain tar is {diff_id}")));
        }
        if recipe.diff_id() != diff_id || recipe.tar_bytes() != layer.size {
            let text = format!("its recipe is for {} of {} bytes", recipe.diff_id(), recipe.tar_bytes());
            return Err(invalid(text));
        }
        let record = LayerRecord { recipe: digest, diff_id, tar_bytes: recipe.tar_bytes() };
        if self.store.layer(diff_id).await? != Some(record) {
            self.store.check_places(&recipe, proof).await.map_err(|error| refusal(error, invalid))?;
            self.store.check_rebuilds(&recipe, proof).await.map_err(|error| refusal(error, invalid))?;
        }
        Ok(Admitted { recipe, record })
    }

    /// The recipe that a layer's annotation names.
    async fn recipe_of(&self, layer: &Descriptor) -> Result<(Digest, Arc<Recipe>), ApiError> {
        let invalid = |text: String| ApiError::ManifestInvalid(format!("layer {}: {text}", layer.digest));
        let Some(recipe) = layer.annotations.get(RECIPE_ANNOTATION) else {
            return Err(invalid(format!(
                "the manifest names a tree, so it must name a recipe in {RECIPE_ANNOTATION}"
            )));
        };
        let digest: Digest = recipe.parse().map_err(|error| invalid(format!("its recipe: {error}")))?;
        // held from now on, where it is there
        self.store.take_blob(digest).await?;
        match self.store.recipe(digest).await {
            Ok(recipe) => Ok((digest, Arc::new(recipe))),
            Err(StoreError::Missing(digest)) => Err(absent("the recipe", digest)),
            Err(error) => Err(refusal(error, invalid)),
        }
    }

    /// Compares the client's tree with the one that the recipes make, and what the manifest tells of its names with what they are.
    async fn check_tree(
        &self,
        tree: Digest,
        names: BTreeMap<String, String>,
        recipes: Vec<Arc<Recipe>>,
    ) -> Result<Descriptor, ApiError> {
        let invalid = |text: String| ApiError::ManifestInvalid(format!("tree {tree}: {text}"));
        let Some(Blob::Stored { .. }) = self.store.take_blob(tree).await? else {
            return Err(absent("the tree", tree));
        };
        let blob = self.store.small_blob(tree, TREE_BYTES_MAX).await?;
        let same = tokio::task::spawn_blocking(move || {
            let recipes: Vec<Recipe> = recipes.iter().map(|recipe| Recipe::clone(recipe)).collect();
            let derived = derive_tree(&recipes).map_err(|error| error.to_string())?;
            let claimed = unpack_tree(&blob).map_err(|error| error.to_string())?;
            Ok((derived == claimed, Descriptor::of_tree(&blob)))
        });
        match same.await.expect("deriving a tree does not panic") {
            Ok((true, tree)) if names.is_empty() || names == tree.annotations => Ok(tree),
            Ok((true, _)) => {
                Err(invalid(format!("{TREE_NAMES_ANNOTATION} is not what its blob begins with")))
            }
            Ok((false, _)) => {
                Err(invalid("it is not the tree that the recipes of the layers make".to_owned()))
            }
            Err(text) => Err(invalid(text)),
        }
    }
}

/// What a manifest tells of the names in its tree.
fn names_noted(manifest: &Manifest) -> BTreeMap<String, String> {
    let is_of_names = |note: &str| [TREE_NAMES_ANNOTATION, TREE_NAMES_BYTES_ANNOTATION].contains(&note);
    let noted = manifest.annotations.iter().filter(|(note, _)| is_of_names(note));
    noted.map(|(note, text)| (note.clone(), text.clone())).collect()
}

fn absent(what: &'static str, digest: Digest) -> ApiError {
    ApiError::ManifestBlobUnknown(vec![Absent { what, digest }])
}

/// What is wrong with what the client sent is told to the client; what is wrong here stays an error of the store.
fn refusal(error: StoreError, invalid: impl Fn(String) -> ApiError) -> ApiError {
    match error {
        StoreError::Place { .. }
        | StoreError::Missing(_)
        | StoreError::Pack { .. }
        | StoreError::Frame { .. }
        | StoreError::Recipe(_)
        | StoreError::TooLarge { .. } => invalid(error.to_string()),
        StoreError::Digest { found, .. } => {
            invalid(format!("its recipe rebuilds a tar that hashes to {found}"))
        }
        other => other.into(),
    }
}
