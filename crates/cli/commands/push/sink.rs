//! A registry as the place where chunks go.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use lamina_chunk::{ChunkId, ChunkPlace, PackId, PackRecord};
use lamina_image::{ChunkSink, SinkError};
use lamina_wire::Client;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, Receiver};

use super::foreign::Earlier;

/// Asks and sends over HTTP, from the pipeline's own threads.
pub(super) struct RegistrySink {
    client: Client,
    repository: String,
    /// What is known of a registry that cannot be asked.
    earlier: Option<Arc<Earlier>>,
    runtime: Handle,
}

impl RegistrySink {
    pub(super) fn new(client: Client, repository: String, earlier: Option<Arc<Earlier>>) -> Self {
        Self { client, repository, earlier, runtime: Handle::current() }
    }
}

impl ChunkSink for RegistrySink {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        match &self.earlier {
            Some(earlier) => Ok(earlier.known(ids)),
            None => Ok(self.runtime.block_on(self.client.known_chunks(&self.repository, ids))?),
        }
    }

    fn put(&self, pack: PackId, bytes: Bytes, _records: &[PackRecord]) -> Result<(), SinkError> {
        let len = bytes.len() as u64;
        self.runtime.block_on(self.client.push_blob(&self.repository, pack.into(), bytes))?;
        if let Some(earlier) = &self.earlier {
            earlier.add_pack(pack, len);
        }
        Ok(())
    }
}

/// A blocking reader as an async one: a thread reads ahead by two blocks.
pub(super) struct AsyncReader {
    blocks: Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl AsyncReader {
    pub(super) fn new(mut reader: Box<dyn Read + Send>) -> Self {
        let (sender, blocks) = mpsc::channel(2);
        tokio::task::spawn_blocking(move || {
            loop {
                let mut block = Vec::with_capacity(1 << 20);
                let read = reader.by_ref().take(1 << 20).read_to_end(&mut block);
                let failed = read.is_err();
                let next = read.map(|_| Bytes::from(block));
                let ended = next.as_ref().is_ok_and(Bytes::is_empty);
                if ended || sender.blocking_send(next).is_err() || failed {
                    return;
                }
            }
        });
        Self { blocks, current: Bytes::new() }
    }
}

impl AsyncRead for AsyncReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.current.is_empty() {
            match self.blocks.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(block)) => self.current = block?,
            }
        }
        let len = self.current.len().min(buffer.remaining());
        buffer.put_slice(&self.current.split_to(len));
        Poll::Ready(Ok(()))
    }
}
