//! The artifacts that this registry has hung on images itself, and may therefore replace.
//!
//! A registry makes the trees of images itself, and takes none from anybody else. So what hangs the tree on an image of which the
//! record says that it was converted to that tree is its own work. Where the packs are others now that have the frames of the tree,
//! it hangs another artifact on the image, and writes that one into the record (`gc/renew.rs`): the old one is superseded, and
//! nothing leads to it any more.
//!
//! But somebody may have come to rely on an artifact by its name. One that is tagged, that an index lists, or on which something
//! hangs in its turn is left alone, and so is one that is in a repository without its image. This counts in every repository, also in
//! one that has nothing of what it names: marks go by digests, so an old pack would stay for it anyway, now beside a new one.

use std::collections::{BTreeMap, BTreeSet};

use lamina_chunk::PackId;
use lamina_image::{Digest, LAYERS_MAX, media_type};

use super::{Document, Marked, Marker, Reached, read_records};
use crate::inventory::Inventory;
use crate::keys::Named;
use crate::record::ImageRecord;
use crate::{Repo, StoreError, keys};

/// An artifact that may be replaced everywhere.
#[derive(Debug)]
pub(crate) struct OwnArtifact {
    /// What it hangs on.
    pub(crate) image: Digest,
    /// Where it does.
    pub(crate) repos: BTreeSet<Repo>,
}

/// What an artifact names beside its tree and its recipes, so that whoever has all that it names can read the tree.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Carried {
    /// Packs that were moved, whose records lead to the others.
    pub(crate) moved: BTreeSet<PackId>,
    /// Packs where the frames are.
    pub(crate) packs: BTreeSet<PackId>,
}

impl Document {
    /// What it names of that.
    fn carried(&self) -> Carried {
        let layers = || self.layers.iter().flatten();
        let packs = layers().filter(|layer| layer.media_type == media_type::PACK);
        Carried {
            moved: layers().filter_map(|layer| layer.moved_pack()).collect(),
            packs: packs.filter_map(|layer| PackId::try_from(layer.digest).ok()).collect(),
        }
    }
}

impl Marker {
    /// Reads the records of the images on which these hang, where nobody may have named them.
    pub(super) async fn read_subjects(
        &mut self,
        inventory: &Inventory,
        wave: &[(Repo, Digest, Reached)],
    ) -> Result<(), StoreError> {
        let there = wave.iter().filter(|(_, _, reached)| *reached == Reached::There);
        let documents = there.map(|(_, digest, _)| &self.documents[digest]);
        let trees = documents.filter(|document| document.artifact_type.as_deref() == Some(media_type::TREE));
        let subjects: BTreeSet<Digest> =
            trees.filter_map(|document| Some(document.subject.as_ref()?.digest)).collect();
        let recorded = subjects.into_iter().filter(|subject| inventory.has(&Named::Image(*subject)));
        let read = read_records(&self.objects, recorded.collect(), &self.images, keys::image).await?;
        self.images.extend(read);
        Ok(())
    }

    /// Whether an artifact of a repository is the registry's own, and another one of the same tree is on the image's record and
    /// hangs there too. Whether somebody relies on it is another question.
    pub(super) fn is_superseded(&self, inventory: &Inventory, repo: &Repo, digest: Digest) -> bool {
        let Some((image, record)) = self.converted(inventory, digest) else { return false };
        let Some(now) = record.artifact.as_ref().map(|artifact| artifact.digest) else { return false };
        let is_there = |manifest| inventory.has(&Named::Manifest(repo.clone(), manifest));
        now != digest
            && is_there(image)
            && is_there(now)
            && inventory.has(&Named::Referrer(repo.clone(), image, now))
    }

    /// The artifact on an image's record, as it was read.
    pub(crate) fn artifact_on_record(&self, image: Digest) -> Option<Digest> {
        Some(self.images.get(&image)?.artifact.as_ref()?.digest)
    }

    /// The collector has changed what is on record of an image.
    pub(crate) fn learn_image(&mut self, image: Digest, record: ImageRecord) {
        self.images.insert(image, record);
    }

    /// The image that a manifest hangs the tree on to which it was converted, and what is on record of it.
    fn converted(&self, inventory: &Inventory, digest: Digest) -> Option<(Digest, &ImageRecord)> {
        let document = self.documents.get(&digest)?;
        let image = document.subject.as_ref()?.digest;
        let record = self.images.get(&image).filter(|_| inventory.has(&Named::Image(image)))?;
        let is_tree = document.artifact_type.as_deref() == Some(media_type::TREE);
        let tree = record.artifact.as_ref().and(record.tree.as_ref())?.digest;
        (is_tree && document.trees().collect::<BTreeSet<_>>() == BTreeSet::from([tree]))
            .then_some((image, record))
    }

    /// The artifacts that may be replaced, as far as marks have come, also after so many more moves of each pack.
    pub(crate) fn own_artifacts(
        &self,
        inventory: &Inventory,
        marked: &Marked,
        moves: usize,
    ) -> BTreeMap<Digest, OwnArtifact> {
        let mut own = BTreeMap::new();
        for (digest, document) in &self.documents {
            if let Some((image, _)) = self.converted(inventory, *digest)
                && self.may_be_replaced(inventory, document, moves)
            {
                own.insert(*digest, OwnArtifact { image, repos: BTreeSet::new() });
            }
        }
        for relied_on in self.relied_on(inventory, marked) {
            own.remove(&relied_on);
        }
        for named in inventory.keys() {
            let Named::Manifest(repo, digest) = named else { continue };
            let Some(artifact) = own.get_mut(digest) else { continue };
            let image = Named::Manifest(repo.clone(), artifact.image);
            match inventory.has(&image) {
                true => drop(artifact.repos.insert(repo.clone())),
                false => drop(own.remove(digest)),
            }
        }
        own.retain(|_, artifact| !artifact.repos.is_empty());
        own
    }

    /// The manifests that are tagged, that another one lists, or on which something hangs, as far as marks have come; some more
    /// than once.
    pub(crate) fn relied_on(&self, inventory: &Inventory, marked: &Marked) -> impl Iterator<Item = Digest> {
        let listed = self.documents.values().flat_map(|document| document.manifests.iter().flatten());
        let hung_on = inventory.keys().filter_map(|named| match named {
            Named::Referrer(_, subject, _) => Some(*subject),
            _ => None,
        });
        listed.map(|child| child.digest).chain(marked.tagged.iter().copied()).chain(hung_on)
    }

    /// Whether it is known what it has to name, and whether that fits into a manifest: of what does not fit a conversion leaves some
    /// out.
    fn may_be_replaced(&self, inventory: &Inventory, document: &Document, moves: usize) -> bool {
        let is_read = |recipe: Digest| self.ours.contains(&recipe) && inventory.has(&Named::Blob(recipe));
        let moved = self.recipe_packs(document).into_iter().map(|pack| self.moved_to(pack).len());
        let led_to = led_to(moved, moves);
        let named = document.carried();
        let others = document.layers.iter().flatten().count() - named.moved.len() - named.packs.len();
        document.recipes().all(is_read) && others + led_to <= LAYERS_MAX
    }

    /// The blobs that manifests name which are there: clients that know nothing of packs may ask for them. Not those packs that
    /// only `own` artifacts name, where their recipes lead: others will take the place of these artifacts.
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
        let packs = self.recipe_packs(document).into_iter();
        packs.flat_map(|pack| std::iter::once(pack).chain(self.moved_to(pack))).map(Digest::from).collect()
    }

    fn recipe_packs(&self, document: &Document) -> BTreeSet<PackId> {
        let packs = document.recipes().filter_map(|recipe| self.recipes.get(&recipe)).flatten();
        packs.filter_map(|pack| PackId::try_from(*pack).ok()).collect()
    }

    /// The packs and records that an artifact has to name; `None` where it does so.
    pub(crate) fn to_be_carried(&self, inventory: &Inventory, artifact: Digest) -> Option<Carried> {
        let document = self.documents.get(&artifact)?;
        let mut carried = Carried::default();
        for pack in self.recipe_packs(document) {
            // some frame is nowhere else, so all are taken from there
            let now = self.gone_to(inventory, pack).map_or(pack, |(now, _)| now);
            carried.packs.insert(now);
            let way = std::iter::once(pack).chain(self.moved_to(pack));
            carried.moved.extend(way.take_while(|at| *at != now));
        }
        (carried != document.carried()).then_some(carried)
    }
}

/// What leads to the frames of packs, each of which was `moved` so many times and may be `moves` times more: a record for each move,
/// and the pack in the end.
fn led_to(moved: impl Iterator<Item = usize>, moves: usize) -> usize {
    moved.map(|moved| 1 + moved + moves).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_had_room_for_one_more_move_has_room_for_what_was_moved() {
        let before = [0, 3, 0, 7];
        for moved in 0..1 << before.len() {
            let after = before.iter().enumerate().map(|(at, moves)| moves + (moved >> at & 1));
            assert!(led_to(after, 0) <= led_to(before.into_iter(), 1), "{moved:b}");
        }
        assert_eq!((led_to(before.into_iter(), 0), led_to(before.into_iter(), 1)), (14, 18));
    }
}
