//! What a start touches, recorded: names looked up and pages read, in order.
//!
//! What the kernel reads ahead is recorded as well, so a mount that records keeps the kernel's window small and hands out
//! nothing unasked. A start is over when nothing new was touched for a while, when it has touched more than any start does, or
//! with the unmount.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lamina_image::{Ino, PAGE_BYTES, PROFILE_ITEMS_MAX, Trace, TraceRun};
use parking_lot::Mutex;

/// Events of each kind: a fraction of what a profile may hold, some 20 MiB.
const EVENTS_MAX: usize = PROFILE_ITEMS_MAX;

/// Pages of one start: 1 GiB. Who reads more is not starting, and is slowed down by being recorded.
const PAGES_MAX: u64 = 1 << 18;

/// Records one start.
#[derive(Debug)]
pub(crate) struct Recorder {
    recording: AtomicBool,
    trace: Mutex<(Trace, u64, Option<Instant>)>,
}

impl Recorder {
    /// One that records, or one that does nothing.
    pub(crate) fn new(recording: bool) -> Self {
        Self { recording: AtomicBool::new(recording), trace: Mutex::default() }
    }

    /// Whether it still records.
    pub(crate) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// A name was looked up.
    pub(crate) fn name(&self, dir: Ino, name: &[u8]) {
        if self.is_recording() {
            let mut trace = self.trace.lock();
            if trace.0.names.len() < EVENTS_MAX {
                trace.0.names.push((dir, name.to_vec()));
            }
        }
    }

    /// Bytes of a file were read.
    pub(crate) fn read(&self, ino: Ino, offset: u64, size: u32, now: Instant) {
        if !self.is_recording() || size == 0 {
            return;
        }
        let first = offset / PAGE_BYTES;
        let pages = (offset + u64::from(size)).div_ceil(PAGE_BYTES) - first;
        let mut trace = self.trace.lock();
        let (recorded, sum, last) = &mut *trace;
        *last = Some(now);
        match recorded.runs.last_mut() {
            Some(run) if run.ino == ino && run.first + run.pages == first => run.pages += pages,
            _ => recorded.runs.push(TraceRun { ino, first, pages }),
        }
        *sum += pages;
        if *sum >= PAGES_MAX || recorded.runs.len() >= EVENTS_MAX {
            self.recording.store(false, Ordering::Relaxed);
        }
    }

    /// Something was read that need not be recorded; the start goes on.
    pub(crate) fn busy(&self, now: Instant) {
        if self.is_recording() {
            self.trace.lock().2 = Some(now);
        }
    }

    /// How long nothing was read; `None` before the first read, and zero where there is no room for more.
    pub(crate) fn quiet(&self, now: Instant) -> Option<Duration> {
        let last = self.trace.lock().2?;
        Some(if self.is_recording() { now.saturating_duration_since(last) } else { Duration::MAX })
    }

    /// Ends recording, and gives what was recorded; nothing the second time.
    pub(crate) fn take(&self) -> Option<Trace> {
        self.recording.store(false, Ordering::Relaxed);
        let (trace, _, last) = mem::take(&mut *self.trace.lock());
        last.map(|_| trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_recorded_in_order_and_given_once() {
        let (recorder, now) = (Recorder::new(true), Instant::now());
        assert_eq!(recorder.quiet(now), None);
        recorder.name(Ino(1), b"bin");
        recorder.read(Ino(2), 0, 4096, now);
        recorder.read(Ino(2), 4096, 100, now);
        recorder.read(Ino(3), 5000, 4096, now);
        assert_eq!(recorder.quiet(now + Duration::from_secs(2)), Some(Duration::from_secs(2)));
        let run = |ino, first, pages| TraceRun { ino: Ino(ino), first, pages };
        let runs = vec![run(2, 0, 2), run(3, 1, 2)];
        assert_eq!(
            recorder.take(),
            Some(Trace { names: vec![(Ino(1), b"bin".to_vec())], runs, boot: false })
        );
        recorder.read(Ino(3), 0, 1, now);
        assert_eq!(recorder.take(), None);
    }

    #[test]
    fn a_start_without_end_is_cut_off() {
        let (recorder, now) = (Recorder::new(true), Instant::now());
        for page in 0..PAGES_MAX + 10 {
            recorder.read(Ino(2), page * 2 * PAGE_BYTES, 4096, now);
        }
        assert!(!recorder.is_recording());
        assert_eq!(recorder.quiet(now), Some(Duration::MAX));
        assert!(recorder.take().expect("recorded").runs.len() <= EVENTS_MAX);
    }
}
