//! Makes again what can be made again.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use lamina_chunk::PackId;
use lamina_image::{Digest, Recipe, derive_tree, pack_tree, pack_tree_as_before};

use super::follow::{Follow, Link};
use super::{Found, FsckReport, Wrong};
use crate::keys::{self, Named};
use crate::{Keeper, Proof, Store, StoreError};

/// What can be done about something damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Nothing that is tagged or recorded needs it.
    Remove,
    /// A layer's plain tar, which its recipe rebuilds.
    Rebuild,
    /// A tree, which the recipes of the image make.
    Derive,
    /// All original layers of the images that need it are here.
    Convert,
    /// An older value of the tag is there.
    StepBack,
    /// Somebody has to push it.
    Push,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Remove => "nothing needs it: it is taken away",
            Self::Rebuild => "it is rebuilt from the layer's recipe",
            Self::Derive => "it is made again from the layers' recipes",
            Self::Convert => "the images are converted again from their original layers",
            Self::StepBack => "the tag goes back to the value before",
            Self::Push => "push the images again: what is still good is not sent again",
        })
    }
}

impl Follow {
    pub(super) fn remedy(&self, named: &Named) -> Remedy {
        let users = self.users(named);
        match named {
            Named::TagValue(repo, tag, number) => {
                let older = |other: &u64| {
                    self.found.inventory.has(&Named::TagValue(repo.clone(), tag.clone(), *other))
                };
                if (number.saturating_sub(16)..*number).any(|other| older(&other)) {
                    Remedy::StepBack
                } else {
                    Remedy::Push
                }
            }
            Named::Blob(digest) if self.is_rebuilt(*digest) => Remedy::Rebuild,
            Named::Blob(digest) if self.tree_of(*digest).is_some() => Remedy::Derive,
            Named::Blob(_)
            | Named::Image(_)
            | Named::Layer(_)
            | Named::Pack(_)
            | Named::Arrival(_)
            | Named::Moved(_) => {
                if users.is_empty() {
                    Remedy::Remove
                } else if users.iter().all(|link| self.is_convertible(named, link)) {
                    Remedy::Convert
                } else {
                    Remedy::Push
                }
            }
            Named::Job(..) | Named::Link(..) => Remedy::Remove,
            Named::Manifest(..) | Named::Referrer(..) => Remedy::Push,
        }
    }

    /// Whether it is a layer's plain tar of which recipe and packs are good, and nobody has found that they make something
    /// else.
    pub(super) fn is_rebuilt(&self, digest: Digest) -> bool {
        let Some(layer) = self.found.layers.get(&digest).filter(|layer| layer.diff_id == digest) else {
            return false;
        };
        let Some(packs) = self.recipes.get(&layer.recipe) else { return false };
        let is_lost = matches!(self.found.wrong.get(&Named::Blob(digest)), Some((Wrong::Missing, _)));
        !is_lost
            && self.found.is_good(layer.recipe)
            && packs.iter().all(|pack| self.found.is_pack_good(*pack))
    }

    /// Whether it is a recipe, or a pack that recipes lead to.
    fn is_cut(&self, named: &Named) -> bool {
        let Named::Blob(digest) = named else { return false };
        self.recipes.contains_key(digest)
            || self.found.layers.values().any(|layer| layer.recipe == *digest)
            || self.recipes.values().any(|packs| packs.contains(digest))
    }

    /// The recipes of an image whose own manifest names this tree, if all are good.
    fn tree_of(&self, tree: Digest) -> Option<Vec<Digest>> {
        let names = |image: &crate::ImageRecord| image.tree.as_ref().is_some_and(|it| it.digest == tree);
        let image = self.found.images.iter().find(|(_, image)| names(image) && image.artifact.is_none())?;
        let document = self.documents.get(image.0)?;
        let recipes: Vec<Digest> = document.recipes().collect();
        let good = !recipes.is_empty() && recipes.iter().all(|recipe| self.recipes.contains_key(recipe));
        (good && Some(recipes.len()) == document.layers.as_ref().map(Vec::len)).then_some(recipes)
    }

    /// Whether an image that needs something damaged can be converted again without it: its own documents and original
    /// layers are good, or rebuilt from what is good, and its manifest binds no tree.
    fn is_convertible(&self, damaged: &Named, link: &Link) -> bool {
        // an artifact needs what it lists, and goes with the image that it hangs on; not from under a tag
        if self.image_of(link).is_some() {
            return !self.tags.contains_key(link);
        }
        let Some(document) = self.documents.get(&link.1) else { return false };
        let mut originals = document.blobs();
        let bound =
            document.annotations.iter().flatten().any(|(name, _)| name == lamina_image::TREE_ANNOTATION);
        let is_original =
            |named: &Named| matches!(named, Named::Blob(blob) if document.blobs().any(|it| it == *blob));
        !bound
            && !is_original(damaged)
            && originals.all(|blob| self.found.is_good(blob) || self.is_rebuilt(blob))
    }

    /// The image on which a manifest hangs the tree that is on the image's record: an artifact of the registry's own, be it
    /// superseded.
    fn image_of(&self, link: &Link) -> Option<Digest> {
        let artifact = |image: &Digest| self.found.images.get(image)?.artifact.as_ref();
        let tree = |image: &Digest| self.found.images.get(image)?.tree.as_ref();
        if let Some((image, hung)) = self.found.hung.get(link)
            && artifact(image).and(tree(image)).is_some_and(|tree| tree.digest == *hung)
        {
            return Some(*image);
        }
        // what says where it hangs may be what is damaged
        let mut images = self.found.images.keys();
        images.find(|image| artifact(image).is_some_and(|artifact| artifact.digest == link.1)).copied()
    }

    /// The artifacts of the registry's own that hang on an image in a repository.
    fn artifacts_of(&self, (repo, image): &Link) -> Vec<Link> {
        let hung = self.found.hung.iter().filter(|(link, on)| link.0 == *repo && on.0 == *image);
        hung.map(|(link, _)| link.clone()).filter(|link| self.image_of(link) == Some(*image)).collect()
    }
}

impl Keeper {
    /// Looks at everything, and makes good what can be made good. Nobody else may use the store meanwhile; images that
    /// have to be converted again wait for the next registry.
    pub async fn repair(&self, store: &Store, done: &(dyn Fn(u64) + Sync)) -> Result<FsckReport, StoreError> {
        let found = Found::read(&self.objects, done).await?;
        let follow = Follow::read(&self.objects, found).await?;
        let mut report = follow.report();
        let wrong: Vec<_> = follow.found.wrong.iter().map(|(named, (wrong, _))| (named, *wrong)).collect();
        let (mut again, mut lost) = (BTreeSet::new(), BTreeSet::new());
        for ((named, wrong), damage) in wrong.into_iter().zip(&mut report.damaged) {
            let remedy = follow.remedy(named);
            if wrong != Wrong::Missing {
                self.put_aside(named).await?;
            }
            damage.repaired = match remedy {
                Remedy::Remove | Remedy::StepBack => true,
                Remedy::Rebuild => self.rebuilds(store, &follow, named).await?,
                Remedy::Derive => self.derive(store, &follow, named).await?,
                Remedy::Convert => {
                    again.extend(follow.users(named));
                    true
                }
                Remedy::Push => {
                    lost.extend(follow.users(named).into_iter().filter(|_| follow.is_cut(named)));
                    false
                }
            };
            self.withdraw(&follow, named, remedy).await?;
        }
        for link in again {
            if self.forget(&follow, &link).await? {
                self.objects.put(&keys::job(link.1, &link.0), "{}".into()).await?;
            }
        }
        // whoever pushes them again gets a tree for them again
        for link in lost {
            self.forget(&follow, &link).await?;
        }
        Ok(report)
    }

    /// Takes an object out of the way without deleting it.
    async fn put_aside(&self, named: &Named) -> Result<(), StoreError> {
        let key = named.key();
        let Some(meta) = self.objects.head(&key).await? else { return Ok(()) };
        self.objects.rename(&key, &keys::damaged(&key), meta.size).await
    }

    /// Nobody may be told of chunks and layers that cannot be read any more.
    async fn withdraw(&self, follow: &Follow, named: &Named, remedy: Remedy) -> Result<(), StoreError> {
        let digest = match named {
            Named::Blob(digest) => *digest,
            // what cannot be found any more is as good as gone
            Named::Moved(pack) => (*pack).into(),
            _ => return Ok(()),
        };
        let digest = &digest;
        if matches!(remedy, Remedy::Rebuild | Remedy::Derive) {
            return Ok(());
        }
        if let Ok(pack) = PackId::try_from(*digest) {
            self.objects.delete(&keys::pack(pack)).await?;
            self.objects.delete(&keys::arrival(pack)).await?;
        }
        // what is made again gets another name; what has to be pushed is still missed
        if remedy != Remedy::Push {
            let links =
                follow.found.inventory.keys().filter(|it| matches!(it, Named::Link(of, _) if of == digest));
            for link in links {
                self.objects.delete(&link.key()).await?;
            }
            // the records that lead there lead nowhere; the one that does so itself goes last, so that none is left that leads to it
            let steps =
                |old: &PackId| follow.found.moved_to(Digest::from(*old)).iter().position(|to| to == digest);
            let mut leading: Vec<_> =
                follow.found.moved.keys().filter_map(|old| Some((steps(old)?, *old))).collect();
            leading.sort_unstable_by(|one, other| other.cmp(one));
            for (_, old) in leading {
                self.objects.delete(&keys::moved(old)).await?;
            }
        }
        for (layer, record) in &follow.found.layers {
            let packs = follow.recipes.get(&record.recipe);
            let leads = [record.recipe, record.diff_id].contains(digest);
            if leads || packs.is_some_and(|packs| packs.contains(digest)) {
                self.objects.delete(&keys::layer(*layer)).await?;
            }
        }
        for (image, record) in &follow.found.images {
            let mut parts = [&record.tree, &record.artifact].into_iter().flatten();
            if parts.any(|part| part.digest == *digest) {
                self.objects.delete(&keys::image(*image)).await?;
            }
        }
        Ok(())
    }

    /// Rebuilds a plain tar once, to see that it can be; from now on it is whenever somebody asks for it.
    async fn rebuilds(&self, store: &Store, follow: &Follow, named: &Named) -> Result<bool, StoreError> {
        let Named::Blob(digest) = named else { return Ok(false) };
        let recipe = Arc::new(store.recipe(follow.found.layers[digest].recipe).await?);
        let proof = Arc::new(Proof::default());
        store.check_places(&recipe, &proof).await?;
        match store.check_rebuilds(&recipe, &proof).await {
            Ok(()) => Ok(true),
            Err(StoreError::Digest { .. } | StoreError::Frame { .. } | StoreError::Place { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes a tree again.
    async fn derive(&self, store: &Store, follow: &Follow, named: &Named) -> Result<bool, StoreError> {
        let Named::Blob(digest) = named else { return Ok(false) };
        let Some(digests) = follow.tree_of(*digest) else { return Ok(false) };
        let mut recipes: Vec<Recipe> = Vec::with_capacity(digests.len());
        for recipe in digests {
            recipes.push(store.recipe(recipe).await?);
        }
        let wanted = *digest;
        let made = tokio::task::spawn_blocking(move || {
            let flat = derive_tree(&recipes).ok()?;
            // as trees are packed now, and as they were
            let now = std::iter::once_with(|| pack_tree(&flat));
            now.chain(pack_tree_as_before(&flat)).find(|made| Digest::of(made) == wanted)
        });
        match made.await.expect("deriving a tree does not panic").map(Bytes::from) {
            Some(made) => store.put_blob(made).await.map(|_| true),
            None => Ok(false),
        }
    }

    /// Forgets what is known of an image's tree, so that it can be made anew, and takes down all that hangs it there: what is made
    /// may have its frames elsewhere, and nobody would know these for the registry's own. False where there is nothing to make: it
    /// is such an artifact, or no image at all.
    async fn forget(&self, follow: &Follow, link: &Link) -> Result<bool, StoreError> {
        if let Some(image) = follow.image_of(link) {
            self.take_down(follow, link, image).await?;
            return Ok(false);
        }
        let digest = link.1;
        let Some(document) = follow.documents.get(&digest) else { return Ok(false) };
        if !follow.found.images.contains_key(&digest) && document.config.is_none() {
            return Ok(false);
        }
        for artifact in follow.artifacts_of(link) {
            self.take_down(follow, &artifact, digest).await?;
        }
        self.objects.delete(&keys::image(digest)).await?;
        Ok(true)
    }

    /// Takes an artifact off an image and out of its repository, but not from under a tag.
    async fn take_down(&self, follow: &Follow, link: &Link, image: Digest) -> Result<(), StoreError> {
        if follow.tags.contains_key(link) {
            return Ok(());
        }
        let (repo, artifact) = link;
        self.objects.delete(&keys::referrer(repo, image, *artifact)).await?;
        self.objects.delete(&keys::manifest(repo, *artifact)).await
    }
}
