//! Artifacts of the registry's own that have to name other packs: those where the frames of their recipes are.
//!
//! What hangs the tree on an image after an ordinary push names packs, so that clients take them along when they copy the image. Of
//! such a pack what lives is taken over like that of any other, and a new artifact of the same tree and recipes takes the place of
//! the one that names it:
//!
//! 1. The new artifact is hung on the image in every repository that has the old one, when all that it names is there. If anything
//!    ends here, both hang, and both are good.
//! 2. The image's record names the new one, which other repositories get from now on.
//! 3. The old one is condemned, and taken down where nobody holds it and it still is only the registry's. Ended before, the next
//!    collection does so.
//!
//! From then on the old pack is like any other: it is moved where no manifest that is there names it. But it stays for a quarantine
//! more, since whoever has begun to copy the old artifact still asks for it. Where it is not moved after all, say since somebody
//! holds it, the next collection repacks it anew, or lets the artifact name it again where so much of it lives again.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use lamina_chunk::PackId;
use lamina_image::{Descriptor, Digest, MANIFEST_BYTES_MAX, Manifest, media_type};

use super::Gc;
use super::condemn::Condemned;
use super::repack::Copied;
use crate::inventory::Inventory;
use crate::keys::{self, Named};
use crate::manifests::{self, ManifestPut, Referrer};
use crate::mark::{Marked, Marker, OwnArtifact};
use crate::record::ImageRecord;
use crate::{Repo, StoreError};

/// Whether any artifact has to name other packs, though none is moved now.
pub(super) fn is_due(marker: &Marker, inventory: &Inventory, marked: &Marked, young_after: i64) -> bool {
    let own = marker.own_artifacts(inventory, marked, young_after);
    own.keys().any(|artifact| marker.to_be_named(*artifact, &BTreeMap::new()).is_some())
}

impl Gc<'_> {
    /// Hangs artifacts on images that name the packs to which frames are about to be moved. Gives the old ones, which hang as well.
    pub(super) async fn renew(
        &self,
        (inventory, marked): (&Inventory, &Marked),
        copied: &[Copied],
    ) -> Result<BTreeSet<Named>, StoreError> {
        let own = self.marker.own_artifacts(inventory, marked, self.config.young_after(self.now));
        let moved = copied.iter().map(|copied| (copied.pack, copied.moved.pack())).collect();
        let mut bytes = BTreeMap::new();
        for copied in copied {
            let new = copied.moved.pack();
            bytes.extend(self.objects.head(&keys::blob(new.into())).await?.map(|meta| (new, meta.size)));
        }
        let listed = |pack: &PackId| inventory.0.get(&Named::Blob((*pack).into())).map(|listed| listed.bytes);
        let mut replaced = BTreeSet::new();
        for (old, artifact) in own {
            let Some(packs) = self.marker.to_be_named(old, &moved) else { continue };
            let packs = packs.into_iter().map(|pack| {
                let size = bytes.get(&pack).copied().or_else(|| listed(&pack))?;
                Some(Descriptor::named(media_type::PACK, pack.into(), size))
            });
            let Some(packs) = packs.collect::<Option<Vec<_>>>() else {
                tracing::warn!(artifact = %old, "it is left alone: a pack is missing; see lamina fsck");
                continue;
            };
            if self.replace(inventory, (old, &artifact), packs).await? {
                replaced.extend(names(old, &artifact));
            }
        }
        Ok(replaced)
    }

    /// Hangs an artifact that names these packs on an image, beside the old one. False where that cannot be read any more.
    async fn replace(
        &self,
        inventory: &Inventory,
        (old, artifact): (Digest, &OwnArtifact),
        packs: Vec<Descriptor>,
    ) -> Result<bool, StoreError> {
        let read = self.objects.read(&keys::blob(old), MANIFEST_BYTES_MAX as u64).await?;
        let read = read.and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
        let Some(mut manifest) = read else { return Ok(false) };
        manifest.layers.retain(|layer| layer.media_type != media_type::PACK);
        manifest.layers.extend(packs);
        let bytes = Bytes::from(serde_json::to_vec(&manifest).expect("a manifest has string keys"));
        let new = Descriptor {
            artifact_type: manifest.artifact_type.clone(),
            annotations: manifest.annotations.clone(),
            ..Descriptor::of(media_type::OCI_MANIFEST, &bytes)
        };
        self.collector.check().await?;
        for repo in &artifact.repos {
            self.link_layers(inventory, repo, &manifest).await?;
            let put = ManifestPut {
                digest: new.digest,
                media_type: media_type::OCI_MANIFEST.to_owned(),
                bytes: bytes.clone(),
                referrer: Some(Referrer { subject: artifact.image, descriptor: new.clone() }),
            };
            manifests::put(self.objects, repo, put).await?;
        }
        let key = keys::image(artifact.image);
        if let Some(record) = self.objects.json::<ImageRecord>(&key).await?
            && record.artifact.as_ref().is_some_and(|on_record| on_record.digest == old)
        {
            let record = ImageRecord { artifact: Some(new.clone()), ..record };
            self.objects.put_json(&key, &record).await?;
        }
        tracing::info!(image = %artifact.image, %old, new = %new.digest, "an artifact names other packs");
        Ok(true)
    }

    /// Takes down the artifacts that were replaced, each everywhere or nowhere, and takes them out of `inventory`.
    pub(super) async fn take_down(
        &mut self,
        (inventory, marked): (&mut Inventory, &Marked),
        replaced: &BTreeSet<Named>,
        list: &Condemned,
    ) -> Result<(), StoreError> {
        let own = self.marker.own_artifacts(inventory, marked, self.config.young_after(self.now));
        let names = own.iter().map(|(old, artifact)| names(*old, artifact));
        let goes = |names: &Vec<Named>| names.iter().all(|name| replaced.contains(name) && !list.holds(name));
        let mut doomed: Vec<Named> = names.filter(goes).flatten().collect();
        doomed.sort_by_key(super::order);
        for gone in self.delete(&doomed).await? {
            inventory.0.remove(&gone);
        }
        Ok(())
    }

    /// Whoever may read an artifact may read what it names.
    async fn link_layers(
        &self,
        inventory: &Inventory,
        repo: &Repo,
        manifest: &Manifest,
    ) -> Result<(), StoreError> {
        for layer in &manifest.layers {
            if !inventory.has(&Named::Link(layer.digest, repo.clone())) {
                self.objects.put(&keys::link(layer.digest, repo), "{}".into()).await?;
            }
        }
        Ok(())
    }
}

/// What makes an artifact be there.
fn names(digest: Digest, artifact: &OwnArtifact) -> Vec<Named> {
    let names = artifact.repos.iter().flat_map(|repo| {
        let referrer = Named::Referrer(repo.clone(), artifact.image, digest);
        [referrer, Named::Manifest(repo.clone(), digest)]
    });
    names.collect()
}
