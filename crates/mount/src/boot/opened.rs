//! Frames of a boot pack that were opened and not given up yet, for reads.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tokio::sync::watch;

use super::KEPT;

/// The number of frames that were opened, once no more will be.
const ALL: usize = usize::MAX;

/// What was opened so far.
#[derive(Debug)]
pub(super) struct Opened {
    frames: Mutex<Frames>,
    /// How many frames were opened, from the first on; [`ALL`] once it has ended, however.
    progress: watch::Sender<usize>,
    /// Bytes of the blob that were taken.
    taken: AtomicU64,
}

#[derive(Debug, Default)]
struct Frames {
    here: HashMap<u32, Bytes>,
    /// Which of them came again, the oldest first.
    again: VecDeque<u32>,
}

impl Default for Opened {
    fn default() -> Self {
        Self { frames: Mutex::default(), progress: watch::Sender::new(0), taken: AtomicU64::new(0) }
    }
}

impl Opened {
    /// All before `number` came before, if it has not ended.
    pub(super) fn add(&self, number: u32, plain: Bytes) {
        let mut frames = self.frames.lock();
        if !self.has_ended() {
            frames.here.insert(number, plain);
            self.progress.send_replace(number as usize + 1);
        }
    }

    /// No more come, and those that are here are given up.
    pub(super) fn end(&self) {
        let mut frames = self.frames.lock();
        self.progress.send_replace(ALL);
        let all = std::mem::take(&mut *frames);
        drop(frames);
        // memory is given back while nobody waits for the lock
        drop(all);
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.count() == ALL
    }

    /// One that came again, since the kernel has dropped what was stored of it, for its neighbours. The last few are kept.
    pub(super) fn add_again(&self, number: u32, plain: Bytes) {
        let mut frames = self.frames.lock();
        if frames.here.contains_key(&number) {
            return;
        }
        let oldest = if frames.again.len() < KEPT { None } else { frames.again.pop_front() };
        let old = oldest.and_then(|oldest| frames.here.remove(&oldest));
        frames.again.push_back(number);
        frames.here.insert(number, plain);
        drop(frames);
        drop(old);
    }

    /// It was stored, and is not needed here any more.
    pub(super) fn give_up(&self, number: u32) {
        let old = self.frames.lock().here.remove(&number);
        drop(old);
    }

    /// Those that are here.
    pub(super) fn frames(&self) -> MappedMutexGuard<'_, HashMap<u32, Bytes>> {
        MutexGuard::map(self.frames.lock(), |frames| &mut frames.here)
    }

    /// How many were opened; all that there can be once it has ended.
    pub(super) fn count(&self) -> usize {
        *self.progress.borrow()
    }

    /// Returns once frame `number` was opened, or it has ended.
    pub(super) async fn wait(&self, number: u32) {
        let mut progress = self.progress.subscribe();
        let _ = progress.wait_for(|opened| *opened > number as usize).await;
    }

    /// So many bytes of the blob were taken.
    pub(super) fn taken(&self, bytes: u64) {
        self.taken.store(bytes, Ordering::Relaxed);
    }

    /// Bytes of the blob that were taken.
    pub(super) fn taken_bytes(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_opened_after_the_end_is_not_kept() {
        let opened = Opened::default();
        opened.add(0, Bytes::from_static(b"a"));
        assert_eq!((opened.count(), opened.frames().len()), (1, 1));
        opened.end();
        opened.add(1, Bytes::from_static(b"b"));
        assert!(opened.has_ended() && opened.frames().is_empty());
    }

    #[test]
    fn of_what_came_again_the_last_few_are_kept_also_while_more_comes() {
        let opened = Opened::default();
        let kept = u32::try_from(KEPT).expect("few");
        let (coming, again) = (100..103, 0..3 * kept);
        coming.clone().for_each(|number| opened.add(number, Bytes::from_static(b"a")));
        for number in again.clone().chain([again.end - 1]) {
            opened.add_again(number, Bytes::from_static(b"b"));
        }
        let mut here: Vec<u32> = opened.frames().keys().copied().collect();
        here.sort_unstable();
        assert_eq!(here, (2 * kept..3 * kept).chain(coming).collect::<Vec<_>>());
        opened.end();
        again.clone().for_each(|number| opened.add_again(number, Bytes::from_static(b"c")));
        assert_eq!(opened.frames().len(), KEPT);
    }
}
