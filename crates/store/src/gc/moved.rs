//! Old packs that have a record of where their frames went, on their way out.
//!
//! A collector that slept between looking for links and writing the record has missed those that came meanwhile. So whoever
//! deletes a pack that has a record looks once more. And a record may be somebody else's word: nothing is deleted for one that the
//! packs' indexes do not bear out.

use std::collections::{BTreeMap, BTreeSet};

use lamina_chunk::{FrameId, PackId};
use lamina_image::Digest;

use super::Gc;
use super::repack::living;
use crate::inventory::Inventory;
use crate::keys::{self, Named};
use crate::mark::{Marked, Span};
use crate::packs::pack_records;
use crate::{Repo, StoreError};

/// The repositories of packs.
pub(super) fn links(inventory: &Inventory, packs: &BTreeSet<PackId>) -> BTreeMap<PackId, Vec<Repo>> {
    let mut found = BTreeMap::<PackId, Vec<Repo>>::new();
    for named in inventory.keys() {
        if let Named::Link(digest, repo) = named
            && let Ok(pack) = PackId::try_from(*digest)
            && packs.contains(&pack)
        {
            found.entry(pack).or_default().push(repo.clone());
        }
    }
    found
}

/// The repositories of the old pack that have not got the new one.
pub(super) fn lacking(old: &[Repo], new: &[Repo]) -> Vec<Repo> {
    old.iter().filter(|repo| !new.contains(repo)).cloned().collect()
}

impl Gc<'_> {
    /// Gives a pack to repositories.
    pub(super) async fn link(&self, pack: PackId, repos: &[Repo]) -> Result<(), StoreError> {
        for repo in repos {
            self.objects.put(&keys::link(pack.into(), repo), "{}".into()).await?;
        }
        Ok(())
    }

    /// Those of the packs among `doomed` of which the named frames are not where records say, by the packs' indexes: a record that
    /// came from an upstream is its word. *Cost*: two indexes for each pack that was moved and is here.
    pub(super) async fn unproven(
        &self,
        (inventory, marked): (&Inventory, &Marked),
        doomed: &[Named],
    ) -> Result<BTreeSet<Digest>, StoreError> {
        let packs = doomed.iter().filter_map(|named| match named {
            Named::Blob(digest) => PackId::try_from(*digest).ok(),
            _ => None,
        });
        let mut unproven = BTreeSet::new();
        for pack in packs.filter(|pack| marked.names.contains(&Named::Moved(*pack))) {
            let (named, now) = (self.marker.live().of(pack), self.marker.gone_to(inventory, pack));
            let is_proved = match (named, now) {
                (Some(named), Some((now, spans))) => {
                    let (old, new) = (self.ids(pack, named).await?, self.ids(now, &spans).await?);
                    old.is_some() && old == new
                }
                _ => false,
            };
            if !is_proved {
                tracing::warn!(%pack, "a pack stays: what lives of it is not where its record says; see lamina fsck");
                unproven.insert(pack.into());
            }
        }
        Ok(unproven)
    }

    /// Which frames these are, by their pack's index; `None` where that does not have them.
    async fn ids(&self, pack: PackId, frames: &[Span]) -> Result<Option<Vec<FrameId>>, StoreError> {
        let records = match pack_records(self.objects, pack).await {
            Ok(records) => records,
            Err(StoreError::Pack { .. } | StoreError::Missing(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let found = living(&records, frames);
        Ok(found.map(|records| records.into_iter().map(|record| record.id).collect()))
    }

    /// Gives the packs to which these were moved to all repositories that have the old ones.
    pub(super) async fn link_moved(&self, inventory: &Inventory, doomed: &[Named]) -> Result<(), StoreError> {
        let is_moved = |pack: &PackId| inventory.has(&Named::Moved(*pack));
        let packs = doomed.iter().filter_map(|named| match named {
            Named::Blob(digest) => PackId::try_from(*digest).ok().filter(is_moved),
            _ => None,
        });
        let moved: BTreeMap<PackId, Vec<PackId>> =
            packs.map(|pack| (pack, self.marker.moved_to(pack))).collect();
        let all = moved.iter().flat_map(|(pack, now)| now.iter().chain([pack])).copied().collect();
        let links = links(inventory, &all);
        let of = |pack: &PackId| links.get(pack).map_or(&[][..], Vec::as_slice);
        for (old, now) in &moved {
            // where nothing names the old one, the new one may be gone
            let is_known = |pack: &&PackId| inventory.has(&Named::Blob((**pack).into())) || is_moved(pack);
            for new in now.iter().filter(is_known) {
                let lacks = lacking(of(old), of(new));
                if !lacks.is_empty() {
                    self.collector.check().await?;
                    self.link(*new, &lacks).await?;
                }
            }
        }
        Ok(())
    }
}
