//! The few calls on an object store that this crate needs, with absence as `None` and bodies in large frames.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutPayload,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StoreError;
use crate::frames::file_frames;

/// Bodies come in frames of 1 MiB, the last one shorter: an HTTP server is twice as fast with them as with 64 KiB.
pub const FRAME_BYTES: u64 = 1 << 20;
/// Records are small; one over 8 MiB is damage.
const RECORD_BYTES_MAX: u64 = 8 << 20;

/// A body. After an error nothing follows.
pub type ByteStream = BoxStream<'static, Result<Bytes, StoreError>>;

#[derive(Clone, Debug)]
pub(crate) struct Objects(Arc<dyn ObjectStore>);

impl Objects {
    pub(crate) fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self(objects)
    }

    pub(crate) fn raw(&self) -> &Arc<dyn ObjectStore> {
        &self.0
    }

    pub(crate) async fn head(&self, key: &Path) -> Result<Option<ObjectMeta>, StoreError> {
        Ok(present(self.0.head(key).await)?)
    }

    pub(crate) async fn exists(&self, key: &Path) -> Result<bool, StoreError> {
        Ok(self.head(key).await?.is_some())
    }

    /// The whole object, which must not be longer than `limit` bytes.
    pub(crate) async fn read(&self, key: &Path, limit: u64) -> Result<Option<Bytes>, StoreError> {
        let Some(result) = present(self.0.get(key).await)? else { return Ok(None) };
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
        Ok(present(self.0.get_ranges(key, ranges).await)?)
    }

    /// A range of an object as a stream. The caller knows that it lies inside.
    pub(crate) async fn stream(
        &self,
        key: &Path,
        range: Range<u64>,
    ) -> Result<Option<ByteStream>, StoreError> {
        if range.is_empty() {
            return Ok(self.exists(key).await?.then(|| stream::empty().boxed()));
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        Ok(present(self.0.get_opts(key, options).await)?.map(frames))
    }

    pub(crate) async fn json<T: DeserializeOwned>(&self, key: &Path) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.read(key, RECORD_BYTES_MAX).await? else { return Ok(None) };
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Some).map_err(|error| StoreError::Record { key: key.to_string(), error })
    }

    pub(crate) async fn put(&self, key: &Path, payload: PutPayload) -> Result<(), StoreError> {
        self.0.put(key, payload).await?;
        Ok(())
    }

    pub(crate) async fn put_json<T: Serialize>(&self, key: &Path, value: &T) -> Result<(), StoreError> {
        self.put(key, json_bytes(value)).await
    }

    /// Writes the object if there is none. False where there is one already.
    pub(crate) async fn create_json<T: Serialize>(&self, key: &Path, value: &T) -> Result<bool, StoreError> {
        match self.0.put_opts(key, json_bytes(value), PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the object, if it is there.
    pub(crate) async fn delete(&self, key: &Path) -> Result<(), StoreError> {
        present(self.0.delete(key).await)?;
        Ok(())
    }

    /// The prefixes one level below a prefix, sorted.
    pub(crate) async fn prefixes(&self, prefix: &Path) -> Result<Vec<Path>, StoreError> {
        let mut prefixes = self.0.list_with_delimiter(Some(prefix)).await?.common_prefixes;
        prefixes.sort_unstable();
        Ok(prefixes)
    }

    /// Every object below a prefix.
    pub(crate) fn list(&self, prefix: &Path) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        self.0.list(Some(prefix)).map_err(StoreError::from).boxed()
    }
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

/// The body in frames of [`FRAME_BYTES`].
fn frames(result: GetResult) -> ByteStream {
    let range = result.range.clone();
    match result.payload {
        GetResultPayload::File(file, _) => file_frames(file, range),
        GetResultPayload::Stream(body) => coalesce(body.map_err(StoreError::from).boxed()),
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
