//! The store: one handle on everything that is durable.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::arrivals::Arrivals;
use crate::index::Index;
use crate::objects::Objects;
use crate::upload::Uploads;
use crate::{StoreError, keys};

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
}

impl Store {
    /// Opens the store and brings the index up to date with the packs that are there.
    ///
    /// Cost: one listing of packs, and two small reads for each that the index has not seen.
    pub async fn open(objects: Arc<dyn ObjectStore>, config: StoreConfig) -> Result<Self, StoreError> {
        let index = Index::open_async(config.index.clone(), config.index_open_max).await?;
        Self::with_index(objects, index, config).await
    }

    /// Whether the object store answers. One small request.
    pub async fn reach(&self) -> Result<(), StoreError> {
        self.objects.exists(&keys::upload(Uuid::nil())).await.map(drop)
    }

    pub(crate) async fn with_index(
        objects: Arc<dyn ObjectStore>,
        index: Index,
        config: StoreConfig,
    ) -> Result<Self, StoreError> {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let store = Self {
            objects: Objects::new(objects),
            index: Arc::new(index),
            arrivals: Arrivals::default(),
            uploads: Uploads::new(&config),
            verifying: Arc::new(Semaphore::new(cores)),
            rebuilding: Arc::new(Semaphore::new(REBUILDS_MAX)),
        };
        store.index_packs().await?;
        store.recall_arrivals().await?;
        Ok(store)
    }
}
