//! The few calls on an object store that this crate needs, with absence as `None` and bodies in large frames.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutPayload, WriteMultipart,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StoreError;
use crate::frames::{Content, FileRange};
use crate::lease::Lease;
use crate::listed::Listed;

/// Bodies come in frames of 1 MiB, the last one shorter: an HTTP server is twice as fast with them as with 64 KiB.
pub const FRAME_BYTES: u64 = 1 << 20;
/// Records are small; one over 8 MiB is damage.
const RECORD_BYTES_MAX: u64 = 8 << 20;

/// Parts in which an object that is too long for one request is copied, and how many are on their way: 10,000 parts of
/// 64 MiB are 625 GiB.
const COPY_PART_BYTES: usize = 64 << 20;
const COPY_PARTS: usize = 2;

/// A body. After an error nothing follows.
pub type ByteStream = BoxStream<'static, Result<Bytes, StoreError>>;

#[derive(Clone, Debug)]
pub(crate) struct Objects {
    raw: Arc<dyn ObjectStore>,
    /// Objects of at most this length are copied in one request.
    copy_bytes_max: u64,
    /// Holds what is written and taken; `None` for whoever only collects and checks.
    lease: Option<Arc<Lease>>,
    listed: Arc<Listed>,
}

impl Objects {
    pub(crate) fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self { raw: objects, copy_bytes_max: u64::MAX, lease: None, listed: Arc::default() }
    }

    pub(crate) fn with_copies_up_to(self, copy_bytes_max: u64) -> Self {
        Self { copy_bytes_max, ..self }
    }

    pub(crate) fn with_lease(self, lease: Arc<Lease>) -> Self {
        Self { lease: Some(lease), ..self }
    }

    /// The same objects, of which nothing is held.
    pub(crate) fn without_lease(&self) -> Self {
        Self { lease: None, ..self.clone() }
    }

    /// Sees to it that no collection removes the object from now on, for as long as a push may take. Whoever tells
    /// others that it is there, or builds on it, looks for it after this. Waits where it is just being removed.
    pub(crate) fn hold<'a>(&'a self, key: &'a Path) -> BoxFuture<'a, Result<(), StoreError>> {
        // boxed, since waiting may write, and writing holds
        Box::pin(async move {
            match &self.lease {
                Some(lease) => lease.hold(&self.without_lease(), key).await,
                None => Ok(()),
            }
        })
    }

    /// The same without waiting: false where it is just being removed.
    pub(crate) fn hold_now(&self, key: &Path) -> bool {
        self.lease.as_ref().is_none_or(|lease| lease.hold_now(key))
    }

    /// Gives the lease back: nothing is held any more.
    pub(crate) async fn end_lease(&self) -> Result<(), StoreError> {
        match &self.lease {
            Some(lease) => lease.end(&self.without_lease()).await,
            None => Ok(()),
        }
    }

    /// Looks for an object that is held from now on.
    pub(crate) async fn take(&self, key: &Path) -> Result<Option<ObjectMeta>, StoreError> {
        self.hold(key).await?;
        self.head(key).await
    }

    /// Reads a record that is held from now on.
    pub(crate) async fn take_json<T: DeserializeOwned>(&self, key: &Path) -> Result<Option<T>, StoreError> {
        self.hold(key).await?;
        self.json(key).await
    }

    pub(crate) fn raw(&self) -> &Arc<dyn ObjectStore> {
        &self.raw
    }

    pub(crate) async fn head(&self, key: &Path) -> Result<Option<ObjectMeta>, StoreError> {
        Ok(present(self.raw.head(key).await)?)
    }

    pub(crate) async fn exists(&self, key: &Path) -> Result<bool, StoreError> {
        Ok(self.head(key).await?.is_some())
    }

    /// The whole object, which must not be longer than `limit` bytes.
    pub(crate) async fn read(&self, key: &Path, limit: u64) -> Result<Option<Bytes>, StoreError> {
        let Some(result) = present(self.raw.get(key).await)? else { return Ok(None) };
        if result.meta.size > limit {
            return Err(StoreError::TooLarge { what: "an object", len: result.meta.size, limit });
        }
        Ok(Some(result.bytes().await?))
    }

    /// Several ranges of one object at once.
    pub(crate) async fn ranges(
        &self,
        key: &Path,
        ranges: &[Range<u64>],
    ) -> Result<Option<Vec<Bytes>>, StoreError> {
        Ok(present(self.raw.get_ranges(key, ranges).await)?)
    }

    /// A range of an object as a stream. The caller knows that it lies inside.
    pub(crate) async fn stream(
        &self,
        key: &Path,
        range: Range<u64>,
    ) -> Result<Option<ByteStream>, StoreError> {
        Ok(self.content(key, range).await?.map(Content::into_stream))
    }

    /// The same, for whoever can send files as such.
    pub(crate) async fn content(&self, key: &Path, range: Range<u64>) -> Result<Option<Content>, StoreError> {
        if range.is_empty() {
            return Ok(self.exists(key).await?.then(|| Content::Stream(stream::empty().boxed())));
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        Ok(present(self.raw.get_opts(key, options).await)?.map(content_of))
    }

    /// As much of a range as lies inside the object, where it begins there: the bytes, which they are, and how long the object is.
    /// One request.
    pub(crate) async fn part(
        &self,
        key: &Path,
        range: Range<u64>,
    ) -> Result<Option<(Content, Range<u64>, u64)>, StoreError> {
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let Some(result) = present(self.raw.get_opts(key, options).await)? else { return Ok(None) };
        let (part, size) = (result.range.clone(), result.meta.size);
        // not every storage refuses what begins beyond the end
        let is_it = part.start == range.start && part.end == range.end.min(size) && !part.is_empty();
        Ok(is_it.then(|| (content_of(result), part, size)))
    }

    pub(crate) async fn json<T: DeserializeOwned>(&self, key: &Path) -> Result<Option<T>, StoreError> {
        self.read(key, RECORD_BYTES_MAX).await?.map(|bytes| record(key, &bytes)).transpose()
    }

    /// The same of a record that a listing has just shown: one that was read before, and is shown as it was then, comes from memory.
    pub(crate) async fn listed_json<T: DeserializeOwned>(
        &self,
        object: &ObjectMeta,
    ) -> Result<Option<T>, StoreError> {
        let key = &object.location;
        if let Some(bytes) = self.listed.get(object) {
            return record(key, &bytes).map(Some);
        }
        let Some(bytes) = self.read(key, RECORD_BYTES_MAX).await? else { return Ok(None) };
        let parsed = record(key, &bytes)?;
        self.listed.keep(object.clone(), &bytes);
        Ok(Some(parsed))
    }

    pub(crate) async fn put(&self, key: &Path, payload: PutPayload) -> Result<(), StoreError> {
        self.hold(key).await?;
        self.raw.put(key, payload).await?;
        Ok(())
    }

    pub(crate) async fn put_json<T: Serialize>(&self, key: &Path, value: &T) -> Result<(), StoreError> {
        self.put(key, json_bytes(value)).await
    }

    /// Writes the object if there is none. False where there is one already.
    pub(crate) async fn create(&self, key: &Path, payload: PutPayload) -> Result<bool, StoreError> {
        self.hold(key).await?;
        match self.raw.put_opts(key, payload, PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The same with a record.
    pub(crate) async fn create_json<T: Serialize>(&self, key: &Path, value: &T) -> Result<bool, StoreError> {
        self.create(key, json_bytes(value)).await
    }

    /// Removes the object, if it is there.
    pub(crate) async fn delete(&self, key: &Path) -> Result<(), StoreError> {
        present(self.raw.delete(key).await)?;
        Ok(())
    }

    /// The prefixes one level below a prefix, sorted.
    pub(crate) async fn prefixes(&self, prefix: &Path) -> Result<Vec<Path>, StoreError> {
        let mut prefixes = self.raw.list_with_delimiter(Some(prefix)).await?.common_prefixes;
        prefixes.sort_unstable();
        Ok(prefixes)
    }

    /// Gives the object of `len` bytes another name. What has that name already is replaced at once.
    ///
    /// Cost: in a directory nothing, in a bucket a copy: one request, or where the object is too long for that, all its
    /// bytes through here, part by part.
    pub(crate) async fn rename(&self, from: &Path, to: &Path, len: u64) -> Result<(), StoreError> {
        self.hold(to).await?;
        if len <= self.copy_bytes_max {
            self.raw.rename(from, to).await?;
            return Ok(());
        }
        let mut body = self.stream(from, 0..len).await?.ok_or(StoreError::Vanished(from.to_string()))?;
        let mut writer =
            WriteMultipart::new_with_chunk_size(self.raw.put_multipart(to).await?, COPY_PART_BYTES);
        while let Some(frame) = body.try_next().await? {
            writer.wait_for_capacity(COPY_PARTS).await?;
            writer.put(frame);
        }
        writer.finish().await?;
        self.delete(from).await
    }

    /// Every object below a prefix.
    pub(crate) fn list(&self, prefix: &Path) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        self.raw.list(Some(prefix)).map_err(StoreError::from).boxed()
    }
}

fn record<T: DeserializeOwned>(key: &Path, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Record { key: key.to_string(), error })
}

fn json_bytes<T: Serialize>(value: &T) -> PutPayload {
    serde_json::to_vec(value).expect("records have string keys and no failing parts").into()
}

fn present<T>(result: object_store::Result<T>) -> object_store::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn content_of(result: GetResult) -> Content {
    let range = result.range.clone();
    match result.payload {
        GetResultPayload::File(file, _) => Content::File(FileRange::new(file, range)),
        GetResultPayload::Stream(body) => Content::Stream(coalesce(body.map_err(StoreError::from).boxed())),
    }
}

/// Joins small pieces, so that no frame but the last is shorter than [`FRAME_BYTES`].
fn coalesce(body: ByteStream) -> ByteStream {
    let joined = stream::try_unfold(Some(body), |body| async move {
        let Some(mut body) = body else { return Ok(None) };
        let mut frame = BytesMut::new();
        while (frame.len() as u64) < FRAME_BYTES {
            match body.try_next().await? {
                Some(piece) => frame.extend_from_slice(&piece),
                None => return Ok((!frame.is_empty()).then(|| (frame.freeze(), None))),
            }
        }
        Ok(Some((frame.freeze(), Some(body))))
    });
    joined.boxed()
}
