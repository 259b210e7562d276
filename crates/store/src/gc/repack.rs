//! Packs that are mostly dead: what lives of each goes into a new pack, and the rest is gone with the old one.
//!
//! A pack is left alone where anything is unsure: where a manifest names it itself, since clients that know nothing of packs ask
//! for what manifests name, unless that is an artifact whose place another one will take (`gc/renew.rs`); where a frame that
//! something names is not in its index, or does not open; where a tree cannot be read; where it was moved before, or what is in it
//! often enough. Each pack becomes one of its own: whoever may read the old one learns nothing of others.
//!
//! 1. Every process is asked what it holds: such a pack would be copied in vain.
//! 2. The new pack, its mark, and its links to all repositories of the old one. If anything ends here, that is garbage, or a pack
//!    like any other.
//! 3. The old pack is condemned like garbage. Nobody who holds it loses it, and the others forget it and learn the new one.
//! 4. Marked again: where more frames are named than the new pack has, nothing happens. Otherwise links that came meanwhile, and
//!    then the record, from which moment all that names the old pack leads to the new one.
//! 5. Only then the old pack is deleted. If this does not happen, or a manifest names it, it is garbage for the collection that
//!    finds that nothing does any more.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use lamina_chunk::{FOOTER_BYTES, MOVES_MAX, Moved, PACK_BYTES_MAX, PackBuilder, PackId, PackRecord, Sealed};
use lamina_image::Digest;

use super::condemn::Condemned;
use super::moved::{lacking, links};
use super::{Gc, GcConfig, GcRepacked};
use crate::inventory::Inventory;
use crate::keys::{self, Named};
use crate::mark::{Marked, Marker, Roots, Span};
use crate::objects::Objects;
use crate::packs::pack_records;
use crate::{Repo, StoreError};

/// Packs in one collection, 32 GiB of full ones: all are moved while pushes that want one of them wait, at some 20 ms each. The
/// next collection goes on.
const PACKS_MAX: usize = 512;

/// A pack of which little lives.
#[derive(Debug)]
pub(super) struct Dying {
    pack: PackId,
    /// The frames that are named.
    frames: Vec<Span>,
    /// What repacking it does.
    pub(super) repacked: GcRepacked,
}

/// A pack whose frames are in a new one.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) pack: PackId,
    pub(super) moved: Moved,
    repacked: GcRepacked,
}

/// How long a pack of these records is, in bytes.
fn pack_len(records: &[PackRecord]) -> u64 {
    let index = records.iter().map(|record| 48 + 36 * record.chunks.len() as u64).sum::<u64>();
    let frames = records.iter().map(|record| u64::from(record.frame.sealed_len)).sum::<u64>();
    frames + index + FOOTER_BYTES as u64
}

/// Packs of which less lives than is worth the rest, as far as was marked. Cost: the footer of each that seems to be one, once.
pub(super) async fn dying(
    marker: &mut Marker,
    inventory: &Inventory,
    marked: &Marked,
    (config, now): (&GcConfig, i64),
) -> Result<Vec<PackId>, StoreError> {
    let young_after = config.young_after(now);
    let is_old = |named: &Named| inventory.0.get(named).is_some_and(|listed| listed.written < young_after);
    let is_little = |marker: &Marker, pack: PackId, bytes: u64| {
        let live = marker.live().bytes(pack).filter(|live| *live > 0);
        live.is_some_and(|live| live * 100 < bytes * u64::from(config.repack_below))
    };
    let seems_dying = |pack: &PackId| {
        let blob = Named::Blob((*pack).into());
        let bytes = inventory.0.get(&blob).map_or(0, |listed| listed.bytes);
        is_little(marker, *pack, bytes)
            && marked.blobs.contains(&(*pack).into())
            && !inventory.has(&Named::Moved(*pack))
            && is_old(&Named::Pack(*pack))
            && is_old(&blob)
    };
    let packs = inventory.keys().filter_map(|named| match named {
        Named::Pack(pack) => Some(*pack),
        _ => None,
    });
    let mut packs: Vec<PackId> = packs.filter(seems_dying).collect();
    if !packs.is_empty() {
        let named = marker.in_manifests(inventory, &marker.own_artifacts(inventory, marked, 1));
        packs.retain(|pack| !named.contains(&(*pack).into()));
    }
    let mut dying = Vec::with_capacity(packs.len());
    for pack in packs {
        // where chunks are small, the index may be most of a pack of which all lives
        let bytes = marker.frame_bytes(pack).await?;
        dying.extend(Some(pack).filter(|pack| is_little(marker, *pack, bytes)));
    }
    Ok(dying)
}

/// Those of the packs that may be repacked, by everything that is left in `inventory`.
pub(super) async fn candidates(
    marker: &mut Marker,
    inventory: &Inventory,
    due: BTreeSet<PackId>,
    (config, now): (&GcConfig, i64),
) -> Result<Vec<PackId>, StoreError> {
    if due.is_empty() {
        return Ok(Vec::new());
    }
    let marked = marker.mark(inventory, Roots::All).await?;
    if !marker.read_trees(inventory, &marked, &due).await? {
        return Ok(Vec::new());
    }
    let still = dying(marker, inventory, &marked, (config, now)).await?.into_iter();
    Ok(still.filter(|pack| due.contains(pack) && marker.moves(*pack) < MOVES_MAX).collect())
}

/// Those of them that are repacked now.
pub(super) async fn choose(
    objects: &Objects,
    marker: &Marker,
    candidates: Vec<PackId>,
) -> Result<Vec<Dying>, StoreError> {
    let mut chosen = Vec::new();
    for pack in candidates {
        if chosen.len() == PACKS_MAX {
            tracing::info!("there are more packs that are mostly dead; the next collection goes on");
            break;
        }
        let records = match pack_records(objects, pack).await {
            Ok(records) => records,
            Err(error @ (StoreError::Pack { .. } | StoreError::Missing(_))) => {
                tracing::warn!(%pack, %error, "a pack that is mostly dead is left alone");
                continue;
            }
            Err(error) => return Err(error),
        };
        let frames = marker.live().of(pack).unwrap_or_default().to_vec();
        match living(&records, &frames) {
            Some(living) if living.len() < records.len() => {
                let (bytes, bytes_left) = (pack_len(&records), pack_len(&living));
                chosen.push(Dying { pack, frames, repacked: GcRepacked { packs: 1, bytes, bytes_left } });
            }
            // small as it looks, all of it lives
            Some(_) => {}
            None => {
                tracing::warn!(%pack, "a pack is left alone: something names a frame that is not in its index")
            }
        }
    }
    Ok(chosen)
}

/// The records of these frames; `None` where one has none.
pub(super) fn living(records: &[PackRecord], frames: &[Span]) -> Option<Vec<PackRecord>> {
    let record = |(offset, len): &Span| {
        let found = records.binary_search_by_key(offset, |record| record.frame.offset).ok()?;
        records.get(found).filter(|record| record.frame.sealed_len == *len).cloned()
    };
    frames.iter().map(record).collect()
}

/// A pack's blob and its mark.
fn objects_of(pack: PackId) -> [Named; 2] {
    [Named::Pack(pack), Named::Blob(pack.into())]
}

impl Gc<'_> {
    /// Writes what lives of packs that are mostly dead into new ones.
    pub(super) async fn repack(&mut self, due: BTreeSet<PackId>) -> Result<Vec<Copied>, StoreError> {
        if due.is_empty() {
            return Ok(Vec::new());
        }
        let inventory = Inventory::read(self.objects).await?;
        let how = (self.config, self.now);
        let mut packs = candidates(&mut self.marker, &inventory, due, how).await?;
        let held = self.ask(packs.iter().copied().flat_map(objects_of).collect()).await?;
        self.report.held += held.len() as u64;
        packs.retain(|pack| !objects_of(*pack).iter().any(|named| held.contains(named)));
        let dying = choose(self.objects, &self.marker, packs).await?;
        self.copy(&inventory, dying).await
    }

    /// Writes the new packs. See the module.
    async fn copy(&self, inventory: &Inventory, dying: Vec<Dying>) -> Result<Vec<Copied>, StoreError> {
        let links = links(inventory, &dying.iter().map(|dying| dying.pack).collect());
        let mut all = Vec::with_capacity(dying.len());
        for dying in dying {
            let repos = links.get(&dying.pack).map_or(&[][..], Vec::as_slice);
            all.extend(self.copy_one(dying, repos).await?);
        }
        Ok(all)
    }

    async fn copy_one(&self, dying: Dying, repos: &[Repo]) -> Result<Option<Copied>, StoreError> {
        self.collector.check().await?;
        let Dying { pack, frames, repacked } = dying;
        let key = keys::blob(pack.into());
        let Some(bytes) = self.objects.read(&key, PACK_BYTES_MAX as u64).await? else { return Ok(None) };
        let built = tokio::task::spawn_blocking(move || build(&bytes, &frames)).await;
        let Some((bytes, moved)) = built.expect("building a pack does not panic") else {
            tracing::warn!(%pack, "a pack that is mostly dead is damaged, and is left alone; see lamina fsck");
            return Ok(None);
        };
        let new = moved.pack();
        let key = keys::blob(new.into());
        // the old one goes, so what is here under this name, and may have lain here for long, has to be read once
        let is_here = match self.objects.read(&key, bytes.len() as u64).await {
            Ok(here) => here.is_some_and(|here| here == bytes),
            Err(StoreError::TooLarge { .. }) => false,
            Err(error) => return Err(error),
        };
        if !is_here {
            self.objects.put(&key, bytes.into()).await?;
        }
        self.objects.put(&keys::pack(new), "{}".into()).await?;
        self.link(new, repos).await?;
        Ok(Some(Copied { pack, moved, repacked }))
    }

    /// Writes the records of those that may go. Gives what is garbage from that moment: not what artifacts still name.
    pub(super) async fn go(
        &mut self,
        (inventory, marked): (&Inventory, &Marked),
        copied: &[Copied],
        list: &Condemned,
    ) -> Result<Vec<Named>, StoreError> {
        let young_after = self.config.young_after(self.now);
        let packs: BTreeSet<PackId> = copied.iter().map(|copied| copied.pack).collect();
        // more may have come since the first look
        if copied.is_empty() || !self.marker.read_trees(inventory, marked, &packs).await? {
            return Ok(Vec::new());
        }
        let mut garbage = Vec::new();
        let own = self.marker.own_artifacts(inventory, marked, 1);
        let named = self.marker.in_manifests(inventory, &own);
        let still_named = self.marker.in_manifests(inventory, &BTreeMap::new());
        // what lives of one may make up another one: that stays, since its new pack was made without knowing so
        let new: BTreeSet<PackId> = copied.iter().map(|copied| copied.moved.pack()).collect();
        let links = links(inventory, &packs.union(&new).copied().collect());
        let of = |pack: &PackId| links.get(pack).map_or(&[][..], Vec::as_slice);
        for Copied { pack, moved, repacked } in copied {
            let old = objects_of(*pack);
            let is_old =
                |named: &Named| inventory.0.get(named).is_some_and(|listed| listed.written < young_after);
            let goes = old.iter().all(|named| !list.holds(named) && is_old(named))
                && self.marker.live().are_moved(*pack, moved)
                && !named.contains(&(*pack).into())
                && !new.contains(pack);
            if !goes {
                continue;
            }
            self.collector.check().await?;
            self.link(moved.pack(), &lacking(of(pack), of(&moved.pack()))).await?;
            // whoever lost the right to collect may still be writing: the first record stays
            if self.objects.create(&keys::moved(*pack), moved.to_bytes().into()).await? {
                self.report.repacked.add(*repacked);
                if !still_named.contains(&(*pack).into()) {
                    garbage.extend(old);
                }
            }
        }
        Ok(garbage)
    }
}

/// A pack of these frames of `pack`, byte for byte, each opened once, and where they went; `None` where one is not what it was.
fn build(pack: &Bytes, frames: &[Span]) -> Option<(Bytes, Moved)> {
    let records = living(&lamina_chunk::pack_records(pack).ok()?, frames)?;
    let frames: Vec<_> = records.iter().map(|record| record.frame).collect();
    let sealed_bytes = frames.iter().map(|frame| frame.sealed_len as usize).sum();
    let mut builder = PackBuilder::with_capacity(sealed_bytes);
    for record in records {
        record.verify(pack).ok()?;
        let start = record.frame.offset as usize;
        let sealed = pack.slice(start..start + record.frame.sealed_len as usize);
        builder.push(record.id, &Sealed::new(sealed, record.frame.plain_len as usize), record.chunks);
    }
    let (bytes, _) = builder.finish();
    let new = PackId::try_from(Digest::of(&bytes)).expect("the usual digest is a sha256");
    Some((bytes, Moved::new(new, frames)))
}
