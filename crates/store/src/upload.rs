//! Uploads: bytes on their way in, hashed as they come, and nowhere to be seen before they are proved.
//!
//! Memory: one part of 8 MiB being filled and one being written, for each upload; of 64 MiB after the first 8 GiB. A blob of less than one part is
//! written in one piece straight under its name; a longer one goes to a staging key, part by part, and is renamed.
//! Uploads belong to this process: after a restart they are unknown, and clients begin again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use lamina_chunk::{FOOTER_BYTES, PACK_BYTES_MAX, PackFooter, PackId};
use lamina_image::{Algorithm, Digest, Hasher};
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;

use crate::hashing::hash;
use crate::objects::Objects;
use crate::{Repo, Store, StoreConfig, StoreError, keys};

/// Bytes in one part: S3 wants at least 5 MiB.
pub const UPLOAD_PART_BYTES: usize = 8 << 20;
/// Parts of that length; each that follows is so many times longer than it. S3 takes 10,000 parts, so 1,000 of 8 MiB
/// and 9,000 of 64 MiB are 570 GiB.
const PARTS_SHORT: usize = 1000;
const PART_GROWS: usize = 8;

/// The open uploads. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Uploads {
    open: Arc<Mutex<HashMap<Uuid, Slot>>>,
    open_max: usize,
    idle_max: Duration,
    blob_bytes_max: u64,
}

#[derive(Debug)]
enum Slot {
    Idle(Box<Upload>),
    /// A [`Session`] has it.
    Busy,
}

impl Uploads {
    pub(crate) fn new(config: &StoreConfig) -> Self {
        Self {
            open: Arc::default(),
            open_max: config.uploads_max,
            idle_max: config.upload_idle_max,
            blob_bytes_max: config.blob_bytes_max,
        }
    }
}

/// One request's exclusive hold on an upload. Dropping it leaves the upload as it is, for the next request.
#[derive(Debug)]
pub struct Session {
    id: Uuid,
    store: Store,
    upload: Option<Box<Upload>>,
}

impl Store {
    /// Begins an upload into a repository, which is hashed by sha256 as it comes.
    pub fn begin_upload(&self, repo: &Repo) -> Result<Session, StoreError> {
        self.begin_upload_by(repo, Algorithm::Sha256)
    }

    /// The same by another algorithm. Where it ends under a digest of another one than was said here, it is read once
    /// more.
    pub fn begin_upload_by(&self, repo: &Repo, algorithm: Algorithm) -> Result<Session, StoreError> {
        let mut open = self.uploads.open.lock();
        if open.len() >= self.uploads.open_max {
            return Err(StoreError::UploadsFull(open.len()));
        }
        let id = Uuid::new_v4();
        open.insert(id, Slot::Busy);
        Ok(Session {
            id,
            store: self.clone(),
            upload: Some(Box::new(Upload::new(id, repo.clone(), algorithm))),
        })
    }

    /// Goes on with an upload that was begun in the same repository.
    pub fn resume_upload(&self, repo: &Repo, id: Uuid) -> Result<Session, StoreError> {
        let mut open = self.uploads.open.lock();
        let slot = open.get_mut(&id).ok_or(StoreError::UploadUnknown(id))?;
        match std::mem::replace(slot, Slot::Busy) {
            Slot::Busy => Err(StoreError::UploadBusy(id)),
            Slot::Idle(upload) if upload.repo != *repo => {
                *slot = Slot::Idle(upload);
                Err(StoreError::UploadUnknown(id))
            }
            Slot::Idle(upload) => Ok(Session { id, store: self.clone(), upload: Some(upload) }),
        }
    }

    /// Removes what uploads have left behind that ended in the middle of their last step, if it is older than a day.
    /// `now` is in seconds since 1970.
    pub async fn sweep_uploads(&self, now: u64) -> Result<(), StoreError> {
        let mut listing = self.objects.list(&keys::uploads());
        while let Some(object) = listing.try_next().await? {
            let age = i128::from(now) - i128::from(object.last_modified.timestamp());
            if age > 24 * 3600 {
                self.objects.delete(&object.location).await?;
            }
        }
        Ok(())
    }

    /// How many uploads are open.
    pub fn uploads_open(&self) -> usize {
        self.uploads.open.lock().len()
    }

    /// Drops the uploads to which nobody has written for long before `now`. Says how many.
    pub async fn expire_uploads(&self, now: Instant) -> usize {
        let idle_max = self.uploads.idle_max;
        let expired: Vec<Slot> = {
            let mut open = self.uploads.open.lock();
            let old = |slot: &Slot| matches!(slot, Slot::Idle(upload) if upload.touched + idle_max <= now);
            let ids: Vec<Uuid> = open.iter().filter(|(_, slot)| old(slot)).map(|(id, _)| *id).collect();
            ids.iter().filter_map(|id| open.remove(id)).collect()
        };
        let count = expired.len();
        for slot in expired {
            if let Slot::Idle(upload) = slot {
                upload.abort().await;
            }
        }
        count
    }
}

impl Session {
    /// The upload's name.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// How many bytes have come, in this and earlier requests.
    pub fn received(&self) -> u64 {
        self.upload.as_ref().map_or(0, |upload| upload.received)
    }

    /// Takes the next bytes. Cancelling it keeps them.
    ///
    /// # Errors
    /// After an error the upload is worthless: cancel it.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        let limit = self.store.uploads.blob_bytes_max;
        let upload = self.upload.as_mut().ok_or(StoreError::UploadUnknown(self.id))?;
        let len = upload.received + bytes.len() as u64;
        if len > limit {
            return Err(StoreError::TooLarge { what: "a blob", len, limit });
        }
        upload.write(&self.store.objects, bytes).await
    }

    /// Ends the upload: once it returns, the blob is durable under `expected` and belongs to the repository, and where
    /// it is a pack, whoever asks for one of its chunks is told of it. Gives the blob's length in bytes.
    ///
    /// # Errors
    /// [`StoreError::Digest`] where other bytes came; the upload is gone then too.
    pub async fn finish(mut self, expected: Digest) -> Result<u64, StoreError> {
        let upload = self.upload.take().ok_or(StoreError::UploadUnknown(self.id))?;
        let (size, tail, repo) = (upload.received, upload.tail.clone(), upload.repo.clone());
        upload.finish(&self.store.objects, expected).await?;
        self.store.link_blobs(&repo, [expected]).await?;
        if let Ok(pack) = PackId::try_from(expected)
            && size <= PACK_BYTES_MAX as u64
            && PackFooter::read(&tail, size).is_ok()
        {
            match self.store.arrive(pack).await {
                Ok(()) => {}
                // as a blob it is what was asked for; as a pack nobody will rely on it
                Err(error @ (StoreError::Pack { .. } | StoreError::Frame { .. })) => {
                    tracing::warn!(%pack, %error, "a blob that ends like a pack is none");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(size)
    }

    /// Ends the upload and forgets its bytes.
    pub async fn cancel(mut self) {
        if let Some(upload) = self.upload.take() {
            upload.abort().await;
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut open = self.store.uploads.open.lock();
        match self.upload.take() {
            Some(mut upload) => {
                upload.touched = Instant::now();
                open.insert(self.id, Slot::Idle(upload));
            }
            None => drop(open.remove(&self.id)),
        }
    }
}

/// What has come so far. Between calls either `hasher` is here, or `writing` will give it back, or the upload failed.
#[derive(Debug)]
struct Upload {
    id: Uuid,
    repo: Repo,
    received: u64,
    /// The last bytes, which would be a pack's footer.
    tail: Vec<u8>,
    pending: Vec<Bytes>,
    pending_bytes: usize,
    parts: Option<Box<dyn MultipartUpload>>,
    parts_written: usize,
    hasher: Option<Hasher>,
    writing: Option<JoinHandle<Result<Hasher, StoreError>>>,
    touched: Instant,
}

impl Upload {
    fn new(id: Uuid, repo: Repo, algorithm: Algorithm) -> Self {
        Self {
            id,
            repo,
            received: 0,
            tail: Vec::new(),
            pending: Vec::new(),
            pending_bytes: 0,
            parts: None,
            parts_written: 0,
            hasher: Some(Hasher::new(algorithm)),
            writing: None,
            touched: Instant::now(),
        }
    }

    async fn write(&mut self, objects: &Objects, bytes: Bytes) -> Result<(), StoreError> {
        self.received += bytes.len() as u64;
        self.pending_bytes += bytes.len();
        let last = &bytes[bytes.len().saturating_sub(FOOTER_BYTES)..];
        self.tail.extend_from_slice(last);
        self.tail.drain(..self.tail.len().saturating_sub(FOOTER_BYTES));
        self.pending.push(bytes);
        if self.pending_bytes >= self.part_bytes() { self.flush(objects).await } else { Ok(()) }
    }

    /// How long the next part is, in bytes.
    fn part_bytes(&self) -> usize {
        if self.parts_written < PARTS_SHORT { UPLOAD_PART_BYTES } else { UPLOAD_PART_BYTES * PART_GROWS }
    }

    /// Hashes and writes what is pending, in the background, after what is being written now.
    async fn flush(&mut self, objects: &Objects) -> Result<(), StoreError> {
        self.settle().await?;
        if self.parts.is_none() {
            self.parts = Some(objects.raw().put_multipart(&keys::upload(self.id)).await?);
        }
        let parts = self.parts.as_mut().expect("just made");
        let pieces = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        self.parts_written += 1;
        let part = parts.put_part(pieces.iter().cloned().collect());
        let hasher = self.hasher.take().ok_or(StoreError::UploadUnknown(self.id))?;
        self.writing = Some(tokio::spawn(async move {
            let (hasher, written) = tokio::join!(hash(hasher, pieces), part);
            written?;
            Ok(hasher)
        }));
        Ok(())
    }

    /// Waits for what is being written.
    async fn settle(&mut self) -> Result<(), StoreError> {
        if let Some(writing) = &mut self.writing {
            let written = writing.await.expect("writing does not panic");
            self.writing = None;
            self.hasher = Some(written?);
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>, objects: &Objects, expected: Digest) -> Result<(), StoreError> {
        let result = self.prove(objects, expected).await;
        if result.is_err() {
            self.abort().await;
        }
        result
    }

    async fn prove(&mut self, objects: &Objects, expected: Digest) -> Result<(), StoreError> {
        let check = |found: Digest| match found == expected {
            true => Ok(()),
            false => Err(StoreError::Digest { expected, found }),
        };
        if self.parts.is_none() {
            let pieces = std::mem::take(&mut self.pending);
            // all of it is in memory, so nothing was hashed yet
            let hasher = Hasher::new(expected.algorithm());
            check(hash(hasher, pieces.clone()).await.finish())?;
            return objects.put(&keys::blob(expected), pieces.into_iter().collect()).await;
        }
        if !self.pending.is_empty() {
            self.flush(objects).await?;
        }
        self.settle().await?;
        let hasher = self.hasher.take().ok_or(StoreError::UploadUnknown(self.id))?;
        let hashed = hasher.algorithm() == expected.algorithm();
        if hashed {
            check(hasher.finish())?;
        }
        let mut parts = self.parts.take().expect("checked above");
        let staging = keys::upload(self.id);
        parts.complete().await?;
        let named = async {
            if !hashed {
                check(rehash(objects, &staging, self.received, expected.algorithm()).await?)?;
            }
            objects.rename(&staging, &keys::blob(expected), self.received).await
        };
        let named: Result<(), StoreError> = named.await;
        if named.is_err() {
            let _ = objects.delete(&staging).await;
        }
        named
    }

    async fn abort(mut self: Box<Self>) {
        // a part on its way would come after the abort
        let _ = self.settle().await;
        if let Some(mut parts) = self.parts.take()
            && let Err(error) = parts.abort().await
        {
            tracing::warn!(upload = %self.id, %error, "the bytes of an upload that was given up were not removed");
        }
    }
}

/// Reads what was staged once more, for an algorithm that nobody had announced.
async fn rehash(
    objects: &Objects,
    staging: &Path,
    len: u64,
    algorithm: Algorithm,
) -> Result<Digest, StoreError> {
    let mut hasher = Hasher::new(algorithm);
    let mut staged = objects.stream(staging, 0..len).await?.ok_or(StoreError::Staged)?;
    while let Some(piece) = staged.try_next().await? {
        hasher = hash(hasher, vec![piece]).await;
    }
    Ok(hasher.finish())
}
