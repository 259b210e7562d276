//! The store: one handle on everything that is durable.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use lamina_chunk::PackId;
use object_store::ObjectStore;
use object_store::path::Path;
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::arrivals::Arrivals;
use crate::index::Index;
use crate::lease::{Forget, Lease};
use crate::objects::Objects;
use crate::packs::pack_records;
use crate::upload::Uploads;
use crate::{Keeper, StoreError, keys};

/// Tars that are rebuilt at the same time: each holds one blocking thread and some 30 MiB while it runs.
const REBUILDS_MAX: usize = 8;

/// How a store is set up.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where the index of chunks lives: a local directory that may be deleted at any time the store is closed.
    pub index: PathBuf,
    /// How long the index may take to open before it is thrown away and built again.
    pub index_open_max: Duration,
    /// Uploads that may be open at the same time; each holds up to 16 MiB of memory.
    pub uploads_max: usize,
    /// After how long an upload to which nobody writes is dropped.
    pub upload_idle_max: Duration,
    /// The longest blob that is taken, in bytes.
    pub blob_bytes_max: u64,
    /// How long a client may rely on what it was told is there: longer than any push takes.
    pub hold: Duration,
    /// How often this process asks whether somebody collects.
    pub poll_every: Duration,
}

impl StoreConfig {
    /// The usual bounds, with the index in `index`.
    pub fn new(index: PathBuf) -> Self {
        Self {
            index,
            index_open_max: Duration::from_secs(60),
            uploads_max: 256,
            upload_idle_max: Duration::from_secs(3600),
            blob_bytes_max: 1 << 40,
            hold: Duration::from_secs(6 * 3600),
            poll_every: Duration::from_secs(5),
        }
    }
}

/// Durable truth over an object store. A handle: clones are the same store.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) objects: Objects,
    pub(crate) index: Arc<Index>,
    pub(crate) arrivals: Arrivals,
    pub(crate) uploads: Uploads,
    /// Packs that are opened at the same time.
    pub(crate) verifying: Arc<Semaphore>,
    pub(crate) rebuilding: Arc<Semaphore>,
    /// Of a directory: that no other process serves it.
    pub(crate) _lock: Option<Arc<File>>,
}

impl Store {
    /// Opens the store and brings the index up to date with the packs that are there.
    ///
    /// Cost: one listing of packs, and two small reads for each that the index has not seen.
    pub async fn open(objects: Arc<dyn ObjectStore>, config: StoreConfig) -> Result<Self, StoreError> {
        let index = Index::open_async(config.index.clone(), config.index_open_max).await?;
        Self::with_index(Objects::new(objects), index, config).await
    }

    /// Whether the object store answers. One small request.
    pub async fn reach(&self) -> Result<(), StoreError> {
        self.objects.exists(&keys::upload(Uuid::nil())).await.map(drop)
    }

    pub(crate) async fn with_index(
        objects: Objects,
        index: Index,
        config: StoreConfig,
    ) -> Result<Self, StoreError> {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let index = Arc::new(index);
        let objects = leased(objects, &index, &config).await?;
        let store = Self {
            objects,
            index,
            arrivals: Arrivals::default(),
            uploads: Uploads::new(&config),
            verifying: Arc::new(Semaphore::new(cores)),
            rebuilding: Arc::new(Semaphore::new(REBUILDS_MAX)),
            _lock: None,
        };
        store.index_packs().await?;
        store.recall_arrivals().await?;
        Ok(store)
    }

    /// Tells collectors that this process takes nothing in any more. What it was asked for before may not be relied on
    /// after this.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.objects.end_lease().await
    }

    /// Whoever collects and checks what is in this store.
    pub fn keeper(&self) -> Keeper {
        Keeper::new(self.objects.without_lease())
    }
}

/// Takes a lease, and keeps it until the store is dropped.
async fn leased(objects: Objects, index: &Arc<Index>, config: &StoreConfig) -> Result<Objects, StoreError> {
    let known = Arc::downgrade(index);
    let forget = Forget(Box::new(move |packs: Vec<PackId>| {
        let Some(index) = known.upgrade() else { return };
        packs.into_iter().for_each(|pack| index.remove(pack));
    }));
    let lease = Arc::new(Lease::new(config.hold, forget));
    lease.poll(&objects).await?;
    let (weak, known) = (Arc::downgrade(&lease), Arc::downgrade(index));
    tokio::spawn(keep((weak, known), lease.key(), objects.clone(), config.poll_every));
    Ok(objects.with_lease(lease))
}

async fn keep((lease, index): (Weak<Lease>, Weak<Index>), key: Path, objects: Objects, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let Some(lease) = lease.upgrade() else { break };
        if lease.is_over() {
            return;
        }
        if let Err(error) = lease.poll(&objects).await {
            tracing::warn!(%error, "it is not known whether somebody collects; if this goes on, pushes are refused");
        }
        let Some(index) = index.upgrade() else { continue };
        for pack in lease.instead() {
            if let Err(error) = learn(&objects.clone().with_lease(Arc::clone(&lease)), &index, pack).await {
                tracing::warn!(%pack, %error, "a repacked pack is not known before the next start");
            }
        }
    }
    if let Err(error) = objects.delete(&key).await {
        tracing::debug!(%error, "a lease was not given back; the next collection waits a minute for it");
    }
}

/// Points chunks to a pack that takes the place of another one.
async fn learn(objects: &Objects, index: &Arc<Index>, pack: PackId) -> Result<(), StoreError> {
    // held, and then looked for: it stays
    if !objects.hold_now(&keys::blob(pack.into())) || !objects.exists(&keys::pack(pack)).await? {
        return Ok(());
    }
    let records = pack_records(objects, pack).await?;
    let index = Arc::clone(index);
    let learnt = tokio::task::spawn_blocking(move || {
        // where it was known, chunks may lead to the old one
        index.remove(pack);
        index.add(pack, &records);
    });
    learnt.await.expect("adding to the index does not panic");
    Ok(())
}
