//! What is reachable: from tags through indexes, manifests and what hangs on them to configs, layers, recipes, trees and
//! packs. Who names a pack that was moved names its record and the pack where its frames are now, and not the old one, as long as
//! the record has all frames that are named. What hangs on an image leads on, but for artifacts of the registry's own whose place
//! others have taken (`mark/artifacts.rs`).
//!
//! Nothing is guessed: where a manifest, a recipe or a record on the way does not parse, what it names is unknown, and marking
//! fails. Cost: each manifest, image record, layer record and recipe on the way is read once, also over several marks. Which
//! frames of packs are named only grows over those: what went meanwhile may still count.

mod artifacts;
mod live;
mod packs;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{Moved, PackId};
use lamina_image::{
    BOOT_ANNOTATION, Descriptor, Digest, MANIFEST_BYTES_MAX, PROFILE_ANNOTATION, RECIPE_ANNOTATION,
    TREE_ANNOTATION, media_type,
};
use serde::Deserialize;

use crate::inventory::Inventory;
use crate::keys::Named;
use crate::objects::Objects;
use crate::record::{ImageRecord, LayerRecord, RefValue};
use crate::{Repo, StoreError, Tag, keys};

pub(crate) use self::artifacts::Carried;
pub(crate) use self::live::{Live, Span};
use self::packs::moved_pack;

/// Objects that are read at the same time.
const READS: usize = 16;

/// What a mark begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Roots {
    /// Tags, jobs, and manifests that were written after this moment, in seconds since 1970.
    Tagged {
        /// See above.
        young_after: i64,
    },
    /// Every manifest that is in a repository.
    Untagged,
    /// Every manifest and every record that is there, whether or not anything names it.
    All,
}

/// What was reached.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marked {
    /// Manifests, images, layers, and what else names things.
    pub(crate) names: BTreeSet<Named>,
    pub(crate) blobs: BTreeSet<Digest>,
    /// What tags name.
    tagged: BTreeSet<Digest>,
    /// Those of the blobs that must be stored: whatever is not named as a layer of a file system alone, and the layers
    /// of images that still wait for their tree.
    stored: BTreeSet<Digest>,
    /// Those that need not be, with what rebuilds them.
    pub(crate) rebuilt: BTreeMap<Digest, LayerRecord>,
}

impl Marked {
    /// Reaches blobs that must be stored.
    fn need(&mut self, digests: impl IntoIterator<Item = Digest>) {
        for digest in digests {
            self.blobs.insert(digest);
            self.stored.insert(digest);
        }
    }
}

/// A manifest or an index, as far as it names others.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Document {
    pub(crate) config: Option<Descriptor>,
    pub(crate) layers: Option<Vec<Descriptor>>,
    pub(crate) manifests: Option<Vec<Descriptor>>,
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    artifact_type: Option<String>,
    subject: Option<Descriptor>,
}

/// How a manifest of a repository was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// Somebody names it.
    Named,
    /// It hangs on another one, or nobody has deleted it.
    There,
}

impl Document {
    /// Blobs that it names.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = Digest> {
        self.tars().chain(self.others())
    }

    /// Those of them that are named as layers of a file system.
    fn tars(&self) -> impl Iterator<Item = Digest> {
        self.layers.iter().flatten().filter(|layer| layer.is_tar()).map(|layer| layer.digest)
    }

    /// Those that are named as anything else.
    fn others(&self) -> impl Iterator<Item = Digest> {
        let noted = [TREE_ANNOTATION, PROFILE_ANNOTATION, BOOT_ANNOTATION];
        let noted = noted.into_iter().filter_map(|name| digest_in(self.annotations.as_ref()?.get(name)));
        let layers = self.layers.iter().flatten().filter(|layer| !layer.is_tar()).map(|layer| layer.digest);
        layers.chain(self.config.as_ref().map(|config| config.digest)).chain(noted).chain(self.recipes())
    }

    /// Those of them that are trees.
    fn trees(&self) -> impl Iterator<Item = Digest> {
        let trees = self.layers.iter().flatten().filter(|layer| layer.media_type == media_type::TREE);
        let noted = digest_in(self.annotations.as_ref().and_then(|notes| notes.get(TREE_ANNOTATION)));
        trees.map(|layer| layer.digest).chain(noted)
    }

    /// Those of them that are recipes.
    pub(crate) fn recipes(&self) -> impl Iterator<Item = Digest> {
        let recipe = |layer: &Descriptor| match layer.media_type == media_type::RECIPE {
            true => Some(layer.digest),
            false => digest_in(layer.annotations.get(RECIPE_ANNOTATION)),
        };
        self.layers.iter().flatten().filter_map(recipe)
    }
}

fn digest_in(text: Option<&String>) -> Option<Digest> {
    text?.parse().ok()
}

/// Reads what names others, each once.
#[derive(Debug)]
pub(crate) struct Marker {
    objects: Objects,
    documents: HashMap<Digest, Document>,
    images: HashMap<Digest, ImageRecord>,
    layers: HashMap<Digest, LayerRecord>,
    /// The packs of each recipe.
    recipes: HashMap<Digest, BTreeSet<Digest>>,
    /// Recipes that layers' records name, and not only what others say.
    ours: BTreeSet<Digest>,
    /// Trees of which the frames were taken in.
    trees: BTreeSet<Digest>,
    /// Where packs went.
    moved: HashMap<PackId, Moved>,
    /// How many bytes of packs are in frames, of those that seemed mostly dead.
    frame_bytes: HashMap<PackId, u64>,
    live: Live,
}

impl Marker {
    pub(crate) fn new(objects: Objects) -> Self {
        Self::counting(objects, 0)
    }

    /// The same, that counts the frames which are named, of packs of which less than so many percent live.
    pub(crate) fn counting(objects: Objects, enough_percent: u8) -> Self {
        let (documents, images, layers) = (HashMap::new(), HashMap::new(), HashMap::new());
        let (recipes, trees, moved) = (HashMap::new(), BTreeSet::new(), HashMap::new());
        let (ours, frame_bytes) = (BTreeSet::new(), HashMap::new());
        Self {
            objects,
            documents,
            images,
            layers,
            recipes,
            ours,
            trees,
            moved,
            frame_bytes,
            live: Live::new(enough_percent),
        }
    }

    /// Which frames are named, as far as marks have come.
    pub(crate) fn live(&self) -> &Live {
        &self.live
    }

    /// Marks what the names in `inventory` reach.
    ///
    /// # Errors
    /// [`StoreError::Unmarkable`] and [`StoreError::Record`] where something on the way is damaged.
    pub(crate) async fn mark(&mut self, inventory: &Inventory, roots: Roots) -> Result<Marked, StoreError> {
        let mut marked = Marked::default();
        let manifests = self.roots(inventory, roots, &mut marked).await?;
        self.manifests(inventory, manifests, &mut marked).await?;
        self.records(inventory, roots, &mut marked).await?;
        self.packs(inventory, roots, &mut marked).await?;
        self.rebuilt(inventory, &mut marked);
        Ok(marked)
    }

    async fn roots(
        &self,
        inventory: &Inventory,
        roots: Roots,
        marked: &mut Marked,
    ) -> Result<Vec<(Repo, Digest, Reached)>, StoreError> {
        let mut found = Vec::new();
        for (named, listed) in &inventory.0 {
            match (named, roots) {
                (Named::Manifest(repo, digest), Roots::All) => {
                    found.push((repo.clone(), *digest, Reached::Named))
                }
                (Named::Manifest(repo, digest), Roots::Untagged) => {
                    found.push((repo.clone(), *digest, Reached::There))
                }
                (Named::Manifest(repo, digest), Roots::Tagged { young_after })
                    if listed.written >= young_after =>
                {
                    found.push((repo.clone(), *digest, Reached::Named));
                }
                // of one that was moved more is to be known
                (Named::Link(digest, _), Roots::All) if moved_pack(inventory, *digest).is_none() => {
                    marked.blobs.insert(*digest);
                }
                (Named::Job(digest, repo), _) => found.push((repo.clone(), *digest, Reached::Named)),
                _ => {}
            }
        }
        for (repo, _, number, manifest) in self.tags(inventory).await? {
            let (repo, tag) = repo;
            marked.names.insert(Named::TagValue(repo.clone(), tag, number));
            marked.tagged.extend(manifest);
            found.extend(manifest.map(|manifest| (repo, manifest, Reached::Named)));
        }
        Ok(found)
    }

    /// The current value of each tag: its name, how many values it has, the number and what it names.
    pub(crate) async fn tags(&self, inventory: &Inventory) -> Result<Vec<CurrentTag>, StoreError> {
        let mut tags = BTreeMap::<(Repo, Tag), (usize, u64)>::new();
        for named in inventory.keys() {
            if let Named::TagValue(repo, tag, number) = named {
                let (values, highest) = tags.entry((repo.clone(), tag.clone())).or_default();
                *values += 1;
                *highest = number.max(highest).to_owned();
            }
        }
        let read = |((repo, tag), (values, number)): ((Repo, Tag), (usize, u64))| async move {
            let value = self.objects.json::<RefValue>(&keys::tag_value(&repo, &tag, number)).await?;
            // gone: so many were written since the listing that it is an old one. Whoever wrote them holds their manifests
            Ok::<_, StoreError>(((repo, tag), values, number, value.and_then(|value| value.manifest)))
        };
        stream::iter(tags.into_iter().map(read)).buffered(READS).try_collect().await
    }

    /// Follows manifests, what they list, and what hangs on them.
    async fn manifests(
        &mut self,
        inventory: &Inventory,
        mut open: Vec<(Repo, Digest, Reached)>,
        marked: &mut Marked,
    ) -> Result<(), StoreError> {
        let mut hanging = BTreeMap::<(&Repo, Digest), Vec<Digest>>::new();
        let mut waiting = BTreeSet::<Digest>::new();
        for named in inventory.keys() {
            match named {
                Named::Referrer(repo, subject, digest) => {
                    hanging.entry((repo, *subject)).or_default().push(*digest);
                }
                Named::Job(digest, _) => drop(waiting.insert(*digest)),
                _ => {}
            }
        }
        while !open.is_empty() {
            let mut wave = std::mem::take(&mut open);
            wave.retain(|(repo, digest, _)| {
                let link = Named::Manifest(repo.clone(), *digest);
                inventory.has(&link) && !marked.names.contains(&link)
            });
            self.read_documents(wave.iter().map(|(_, digest, _)| *digest)).await?;
            self.read_subjects(inventory, &wave).await?;
            for (repo, digest, reached) in wave {
                let is_relied_on = reached == Reached::Named || hanging.contains_key(&(&repo, digest));
                if !is_relied_on && self.is_superseded(inventory, &repo, digest) {
                    continue;
                }
                if !marked.names.insert(Named::Manifest(repo.clone(), digest)) {
                    continue;
                }
                marked.names.insert(Named::Image(digest));
                marked.need([digest]);
                let document = &self.documents[&digest];
                let subject = document.subject.as_ref();
                marked.names.extend(subject.map(|on| Named::Referrer(repo.clone(), on.digest, digest)));
                marked.need(document.others());
                match waiting.contains(&digest) {
                    true => marked.need(document.tars()),
                    false => marked.blobs.extend(document.tars()),
                }
                let children = document.manifests.iter().flatten().map(|child| child.digest);
                open.extend(children.map(|child| (repo.clone(), child, Reached::Named)));
                let referrers = hanging.get(&(&repo, digest)).into_iter().flatten();
                open.extend(referrers.map(|referrer| (repo.clone(), *referrer, Reached::There)));
            }
        }
        Ok(())
    }

    async fn read_documents(&mut self, digests: impl Iterator<Item = Digest>) -> Result<(), StoreError> {
        let unread: BTreeSet<Digest> =
            digests.filter(|digest| !self.documents.contains_key(digest)).collect();
        let objects = &self.objects;
        let read = |digest: Digest| async move {
            let bytes = objects.read(&keys::blob(digest), MANIFEST_BYTES_MAX as u64).await?;
            let wrong = |reason| StoreError::Unmarkable { what: "manifest", digest, reason };
            let bytes = bytes.ok_or_else(|| wrong("it is missing".to_owned()))?;
            if !digest.names(&bytes) {
                return Err(wrong("it hashes to something else".to_owned()));
            }
            let document = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
            Ok((digest, document))
        };
        let found = stream::iter(unread.into_iter().map(read)).buffer_unordered(READS);
        let found: Vec<(Digest, Document)> = found.try_collect().await?;
        self.documents.extend(found);
        Ok(())
    }

    /// Follows the records of the images and layers that were reached, or of all.
    async fn records(
        &mut self,
        inventory: &Inventory,
        roots: Roots,
        marked: &mut Marked,
    ) -> Result<(), StoreError> {
        let all = roots == Roots::All;
        let images = inventory.keys().filter_map(|named| match named {
            Named::Image(digest) if all || marked.names.contains(named) => Some(*digest),
            _ => None,
        });
        let images: Vec<Digest> = images.collect();
        let read = read_records(&self.objects, images.clone(), &self.images, keys::image).await?;
        self.images.extend(read);
        for digest in images {
            let Some(image) = self.images.get(&digest) else { continue };
            marked.names.insert(Named::Image(digest));
            let parts = [&image.tree, &image.artifact];
            marked.need(parts.into_iter().flatten().map(|part| part.digest));
        }
        let mut open: Vec<Digest> = inventory
            .keys()
            .filter_map(|named| match named {
                Named::Layer(digest) if all || marked.blobs.contains(digest) => Some(*digest),
                _ => None,
            })
            .collect();
        while !open.is_empty() {
            let wave = std::mem::take(&mut open);
            let read = read_records(&self.objects, wave.clone(), &self.layers, keys::layer).await?;
            self.layers.extend(read);
            for digest in wave {
                let Some(layer) = self.layers.get(&digest) else { continue };
                marked.names.insert(Named::Layer(digest));
                marked.need([layer.recipe]);
                marked.blobs.insert(layer.diff_id);
                self.ours.insert(layer.recipe);
                let plain = Named::Layer(layer.diff_id);
                if inventory.has(&plain) && !marked.names.contains(&plain) {
                    open.push(layer.diff_id);
                }
            }
        }
        Ok(())
    }

    /// Finds the layers that need not be stored, since their records and all that these lead to were reached.
    fn rebuilt(&self, inventory: &Inventory, marked: &mut Marked) {
        let is_pack = |digest: Digest| {
            PackId::try_from(digest)
                .is_ok_and(|pack| inventory.has(&Named::Pack(pack)) || inventory.has(&Named::Arrival(pack)))
        };
        let reached = |digest: &Digest| marked.names.contains(&Named::Layer(*digest));
        let rebuilt =
            marked.blobs.difference(&marked.stored).filter(|digest| reached(digest) && !is_pack(**digest));
        let rebuilt = rebuilt.filter_map(|digest| {
            let layer = self.layers.get(digest).filter(|layer| layer.diff_id == *digest)?;
            Some((*digest, *layer))
        });
        marked.rebuilt = rebuilt.collect();
    }
}

/// A tag, how many values it has, the newest one's number, and what that names.
pub(crate) type CurrentTag = ((Repo, Tag), usize, u64, Option<Digest>);

/// Those of these records that were not read yet and are there.
async fn read_records<T: serde::de::DeserializeOwned>(
    objects: &Objects,
    digests: Vec<Digest>,
    known: &HashMap<Digest, T>,
    key: fn(Digest) -> object_store::path::Path,
) -> Result<Vec<(Digest, T)>, StoreError> {
    let unread = digests.into_iter().filter(|digest| !known.contains_key(digest));
    let read = |digest| async move {
        let record: Option<T> = objects.json(&key(digest)).await?;
        Ok::<_, StoreError>(record.map(|record| (digest, record)))
    };
    let found = stream::iter(unread.map(read)).buffer_unordered(READS);
    found.try_filter_map(|found| async move { Ok(found) }).try_collect().await
}
