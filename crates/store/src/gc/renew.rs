//! Artifacts of the registry's own that have to name other packs: those where the frames of their recipes are.
//!
//! What hangs the tree on an image after an ordinary push names packs, so that clients take them along when they copy the image.
//! Such a pack is moved like any other, but its artifact names it, so it stays. Then this is all that happens:
//!
//! 1. An artifact of the same tree and recipes that names the new packs, and the moved records that lead there, is hung on the image
//!    wherever one of its kind hangs. All that it names was there before.
//! 2. The image's record names the new one, once it hangs everywhere. What else is of the registry's own and hangs beside it is
//!    superseded from that moment (`mark/artifacts.rs`): garbage that goes through quarantine and is condemned like any other, and
//!    when it is gone nothing names the old pack.
//!
//! No step needs the next one, and each looks for what it has to do, and not for what an earlier collection did. Ended anywhere,
//! either artifact is good: the old packs are there as long as the old one, and the new packs as long as a record or the new one.
//! Where a new one hangs that is not on record, it is superseded by the old one, or put there once more.
//!
//! Nothing comes back that somebody deletes meanwhile: image and artifact are looked for right before, and once more when all is
//! hung; where they went in between, the new one is condemned and taken down, unless they are there again. What is hung is written
//! down before: where a collector dies between the two looks, the next one begins with the second look, since nobody could tell what
//! is left then from what somebody keeps without its image. A process that hangs the old one on the image in another repository at
//! this time has read the record before: the next collection finds that the new one is missing there.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use lamina_chunk::{MOVED_BYTES_MAX, PackId};
use lamina_image::{Descriptor, Digest, MANIFEST_BYTES_MAX, Manifest, media_type};
use serde::{Deserialize, Serialize};

use super::Gc;
use crate::inventory::Inventory;
use crate::keys::{self, Named};
use crate::manifests::{self, ManifestPut, Referrer};
use crate::mark::{Carried, Marked, Marker, Roots};
use crate::record::ImageRecord;
use crate::{Repo, StoreError};

/// Images in one collection, at some ten small requests for each repository. The next one goes on: an image that had its turn is not
/// found again, unless somebody changed it meanwhile, and none is found that can never be renewed (`may_be_replaced`), so the first
/// ones do not keep the others waiting.
const IMAGES_MAX: usize = 4096;

/// An image that is to get another artifact somewhere.
#[derive(Debug)]
struct Renewal {
    image: Digest,
    /// The artifact on its record.
    on_record: Digest,
    /// What it is to name; `None` where it does so and only hangs not everywhere.
    carried: Option<Carried>,
    /// The repositories where it is to hang, with those of the registry's own that do so.
    repos: BTreeMap<Repo, BTreeSet<Digest>>,
}

/// An artifact that is being hung on an image.
#[derive(Debug, Serialize, Deserialize)]
struct Hanging {
    image: Digest,
    artifact: Digest,
    /// By repository, what has to hang there too.
    beside: BTreeMap<String, BTreeSet<Digest>>,
}

/// An artifact, as bytes and as a referrers answer has it.
#[derive(Debug)]
struct Renewed {
    bytes: Bytes,
    descriptor: Descriptor,
    manifest: Manifest,
}

/// The images that need another artifact, or theirs in more repositories, as far as marks have come.
fn renewals(marker: &Marker, inventory: &Inventory, marked: &Marked) -> Vec<Renewal> {
    // what was moved had room for that
    let own = marker.own_artifacts(inventory, marked, 0);
    let mut all = BTreeMap::<Digest, BTreeMap<Repo, BTreeSet<Digest>>>::new();
    for (digest, artifact) in &own {
        let hanging = all.entry(artifact.image).or_default();
        for repo in &artifact.repos {
            hanging.entry(repo.clone()).or_default().insert(*digest);
        }
    }
    let mut found = Vec::new();
    for (image, mut repos) in all {
        let Some(on_record) = marker.artifact_on_record(image).filter(|digest| own.contains_key(digest))
        else {
            continue;
        };
        let carried = marker.to_be_carried(inventory, on_record);
        let is_there = |pack: &PackId| inventory.has(&Named::Blob((*pack).into()));
        match &carried {
            Some(carried) if !carried.packs.iter().all(is_there) => continue,
            Some(_) => {}
            None => repos.retain(|repo, there| {
                // a crash may have left it there hanging on nothing
                let hangs = || inventory.has(&Named::Referrer(repo.clone(), image, on_record));
                !(there.contains(&on_record) && hangs())
            }),
        }
        if !repos.is_empty() {
            found.push(Renewal { image, on_record, carried, repos });
        }
    }
    found
}

impl Gc<'_> {
    /// Hangs artifacts on images that name the packs where frames are now; `moved` says whether any were moved since what was
    /// `found`.
    pub(super) async fn renew(
        &mut self,
        (inventory, marked): (&Inventory, &Marked),
        moved: bool,
    ) -> Result<(), StoreError> {
        if !moved && renewals(&self.marker, inventory, marked).is_empty() {
            return Ok(());
        }
        let inventory = Inventory::read(self.objects).await?;
        let marked = self.marker.mark(&inventory, Roots::All).await?;
        let all = renewals(&self.marker, &inventory, &marked);
        for renewal in all.into_iter().take(IMAGES_MAX) {
            self.renew_one(&inventory, renewal).await?;
        }
        self.objects.delete(&keys::hanging()).await
    }

    async fn renew_one(&mut self, inventory: &Inventory, renewal: Renewal) -> Result<(), StoreError> {
        self.collector.check().await?;
        let Some(new) = self.renewed(inventory, &renewal).await? else { return Ok(()) };
        let Renewal { image, on_record, repos, .. } = renewal;
        let beside = repos.iter().map(|(repo, old)| (repo.to_string(), old.clone())).collect();
        let hanging = Hanging { image, artifact: new.descriptor.digest, beside };
        self.objects.put_json(&keys::hanging(), &hanging).await?;
        let mut is_hung = false;
        for (repo, old) in repos {
            self.collector.check().await?;
            if self.still_hangs(&repo, image, &old).await? {
                self.hang(inventory, &repo, image, &new).await?;
                is_hung = true;
            }
        }
        let is_lost = self.take_down_lost(&hanging).await?;
        if !is_hung || is_lost || new.descriptor.digest == on_record {
            return Ok(());
        }
        let key = keys::image(image);
        self.collector.check().await?;
        if let Some(record) = self.objects.json::<ImageRecord>(&key).await?
            && record.artifact.as_ref().is_some_and(|artifact| artifact.digest == on_record)
        {
            let record = ImageRecord { artifact: Some(new.descriptor.clone()), ..record };
            self.objects.put_json(&key, &record).await?;
            self.marker.learn_image(image, record);
            tracing::info!(%image, old = %on_record, new = %new.descriptor.digest, "an artifact names other packs");
        }
        Ok(())
    }

    /// The artifact as it is to be, when its moved records are stored. `None` where it cannot be read any more.
    async fn renewed(&self, inventory: &Inventory, renewal: &Renewal) -> Result<Option<Renewed>, StoreError> {
        let read = self.objects.read(&keys::blob(renewal.on_record), MANIFEST_BYTES_MAX as u64).await?;
        let manifest = read.as_ref().and_then(|bytes| serde_json::from_slice::<Manifest>(bytes).ok());
        let (Some(mut bytes), Some(mut manifest)) = (read, manifest) else { return Ok(None) };
        if let Some(carried) = &renewal.carried {
            let is_other = |layer: &Descriptor| {
                layer.media_type != media_type::PACK && layer.media_type != media_type::MOVED
            };
            manifest.layers.retain(is_other);
            for pack in &carried.moved {
                let Some(record) = self.objects.read(&keys::moved(*pack), MOVED_BYTES_MAX as u64).await?
                else {
                    return Ok(None);
                };
                let layer = Descriptor::of_moved(*pack, &record);
                self.objects.put(&keys::blob(layer.digest), record.into()).await?;
                manifest.layers.push(layer);
            }
            let size = |pack| inventory.0.get(&Named::Blob(pack)).map_or(0, |listed| listed.bytes);
            let packs = carried.packs.iter().map(|pack| Digest::from(*pack));
            manifest.layers.extend(packs.map(|pack| Descriptor::named(media_type::PACK, pack, size(pack))));
            bytes = serde_json::to_vec(&manifest).expect("a manifest has string keys").into();
        }
        let descriptor = Descriptor {
            artifact_type: manifest.artifact_type.clone(),
            annotations: manifest.annotations.clone(),
            ..Descriptor::of(media_type::OCI_MANIFEST, &bytes)
        };
        Ok(Some(Renewed { bytes, descriptor, manifest }))
    }

    /// Whether an image is in a repository, with any of these artifacts.
    async fn still_hangs(
        &self,
        repo: &Repo,
        image: Digest,
        artifacts: &BTreeSet<Digest>,
    ) -> Result<bool, StoreError> {
        for artifact in artifacts {
            if self.objects.exists(&keys::manifest(repo, *artifact)).await? {
                return self.objects.exists(&keys::manifest(repo, image)).await;
            }
        }
        Ok(false)
    }

    /// Whoever may read an artifact may read what it names.
    async fn hang(
        &self,
        inventory: &Inventory,
        repo: &Repo,
        image: Digest,
        new: &Renewed,
    ) -> Result<(), StoreError> {
        for layer in &new.manifest.layers {
            if !inventory.has(&Named::Link(layer.digest, repo.clone())) {
                self.objects.put(&keys::link(layer.digest, repo), "{}".into()).await?;
            }
        }
        let put = ManifestPut {
            digest: new.descriptor.digest,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            bytes: new.bytes.clone(),
            referrer: Some(Referrer { subject: image, descriptor: new.descriptor.clone() }),
        };
        manifests::put(self.objects, repo, put).await
    }

    /// Looks once more for a collector that died after it had hung an artifact.
    pub(super) async fn look_again(&mut self) -> Result<(), StoreError> {
        let mut hanging = match self.objects.json::<Hanging>(&keys::hanging()).await {
            Ok(Some(hanging)) => hanging,
            Ok(None) => return Ok(()),
            Err(error @ (StoreError::Record { .. } | StoreError::TooLarge { .. })) => {
                tracing::warn!(%error, "it is not known which artifact a collection was hanging that died");
                return self.objects.delete(&keys::hanging()).await;
            }
            Err(error) => return Err(error),
        };
        // on record by now, it may hang alone
        let record = self.objects.json::<ImageRecord>(&keys::image(hanging.image)).await?;
        let on_record = record.and_then(|record| record.artifact).map(|artifact| artifact.digest);
        hanging
            .beside
            .values_mut()
            .for_each(|old| old.extend(on_record.filter(|it| *it == hanging.artifact)));
        // since then somebody may have come to need it, who keeps it
        let inventory = Inventory::read(self.objects).await?;
        let marked = self.marker.mark(&inventory, self.config.roots(self.now)).await?;
        if !self.marker.relied_on(&inventory, &marked).any(|it| it == hanging.artifact) {
            self.take_down_lost(&hanging).await?;
        }
        self.objects.delete(&keys::hanging()).await
    }

    /// Takes a new artifact out of repositories again from which the image or all that it replaces went meanwhile. Whether there are
    /// any.
    async fn take_down_lost(&mut self, hanging: &Hanging) -> Result<bool, StoreError> {
        let (image, new) = (hanging.image, hanging.artifact);
        let names =
            |repo: &Repo| [Named::Referrer(repo.clone(), image, new), Named::Manifest(repo.clone(), new)];
        let mut lost = Vec::new();
        for (repo, old) in &hanging.beside {
            let Ok(repo) = repo.parse::<Repo>() else { continue };
            let is_there = self.objects.exists(&keys::manifest(&repo, new)).await?;
            if is_there && !self.still_hangs(&repo, image, old).await? {
                lost.push((repo, old));
            }
        }
        if lost.is_empty() {
            return Ok(false);
        }
        let keys = lost.iter().flat_map(|(repo, _)| names(repo)).map(|named| named.key());
        let list = self.condemn(keys.collect::<Vec<_>>().into_iter(), &[]).await?;
        let mut doomed = Vec::new();
        for (repo, old) in lost {
            let names = names(&repo);
            if !names.iter().any(|named| list.holds(named)) && !self.still_hangs(&repo, image, old).await? {
                doomed.extend(names);
            }
        }
        doomed.sort_by_key(super::order);
        self.delete(&doomed).await?;
        self.forgive(list).await?;
        Ok(true)
    }
}
