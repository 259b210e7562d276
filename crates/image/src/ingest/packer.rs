//! Frames into packs, in the order in which their chunks were cut.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender};

use bytes::Bytes;
use lamina_chunk::{CHUNK_BYTES_MAX, PACK_BYTES_MAX, PackBuilder, PackRecord};

use super::SealedBatch;

/// A pack that waits to be named and put.
pub(super) struct FinishedPack {
    pub(super) bytes: Bytes,
    pub(super) records: Vec<PackRecord>,
    /// The number of each chunk of each record.
    pub(super) numbers: Vec<u32>,
}

/// Builds one pack after the other.
pub(super) struct Packer {
    target_bytes: usize,
    builder: PackBuilder,
    numbers: Vec<u32>,
    finished: SyncSender<FinishedPack>,
}

impl Packer {
    pub(super) fn new(target_bytes: usize, finished: SyncSender<FinishedPack>) -> Self {
        assert!(target_bytes + CHUNK_BYTES_MAX * 2 <= PACK_BYTES_MAX);
        Self { target_bytes, builder: PackBuilder::default(), numbers: Vec::new(), finished }
    }

    /// Packs what comes until nothing more does. Sealers finish out of turn: what came early waits, and there is
    /// never more of it than there are sealers and places in their queue.
    pub(super) fn run(mut self, sealed: &Receiver<SealedBatch>) {
        let mut early = BTreeMap::new();
        let mut next = 0;
        while let Ok(batch) = sealed.recv() {
            early.insert(batch.sequence, batch.frames);
            while let Some(frames) = early.remove(&next) {
                next += 1;
                for frame in frames {
                    self.builder.push(frame.id, &frame.sealed, frame.chunks);
                    self.numbers.extend(frame.numbers);
                    if self.builder.len() >= self.target_bytes && self.close().is_none() {
                        return;
                    }
                }
            }
        }
        // where a stage before has failed, what is left is incomplete but still a good pack: a later try finds it
        self.close();
    }

    /// Hands the pack on. `None` where nobody takes it any more.
    fn close(&mut self) -> Option<()> {
        if self.builder.is_empty() {
            return Some(());
        }
        let next = PackBuilder::with_capacity(self.target_bytes + CHUNK_BYTES_MAX);
        let (bytes, records) = std::mem::replace(&mut self.builder, next).finish();
        let numbers = std::mem::take(&mut self.numbers);
        self.finished.send(FinishedPack { bytes, records, numbers }).ok()
    }
}
