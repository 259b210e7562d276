//! Who collects: one process at a time, by the same compare-and-swap as tags have.
//!
//! A collector writes a number, and while it works the next one, and the next. Whoever finds that the number does not
//! rise for [`LOST_AFTER`](crate::lease::LOST_AFTER) may write the next one instead. A collector looks before each
//! batch of deletions whether its own last number is young enough that nobody can have taken over yet.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::objects::Objects;
use crate::{StoreError, keys};

/// How often the number rises.
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// After so long without a new number nothing is deleted any more: the rest is for requests that are on their way.
const DELETE_WITHIN: Duration = Duration::from_secs(25);

/// Under a number.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct CollectorRecord {
    /// It has ended; whoever wants may go on at once.
    released: bool,
}

/// The right to collect. A task keeps it, until it is given back or dropped.
#[derive(Debug)]
pub(crate) struct Collector(Arc<Mutex<Right>>);

#[derive(Debug)]
struct Right {
    number: u64,
    renewed: Instant,
    over: bool,
}

impl Collector {
    /// Takes the right, if nobody has it. Waits where somebody has it who may be dead.
    ///
    /// # Errors
    /// [`StoreError::Collected`] where somebody alive has it.
    pub(crate) async fn begin(objects: &Objects, lost_after: Duration) -> Result<Self, StoreError> {
        let begun = Instant::now();
        let (first, released) = Self::newest(objects).await?;
        if first > 0 && !released {
            tracing::info!("another collection is under way, or died; waiting to see which");
        }
        loop {
            let (number, released) = Self::newest(objects).await?;
            if number == 0 || released || (number == first && begun.elapsed() > lost_after) {
                return Self::take_over(objects, number).await?.ok_or(StoreError::Collected);
            }
            if number != first {
                return Err(StoreError::Collected);
            }
            tokio::time::sleep(lost_after / 20).await;
        }
    }

    /// The newest number, and whether it was given back.
    async fn newest(objects: &Objects) -> Result<(u64, bool), StoreError> {
        let listing = objects.list(&keys::collectors());
        let numbers: Vec<u64> = listing
            .try_filter_map(|object| async move { Ok(keys::parse_collector(&object.location)) })
            .try_collect()
            .await?;
        let number = numbers.into_iter().max().unwrap_or(0);
        let record = objects.json::<CollectorRecord>(&keys::collector(number)).await?;
        Ok((number, record.is_some_and(|record| record.released)))
    }

    /// Writes the number after `seen`, and takes away what its predecessor has left. `None` where somebody was faster.
    pub(crate) async fn take_over(objects: &Objects, seen: u64) -> Result<Option<Self>, StoreError> {
        let number = seen + 1;
        if !objects.create_json(&keys::collector(number), &CollectorRecord { released: false }).await? {
            return Ok(None);
        }
        tidy(objects, number).await?;
        let lists: Vec<_> = objects.list(&keys::condemned_lists()).try_collect().await?;
        for list in lists {
            objects.delete(&list.location).await?;
        }
        let right = Arc::new(Mutex::new(Right { number, renewed: Instant::now(), over: false }));
        tokio::spawn(keep(Arc::downgrade(&right), objects.clone()));
        Ok(Some(Self(right)))
    }

    /// Whether what is deleted now is deleted before anybody can take over.
    ///
    /// # Errors
    /// [`StoreError::Collected`] where it is not.
    pub(crate) async fn check(&self) -> Result<(), StoreError> {
        let right = self.0.lock().await;
        let safe = !right.over && right.renewed.elapsed() < DELETE_WITHIN;
        if safe { Ok(()) } else { Err(StoreError::Collected) }
    }

    /// A number that no other collector ever has, and that rises.
    pub(crate) async fn number(&self) -> u64 {
        self.0.lock().await.number
    }

    /// Gives the right back.
    pub(crate) async fn release(self, objects: &Objects) -> Result<(), StoreError> {
        let mut right = self.0.lock().await;
        if !right.over {
            right.over = true;
            right.write(objects, true).await?;
        }
        Ok(())
    }
}

impl Right {
    /// Writes the next number. False where somebody else has.
    async fn write(&mut self, objects: &Objects, released: bool) -> Result<bool, StoreError> {
        let begun = Instant::now();
        let number = self.number + 1;
        if !objects.create_json(&keys::collector(number), &CollectorRecord { released }).await? {
            return Ok(false);
        }
        objects.delete(&keys::collector(self.number)).await?;
        (self.number, self.renewed) = (number, begun);
        Ok(true)
    }
}

/// Renews the right until it is over.
async fn keep(right: Weak<Mutex<Right>>, objects: Objects) {
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        let Some(right) = right.upgrade() else { return };
        let mut right = right.lock().await;
        if right.over {
            return;
        }
        match right.write(&objects, false).await {
            Ok(true) => {}
            Ok(false) => right.over = true,
            Err(error) => tracing::warn!(%error, "a collection could not say that it is still at work"),
        }
    }
}

/// Removes numbers before this one.
async fn tidy(objects: &Objects, number: u64) -> Result<(), StoreError> {
    let old: Vec<_> = objects.list(&keys::collectors()).try_collect().await?;
    for object in old {
        if keys::parse_collector(&object.location).is_some_and(|old| old < number) {
            objects.delete(&object.location).await?;
        }
    }
    Ok(())
}
