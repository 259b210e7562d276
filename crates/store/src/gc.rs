//! Online garbage collection: mark, quarantine, and deletion of what nobody is taking in.
//!
//! 1. *Mark* from the tags. What is not reached and was written longer than the grace period ago is garbage.
//! 2. *Quarantine*: garbage is written down, with the time at which it was first seen; it stays where it is, and what is
//!    reached again leaves the list. What was in it for long enough is due.
//! 3. *Condemn* what is due, ask every process that takes things in which of it is held there ([`crate::lease`]), mark
//!    again, and delete the rest. First the names (manifests, records, deleted tags), then the blobs that no name that
//!    is left leads to, whether or not a tag leads to the name.
//!
//! Of a pack that is mostly dead the rest goes too: what lives is taken over into a new one (`gc/repack.rs`). It waits in
//! quarantine like garbage, in case more of it is used again. Where artifacts of the registry's own name it, others take their place
//! (`gc/renew.rs`), and they are garbage like any other.
//!
//! So whoever finds a name finds what it leads to, at any moment and after a crash at any moment; a crash leaves
//! garbage, and the next collection goes on. Cost: a listing of everything, and one read of each manifest, record and
//! recipe; where packs are to be repacked, of each tree and of those packs too, and of
//! those that seem mostly dead the footers. Memory: some 200 bytes an object, 8 bytes a
//! frame of packs that live less than they should, and twice a pack.
//!
//! Where originals are dropped ([`crate::originals`]), a layer that need not be stored is garbage though it is reached.
//! What is due of those is made again before it is condemned, since others wait for what is.

mod condemn;
mod moved;
mod quarantine;
mod renew;
mod repack;
mod report;

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::TryStreamExt;
use lamina_chunk::PackId;
use lamina_image::Digest;

use crate::StoreError;
use crate::collector::Collector;
use crate::inventory::{Inventory, Listed};
use crate::keys::{self, Named};
use crate::lease::LOST_AFTER;
use crate::mark::{Marked, Marker, Roots};
use crate::objects::Objects;
use crate::originals::{Originals, prove};

use self::quarantine::Quarantine;
use self::repack::Copied;
pub use self::report::{GcAmount, GcRepacked, GcReport};

/// How a collection is done.
#[derive(Clone, Debug)]
pub struct GcConfig {
    /// What was written later than this before now is never collected.
    pub grace: Duration,
    /// How long garbage stays in quarantine.
    pub quarantine: Duration,
    /// Keep manifests that no tag leads to: only what was deleted is collected then.
    pub keep_untagged: bool,
    /// What becomes of layers that are stored and need not be.
    pub originals: Originals,
    /// A pack of which less lives, in percent of its bytes, is repacked; 0 for none.
    pub repack_below: u8,
    /// Only look.
    pub dry_run: bool,
    /// After how long a process that does not answer is taken for dead. Shorter than the usual minute only where it is
    /// known to be.
    pub lost_after: Duration,
}

impl Default for GcConfig {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            grace: day,
            quarantine: day,
            keep_untagged: false,
            originals: Originals::default(),
            // then each move frees more than it copies
            repack_below: 50,
            dry_run: false,
            lost_after: LOST_AFTER,
        }
    }
}

/// Collects and checks a store, beside the processes that serve it or without them.
#[derive(Clone, Debug)]
pub struct Keeper {
    pub(crate) objects: Objects,
}

/// One collection.
struct Gc<'a> {
    objects: &'a Objects,
    config: &'a GcConfig,
    collector: Collector,
    marker: Marker,
    /// In seconds since 1970.
    now: i64,
    lists: u64,
    report: GcReport,
}

impl Keeper {
    pub(crate) fn new(objects: Objects) -> Self {
        Self { objects }
    }

    /// A keeper of what is in `storage`.
    pub async fn open(storage: &crate::Storage) -> Result<Self, StoreError> {
        Ok(Self::new(storage.objects().await?))
    }

    /// Whether any process has a lease: it serves the store, or died not long ago.
    pub async fn is_served(&self) -> Result<bool, StoreError> {
        Ok(self.objects.list(&keys::leases()).try_next().await?.is_some())
    }

    /// Collects garbage; `now` is in seconds since 1970, by a clock that is not far from the object store's.
    ///
    /// # Errors
    /// [`StoreError::Collected`] where somebody else collects; [`StoreError::Unmarkable`] and [`StoreError::Record`]
    /// where what is reachable cannot be known. Nothing is deleted then.
    pub async fn gc(&self, config: &GcConfig, now: u64) -> Result<GcReport, StoreError> {
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        if config.dry_run {
            return dry_run(&self.objects, config, now).await;
        }
        let collector = Collector::begin(&self.objects, config.lost_after).await?;
        let marker = Marker::counting(self.objects.clone(), config.repack_below);
        let report = GcReport::default();
        let mut gc = Gc { objects: &self.objects, config, collector, marker, now, lists: 0, report };
        let ended = gc.run().await;
        gc.collector.release(&self.objects).await?;
        ended.map(|()| gc.report)
    }
}

impl GcConfig {
    fn young_after(&self, now: i64) -> i64 {
        now.saturating_sub(i64::try_from(self.grace.as_secs()).unwrap_or(i64::MAX))
    }

    fn roots(&self, now: i64) -> Roots {
        if self.keep_untagged {
            Roots::Untagged
        } else {
            Roots::Tagged { young_after: self.young_after(now) }
        }
    }
}

async fn dry_run(objects: &Objects, config: &GcConfig, now: i64) -> Result<GcReport, StoreError> {
    let mut marker = Marker::counting(objects.clone(), config.repack_below);
    let mut inventory = Inventory::read(objects).await?;
    let marked = marker.mark(&inventory, config.roots(now)).await?;
    let mut report = GcReport { dry_run: true, ..GcReport::default() };
    let garbage = garbage(&marker, &inventory, &marked, config, now).await?;
    let dying = repack::dying(&mut marker, &inventory, &marked, (config, now)).await?;
    let mut quarantine = Quarantine::read(objects).await?;
    quarantine.update(&garbage, &dying, now);
    report.count(&inventory, &garbage);
    let due = garbage.iter().map(|(named, _)| named);
    let due = due.filter(|named| quarantine.is_due(named, config.quarantine, now));
    let (due, unproven) = prove_originals(objects, due.cloned().collect(), &marked).await;
    report.unproven = unproven;
    for (named, listed) in &garbage {
        report.add(named, listed.bytes, due.contains(named), &marked);
    }
    // as it would be when the names that are due are gone
    inventory.0.retain(|named, _| is_bytes(named) || !quarantine.is_due(named, config.quarantine, now));
    let due = quarantine.due_packs(dying, config.quarantine, now);
    let candidates = repack::candidates(&mut marker, &inventory, due, (config, now)).await?;
    for dying in repack::choose(objects, &marker, candidates).await? {
        report.repacked.add(dying.repacked);
    }
    Ok(report)
}

/// Leaves out the originals that cannot be made again, and says how many they are. One is made again after the other.
async fn prove_originals(
    objects: &Objects,
    mut due: BTreeSet<Named>,
    marked: &Marked,
) -> (BTreeSet<Named>, u64) {
    let mut unproven = 0;
    for (digest, layer) in &marked.rebuilt {
        let original = Named::Blob(*digest);
        if !due.contains(&original) {
            continue;
        }
        if let Err(error) = prove(objects, layer).await {
            tracing::warn!(layer = %digest, %error, "a layer could not be made again, and its original stays; see `lamina fsck`");
            due.remove(&original);
            unproven += 1;
        }
    }
    (due, unproven)
}

/// What is not reached and old enough.
async fn garbage(
    marker: &Marker,
    inventory: &Inventory,
    marked: &Marked,
    config: &GcConfig,
    now: i64,
) -> Result<Vec<(Named, Listed)>, StoreError> {
    let young_after = config.young_after(now);
    let gone: BTreeSet<_> = marker
        .tags(inventory)
        .await?
        .into_iter()
        .filter(|(_, _, _, manifest)| manifest.is_none())
        .map(|(tag, _, _, _)| tag)
        .collect();
    let is_garbage = |named: &Named| match named {
        Named::Blob(digest) if config.originals == Originals::Drop && marked.rebuilt.contains_key(digest) => {
            true
        }
        Named::Blob(_) | Named::Pack(_) | Named::Arrival(_) => {
            !named.bytes().is_some_and(|digest| marked.blobs.contains(&digest))
        }
        // it says who may ask where a pack went
        Named::Link(digest, _) => {
            let is_moved = |pack| marked.names.contains(&Named::Moved(pack));
            !marked.blobs.contains(digest) && !PackId::try_from(*digest).is_ok_and(is_moved)
        }
        Named::Moved(_) | Named::Layer(_) | Named::Image(_) | Named::Manifest(..) | Named::Referrer(..) => {
            !marked.names.contains(named)
        }
        // older values of a tag are taken away by its changes; a deleted one goes with all of them
        Named::TagValue(repo, tag, _) => gone.contains(&(repo.clone(), tag.clone())),
        Named::Job(..) => false,
    };
    let old = inventory.0.iter().filter(|(_, listed)| listed.written < young_after);
    Ok(old.filter(|(named, _)| is_garbage(named)).map(|(named, listed)| (named.clone(), *listed)).collect())
}

impl Gc<'_> {
    async fn run(&mut self) -> Result<(), StoreError> {
        self.look_again().await?;
        let inventory = Inventory::read(self.objects).await?;
        let marked = self.marker.mark(&inventory, self.config.roots(self.now)).await?;
        let garbage = garbage(&self.marker, &inventory, &marked, self.config, self.now).await?;
        let how = (self.config, self.now);
        let dying = repack::dying(&mut self.marker, &inventory, &marked, how).await?;
        self.report.count(&inventory, &garbage);
        let mut quarantine = Quarantine::read(self.objects).await?;
        quarantine.update(&garbage, &dying, self.now);
        quarantine.write(self.objects).await?;
        let due = garbage.iter().map(|(named, _)| named);
        let due = due.filter(|named| quarantine.is_due(named, self.config.quarantine, self.now));
        let (due, unproven) = prove_originals(self.objects, due.cloned().collect(), &marked).await;
        self.report.unproven = unproven;
        let (bytes, names): (Vec<_>, Vec<_>) = due.into_iter().partition(is_bytes);
        let dying = quarantine.due_packs(dying, self.config.quarantine, self.now);
        let mut deleted = BTreeSet::new();
        for names in condemn::lists(names) {
            deleted.extend(self.delete_names(names).await?);
        }
        let copied = self.repack(dying).await?;
        let new = copied.iter().map(|copied| copied.moved.pack());
        let new: BTreeSet<Named> =
            new.flat_map(|pack| [Named::Pack(pack), Named::Blob(pack.into())]).collect();
        let mut lists = condemn::lists(bytes).into_iter();
        deleted.extend(self.delete_bytes(lists.next().unwrap_or_default(), &marked, copied).await?);
        for bytes in lists {
            deleted.extend(self.delete_bytes(bytes, &marked, Vec::new()).await?);
        }
        for (named, listed) in &garbage {
            self.report.add(named, listed.bytes, deleted.contains(named), &marked);
        }
        self.renew((&inventory, &marked), !new.is_empty()).await?;
        quarantine.forget(&deleted);
        // a new pack may be one that was garbage until now
        quarantine.forget(&new);
        quarantine.write(self.objects).await
    }

    /// Deletes names that are due and that still nothing reaches.
    async fn delete_names(&mut self, due: Vec<Named>) -> Result<Vec<Named>, StoreError> {
        if due.is_empty() {
            return Ok(Vec::new());
        }
        let list = self.condemn(due.iter().map(Named::key), &[]).await?;
        let inventory = Inventory::read_names(self.objects).await?;
        let marked = self.marker.mark(&inventory, self.config.roots(self.now)).await?;
        let due_now: BTreeSet<Named> = garbage(&self.marker, &inventory, &marked, self.config, self.now)
            .await?
            .into_iter()
            .map(|(named, _)| named)
            .collect();
        let mut doomed = due;
        doomed.retain(|named| due_now.contains(named) && !list.holds(named));
        keep_history(&mut doomed, &list);
        // what hangs goes before what it hangs on is gone; a deleted tag's last value goes last
        doomed.sort_by_key(|named| (order(named), named.clone()));
        let deleted = self.delete(&doomed).await?;
        self.forgive(list).await?;
        Ok(deleted)
    }

    /// Deletes blobs that are due, with their marks as packs, where no name that is left leads to them; those originals
    /// that were proved to be made again by what is `proved`, where they still need not be stored; and packs whose frames were
    /// copied.
    async fn delete_bytes(
        &mut self,
        due: Vec<Named>,
        proved: &Marked,
        copied: Vec<Copied>,
    ) -> Result<Vec<Named>, StoreError> {
        if due.is_empty() && copied.is_empty() {
            return Ok(Vec::new());
        }
        let old = copied.iter().flat_map(|copied| [keys::pack(copied.pack), keys::blob(copied.pack.into())]);
        let list = self.condemn(due.iter().map(Named::key).chain(old), &copied).await?;
        let inventory = Inventory::read(self.objects).await?;
        let marked = self.marker.mark(&inventory, Roots::All).await?;
        let moved = self.go((&inventory, &marked), &copied, &list).await?;
        let young_after = self.config.young_after(self.now);
        let new = copied.iter().map(|copied| Digest::from(copied.moved.pack()));
        let held: BTreeSet<Digest> = list.held().filter_map(Named::bytes).chain(new).collect();
        let is_rebuilt = |digest: &Digest| {
            let proved = proved.rebuilt.get(digest);
            proved.is_some() && proved == marked.rebuilt.get(digest)
        };
        let is_needed = |digest: &Digest| marked.blobs.contains(digest) && !is_rebuilt(digest);
        let stays = |named: &Named| match named.bytes() {
            Some(digest) => is_needed(&digest) || held.contains(&digest),
            None => marked.names.contains(named) || list.holds(named),
        };
        let mut doomed = due;
        // what came once more meanwhile is young
        doomed.retain(|named| inventory.0.get(named).is_some_and(|listed| listed.written < young_after));
        doomed.retain(|named| !stays(named));
        let unproven = self.unproven((&inventory, &marked), &doomed).await?;
        doomed.retain(|named| named.bytes().is_none_or(|digest| !unproven.contains(&digest)));
        self.link_moved(&inventory, &doomed).await?;
        doomed.extend(moved);
        doomed.sort_by_key(|named| (order(named), named.clone()));
        let deleted = self.delete(&doomed).await?;
        self.forgive(list).await?;
        Ok(deleted)
    }
}

/// Whether it is bytes, a mark that goes with them, or says where they are.
fn is_bytes(named: &Named) -> bool {
    matches!(named, Named::Blob(_) | Named::Pack(_) | Named::Arrival(_) | Named::Moved(_))
}

/// In which order things go: never what is named before what names it.
fn order(named: &Named) -> u8 {
    match named {
        Named::TagValue(..) | Named::Job(..) => 0,
        Named::Referrer(..) => 1,
        Named::Manifest(..) => 2,
        Named::Image(_) => 3,
        // a layer's record is what a plain tar is rebuilt from, so what leads to that tar goes before
        Named::Link(..) => 4,
        Named::Layer(_) => 5,
        Named::Moved(_) => 6,
        Named::Pack(_) | Named::Arrival(_) => 7,
        Named::Blob(_) => 8,
    }
}

/// Of a deleted tag all values go, or none: the newest must not go before an older one.
fn keep_history(doomed: &mut Vec<Named>, list: &condemn::Condemned) {
    let kept: BTreeSet<_> = list
        .held()
        .filter_map(|named| match named {
            Named::TagValue(repo, tag, _) => Some((repo.clone(), tag.clone())),
            _ => None,
        })
        .collect();
    doomed.retain(|named| match named {
        Named::TagValue(repo, tag, _) => !kept.contains(&(repo.clone(), tag.clone())),
        _ => true,
    });
}
