//! Replaying a trace: what was there when it was asked for. And the real cache as one that is asked.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lamina_cache::{Cache, CacheConfig, Class, Pieces, Source, SourceError, Want};
use lamina_chunk::{Chunk, Frame as PackedFrame, PackId, Place};
use lamina_testkit::noise;
use tokio::runtime::Runtime;

use crate::trace::{Trace, Why};

/// What a record has besides its frame: `crates/cache/FORMAT.md`.
const RECORD_HEADER_BYTES: u64 = 64;

/// A frame of a trace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) number: usize,
    /// What it takes on disk.
    pub(crate) record_bytes: u64,
}

/// Something that keeps frames, and fewer bytes than all.
pub(crate) trait Keeps {
    fn has(&self, frame: Frame) -> bool;
    /// Somebody asks for it. Where it is not here it is fetched, and may stay.
    fn ask(&mut self, frame: Frame) -> Result<()>;
    fn used_bytes(&self) -> u64;
    /// Bytes written so far, if they are more than those that were fetched.
    fn written_bytes(&self) -> Option<u64> {
        None
    }
}

/// Of how much how much was there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hits {
    pub(crate) asked: u64,
    pub(crate) asked_bytes: u64,
    pub(crate) hits: u64,
    pub(crate) hit_bytes: u64,
}

/// What came of a trace.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) all: Hits,
    /// Of the phases that had been before.
    pub(crate) again: Hits,
    pub(crate) fetched_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) bytes_used_max: u64,
}

pub(crate) fn replay(keeps: &mut dyn Keeps, trace: &Trace) -> Result<Outcome> {
    let (mut outcome, mut names) = (Outcome::default(), HashSet::new());
    for phase in &trace.phases {
        let again = !names.insert(&phase.name);
        for ask in &phase.asks {
            let record_bytes = trace.lens[ask.frame] as u64 + RECORD_HEADER_BYTES;
            let frame = Frame { number: ask.frame, record_bytes };
            let here = keeps.has(frame);
            if !here {
                outcome.fetched_bytes += record_bytes;
            }
            // what only comes along does not come where it is
            if ask.why != Why::Along {
                let all = std::iter::once(&mut outcome.all);
                for hits in all.chain(again.then_some(&mut outcome.again)) {
                    hits.asked += 1;
                    hits.asked_bytes += record_bytes;
                    hits.hits += u64::from(here);
                    hits.hit_bytes += if here { record_bytes } else { 0 };
                }
                keeps.ask(frame)?;
            } else if !here {
                keeps.ask(frame)?;
            }
            outcome.bytes_used_max = outcome.bytes_used_max.max(keeps.used_bytes());
        }
    }
    outcome.written_bytes = keeps.written_bytes().unwrap_or(outcome.fetched_bytes);
    Ok(outcome)
}

/// The real cache, with no memory in front of its disk: the trace has what memory did not have.
pub(crate) struct Disk {
    runtime: Runtime,
    cache: Cache,
    source: Arc<dyn Source>,
    wants: Vec<Want>,
}

impl Disk {
    pub(crate) fn open(trace: &Trace, directory: &Path, bytes_max: u64) -> Result<Self> {
        let runtime = Runtime::new()?;
        let mut config = CacheConfig::new(directory.to_owned(), bytes_max);
        config.memory_bytes = 0;
        let cache = Cache::open(config, runtime.handle().clone())?;
        let (mut wants, mut lens) = (Vec::new(), HashMap::new());
        for (number, &len) in trace.lens.iter().enumerate() {
            let (pack, len32) = (pack(number), u32::try_from(len)?);
            let frame = PackedFrame { offset: 0, sealed_len: len32, plain_len: len32 };
            let id = Chunk::cut(contents(number, len)).id();
            wants.push(Want { id, place: Place { pack, frame } });
            lens.insert(pack, (number, len));
        }
        Ok(Self { runtime, cache, source: Arc::new(Noise(lens)), wants })
    }
}

impl Keeps for Disk {
    fn has(&self, frame: Frame) -> bool {
        self.cache.is_on_disk(self.wants[frame.number].id)
    }

    fn ask(&mut self, frame: Frame) -> Result<()> {
        let wants = &self.wants[frame.number..=frame.number];
        self.runtime.block_on(self.cache.fetch(&self.source, wants, &[], Class::Demand))?;
        // so that the next one finds it there
        self.cache.flush();
        Ok(())
    }

    fn used_bytes(&self) -> u64 {
        self.cache.snapshot().disk_used_bytes
    }

    fn written_bytes(&self) -> Option<u64> {
        let seen = self.cache.snapshot();
        Some(seen.disk_used_bytes + seen.evicted_bytes)
    }
}

/// Each frame is a pack of its own.
fn pack(number: usize) -> PackId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    PackId::from_bytes(bytes)
}

fn contents(number: usize, len: usize) -> Bytes {
    noise(len, number as u64).into()
}

/// A source that has every frame, by its pack.
struct Noise(HashMap<PackId, (usize, usize)>);

impl Source for Noise {
    fn stream(
        &self,
        pack: PackId,
        range: Range<u64>,
        _: Class,
    ) -> BoxFuture<'_, Result<Pieces, SourceError>> {
        let found = self.0.get(&pack).copied();
        async move {
            let (number, len) = found.ok_or(SourceError::Missing(pack))?;
            let end = usize::try_from(range.end).map_or(len, |end| end.min(len));
            Ok(Pieces::whole(contents(number, len).slice(0..end)))
        }
        .boxed()
    }
}
