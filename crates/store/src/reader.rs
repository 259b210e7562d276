//! A blob as something that blocks.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use lamina_image::Digest;
use tokio::runtime::Handle;

use crate::{ByteStream, Store, StoreError};

/// Reads a whole blob, for threads that may block, never for async tasks. Nothing is asked of the store before the
/// first read.
pub struct BlobReader {
    store: Store,
    digest: Digest,
    runtime: Handle,
    body: Option<ByteStream>,
    frame: Bytes,
}

impl std::fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlobReader({})", self.digest)
    }
}

impl BlobReader {
    /// A reader of the blob `digest`, which waits for the store on `runtime`.
    pub fn new(store: Store, digest: Digest, runtime: Handle) -> Self {
        Self { store, digest, runtime, body: None, frame: Bytes::new() }
    }

    async fn open(store: &Store, digest: Digest) -> Result<ByteStream, StoreError> {
        let blob = store.blob(digest).await?.ok_or(StoreError::Missing(digest))?;
        Ok(store.read_blob(digest, blob, 0..blob.size()).await?.into_stream())
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let runtime = self.runtime.clone();
        while self.frame.is_empty() {
            let body = match &mut self.body {
                Some(body) => body,
                none => {
                    let opened = runtime.block_on(Self::open(&self.store, self.digest));
                    none.insert(opened.map_err(io::Error::other)?)
                }
            };
            match runtime.block_on(body.next()) {
                Some(frame) => self.frame = frame.map_err(io::Error::other)?,
                None => return Ok(0),
            }
        }
        let len = self.frame.len().min(buffer.len());
        self.frame.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}
