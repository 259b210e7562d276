//! Garbage that is waiting, and since when.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::TryStreamExt;
use lamina_chunk::PackId;
use object_store::path::Path;

use crate::StoreError;
use crate::inventory::Listed;
use crate::keys::{self, Named};
use crate::objects::Objects;

/// Keys in one object: 20,000 of 150 bytes are 3 MiB.
const KEYS_MAX: usize = 20_000;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    /// In seconds since 1970.
    since: BTreeMap<Named, i64>,
    /// As it was read or written last.
    stored: BTreeMap<Named, i64>,
    objects: usize,
}

impl Quarantine {
    pub(super) async fn read(objects: &Objects) -> Result<Self, StoreError> {
        let mut quarantine = Self::default();
        let listed: Vec<_> = objects.list(&keys::quarantines()).try_collect().await?;
        for object in listed {
            let part: Option<BTreeMap<String, i64>> = objects.json(&object.location).await?;
            for (key, since) in part.into_iter().flatten() {
                quarantine.since.extend(Named::parse(&Path::from(key)).map(|named| (named, since)));
            }
            quarantine.objects += 1;
        }
        quarantine.stored = quarantine.since.clone();
        Ok(quarantine)
    }

    /// Takes in what is garbage now, and packs that are mostly, and lets go of everything else.
    pub(super) fn update(&mut self, garbage: &[(Named, Listed)], dying: &[PackId], now: i64) {
        let before = std::mem::take(&mut self.since);
        let dying = dying.iter().flat_map(|pack| [Named::Pack(*pack), Named::Blob((*pack).into())]);
        let all = garbage.iter().map(|(named, _)| named.clone()).chain(dying);
        let since = |named: Named| {
            let since = before.get(&named).copied().unwrap_or(now);
            (named, since)
        };
        self.since = all.map(since).collect();
    }

    /// Those of these packs that are due.
    pub(super) fn due_packs(&self, packs: Vec<PackId>, after: Duration, now: i64) -> BTreeSet<PackId> {
        packs.into_iter().filter(|pack| self.is_due(&Named::Blob((*pack).into()), after, now)).collect()
    }

    pub(super) fn is_due(&self, named: &Named, after: Duration, now: i64) -> bool {
        let after = i64::try_from(after.as_secs()).unwrap_or(i64::MAX);
        self.since.get(named).is_some_and(|since| since.saturating_add(after) <= now)
    }

    pub(super) fn forget(&mut self, deleted: &BTreeSet<Named>) {
        self.since.retain(|named, _| !deleted.contains(named));
    }

    /// Writes it down, where it has changed.
    pub(super) async fn write(&mut self, objects: &Objects) -> Result<(), StoreError> {
        if self.since == self.stored {
            return Ok(());
        }
        let all: Vec<(String, i64)> =
            self.since.iter().map(|(named, since)| (named.key().to_string(), *since)).collect();
        let parts = all.chunks(KEYS_MAX);
        let count = parts.len();
        for (number, part) in parts.enumerate() {
            let part: BTreeMap<&str, i64> = part.iter().map(|(key, since)| (key.as_str(), *since)).collect();
            objects.put_json(&keys::quarantine(number), &part).await?;
        }
        for number in count..self.objects {
            objects.delete(&keys::quarantine(number)).await?;
        }
        (self.objects, self.stored) = (count, self.since.clone());
        Ok(())
    }
}
