//! Deleting what nobody holds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path;
use tokio::time::{Instant, timeout};

use super::Gc;
use super::repack::Copied;
use crate::StoreError;
use crate::keys::{self, Named};
use crate::lease::{CondemnedRecord, LeaseRecord};

/// Objects that are deleted in one request, where the store can.
const BATCH: usize = 500;
/// How long a batch may take: with what its collector checks before, all is over before anybody takes over.
const BATCH_MAX: Duration = Duration::from_secs(20);
/// Keys in one list, in bytes: every process must be able to read it, and records of 8 MiB are taken for damage.
const LIST_BYTES_MAX: usize = 4 << 20;
/// How often answers are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What is due in parts that are condemned one after the other, in the order in which it is deleted.
pub(super) fn lists(mut due: Vec<Named>) -> Vec<Vec<Named>> {
    due.sort_by_key(|named| (super::order(named), named.clone()));
    let (mut lists, mut bytes) = (Vec::<Vec<Named>>::new(), 0);
    for named in due {
        // with its quotation marks and comma
        let len = named.key().as_ref().len() + 3;
        match lists.last_mut() {
            Some(list) if bytes + len <= LIST_BYTES_MAX => {
                list.push(named);
                bytes += len;
            }
            _ => {
                lists.push(vec![named]);
                bytes = len;
            }
        }
    }
    lists
}

/// A list that every process has read.
#[derive(Debug)]
pub(super) struct Condemned {
    number: u64,
    held: BTreeSet<Named>,
}

impl Condemned {
    /// Whether any process holds it.
    pub(super) fn holds(&self, named: &Named) -> bool {
        self.held.contains(named)
    }

    /// What is held.
    pub(super) fn held(&self) -> impl Iterator<Item = &Named> {
        self.held.iter()
    }
}

impl Gc<'_> {
    /// Says what is about to be deleted, and which packs are to take the place of others. Waits until every process has
    /// answered, or is dead.
    pub(super) async fn condemn(
        &mut self,
        condemned: impl Iterator<Item = Path>,
        copied: &[Copied],
    ) -> Result<Condemned, StoreError> {
        let instead = copied.iter().map(|copied| copied.moved.pack().into()).collect();
        let keys = condemned.map(|key| key.to_string()).collect();
        let list = self.answered(CondemnedRecord { keys, instead, asked: Vec::new() }).await?;
        self.report.held += list.held.len() as u64;
        Ok(list)
    }

    /// Which of these some process holds. Nobody waits for this, and who holds nothing of them now may do so later.
    pub(super) async fn ask(&mut self, asked: Vec<Named>) -> Result<BTreeSet<Named>, StoreError> {
        let mut held = BTreeSet::new();
        for asked in lists(asked) {
            let asked = asked.iter().map(|named| named.key().to_string()).collect();
            let list = CondemnedRecord { keys: Vec::new(), instead: Vec::new(), asked };
            let mut list = self.answered(list).await?;
            held.append(&mut list.held);
            self.forgive(list).await?;
        }
        Ok(held)
    }

    /// Writes a list, and waits until every process has answered, or is dead.
    async fn answered(&mut self, record: CondemnedRecord) -> Result<Condemned, StoreError> {
        self.collector.check().await?;
        // each list has its own number, and later ones higher ones
        self.lists += 1;
        let number = self.collector.number().await * 1000 + self.lists;
        self.objects.put_json(&keys::condemned(number), &record).await?;
        let begun = Instant::now();
        let mut silent = BTreeMap::<Path, ()>::new();
        let mut held = BTreeSet::new();
        let leases: Vec<_> = self.objects.list(&keys::leases()).try_collect().await?;
        silent.extend(leases.into_iter().map(|lease| (lease.location, ())));
        while !silent.is_empty() {
            for key in silent.keys().cloned().collect::<Vec<_>>() {
                let lease = self.objects.json::<LeaseRecord>(&key).await?;
                match lease {
                    Some(lease) if lease.seen < number => continue,
                    Some(lease) => {
                        let keys = lease.held.iter().map(|key| Path::from(key.as_str()));
                        held.extend(keys.filter_map(|key| Named::parse(&key)));
                    }
                    // it has ended in good order
                    None => {}
                }
                silent.remove(&key);
            }
            if !silent.is_empty() && begun.elapsed() > self.config.lost_after {
                for key in silent.keys() {
                    tracing::warn!(lease = %key, "a process did not answer and is taken for dead");
                    self.objects.delete(key).await?;
                }
                silent.clear();
            }
            if !silent.is_empty() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        Ok(Condemned { number, held })
    }

    /// Deletes these, in this order. Gives those that are gone.
    pub(super) async fn delete(&mut self, doomed: &[Named]) -> Result<Vec<Named>, StoreError> {
        let mut gone = Vec::with_capacity(doomed.len());
        let mut rest = doomed;
        while let Some(first) = rest.first() {
            // kinds are never mixed: a batch is deleted in any order
            let same = rest.iter().take(BATCH).take_while(|named| super::order(named) == super::order(first));
            // and of a tag's values the newest goes last
            let count = if super::order(first) == 0 { 1 } else { same.count() };
            let (batch, later) = rest.split_at(count);
            rest = later;
            self.collector.check().await?;
            let keys: Vec<_> = batch.iter().map(|named| Ok(named.key())).collect();
            let deleting = self.objects.raw().delete_stream(stream::iter(keys).boxed()).collect::<Vec<_>>();
            let deleted = timeout(BATCH_MAX, deleting).await.map_err(|_| StoreError::Collected)?;
            for deleted in deleted {
                match deleted {
                    Ok(key) => gone.extend(Named::parse(&key)),
                    Err(object_store::Error::NotFound { path, .. }) => {
                        gone.extend(Named::parse(&path.into()))
                    }
                    // it stays in quarantine, and the next collection tries again
                    Err(error) => tracing::warn!(%error, "garbage was not deleted"),
                }
            }
        }
        Ok(gone)
    }

    /// Takes the list away: whoever waited goes on.
    pub(super) async fn forgive(&mut self, list: Condemned) -> Result<(), StoreError> {
        self.objects.delete(&keys::condemned(list.number)).await
    }
}

#[cfg(test)]
mod tests {
    use lamina_image::Digest;

    use super::*;
    use crate::Repo;

    #[test]
    fn a_great_deal_of_garbage_is_condemned_in_lists_that_every_process_can_read() {
        let repo: Repo = "a".repeat(200).parse().unwrap();
        let names: BTreeSet<Named> =
            (0..50_000u32).map(|at| Named::Link(Digest::of(&at.to_le_bytes()), repo.clone())).collect();
        let lists = lists(names.iter().cloned().collect());
        assert!(lists.len() > 1);
        for list in &lists {
            let keys = list.iter().map(|named| named.key().to_string()).collect();
            let record = CondemnedRecord { keys, instead: Vec::new(), asked: Vec::new() };
            let record = serde_json::to_vec(&record).unwrap();
            assert!(record.len() < 5 << 20, "{} bytes", record.len());
        }
        assert_eq!(lists.concat().into_iter().collect::<BTreeSet<_>>(), names);
    }
}
