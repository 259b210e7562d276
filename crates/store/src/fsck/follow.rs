//! Follows every name, also over what is damaged, and says which images need what.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use lamina_chunk::{PackId, PackRecord};
use lamina_image::{Digest, MANIFEST_BYTES_MAX, Recipe};

use super::{Damage, Found, FsckReport, Wrong};
use crate::check::at;
use crate::keys::{self, Named};
use crate::mark::{Document, Marker};
use crate::moved;
use crate::objects::Objects;
use crate::originals::prove;
use crate::record::ImageState;
use crate::{Repo, StoreError, Tag};

/// Recipes over 512 MiB are refused when they come.
const RECIPE_BYTES_MAX: u64 = 512 << 20;

/// A manifest of a repository.
pub(super) type Link = (Repo, Digest);

/// See the module.
#[derive(Debug)]
pub(super) struct Follow {
    pub(super) found: Found,
    /// What each manifest says. Damaged ones are not here.
    pub(super) documents: BTreeMap<Digest, Document>,
    /// The packs of each recipe that could be read, and those to which their frames were moved.
    pub(super) recipes: BTreeMap<Digest, BTreeSet<Digest>>,
    /// Which tags lead to a manifest.
    pub(super) tags: BTreeMap<Link, BTreeSet<Tag>>,
    /// Blobs that each manifest needs.
    pub(super) needs: BTreeMap<Link, BTreeSet<Digest>>,
}

impl Follow {
    pub(super) async fn read(objects: &Objects, found: Found) -> Result<Self, StoreError> {
        let (documents, recipes, tags, needs) = Default::default();
        let mut follow = Self { found, documents, recipes, tags, needs };
        follow.read_documents(objects).await?;
        follow.read_recipes(objects).await?;
        follow.read_tags(objects).await?;
        follow.need();
        follow.find_missing();
        follow.rebuild(objects).await?;
        Ok(follow)
    }

    fn links(&self) -> Vec<Link> {
        let links = self.found.inventory.keys().filter_map(|named| match named {
            Named::Manifest(repo, digest) => Some((repo.clone(), *digest)),
            _ => None,
        });
        links.collect()
    }

    async fn read_documents(&mut self, objects: &Objects) -> Result<(), StoreError> {
        for (_, digest) in self.links() {
            if self.documents.contains_key(&digest) || !self.found.is_good(digest) {
                continue;
            }
            let read = objects.read(&keys::blob(digest), MANIFEST_BYTES_MAX as u64).await?;
            match read.map(|bytes| serde_json::from_slice(&bytes)) {
                Some(Ok(document)) => drop(self.documents.insert(digest, document)),
                Some(Err(error)) => self.wrong(Named::Blob(digest), Wrong::Contents, error.to_string()),
                None => {}
            }
        }
        Ok(())
    }

    /// Reads recipes, and checks that each of their frames lies where they say, by the indexes of the packs.
    async fn read_recipes(&mut self, objects: &Objects) -> Result<(), StoreError> {
        let mut indexes = HashMap::new();
        self.check_moved(objects, &mut indexes).await?;
        let records = self.found.layers.values().map(|layer| layer.recipe);
        let named = self.documents.values().flat_map(|document| document.recipes().collect::<Vec<_>>());
        let all: BTreeSet<Digest> =
            records.chain(named).filter(|digest| self.found.is_good(*digest)).collect();
        for digest in all {
            let Some(bytes) = objects.read(&keys::blob(digest), RECIPE_BYTES_MAX).await? else { continue };
            let recipe = tokio::task::spawn_blocking(move || Recipe::parse(bytes)).await;
            let recipe = match recipe.expect("parsing does not panic") {
                Ok(recipe) => recipe,
                Err(error) => {
                    // what others call a recipe may be none
                    if self.found.layers.values().any(|layer| layer.recipe == digest) {
                        self.wrong(Named::Blob(digest), Wrong::Contents, error.to_string());
                    }
                    continue;
                }
            };
            let packs: BTreeSet<PackId> = recipe.frames().iter().map(|(_, place)| place.pack).collect();
            for pack in &packs {
                if !self.found.is_pack_good((*pack).into()) {
                    continue;
                }
                if !indexes.contains_key(pack) {
                    indexes.insert(*pack, index(objects, *pack).await?);
                }
                if let Some(reason) = contradiction(&recipe, *pack, &indexes[pack]) {
                    self.wrong(Named::Blob(digest), Wrong::Contents, reason);
                }
            }
            let packs = packs.into_iter().map(Digest::from);
            let moved = |pack: Digest| std::iter::once(pack).chain(self.found.moved_to(pack));
            let packs = packs.flat_map(moved).collect();
            self.recipes.insert(digest, packs);
        }
        Ok(())
    }

    /// Checks that the frames of packs that were moved lie where the records say, by the indexes of the new packs.
    async fn check_moved(
        &mut self,
        objects: &Objects,
        indexes: &mut HashMap<PackId, Result<Vec<PackRecord>, String>>,
    ) -> Result<(), StoreError> {
        for (old, moved) in self.found.moved.clone() {
            let new = moved.pack();
            if !self.found.is_pack_good(new.into()) {
                continue;
            }
            if let Entry::Vacant(unread) = indexes.entry(new) {
                unread.insert(index(objects, new).await?);
            }
            let reason = match &indexes[&new] {
                Err(reason) => Some(reason.clone()),
                // what died since the new pack was moved in its turn is missed by nobody
                Ok(_) if self.found.moved.contains_key(&new) => None,
                Ok(records) => {
                    let lost = moved.frames().len() - moved.old_records(records).len();
                    (lost > 0)
                        .then(|| format!("{lost} of its frames do not lie where it says, in pack {new}"))
                }
            };
            if let Some(reason) = reason {
                self.wrong(Named::Moved(old), Wrong::Contents, reason);
            }
        }
        Ok(())
    }

    async fn read_tags(&mut self, objects: &Objects) -> Result<(), StoreError> {
        let mut readable = self.found.inventory.clone();
        readable.0.retain(|named, _| !self.found.wrong.contains_key(named));
        for ((repo, tag), _, number, manifest) in Marker::new(objects.clone()).tags(&readable).await? {
            let Some(manifest) = manifest else { continue };
            let link = (repo.clone(), manifest);
            if !self.found.inventory.has(&Named::Manifest(repo.clone(), manifest)) {
                let reason = format!("it names {manifest}, which is not in the repository");
                self.wrong(Named::TagValue(repo.clone(), tag.clone(), number), Wrong::Contents, reason);
            }
            self.tags.entry(link).or_default().insert(tag.clone());
            let children = self.documents.get(&manifest).and_then(|document| document.manifests.clone());
            for child in children.into_iter().flatten() {
                self.tags.entry((repo.clone(), child.digest)).or_default().insert(tag.clone());
            }
        }
        Ok(())
    }

    /// Works out which blobs each manifest needs.
    fn need(&mut self) {
        for (repo, digest) in self.links() {
            let mut needs = BTreeSet::from([digest]);
            if let Some(document) = self.documents.get(&digest) {
                needs.extend(document.blobs());
            }
            if let Some(image) = self.found.images.get(&digest) {
                needs.extend([&image.tree, &image.artifact].into_iter().flatten().map(|part| part.digest));
            }
            let layers: Vec<_> = needs.iter().filter_map(|digest| self.found.layers.get(digest)).collect();
            needs.extend(layers.into_iter().flat_map(|layer| [layer.recipe, layer.diff_id]));
            let packs: Vec<_> =
                needs.iter().filter_map(|digest| self.recipes.get(digest)).flatten().copied().collect();
            needs.extend(packs);
            self.needs.insert((repo, digest), needs);
        }
    }

    /// Names of what is not there.
    fn find_missing(&mut self) {
        let mut missing = BTreeMap::<Named, String>::new();
        // what a manifest names need not be here; what belongs to a repository must be
        for named in self.found.inventory.keys() {
            let (repo, digest) = match named {
                Named::Link(digest, repo) | Named::Manifest(repo, digest) => (repo, *digest),
                _ => continue,
            };
            if !self.is_here(digest) {
                missing.entry(Named::Blob(digest)).or_insert_with(|| format!("it belongs to {repo}"));
            }
        }
        for (digest, image) in &self.found.images {
            let parts = [&image.tree, &image.artifact].into_iter().flatten();
            for part in parts.filter(|part| image.state == ImageState::Done && !self.is_here(part.digest)) {
                missing
                    .entry(Named::Blob(part.digest))
                    .or_insert_with(|| format!("the record of image {digest} names it"));
            }
        }
        for (digest, layer) in &self.found.layers {
            let packs = self.recipes.get(&layer.recipe).into_iter().flatten();
            for blob in packs.chain([&layer.recipe]).filter(|blob| !self.is_here(**blob)) {
                missing
                    .entry(Named::Blob(*blob))
                    .or_insert_with(|| format!("the record of layer {digest} names it"));
            }
        }
        for (old, moved) in &self.found.moved {
            if !self.is_here(moved.pack().into()) {
                missing
                    .entry(Named::Blob(moved.pack().into()))
                    .or_insert_with(|| format!("the frames of pack {old} were moved there"));
            }
        }
        for named in self.found.inventory.keys() {
            match named {
                Named::Pack(pack) if !self.is_here((*pack).into()) => {
                    missing
                        .entry(Named::Blob((*pack).into()))
                        .or_insert_with(|| "it was taken in as a pack".to_owned());
                }
                Named::Referrer(repo, subject, digest)
                    if !self.found.inventory.has(&Named::Manifest(repo.clone(), *digest)) =>
                {
                    let reason = format!("it hangs on {subject} and is not in {repo}");
                    missing.insert(Named::Manifest(repo.clone(), *digest), reason);
                }
                _ => {}
            }
        }
        for (named, reason) in missing {
            self.wrong(named, Wrong::Missing, reason);
        }
    }

    /// Rebuilds each plain layer that is not stored, where what it takes is good.
    async fn rebuild(&mut self, objects: &Objects) -> Result<(), StoreError> {
        let layers: BTreeSet<Digest> = self.needs.values().flatten().copied().collect();
        for digest in layers {
            if self.found.inventory.has(&Named::Blob(digest)) || !self.is_rebuilt(digest) {
                continue;
            }
            match prove(objects, &self.found.layers[&digest]).await {
                Ok(()) => {}
                // all that is read was good just now
                Err(error @ StoreError::Object(_)) => return Err(error),
                Err(error) => {
                    let reason = format!("it is not stored, and its recipe does not rebuild it: {error}");
                    self.wrong(Named::Blob(digest), Wrong::Missing, reason);
                }
            }
        }
        Ok(())
    }

    /// Stored, rebuilt from a recipe, or a pack that was moved.
    fn is_here(&self, digest: Digest) -> bool {
        let rebuilt = |digest| self.found.layers.get(&digest).is_some_and(|layer| layer.diff_id == digest);
        let moved = |pack| self.found.inventory.has(&Named::Moved(pack));
        self.found.inventory.has(&Named::Blob(digest))
            || rebuilt(digest)
            || PackId::try_from(digest).is_ok_and(moved)
    }

    fn wrong(&mut self, named: Named, wrong: Wrong, reason: String) {
        self.found.wrong.entry(named).or_insert((wrong, reason));
    }

    /// The manifests that need what is damaged.
    pub(super) fn users(&self, named: &Named) -> Vec<Link> {
        let needs = |wanted: Digest| self.needs.iter().filter(move |(_, needs)| needs.contains(&wanted));
        match named {
            Named::Layer(digest) => needs(*digest).map(|(link, _)| link.clone()).collect(),
            Named::Image(digest) => {
                needs(*digest).map(|(link, _)| link.clone()).filter(|it| it.1 == *digest).collect()
            }
            Named::Job(digest, repo) | Named::Manifest(repo, digest) => vec![(repo.clone(), *digest)],
            Named::Referrer(repo, subject, _) => vec![(repo.clone(), *subject)],
            Named::TagValue(..) => Vec::new(),
            Named::Moved(pack) => needs((*pack).into()).map(|(link, _)| link.clone()).collect(),
            Named::Blob(_) | Named::Pack(_) | Named::Arrival(_) | Named::Link(..) => {
                named.bytes().into_iter().flat_map(needs).map(|(link, _)| link.clone()).collect()
            }
        }
    }

    /// How people call the images that need it.
    pub(super) fn images(&self, named: &Named) -> Vec<String> {
        let name = |(repo, digest): &Link| match self.tags.get(&(repo.clone(), *digest)) {
            Some(tags) => tags.iter().map(|tag| format!("{repo}:{tag}")).collect(),
            None => vec![format!("{repo}@{digest}")],
        };
        let mut images: BTreeSet<String> = self.users(named).iter().flat_map(name).collect();
        if let Named::TagValue(repo, tag, _) = named {
            images.insert(format!("{repo}:{tag}"));
        }
        images.into_iter().collect()
    }

    pub(super) fn report(&self) -> FsckReport {
        let mut report = FsckReport { bytes: self.found.bytes, ..FsckReport::default() };
        let mut needed: BTreeSet<Digest> = self.needs.values().flatten().copied().collect();
        for image in self.found.images.values() {
            needed.extend([&image.tree, &image.artifact].into_iter().flatten().map(|part| part.digest));
        }
        for layer in self.found.layers.values() {
            needed.insert(layer.recipe);
            needed.extend(self.recipes.get(&layer.recipe).into_iter().flatten());
        }
        for (named, listed) in &self.found.inventory.0 {
            match named {
                Named::Blob(digest) => {
                    report.blobs += 1;
                    if !needed.contains(digest) {
                        report.garbage_blobs += 1;
                        report.garbage_bytes += listed.bytes;
                    }
                }
                Named::Manifest(..) => report.manifests += 1,
                _ => report.records += 1,
            }
        }
        report.damaged = self
            .found
            .wrong
            .iter()
            .map(|(named, (wrong, reason))| Damage {
                key: named.key().to_string(),
                wrong: *wrong,
                reason: reason.clone(),
                images: self.images(named),
                remedy: self.remedy(named).to_string(),
                repaired: false,
            })
            .collect();
        report
    }
}

/// The index of a pack whose bytes are good, or what was moved of it; the inner error where it is none.
async fn index(objects: &Objects, pack: PackId) -> Result<Result<Vec<PackRecord>, String>, StoreError> {
    match moved::records(objects, pack).await {
        Ok((records, _)) => Ok(Ok(records)),
        Err(error @ (StoreError::Pack { .. } | StoreError::Missing(_) | StoreError::Moved { .. })) => {
            Ok(Err(error.to_string()))
        }
        Err(error) => Err(error),
    }
}

/// Where a recipe says of a pack what is not so.
fn contradiction(recipe: &Recipe, pack: PackId, index: &Result<Vec<PackRecord>, String>) -> Option<String> {
    let records = match index {
        Ok(records) => records,
        Err(reason) => return Some(reason.clone()),
    };
    let inside = recipe.frames().iter().filter(|(_, place)| place.pack == pack);
    let mut lost = inside.filter(|(id, place)| at(records, *id, place.frame).is_none());
    lost.next().map(|(id, _)| format!("frame {id} does not lie where it says, in pack {pack}"))
}
