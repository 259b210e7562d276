//! Packs: blobs of which every frame has been opened, and whose chunks are therefore offered as known.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{
    ChunkId, ChunkPlace, FOOTER_BYTES, PACK_BYTES_MAX, PackError, PackFooter, PackId, PackRecord, Place,
    Sealed,
};
use lamina_image::{ChunkSink, Digest, SinkError};
use tokio::runtime::Handle;

use crate::arrivals::ARRIVALS_MAX;
use crate::objects::Objects;
use crate::{Store, StoreError, keys, moved};

/// Packs whose indexes are read at the same time when the store opens.
const FOOTERS: usize = 8;

impl Store {
    /// Where each chunk lies, in the order of `ids`; `None` where no pack that was opened has it. Packs that wait to be
    /// opened, and claim to have one of them, are opened now.
    pub async fn find_chunks(&self, ids: &[ChunkId]) -> Vec<Option<ChunkPlace>> {
        let found = self.look_up(ids).await;
        let unknown = ids.iter().zip(&found).filter(|(_, place)| place.is_none()).map(|(id, _)| *id);
        let claiming = self.arrivals.claiming(unknown);
        if claiming.is_empty() {
            return found;
        }
        for pack in claiming {
            if let Err(error) = self.admit_pack(pack).await {
                tracing::warn!(%pack, %error, "a pack that had come was not opened");
            }
        }
        self.look_up(ids).await
    }

    async fn look_up(&self, ids: &[ChunkId]) -> Vec<Option<ChunkPlace>> {
        let (index, objects, ids) = (Arc::clone(&self.index), self.objects.clone(), ids.to_vec());
        let found = tokio::task::spawn_blocking(move || {
            let mut found = index.find(&ids);
            let packs: HashSet<PackId> = found.iter().flatten().map(|place| place.place.pack).collect();
            // held, and then still in the index: it stays
            let stays = |pack: &PackId| objects.hold_now(&keys::blob((*pack).into())) && index.has(*pack);
            let stays: HashSet<PackId> = packs.into_iter().filter(stays).collect();
            found
                .iter_mut()
                .for_each(|place| *place = place.take_if(|place| stays.contains(&place.place.pack)));
            found
        });
        found.await.expect("a lookup does not panic")
    }

    /// Takes note of a blob that ends like a pack, if its index is good. Its frames are opened later.
    pub(crate) async fn arrive(&self, pack: PackId) -> Result<(), StoreError> {
        if self.is_pack(pack.into()).await? {
            return self.admit_pack(pack).await;
        }
        let records = Arc::new(self.pack_records(pack).await?);
        self.objects.put(&keys::arrival(pack), "{}".into()).await?;
        if self.arrivals.add(pack, records) { Ok(()) } else { self.admit_pack(pack).await }
    }

    /// Opens every frame of a pack that is stored as a blob, unless that was done before, and makes its chunks known.
    ///
    /// # Errors
    /// [`StoreError::Pack`] and [`StoreError::Frame`] where it is no good, [`StoreError::Missing`] where it is not
    /// there.
    pub async fn admit_pack(&self, pack: PackId) -> Result<(), StoreError> {
        let admitted = self.is_pack(pack.into()).await?;
        if admitted && (self.index.has(pack) || !self.is_offered(pack).await?) {
            return Ok(());
        }
        let records = Arc::new(self.pack_records(pack).await?);
        if admitted {
            self.index_pack(pack, records).await;
            return Ok(());
        }
        let opened = self.open_frames(pack, &records).await;
        if matches!(opened, Err(StoreError::Frame { .. })) {
            self.forget_arrival(pack).await?;
        }
        opened?;
        self.prove_pack(pack, records).await
    }

    /// Whether chunks are offered of a pack, which is held from now on. Not of one that was moved, though it may still be here, or
    /// come again: more of its frames would be named than its record has.
    async fn is_offered(&self, pack: PackId) -> Result<bool, StoreError> {
        self.objects.hold(&keys::blob(pack.into())).await?;
        Ok(!self.objects.exists(&keys::moved(pack)).await?)
    }

    /// Every frame was opened: says so for good, and makes the chunks known.
    pub(crate) async fn prove_pack(
        &self,
        pack: PackId,
        records: Arc<Vec<PackRecord>>,
    ) -> Result<(), StoreError> {
        self.offer_pack(pack, records).await?;
        self.forget_arrival(pack).await
    }

    async fn offer_pack(&self, pack: PackId, records: Arc<Vec<PackRecord>>) -> Result<(), StoreError> {
        self.objects.put(&keys::pack(pack), "{}".into()).await?;
        if self.is_offered(pack).await? {
            self.index_pack(pack, records).await;
        }
        Ok(())
    }

    async fn forget_arrival(&self, pack: PackId) -> Result<(), StoreError> {
        self.arrivals.remove(pack);
        self.objects.delete(&keys::arrival(pack)).await
    }

    /// Finds the packs again that had come before a restart.
    pub(crate) async fn recall_arrivals(&self) -> Result<(), StoreError> {
        let listing = self.objects.list(&keys::arrivals()).take(ARRIVALS_MAX);
        let packs = listing.try_filter_map(|object| async move { Ok(keys::parse_digest(&object.location)) });
        let packs: Vec<Digest> = packs.try_collect().await?;
        let recall = |pack: Digest| async move {
            let Ok(pack) = PackId::try_from(pack) else { return Ok(()) };
            match self.pack_records(pack).await {
                Ok(records) => drop(self.arrivals.add(pack, Arc::new(records))),
                Err(StoreError::Pack { .. } | StoreError::Missing(_)) => self.forget_arrival(pack).await?,
                Err(error) => return Err(error),
            }
            Ok(())
        };
        stream::iter(packs.into_iter().map(recall)).buffer_unordered(FOOTERS).try_collect().await
    }

    /// A frame's bytes as they are stored, also where its pack was moved. Whoever knows its name opens them.
    ///
    /// # Errors
    /// [`StoreError::Missing`] where neither the pack nor the frame is there.
    pub async fn sealed(&self, place: Place) -> Result<Sealed, StoreError> {
        let Place { pack, frame } = place;
        let range = u64::from(frame.offset)..frame.end();
        let read = moved::ranges(&self.objects, pack, &[range]).await?;
        let bytes = read.and_then(|read| read.into_iter().next()).ok_or(StoreError::Missing(pack.into()))?;
        Ok(Sealed::new(bytes, frame.plain_len as usize))
    }

    /// The index of a pack, read from its end.
    pub async fn pack_records(&self, pack: PackId) -> Result<Vec<PackRecord>, StoreError> {
        pack_records(&self.objects, pack).await
    }

    /// Stores a pack that this process has made, and makes its chunks known, unless it was moved before.
    pub async fn put_pack(
        &self,
        pack: PackId,
        bytes: Bytes,
        records: &[PackRecord],
    ) -> Result<(), StoreError> {
        self.objects.put(&keys::blob(pack.into()), bytes.into()).await?;
        self.offer_pack(pack, Arc::new(records.to_vec())).await
    }

    /// Opens all frames on the blocking pool; as many packs at a time as there are cores, each of them in memory.
    async fn open_frames(&self, pack: PackId, records: &Arc<Vec<PackRecord>>) -> Result<(), StoreError> {
        let _permit = self.verifying.acquire().await.expect("never closed");
        let bytes = self.small_blob(pack.into(), PACK_BYTES_MAX as u64).await?;
        let records = Arc::clone(records);
        let opened =
            tokio::task::spawn_blocking(move || records.iter().try_for_each(|record| record.verify(&bytes)));
        opened.await.expect("opening does not panic").map_err(|error| StoreError::Frame { pack, error })
    }

    async fn index_pack(&self, pack: PackId, records: Arc<Vec<PackRecord>>) {
        let index = Arc::clone(&self.index);
        let added = tokio::task::spawn_blocking(move || index.add(pack, &records)).await;
        added.expect("adding to the index does not panic");
    }

    /// Takes every pack into the index that it has not seen.
    pub(crate) async fn index_packs(&self) -> Result<(), StoreError> {
        let listing = self.objects.list(&keys::packs());
        let packs = listing.try_filter_map(|object| async move {
            Ok(keys::parse_digest(&object.location).and_then(|digest| PackId::try_from(digest).ok()))
        });
        let mut packs: HashSet<PackId> = packs.try_collect().await?;
        // of one that was moved nothing is offered, though it may still be here
        let mut moved = self.objects.list(&keys::all_moved());
        while let Some(object) = moved.try_next().await? {
            let pack = keys::parse_digest(&object.location).and_then(|digest| PackId::try_from(digest).ok());
            pack.map(|pack| packs.remove(&pack));
        }
        // those that are gone were collected while this process was not there
        self.index.retain(&packs);
        let packs: Vec<PackId> = packs.into_iter().filter(|pack| !self.index.has(*pack)).collect();
        if packs.is_empty() {
            return Ok(());
        }
        tracing::info!(packs = packs.len(), "reading the indexes of packs");
        let read = |pack| async move {
            match self.pack_records(pack).await {
                Ok(records) => self.index_pack(pack, Arc::new(records)).await,
                Err(error @ (StoreError::Pack { .. } | StoreError::Missing(_))) => {
                    tracing::error!(%pack, %error, "a pack is gone or damaged");
                }
                Err(error) => return Err(error),
            }
            Ok(())
        };
        stream::iter(packs.into_iter().map(read)).buffer_unordered(FOOTERS).try_collect().await
    }
}

/// The store as the place where layers are cut into. For threads that may block, never for async tasks.
#[derive(Debug)]
pub struct StoreSink {
    store: Store,
    runtime: Handle,
}

impl StoreSink {
    /// A sink into `store`, which waits for it on `runtime`.
    pub fn new(store: Store, runtime: Handle) -> Self {
        Self { store, runtime }
    }
}

impl ChunkSink for StoreSink {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        Ok(self.runtime.block_on(self.store.find_chunks(ids)))
    }

    fn put(&self, pack: PackId, bytes: Bytes, records: &[PackRecord]) -> Result<(), SinkError> {
        Ok(self.runtime.block_on(self.store.put_pack(pack, bytes, records))?)
    }
}

impl Store {
    /// Whether the pack's frames were all opened once.
    pub async fn is_pack(&self, digest: Digest) -> Result<bool, StoreError> {
        match PackId::try_from(digest) {
            Ok(pack) => self.objects.exists(&keys::pack(pack)).await,
            Err(_) => Ok(false),
        }
    }
}

/// The index of a pack, read from its end.
pub(crate) async fn pack_records(objects: &Objects, pack: PackId) -> Result<Vec<PackRecord>, StoreError> {
    let footer = pack_footer(objects, pack).await?;
    let range = footer.index_range();
    let index = if range.is_empty() { Bytes::new() } else { pack_range(objects, pack, range).await? };
    footer.records(&index).map_err(|error| StoreError::Pack { pack, error })
}

/// The footer of a pack.
pub(crate) async fn pack_footer(objects: &Objects, pack: PackId) -> Result<PackFooter, StoreError> {
    let wrong = |error| StoreError::Pack { pack, error };
    let meta = objects.head(&keys::blob(pack.into())).await?;
    let len = meta.ok_or(StoreError::Missing(pack.into()))?.size;
    let footer_at = len.checked_sub(FOOTER_BYTES as u64).filter(|_| len <= PACK_BYTES_MAX as u64);
    let footer_at = footer_at.ok_or(wrong(PackError::Footer))?;
    PackFooter::read(&pack_range(objects, pack, footer_at..len).await?, len).map_err(wrong)
}

async fn pack_range(objects: &Objects, pack: PackId, range: Range<u64>) -> Result<Bytes, StoreError> {
    let read = objects.ranges(&keys::blob(pack.into()), &[range]).await?;
    read.and_then(|read| read.into_iter().next()).ok_or(StoreError::Missing(pack.into()))
}
