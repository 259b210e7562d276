//! What others would keep: an exact LRU, and a FIFO, over frames.

use std::collections::{HashMap, VecDeque};

use anyhow::Result;
use lru::LruCache;

use crate::replay::{Frame, Keeps};

/// The least recently asked for goes first.
pub(crate) struct Lru {
    frames: LruCache<usize, u64>,
    bytes: u64,
    bytes_max: u64,
}

impl Lru {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self { frames: LruCache::unbounded(), bytes: 0, bytes_max }
    }
}

impl Keeps for Lru {
    fn has(&self, frame: Frame) -> bool {
        self.frames.contains(&frame.number)
    }

    fn ask(&mut self, frame: Frame) -> Result<()> {
        if self.frames.put(frame.number, frame.record_bytes).is_none() {
            self.bytes += frame.record_bytes;
        }
        while self.bytes > self.bytes_max
            && let Some((_, bytes)) = self.frames.pop_lru()
        {
            self.bytes -= bytes;
        }
        Ok(())
    }

    fn used_bytes(&self) -> u64 {
        self.bytes
    }
}

/// The first that came goes first.
pub(crate) struct Fifo {
    order: VecDeque<usize>,
    frames: HashMap<usize, u64>,
    bytes: u64,
    bytes_max: u64,
}

impl Fifo {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self { order: VecDeque::new(), frames: HashMap::new(), bytes: 0, bytes_max }
    }
}

impl Keeps for Fifo {
    fn has(&self, frame: Frame) -> bool {
        self.frames.contains_key(&frame.number)
    }

    fn ask(&mut self, frame: Frame) -> Result<()> {
        if self.has(frame) {
            return Ok(());
        }
        self.frames.insert(frame.number, frame.record_bytes);
        self.order.push_back(frame.number);
        self.bytes += frame.record_bytes;
        while self.bytes > self.bytes_max
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.frames.remove(&oldest).unwrap_or(0);
        }
        Ok(())
    }

    fn used_bytes(&self) -> u64 {
        self.bytes
    }
}
