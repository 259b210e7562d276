//! What this process is taking in, so that no collection in any process removes it meanwhile.
//!
//! Whoever tells a client that an object is there, or builds on one, *holds* it here first: in memory, for as long as a
//! push may take. A collector that is about to delete writes down what it *condemns*, and waits until every process
//! with a lease has read that and answered which of it is held; that stays. From then on whoever wants to hold
//! something condemned waits until the list is gone, and then looks whether the object still is. So a hold costs no
//! request, and a process asks the store once every few seconds, with one listing.
//!
//! ```text
//! hold, then look          the collector's question comes later: the answer says it is held
//! question, then hold      the hold waits for the end of the deletion, and then sees what is left
//! ```
//!
//! A process that does not answer within [`LOST_AFTER`] is taken for dead; one that could not ask for half of that time
//! holds nothing new before it has asked again. A collector that is dead is relieved by whoever notices.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::TryStreamExt;
use lamina_chunk::PackId;
use lamina_image::Digest;
use object_store::path::Path;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::StoreError;
use crate::collector::Collector;
use crate::keys::{self, Named};
use crate::objects::Objects;

/// Without an answer for so long a process is dead: many times what a poll and all its retries take.
pub(crate) const LOST_AFTER: Duration = Duration::from_secs(60);
/// Objects that are held one by one, at 24 bytes each. Beyond that everything is, until some have expired.
const HOLDS_MAX: usize = 1 << 20;
/// New packs that wait to be looked at. What is forgotten is not deduplicated against until the next start.
const INSTEAD_MAX: usize = 1024;
/// How long somebody waits for a collector to end: less than a client waits for us.
const WAIT_MAX: Duration = Duration::from_secs(50);

/// What a process says to collectors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseRecord {
    /// The newest list of condemned objects that it has read.
    pub(crate) seen: u64,
    /// Which of that list it holds, by key.
    pub(crate) held: Vec<String>,
}

/// What a collector is about to delete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CondemnedRecord {
    /// By key.
    pub(crate) keys: Vec<String>,
    /// Packs that have what lives of some of them.
    #[serde(default)]
    pub(crate) instead: Vec<Digest>,
    /// Objects by key that nobody deletes yet: a collector only asks who holds them, so nobody waits.
    #[serde(default)]
    pub(crate) asked: Vec<String>,
}

/// This process's holds.
#[derive(Debug)]
pub(crate) struct Lease {
    id: Uuid,
    hold_for: Duration,
    state: Mutex<State>,
    /// The condemned have changed.
    changed: Notify,
    /// One poll at a time.
    polling: tokio::sync::Mutex<Polled>,
    /// It was given back.
    over: AtomicBool,
    /// Told of packs that are condemned and not held here, before that is answered.
    forget: Forget,
    /// Packs that are to take the place of condemned ones.
    instead: Mutex<Vec<PackId>>,
}

/// See [`Lease`].
pub(crate) struct Forget(pub(crate) Box<dyn Fn(Vec<PackId>) + Send + Sync>);

impl std::fmt::Debug for Forget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Forget")
    }
}

#[derive(Debug)]
struct State {
    /// Until when each is held.
    held: HashMap<u64, Instant>,
    /// There were too many: until then everything is held.
    all_until: Option<Instant>,
    condemned: HashSet<u64>,
    polled: Instant,
}

#[derive(Debug, Default)]
struct Polled {
    /// The lists as they were read, without packs that take the place of others.
    lists: BTreeMap<u64, CondemnedRecord>,
    /// As it was last written.
    record: Option<LeaseRecord>,
    /// The collector's newest number, and since when.
    collector: Option<(u64, Instant)>,
}

fn hash(key: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.as_ref().hash(&mut hasher);
    hasher.finish()
}

impl Lease {
    pub(crate) fn new(hold_for: Duration, forget: Forget) -> Self {
        let now = Instant::now();
        let state = State { held: HashMap::new(), all_until: None, condemned: HashSet::new(), polled: now };
        let polling = tokio::sync::Mutex::default();
        Self {
            id: Uuid::new_v4(),
            hold_for,
            state: Mutex::new(state),
            changed: Notify::new(),
            polling,
            over: AtomicBool::new(false),
            forget,
            instead: Mutex::default(),
        }
    }

    /// Holds an object that this process is about to look at or to write. Waits where it is being deleted.
    ///
    /// # Errors
    /// [`StoreError::Collecting`] where that takes too long; trying again will help.
    pub(crate) async fn hold(&self, objects: &Objects, key: &Path) -> Result<(), StoreError> {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            match self.try_hold(key) {
                Held::Yes => return Ok(()),
                Held::Condemned => {}
                Held::Unsure => {
                    self.poll(objects).await?;
                    continue;
                }
            }
            let waited = timeout_at(deadline, changed).await;
            waited.map_err(|_| StoreError::Collecting(key.to_string()))?;
        }
    }

    /// The same without waiting. False where it is being deleted, or where this process cannot be sure.
    pub(crate) fn hold_now(&self, key: &Path) -> bool {
        self.try_hold(key) == Held::Yes
    }

    fn try_hold(&self, key: &Path) -> Held {
        let (now, key) = (Instant::now(), hash(key));
        let mut state = self.state.lock();
        if now.saturating_duration_since(state.polled) > LOST_AFTER / 2 {
            return Held::Unsure;
        }
        if state.condemned.contains(&key) {
            return Held::Condemned;
        }
        state.hold(key, now, now + self.hold_for);
        Held::Yes
    }

    /// Reads what is condemned, and answers. The first poll takes the lease.
    pub(crate) async fn poll(&self, objects: &Objects) -> Result<(), StoreError> {
        let mut polled = self.polling.lock().await;
        if self.is_over() {
            return Err(StoreError::Closed);
        }
        let begun = Instant::now();
        let found = Found::read(objects, self.id).await?;
        let lost = polled.record.is_some() && !found.leased;
        if lost {
            tracing::warn!("this process did not answer for so long that a collection went on without it");
        }
        polled.lists.retain(|number, _| found.lists.contains(number));
        for number in &found.lists {
            if !polled.lists.contains_key(number)
                && let Some(mut list) = objects.json::<CondemnedRecord>(&keys::condemned(*number)).await?
            {
                self.note(std::mem::take(&mut list.instead));
                polled.lists.insert(*number, list);
            }
        }
        let paths = |of: fn(&CondemnedRecord) -> &[String]| -> Vec<Path> {
            polled.lists.values().flat_map(of).map(|key| Path::from(key.as_str())).collect()
        };
        let (keys, asked) = (paths(|list| &list.keys), paths(|list| &list.asked));
        let mut held = self.condemn(&keys, begun);
        let seen = polled.lists.keys().next_back().copied().unwrap_or(0);
        (self.forget.0)(lost_packs(&keys, &held));
        held.extend(self.held_of(asked));
        let record = LeaseRecord { seen, held: held.iter().map(Path::to_string).collect() };
        if lost || polled.record.as_ref() != Some(&record) {
            objects.put_json(&keys::lease(self.id), &record).await?;
            polled.record = Some(record);
        }
        polled.relieve(objects, &found).await
    }

    /// Those of these that are held.
    fn held_of(&self, mut keys: Vec<Path>) -> Vec<Path> {
        let (state, now) = (self.state.lock(), Instant::now());
        keys.retain(|key| state.holds(hash(key), now));
        keys
    }

    fn note(&self, instead: Vec<Digest>) {
        let mut noted = self.instead.lock();
        let free = INSTEAD_MAX.saturating_sub(noted.len());
        noted.extend(instead.into_iter().filter_map(|digest| PackId::try_from(digest).ok()).take(free));
    }

    /// The packs that are to take the place of condemned ones, since this was last asked.
    pub(crate) fn instead(&self) -> Vec<PackId> {
        std::mem::take(&mut self.instead.lock())
    }

    /// From now on these are condemned. Gives those that are held.
    fn condemn(&self, keys: &[Path], begun: Instant) -> BTreeSet<Path> {
        let mut state = self.state.lock();
        state.condemned = keys.iter().map(hash).collect();
        state.polled = begun;
        let now = Instant::now();
        let held: BTreeSet<Path> = keys.iter().filter(|key| state.holds(hash(key), now)).cloned().collect();
        // what is held stays, so nobody needs to wait for it
        for key in &held {
            state.condemned.remove(&hash(key));
        }
        drop(state);
        self.changed.notify_waiters();
        held
    }

    /// Gives the lease back.
    pub(crate) async fn end(&self, objects: &Objects) -> Result<(), StoreError> {
        let _polled = self.polling.lock().await;
        self.over.store(true, Ordering::Release);
        objects.delete(&self.key()).await
    }

    /// Whether it was given back.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// The lease's object.
    pub(crate) fn key(&self) -> Path {
        keys::lease(self.id)
    }
}

/// The packs among the condemned of which nothing is held: neither the blob nor its mark.
fn lost_packs(condemned: &[Path], held: &BTreeSet<Path>) -> Vec<PackId> {
    let pack = |key: &Path| match Named::parse(key)? {
        Named::Pack(pack) | Named::Arrival(pack) => Some(pack),
        Named::Blob(digest) => PackId::try_from(digest).ok(),
        _ => None,
    };
    let held: BTreeSet<PackId> = held.iter().filter_map(pack).collect();
    let lost: BTreeSet<PackId> =
        condemned.iter().filter_map(pack).filter(|pack| !held.contains(pack)).collect();
    lost.into_iter().collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Yes,
    Condemned,
    /// This process has not asked for long.
    Unsure,
}

impl State {
    fn hold(&mut self, key: u64, now: Instant, until: Instant) {
        if self.held.len() >= HOLDS_MAX && !self.held.contains_key(&key) {
            self.held.retain(|_, until| *until > now);
            if self.held.len() >= HOLDS_MAX {
                self.all_until = Some(until);
                return;
            }
        }
        self.held.insert(key, until);
    }

    fn holds(&self, key: u64, now: Instant) -> bool {
        self.all_until.is_some_and(|until| until > now)
            || self.held.get(&key).is_some_and(|until| *until > now)
    }
}

/// What a listing shows.
struct Found {
    leased: bool,
    lists: Vec<u64>,
    collector: Option<u64>,
}

impl Found {
    async fn read(objects: &Objects, id: Uuid) -> Result<Self, StoreError> {
        let mut found = Self { leased: false, lists: Vec::new(), collector: None };
        let (lease, mut listing) = (keys::lease(id), objects.list(&keys::collecting()));
        while let Some(object) = listing.try_next().await? {
            if object.location == lease {
                found.leased = true;
            } else if let Some(number) = keys::parse_condemned(&object.location) {
                found.lists.push(number);
            } else if let Some(number) = keys::parse_collector(&object.location) {
                found.collector = found.collector.max(Some(number));
            }
        }
        Ok(found)
    }
}

impl Polled {
    /// Where lists stay and their collector does not go on, somebody must take them away.
    async fn relieve(&mut self, objects: &Objects, found: &Found) -> Result<(), StoreError> {
        let number = found.collector.unwrap_or(0);
        if found.lists.is_empty() {
            self.collector = None;
            return Ok(());
        }
        match self.collector {
            Some((last, since)) if last == number && since.elapsed() > LOST_AFTER => {
                if let Some(collector) = Collector::take_over(objects, number).await? {
                    tracing::warn!("a collection died in the middle; what it had condemned is free again");
                    collector.release(objects).await?;
                }
                self.collector = None;
            }
            Some((last, _)) if last == number => {}
            _ => self.collector = Some((number, Instant::now())),
        }
        Ok(())
    }
}
