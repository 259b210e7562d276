//! The artifacts that this registry has hung on images itself, and may therefore replace.
//!
//! A registry makes the trees of images itself, and takes none from anybody else. So what hangs the tree on an image of which the
//! record says that it was converted to that tree is its own work. Somebody may have come to rely on it by its name, though: one
//! that is tagged, that an index lists, or on which something hangs in its turn is left alone, and so is one that is in a
//! repository without its image, or that is young.

use std::collections::{BTreeMap, BTreeSet};

use lamina_chunk::PackId;
use lamina_image::{Digest, LAYERS_MAX, media_type};

use super::{Document, Marked, Marker};
use crate::Repo;
use crate::inventory::Inventory;
use crate::keys::Named;

/// See the module.
#[derive(Debug)]
pub(crate) struct OwnArtifact {
    /// What it hangs on.
    pub(crate) image: Digest,
    /// Where it does.
    pub(crate) repos: Vec<Repo>,
}

impl Document {
    /// The packs that it names.
    fn packs(&self) -> BTreeSet<Digest> {
        let packs = self.layers.iter().flatten().filter(|layer| layer.media_type == media_type::PACK);
        packs.map(|layer| layer.digest).collect()
    }
}

impl Marker {
    /// The artifacts that may be replaced, as far as marks have come. `young_after` is in seconds since 1970.
    pub(crate) fn own_artifacts(
        &self,
        inventory: &Inventory,
        marked: &Marked,
        young_after: i64,
    ) -> BTreeMap<Digest, OwnArtifact> {
        let image_of = |digest: &Digest| self.converted(inventory, digest);
        let mut own: BTreeMap<Digest, OwnArtifact> = self
            .documents
            .keys()
            .filter_map(|digest| Some((*digest, OwnArtifact { image: image_of(digest)?, repos: Vec::new() })))
            .collect();
        let listed = self.documents.values().flat_map(|document| document.manifests.iter().flatten());
        for relied_on in listed.map(|child| &child.digest).chain(&marked.tagged) {
            own.remove(relied_on);
        }
        for (named, listed) in &inventory.0 {
            match named {
                Named::Referrer(_, subject, _) => drop(own.remove(subject)),
                Named::Manifest(repo, digest) => {
                    let Some(artifact) = own.get_mut(digest) else { continue };
                    let image = Named::Manifest(repo.clone(), artifact.image);
                    match listed.written < young_after && inventory.has(&image) {
                        true => artifact.repos.push(repo.clone()),
                        false => drop(own.remove(digest)),
                    }
                }
                _ => {}
            }
        }
        own.retain(|_, artifact| !artifact.repos.is_empty());
        own
    }

    /// The image that a manifest hangs the tree on to which it was converted.
    fn converted(&self, inventory: &Inventory, digest: &Digest) -> Option<Digest> {
        let document = self.documents.get(digest)?;
        let image = document.subject.as_ref()?.digest;
        let record = self.images.get(&image).filter(|_| inventory.has(&Named::Image(image)))?;
        let is_tree = document.artifact_type.as_deref() == Some(media_type::TREE);
        let tree = record.artifact.as_ref().and(record.tree.as_ref())?.digest;
        let trees: BTreeSet<Digest> = document.trees().collect();
        // what it must name is only known of recipes that were read
        let is_read = |recipe: Digest| self.ours.contains(&recipe) && inventory.has(&Named::Blob(recipe));
        let is_own = is_tree && trees == BTreeSet::from([tree]) && document.recipes().all(is_read);
        is_own.then_some(image)
    }

    /// The blobs that manifests name which are there: clients that know nothing of packs may ask for them. Not those packs that only
    /// `own` artifacts name, where their recipes lead: these artifacts will name other packs.
    pub(crate) fn in_manifests(
        &self,
        inventory: &Inventory,
        own: &BTreeMap<Digest, OwnArtifact>,
    ) -> BTreeSet<Digest> {
        let there: BTreeSet<Digest> = inventory
            .keys()
            .filter_map(|named| match named {
                Named::Manifest(_, digest) => Some(*digest),
                _ => None,
            })
            .collect();
        let mut named = BTreeSet::new();
        for (digest, document) in self.documents.iter().filter(|(digest, _)| there.contains(digest)) {
            let free = if own.contains_key(digest) { self.led_to(document) } else { BTreeSet::new() };
            named.extend(document.blobs().filter(|blob| !free.contains(blob)));
        }
        named
    }

    /// The packs that recipes of an artifact name, and those where their frames went.
    fn led_to(&self, document: &Document) -> BTreeSet<Digest> {
        let packs = self.recipe_packs(document);
        packs.flat_map(|pack| std::iter::once(pack).chain(self.moved_to(pack))).map(Digest::from).collect()
    }

    fn recipe_packs(&self, document: &Document) -> impl Iterator<Item = PackId> {
        let packs = document.recipes().filter_map(|recipe| self.recipes.get(&recipe)).flatten();
        let packs: BTreeSet<PackId> = packs.filter_map(|pack| PackId::try_from(*pack).ok()).collect();
        packs.into_iter()
    }

    /// The packs that an artifact has to name when these were moved; `None` where it names them already. As conversion has it: where
    /// the frames of its recipes are, as many as a manifest may list.
    pub(crate) fn to_be_named(
        &self,
        artifact: Digest,
        moved: &BTreeMap<PackId, PackId>,
    ) -> Option<BTreeSet<PackId>> {
        let document = self.documents.get(&artifact)?;
        let named = document.packs();
        let room = LAYERS_MAX.saturating_sub(document.layers.iter().flatten().count() - named.len());
        let now = |pack: PackId| {
            let pack = self.moved_to(pack).pop().unwrap_or(pack);
            moved.get(&pack).copied().unwrap_or(pack)
        };
        let packs: BTreeSet<Digest> = self.recipe_packs(document).map(|pack| now(pack).into()).collect();
        let packs: BTreeSet<Digest> = packs.into_iter().take(room).collect();
        (packs != named).then(|| packs.into_iter().filter_map(|pack| PackId::try_from(pack).ok()).collect())
    }
}
